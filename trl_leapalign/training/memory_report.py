"""Logs the plan of a training's memory before it starts, and what was measured beside it after the first update."""

import logging
import sys
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..prompts.seeds import Purpose
from ..prompts.sources import collate
from ..rewards.placement import PlacedReward
from ..rollout.calls import sample_images
from ..rollout.components import components_of
from .memory_plan import GIB, SHAPED_STEPS, MemoryPlan, held, plan_memory

logger = logging.getLogger(__name__)

PLANNED_FROM = 1.0


class MemoryReport(TrainerCallback):
    """Plans a training of models of more than one GiB, where memory may be short.

    Args:
        trainer (LeapAlignTrainer): of the training.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.plan: MemoryPlan | None = None
        self.measured: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.plan = self.measured = None
        modules = [part for part in components_of(self.trainer.pipeline).values() if isinstance(part, nn.Module)]
        if sum(map(held, modules)) < PLANNED_FROM * GIB:
            return
        try:
            self.plan = plan_training(self.trainer)
        except ValueError as error:
            logger.warning("%s", error)
            return
        memory = None
        if args.device.type == "cuda":
            memory = torch.cuda.get_device_properties(args.device).total_memory / GIB
            torch.cuda.reset_peak_memory_stats(args.device)
        advice = advice_for(self.plan, args)
        logger.info("The plan of the memory of an update:\n%s", self.plan.markdown(memory, advice))
        if memory is not None and self.plan.peak > memory:
            logger.warning(
                "The plan is %.1f GiB, and the device has %.1f. To save memory: %s.",
                *(self.plan.peak, memory, "; ".join(advice)),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.plan is None or self.measured is not None:
            return
        self.measured, of = measured_peak(args.device)
        logger.info(
            "After the first update: planned %.2f GiB, measured %.2f GiB (%s).",
            *(self.plan.first_update, self.measured, of),
        )


def measured_peak(device: torch.device) -> tuple[float, str]:
    """Most memory in use so far, in GiB, and what it is of.

    Args:
        device (torch.device): where the model runs.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, "tensors on the device"
    if sys.platform == "win32":
        return float("nan"), "not measured on Windows"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return peak, "the whole process since it started, libraries and loading included"


def plan_training(trainer: Any) -> MemoryPlan:
    """Plan the memory of a trainer's updates.

    Args:
        trainer (LeapAlignTrainer): that has not started.

    Returns:
        MemoryPlan: of one process.

    Raises:
        ValueError: if an update cannot run on shapes.
    """
    config, model = trainer.args, trainer.rollout_model
    batch = collate([trainer.train_dataset[index] for index in range(config.per_device_train_batch_size)])
    call = {**model.call_kwargs, "num_inference_steps": SHAPED_STEPS}
    given = {"columns": model.columns, "metadata": batch["metadata"], "purpose": Purpose.NOISE}
    functions = [each.function if isinstance(each, PlacedReward) else each for each in trainer.rewards.functions]
    return plan_memory(
        trainer.pipeline,
        list(trainer.denoisers),
        functions,
        lambda twin: sample_images(twin, batch["prompts"], batch["indices"], call, config.seed, **given),
        method=model.method,
        num_steps=config.sample_num_steps,
        optimizer=config.optim,
        average=config.ema_decay is not None,
        autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision),
        away=list(trainer.memory.freed_bytes),
        device=config.device.type,
    )


def advice_for(plan: MemoryPlan, config: Any, quantized: bool = False) -> list[str]:
    """What to switch on, in the order of what it costs, with what it saves.

    Args:
        plan (MemoryPlan): of the training.
        config (LeapAlignConfig): its settings.
        quantized (bool): whether the denoisers are quantized already.

    Returns:
        list[str]: settings.
    """
    advice = []
    encoders = sum(size for name, size in plan.weights.items() if "encoder" in name)
    if encoders > 0.1 and not config.offload_text_encoders:
        advice.append(f"cache_prompt_embeddings=True and offload_text_encoders=True: {encoders:.1f} GiB less")
    if not config.activation_checkpointing:
        advice.append(
            f"activation_checkpointing=True: most of {plan.kept + plan.decoder + plan.reward:.1f} GiB of activations"
        )
    if config.per_device_train_batch_size > 1:
        advice.append("per_device_train_batch_size=1 and more gradient_accumulation_steps")
    if plan.optimizer > 0.3 and "8bit" not in str(config.optim):
        advice.append(f'optim="adamw_bnb_8bit": {plan.optimizer * 3 / 4:.1f} GiB less')
    rewards = sum(size for name, size in plan.weights.items() if name.startswith("reward "))
    if rewards > 0.5 and not config.offload_rewards:
        advice.append(f"offload_rewards=True: up to {rewards:.1f} GiB less while sampling")
    denoisers = sum(size for name, size in plan.weights.items() if name.startswith(("transformer", "unet")))
    if not config.full_finetuning and not quantized and denoisers > 1:
        advice.append(f"load_in_4bit=True: about {denoisers * 0.71:.1f} GiB less, for LoRA on bfloat16 weights")
    advice.append("a smaller sample_height and sample_width")
    return advice
