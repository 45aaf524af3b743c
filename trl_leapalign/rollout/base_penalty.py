"""How far denoisers with adapters have moved from their base, at the steps that run with gradients."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .hooks import around_calls


@contextmanager
def distances_to_base(denoisers: Iterable[nn.Module], batch_size: int) -> Iterator[list[Tensor]]:
    """Collect the squared distance of every call with gradients to the same call with the adapters off.

    The denoiser's own output is compared, before guidance: `mean |v_theta - v_base|^2` over the elements of a sample.

    Args:
        denoisers (Iterable[nn.Module]): modules with adapters, whose calls are repeated without gradients.
        batch_size (int): samples B of a call; guidance may repeat them.

    Yields:
        list[Tensor]: one distance a call, shape (B,), with graph; filled while the context is open.
    """
    distances: list[Tensor] = []

    def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        with torch.no_grad(), adapters_off(module):
            base = module(*args, **kwargs)
        pairs = zip(_samples(output), _samples(base), strict=True)
        errors = [(ours.float() - theirs.float()).square() for ours, theirs in pairs]
        by_sample = torch.stack([error.mean() for error in errors]) if len(errors) > 1 else errors[0].flatten(1).mean(1)
        distances.append(by_sample.unflatten(0, (-1, batch_size)).mean(0))

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(around_calls(denoiser, after=compare))
        yield distances


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Let a module and its parts run without their adapters for a while.

    Args:
        module (nn.Module): may have adapters anywhere in it.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _samples(output: Any) -> list[Tensor]:
    """The prediction of a denoiser: one tensor, or a list of one tensor a sample."""
    first = output[0]
    return list(first) if isinstance(first, (list, tuple)) else [first]
