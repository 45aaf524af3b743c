"""Classifier-free guidance whose unconditional call has no gradient."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .temporary import temporary_attribute

UNCONDITIONAL = "uncond"


@contextmanager
def detached_unconditional_calls(denoisers: Iterable[nn.Module]) -> Iterator[list[str]]:
    """Run the unconditional calls of denoisers without gradient, where a pipeline makes them calls of their own.

    With the guided velocity `v = u + w (c - u)`, only `w dc/dtheta` is kept of its derivative: u is a constant, so that
    only the conditional call keeps activations. Pipelines of diffusers name each call by `cache_context`.

    Args:
        denoisers (Iterable[nn.Module]): models of diffusers.

    Yields:
        list[str]: names of the calls that ran without gradient, such as "uncond"; filled while the context is open.
    """
    calls: list[str] = []

    def detaching(original: Callable) -> Callable:
        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            with original(name, **kwargs):
                if not str(name).startswith(UNCONDITIONAL):
                    yield
                    return
                calls.append(name)
                enabled = torch.is_grad_enabled()
                with torch.no_grad():
                    yield
                if enabled:
                    # A weight that autocast cast without gradient would be used again with gradient.
                    torch.clear_autocast_cache()

        return cache_context

    with ExitStack() as stack:
        for denoiser in denoisers:
            if hasattr(denoiser, "cache_context"):
                stack.enter_context(temporary_attribute(denoiser, "cache_context", detaching(denoiser.cache_context)))
        yield calls
