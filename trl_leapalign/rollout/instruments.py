"""Makes a pipeline ready for a rollout: `no_grad` decorators off, hooks on, evaluation mode. Puts all back."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from diffusers import DiffusionPipeline

from .pipelines import (
    is_flow_matching,
    modules_of,
    pipelines_of,
    quiet,
    schedulers_of,
    temporary_attribute,
)
from .recorder import Recorder

CHECKPOINTING = "gradient_checkpointing"


@contextmanager
def instrumented(pipeline: DiffusionPipeline, recorder: Recorder) -> Iterator[None]:
    """Make a pipeline ready for a rollout, and put everything back afterwards."""
    with ExitStack() as stack:
        stack.callback(recorder.release)
        for scheduler in filter(is_flow_matching, schedulers_of(pipeline)):
            recorder.track(scheduler)
        for part in pipelines_of(pipeline):
            _record_gradients(part, stack)
            stack.enter_context(quiet(part))
        for module in modules_of(pipeline).values():
            if getattr(module, "_supports_gradient_checkpointing", False) and not hasattr(module, CHECKPOINTING):
                # Some models, made to be run without gradients, read this flag with them but never set it.
                stack.enter_context(temporary_attribute(module, CHECKPOINTING, False))
            if any(parameter.requires_grad for parameter in module.parameters()):
                stack.callback(module.register_forward_pre_hook(recorder.before_call, prepend=True).remove)
                for submodule in module.modules():
                    _record_gradients(submodule, stack)
            for submodule in filter(lambda part: part.training, module.modules()):
                stack.enter_context(temporary_attribute(submodule, "training", False))
        yield


def _record_gradients(instance: Any, stack: ExitStack) -> None:
    """Take the decorators off an instance's methods for a while, but those that the instance has replaced."""
    own = vars(instance)
    for name, stripped, static in _methods_without_gradient(type(instance)):
        if name in own:
            continue
        stack.enter_context(temporary_attribute(instance, name, stripped if static else MethodType(stripped, instance)))


@functools.cache
def _methods_without_gradient(owner: type) -> list[tuple[str, Callable, bool]]:
    """Name and bare function of methods that run under `no_grad`, and whether they are static; not the call itself."""
    found = []
    for name, method in inspect.getmembers(owner, inspect.isfunction):
        stripped = without_no_grad(method)
        if stripped is not method and name != "__call__":
            found.append((name, stripped, isinstance(inspect.getattr_static(owner, name), staticmethod)))
    return found


def without_no_grad(function: Callable) -> Callable:
    """Take `torch.no_grad` and `torch.inference_mode` decorators off a function."""
    while getattr(function, "__code__", None) is not None and function.__code__.co_name == "decorate_context":
        function = function.__wrapped__
    return function
