"""What a training tells its model card."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.lora import adapter_name
from ..adapters.model_card import BeforeAfter, TrainedModel
from .image_grid import ImageGrid

LIBRARIES = ("trl_leapalign", "diffusers", "peft", "transformers", "torch")
SETTINGS = {
    "sample_num_steps": "sampling steps",
    "sample_guidance_scale": "guidance_scale",
    "sample_height": "height",
    "sample_width": "width",
    "samples_per_update": "samples an update",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "learning rate schedule",
    "optim": "optimizer",
    "weight_decay": "weight decay",
    "ema_decay": "decay of the weights' average",
    "base_penalty": "base penalty",
    "max_sample_grad_norm": "largest gradient norm of a sample",
    "seed": "seed",
}
"""Settings that the card shows if they are set, and what it calls them."""


def describe_training(trainer: Any) -> TrainedModel:
    """Collect what the card shows.

    Args:
        trainer (LeapAlignTrainer): the training, before, within or after it.

    Returns:
        TrainedModel: what was trained, and how.
    """
    args = trainer.args
    first = trainer.train_dataset[0]
    evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    results = {
        name: value
        for name, value in (evaluations[-1] if evaluations else {}).items()
        if name.startswith("eval_") and name != "eval_runtime" and isinstance(value, (int, float))
    }
    return TrainedModel(
        pipeline=trainer.pipeline,
        denoisers=trainer.denoisers,
        full_finetuning=args.full_finetuning,
        repository=trainer.hub_model_id or Path(args.output_dir).name,
        rewards=tuple(trainer.rewards.names),
        method=repr(trainer.rollout_model.method),
        prompt=first["prompt"],
        tags=trainer._tag_names,
        call=args.call_kwargs(args.eval_num_steps),
        inputs=tuple(trainer.columns.columns),
        settings=_settings(trainer),
        gallery=_gallery(trainer),
        results=results,
    )


def _settings(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    set_ones = {title: getattr(args, name) for name, title in SETTINGS.items() if getattr(args, name) is not None}
    rewards = zip(trainer.rewards.names, trainer.rewards.weights, trainer.rewards.thresholds, strict=True)
    described = [
        f"{name} x {weight:g}" + ("" if limit is None else f" up to {limit:g}") for name, weight, limit in rewards
    ]
    cuda = args.device.type == "cuda"
    hardware = torch.cuda.get_device_name(args.device) if cuda else args.device.type.upper()
    return {
        "updates": trainer.state.global_step,
        "rewards": ", ".join(described),
        **_ranks(trainer),
        **set_ones,
        "hardware": f"{args.world_size} x {hardware}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in LIBRARIES),
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # run from its sources
        return "of the sources"


def _ranks(trainer: Any) -> dict[str, Any]:
    if trainer.args.full_finetuning:
        return {"trained": ", ".join(trainer.denoisers)}
    configs = {name: each.peft_config[adapter_name(each)] for name, each in trainer.denoisers.items()}
    return {
        "LoRA rank": ", ".join(f"{name}: {config.r}" for name, config in configs.items()),
        "dtype of the adapter": trainer.args.adapter_dtype,
    }


def _gallery(trainer: Any) -> list[BeforeAfter]:
    grids = [each for each in trainer.callback_handler.callbacks if isinstance(each, ImageGrid)]
    samples = grids[0].before_and_after() if grids else []
    return [BeforeAfter(prompt, _picture(before), _picture(after)) for prompt, before, after in samples]


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.mul(255).round().byte().movedim(0, -1).contiguous().numpy())
