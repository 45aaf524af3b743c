# /// script
# dependencies = ["trl-leapalign[trackers]", "ftfy"]
# ///
"""Fine-tune Wan 2.1 (text to video) with LoRA on HPSv2.1 of single frames.

    accelerate launch examples/wan_video.py --output_dir outputs/wan

Each update scores two random frames of each video, so that the reward costs no more than for images; all frames learn,
since other ones are drawn each time. Any text-to-video pipeline with flow matching goes the same way: `--model`.

Every setting of LeapAlignConfig is an option. To try it all out on tiny components, without any download:

    accelerate launch --cpu examples/wan_video.py --smoke
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from trl import TrlParser

from trl_leapalign import LeapAlignConfig, LeapAlignTrainer
from trl_leapalign.rewards import CLIPReward, VideoReward
from trl_leapalign.training.callbacks import SampleFiles

RECIPE = {
    "output_dir": "outputs/wan",
    "max_steps": 300,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 32,
    "activation_checkpointing": True,
    "sample_num_steps": 25,
    "sample_guidance_scale": 5.0,
    "sample_height": 480,
    "sample_width": 832,
    "sample_kwargs": {"num_frames": 33},
    "train_prompts": "Gustavosta/Stable-Diffusion-Prompts",
    "prompt_column": "Prompt",
}
SMOKE = {
    "output_dir": "outputs/wan-smoke",
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "sample_num_steps": 3,
    "sample_height": 16,
    "sample_width": 16,
    "sample_kwargs": {"num_frames": 5, "max_sequence_length": 16},
    "train_prompts": ["a red circle", "a blue square left of a cat"],
    "prompt_column": "prompt",
}


@dataclass
class WanArguments:
    """What the example needs beside the trainer's settings."""

    model: str = field(default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", metadata={"help": "Hub id or path of the pipeline."})
    reward: str = field(default="hpsv2.1", metadata={"help": "Name of a built-in reward of images."})
    num_frames_scored: int = field(default=2, metadata={"help": "Random frames of each video that are scored."})
    smoke: bool = field(default=False, metadata={"help": "Tiny random components, two updates, no download."})


def main() -> None:
    parser = TrlParser((WanArguments, LeapAlignConfig))
    parser.set_defaults(**RECIPE)
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE)
    arguments, config = parser.parse_args_and_config()
    if arguments.smoke:
        from tiny import tiny_clip, tiny_tokenizer
        from tiny_video import tiny_wan

        pipeline, reward = tiny_wan(), CLIPReward(tiny_clip(), tiny_tokenizer())
    else:
        pipeline = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
        reward = arguments.reward
    trainer = LeapAlignTrainer(
        pipeline,
        VideoReward(reward, num_random=arguments.num_frames_scored),
        config,
        image_samples_hook=SampleFiles(Path(config.output_dir) / "samples", every=10),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()
    elif trainer.is_world_process_zero():
        trainer.create_model_card()
        print(f"The adapter is in {config.output_dir}, videos of the training in {config.output_dir}/samples.")


if __name__ == "__main__":
    main()
