"""Runs code that is written for float32 in float64, so that gradients can be compared on any CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
ROUNDED = {torch.float32, torch.float16, torch.bfloat16}


def widened(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in ROUNDED else argument


class DoublePrecision(TorchFunctionMode):
    """Every request for float32, float16 or bfloat16 gives float64, and tensors of float64 say that they are float32.

    Pipelines and schedulers cast to float32 here and there, which would round what is computed in float64, and some
    assert that they have it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.dtype.__get__:
            dtype = func(*args)
            return torch.float32 if dtype == torch.float64 else dtype
        if func in CASTS:
            func = Tensor.double
        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


@contextmanager
def double_precision() -> Iterator[None]:
    """Inside, what is built and computed is float64, whatever the code asks for."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with DoublePrecision():
            yield
    finally:
        torch.set_default_dtype(default)


def widen(module: nn.Module) -> None:
    """Make float64 of what a module was built with in float32; complex numbers stay."""
    module._apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
