"""Run by test_distributed.py, in one process or in several: trains, evaluates, meets NaN, and writes what it saw."""

import json
import math
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file
from test_inputs import ROWS, image_to_image, nearness
from training_cases import PROMPTS, Recorder, make_trainer, redness, trained_weights

from examples.tiny import tiny_flux

SETTINGS = {"use_cpu": True, "method_kwargs": {"similarity_floor": 1e-4}, "adam_epsilon": 1e-3}


def train(directory: Path, batch_size: int, pipeline=None, reward=redness, prompts=PROMPTS, **settings) -> dict:
    recorder = Recorder()
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    trainer = make_trainer(
        directory,
        (pipeline or tiny_flux()).to(torch.float64),
        reward,
        prompts=prompts,
        arguments={
            "callbacks": [recorder],
            "peft_config": None if settings.get("full_finetuning") else adapter,
            "eval_dataset": prompts[:3],
            "image_samples_hook": lambda data, step, tracker: (directory / f"hook-{process()}").touch(),
        },
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=1,
        save_strategy="steps",
        save_steps=2,
        **SETTINGS,
        **settings,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card()
    gradients = {f"{number}.{name}": g for number, step in enumerate(recorder.gradients) for name, g in step.items()}
    save_file(gradients, directory / f"gradients-{process()}.safetensors")
    save_file(trained_weights(trainer), directory / f"weights-{process()}.safetensors")
    return {"metrics": metrics, "history": trainer.state.log_history}


def meet_nan(directory: Path) -> str:
    """NaN in the last process alone, at the second update."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append(prompts)
        broken = len(calls) == 2 and process() == PartialState().num_processes - 1
        return redness(images, prompts, metadata) * (math.nan if broken else 1.0)

    trainer = make_trainer(directory, reward=reward, max_steps=4, reward_threshold=5.0, **SETTINGS)
    try:
        trainer.train()
    except FloatingPointError as error:
        return f"{trainer.state.global_step}: {error}"
    return "no error"


def process() -> int:
    return PartialState().process_index


def main(directory: Path, batch_size: int, accumulation: int) -> None:
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    seen = {
        "lora": train(directory / "lora", batch_size, gradient_accumulation_steps=accumulation),
        "full": train(
            directory / "full", batch_size, gradient_accumulation_steps=accumulation, full_finetuning=True,
            activation_checkpointing=True, learning_rate=1e-3, max_grad_norm=1e-2,
        ),
        "columns": train(
            directory / "columns", batch_size, image_to_image(), nearness, ROWS,
            gradient_accumulation_steps=accumulation, sample_kwargs={"strength": 0.9, "max_sequence_length": 16},
            sample_num_steps=4,
        ),
        "nan": meet_nan(directory / "nan"),
    }  # fmt: skip
    (directory / f"seen-{process()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    PartialState().destroy_process_group()
