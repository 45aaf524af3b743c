"""Run by test_sharding.py, in one process or in several with FSDP: trains, resumes, evaluates, writes what it saw."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file
from training_cases import PROMPTS, make_trainer, trained_weights

from examples.tiny import tiny_flux
from trl_leapalign.training.sharding import whole


def make(directory, full, **settings):
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipeline = tiny_flux() if settings.get("bf16") else tiny_flux().to(torch.float64)
    return make_trainer(
        directory,
        pipeline,
        arguments={"peft_config": None if full else adapter, "eval_dataset": PROMPTS[:3]},
        **{
            "use_cpu": True, "adam_epsilon": 1e-3, "full_finetuning": full, "dry_run": True, "ema_decay": 0.9,
            "learning_rate": 1e-3, "method_kwargs": {"similarity_floor": 1e-4}, "save_strategy": "steps",
            "save_steps": 1, "fsdp": PartialState().num_processes > 1 or None, **settings,
        },
    )  # fmt: skip


def main(directory: Path, batch_size: int, accumulation: int) -> None:
    torch.set_num_threads(1)
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    seen = {}
    for name, full in (("lora", False), ("full", True)):
        trainer = make(directory / name, full, activation_checkpointing=full, **sizes)
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model(str(directory / name / "saved"))
        weights = {key: whole(value).contiguous() for key, value in trained_weights(trainer).items()}
        save_file(weights, directory / name / f"weights-{PartialState().process_index}.safetensors")
        again = make(directory / f"{name}-again", full, activation_checkpointing=full, **sizes)
        again.train(resume_from_checkpoint=str(directory / name / "checkpoint-1"))
        other = {key: whole(value) for key, value in trained_weights(again).items()}
        resumed = all(torch.equal(other[key], value) for key, value in weights.items())
        seen[name] = {"history": trainer.state.log_history, "metrics": metrics, "resumed": resumed}
    trainer = make(directory / "bf16", True, bf16=True, learning_rate=1e-5, ema_decay=None, adam_epsilon=1e-8)
    before = {key: whole(value) for key, value in trained_weights(trainer).items()}
    trainer.train()
    after = {key: whole(value) for key, value in trained_weights(trainer).items()}
    moved = [(after[key] != value).double().mean().item() for key, value in before.items()]
    seen["bf16"] = {"moved": sum(moved) / len(moved), "dtypes": sorted({str(v.dtype) for v in after.values()})}
    (directory / f"seen-{PartialState().process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    PartialState(cpu=True)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    PartialState().destroy_process_group()
