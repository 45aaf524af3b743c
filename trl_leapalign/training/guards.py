"""What stops a training that cannot work: wrong kinds, another optimizer, missing metrics, broken weights."""

from typing import Any

import torch
from torch import nn

from ..adapters.lora import trained_parameters
from ..leapalign_config import LeapAlignConfig
from .sharding import whole


class NothingLearnt(RuntimeError):
    """For many updates no gradient came, though there was something to learn."""


def check_kinds(config: Any, image_samples_hook: Any) -> None:
    """Raise TypeError unless a trainer's arguments are of the right kind.

    Args:
        config (Any): should be a LeapAlignConfig or None.
        image_samples_hook (Any): should be a callable or None.
    """
    if config is not None and not isinstance(config, LeapAlignConfig):
        raise TypeError(
            f"config must be a LeapAlignConfig, got {type(config).__name__}. The order of the arguments is "
            "(pipeline, reward_function, config, prompt_function, image_samples_hook), other than DDPOTrainer's."
        )
    if image_samples_hook is not None and not callable(image_samples_hook):
        raise TypeError(f"image_samples_hook must be callable, got {image_samples_hook!r}.")


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Raise ValueError if an optimizer that was passed misses a trained parameter.

    Args:
        optimizer (torch.optim.Optimizer | None): None is one that the trainer will make.
        model (nn.Module): its parameters that require gradients are trained.
    """
    if optimizer is None:
        return
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trained_parameters(model).items() if id(parameter) not in known]
    if missing:
        raise ValueError(
            f"The optimizer that was passed misses {len(missing)} trained parameters, such as {missing[0]}. Attach the "
            "adapter to the pipeline before making the optimizer, and pass no peft_config; or leave the optimizer to "
            "the trainer and choose it with config.optim."
        )


def check_evaluation(config: Any, reward_names: list[str], eval_dataset: Any) -> None:
    """Raise ValueError if the evaluations of a training could not be made, or lack the metric that decides.

    Args:
        config (LeapAlignConfig): settings.
        reward_names (list[str]): names of the rewards.
        eval_dataset (PromptSource | None): prompts beside those of the settings.
    """
    if eval_dataset is not None and config.eval_prompts is not None:
        raise ValueError("Prompts of evaluations come from eval_dataset or config.eval_prompts; got both.")
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if evaluates and eval_dataset is None and config.eval_prompts is None:
        raise ValueError("There are no prompts for the evaluations. Pass eval_dataset, or set eval_prompts.")
    known = ["reward", "reward_std", "runtime"]
    known += [f"rewards/{name}" for name in reward_names] if len(reward_names) > 1 else []
    metric = (config.metric_for_best_model or known[0]).removeprefix("eval_")
    if metric not in known and not metric.startswith(tuple(f"rewards/{name}/" for name in reward_names)):
        raise ValueError(
            f"Evaluations do not report metric_for_best_model={config.metric_for_best_model!r}. Choose one of {known}, "
            "or rewards/NAME/KEY for what a reward returns beside its rewards."
        )


def check_weights(model: nn.Module) -> None:
    """Raise FloatingPointError if a trained weight is NaN or infinite.

    Args:
        model (nn.Module): its parameters that require gradients are trained.
    """
    broken = [name for name, value in trained_parameters(model).items() if not whole(value.isfinite().all())]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} trained weights are not finite, such as {broken[0]}. The learning_rate is too high: "
            "train again with a lower one, from the last checkpoint's adapter if you like."
        )
