"""Run by test_groups_distributed.py, in one process or in several: trains on verdicts and writes its gradients."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file

from examples.tiny import tiny_flux
from tests.training_cases import Recorder, make_trainer, redness
from trl_leapalign.rewards import BlackBox


def verdict(images, prompts, metadata):
    return (100 * redness(images, prompts, metadata).numpy()).round() / 100


def main(directory: Path, batch_size: int, accumulation: int) -> None:
    torch.set_num_threads(1)
    for pairs in ("far", "near"):
        recorder = Recorder()
        adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        trainer = make_trainer(
            directory / pairs,
            tiny_flux().to(torch.float64),
            BlackBox(verdict),
            arguments={"callbacks": [recorder], "peft_config": adapter},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            adam_epsilon=1e-3,
            pairs=pairs,
            use_cpu=True,
        )
        trainer.train()
        found = {f"{number}.{name}": g for number, step in enumerate(recorder.gradients) for name, g in step.items()}
        save_file(found, directory / f"{pairs}-{PartialState().process_index}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    PartialState().destroy_process_group()
