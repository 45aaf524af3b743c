"""What stops a training that cannot work: wrong kinds, another optimizer, missing metrics, broken weights."""

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..adapters.lora import trained_parameters
from ..leapalign_config import LeapAlignConfig
from .optimizers import has_modes
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


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module, ema_decay: float | None = None) -> None:
    """Raise ValueError if an optimizer that was passed misses a trained parameter, or averages weights that are too.

    Args:
        optimizer (torch.optim.Optimizer | None): None is one that the trainer will make.
        model (nn.Module): its parameters that require gradients are trained.
        ema_decay (float | None): of a moving average of the weights.
    """
    if optimizer is None:
        return
    if ema_decay is not None and has_modes(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} has weights of its own for evaluation (its eval mode), so ema_decay="
            f"{ema_decay} would average those of training, which are not meant to be used. Set ema_decay=None."
        )
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


def check_output_dir(config: LeapAlignConfig) -> None:
    """Raise ValueError if checkpoints could not be written. Leaves nothing behind.

    Args:
        config (LeapAlignConfig): settings.
    """
    if not config.should_save:
        return
    folder = Path(config.output_dir).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir={config.output_dir!r} cannot be written ({error.strerror}), so that every checkpoint would "
            "fail. Choose a folder in which you may create files."
        ) from error


def check_best_model(config: LeapAlignConfig) -> None:
    """Raise ValueError if the best model is to be loaded, but the training ends before the first evaluation.

    Args:
        config (LeapAlignConfig): settings, with the number of updates.
    """
    if not config.load_best_model_at_end or config.eval_on_start:
        return
    steps = config.eval_steps if config.eval_steps >= 1 else config.eval_steps * config.max_steps
    if config.save_strategy != "no" and max(steps, config.eval_delay) > config.max_steps:
        raise ValueError(
            f"load_best_model_at_end=True compares evaluations, but none is made: eval_steps={config.eval_steps} and "
            f"eval_delay={config.eval_delay} of max_steps={config.max_steps} updates. Evaluate earlier."
        )


def check_optimizer_settings(trainer: Trainer) -> None:
    """Raise ValueError if the optimizer of the settings, or its learning rate schedule, cannot be made.

    Args:
        trainer (Trainer): it is left without either, as it was.
    """
    config = trainer.args
    if trainer.optimizer is not None or trainer.sharded or "lomo" in config.optim or "layerwise" in config.optim:
        return  # these two put hooks on the parameters
    try:
        trainer.create_optimizer_and_scheduler(config.max_steps)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        names = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs")
        given = ((name, getattr(config, name)) for name in names)
        settings = ", ".join(f"{name}={getattr(value, 'value', value)!r}" for name, value in given)
        raise ValueError(
            f"The optimizer and the learning rate schedule of {settings} cannot be made: {error}. Correct or leave out "
            "the setting that this is about, or install what is missing."
        ) from error
    finally:
        trainer.optimizer = trainer.lr_scheduler = None


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
