"""What stops a training that cannot work: wrong kinds, another optimizer, missing metrics, broken weights."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..adapters.lora import trained_parameters
from ..leapalign_config import LeapAlignConfig


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
    if image_samples_hook is not None:
        check_signature("image_samples_hook", image_samples_hook, "image_data", "global_step", "tracker")


def check_signature(name: str, function: Any, *arguments: str) -> None:
    """Raise TypeError unless a function can be called with some arguments, in their order.

    Args:
        name (str): what the user passed it as.
        function (Any): something callable.
        *arguments (str): what it is called with.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions have none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{name} is called as {name}({', '.join(arguments)}), but takes {signature}. Change its arguments."
        ) from error


def check_callbacks(callbacks: Any) -> None:
    """Raise TypeError unless callbacks are a list of those that Trainer takes.

    Args:
        callbacks (Any): should be a list of TrainerCallbacks or their classes, or None.
    """
    for callback in callbacks or []:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(f"callbacks must be TrainerCallbacks, got {callback!r:.100}.")


@contextmanager
def no_gradients_added(model: nn.Module) -> Iterator[None]:
    """Raise ValueError if what follows adds to the gradients of what is trained; they are put back.

    Args:
        model (nn.Module): its parameters that require gradients are trained.
    """
    before = [(p, p.grad, None if p.grad is None else p.grad._version) for p in trained_parameters(model).values()]
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    added = [p for p, grad, version in before if p.grad is not grad or (grad is not None and grad._version != version)]
    if added:
        for parameter in added:
            parameter.grad = None
        raise ValueError(
            "A reward calls .backward() itself, which adds to the gradients of the trained weights. Return the rewards "
            "and leave the backward pass to the trainer; what a reward needs of gradients it gets from "
            "torch.autograd.grad(..., retain_graph=True)."
        ) from failed
    if failed is not None:
        raise failed


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
        eval_dataset (PromptSource | dict[str, PromptSource] | None): prompts beside those of the settings.
    """
    if eval_dataset is not None and config.eval_prompts is not None:
        raise ValueError("Prompts of evaluations come from eval_dataset or config.eval_prompts; got both.")
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if evaluates and eval_dataset is None and config.eval_prompts is None:
        raise ValueError("There are no prompts for the evaluations. Pass eval_dataset, or set eval_prompts.")
    if isinstance(eval_dataset, dict) and not eval_dataset:
        raise ValueError("eval_dataset={} holds no prompts. Pass {name: prompts}, prompts alone, or None.")
    known = ["reward", "reward_std", "runtime"]
    known += [f"rewards/{name}" for name in reward_names] if len(reward_names) > 1 else []
    metric = (config.metric_for_best_model or known[0]).removeprefix("eval_")
    extra = [f"rewards/{name}/" for name in reward_names]
    if isinstance(eval_dataset, dict):
        known, extra = ([f"{key}_{name}" for key in eval_dataset for name in names] for names in (known, extra))
        if config.metric_for_best_model is None:
            return
    if metric not in known and not metric.startswith(tuple(extra)):
        raise ValueError(
            f"Evaluations do not report metric_for_best_model={config.metric_for_best_model!r}. Choose one of {known}, "
            "or rewards/NAME/KEY for what a reward returns beside its rewards."
        )


def check_weights(model: nn.Module) -> None:
    """Raise FloatingPointError if a trained weight is NaN or infinite.

    Args:
        model (nn.Module): its parameters that require gradients are trained.
    """
    broken = [name for name, value in trained_parameters(model).items() if not value.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} trained weights are not finite, such as {broken[0]}. The learning_rate is too high: "
            "train again with a lower one, from the last checkpoint's adapter if you like."
        )
