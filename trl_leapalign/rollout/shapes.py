"""A pipeline without memory: its call runs on shapes alone, so that what each module is given is known beforehand."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from .components import components_of, schedulers_of
from .pipelines import temporary_attribute

METHODS = ("forward", "encode", "decode")
QUANTIZED_LINEAR = ("Linear4bit", "Linear8bitLt", "QLinear")


@dataclass(frozen=True)
class ShapedCall:
    """A call of a component.

    Args:
        component (str): its name.
        method (str): forward, encode or decode.
        args (tuple): its arguments; tensors have shapes and no memory.
        kwargs (dict[str, Any]): likewise.
    """

    component: str
    method: str
    args: tuple
    kwargs: dict[str, Any]


def shapes_mode() -> FakeTensorMode:
    """The mode in which tensors have no memory; constants that modules hold may have."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def without_memory(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a module, its parameters and buffers without memory, on the CPU.

    Quantized linear layers become plain ones, which keep the same for the backward pass.

    Args:
        module (nn.Module): any module; on the meta device too.
        mode (FakeTensorMode): of all tensors that it will meet.
        dtype (torch.dtype | None): of the plain layers; None is the module's own.

    Returns:
        nn.Module: with the same settings, without what moves weights between devices.
    """
    dtype = dtype or next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        fake = _empty(tensor, mode)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    for part in module.modules():
        for value in vars(part).values():  # tables that are no buffers
            if isinstance(value, Tensor):
                memo[id(value)] = _empty(value, mode)
        if _is_quantized(part):
            memo[id(part)] = _plain_linear(part, mode, dtype)
    return remove_hook_from_module(copy.deepcopy(module, memo), recurse=True)


def _empty(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ in QUANTIZED_LINEAR and hasattr(module, "in_features")


def _plain_linear(layer: Any, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Linear:
    with mode:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    return plain.requires_grad_(False).train(layer.training)


def pipeline_without_memory(pipeline: DiffusionPipeline, mode: FakeTensorMode) -> DiffusionPipeline:
    """A copy of a pipeline whose modules have no memory; its schedulers are copies too."""
    twin = copy.copy(pipeline)
    twin._internal_dict = copy.copy(pipeline._internal_dict)
    for name, value in list(vars(twin).items()):  # methods replaced on the instance belong to the original
        if callable(value) and callable(getattr(type(twin), name, None)):
            del vars(twin)[name]
    schedulers = {id(each) for each in schedulers_of(pipeline)}
    for name, component in components_of(pipeline).items():
        if isinstance(component, nn.Module):
            vars(twin)[name] = without_memory(component, mode)
        elif id(component) in schedulers:
            vars(twin)[name] = copy.deepcopy(component)
    return twin


@contextmanager
def shaped_calls(pipeline: DiffusionPipeline, mode: FakeTensorMode) -> Iterator[list[ShapedCall]]:
    """Let the modules of a pipeline compute shapes alone, and take note of their calls.

    What they return is zeros of the right shape, with memory, so that the pipeline's own code may look at values.

    Args:
        pipeline (DiffusionPipeline): of `pipeline_without_memory`.
        mode (FakeTensorMode): of its tensors.
    """
    calls: list[ShapedCall] = []
    with ExitStack() as stack:
        for name, component in components_of(pipeline).items():
            if isinstance(component, nn.Module):
                for method in METHODS:
                    if callable(getattr(component, method, None)):
                        replaced = _noted(name, method, getattr(component, method), mode, calls)
                        stack.enter_context(temporary_attribute(component, method, replaced))
        yield calls


def _noted(name: str, method: str, run: Callable, mode: FakeTensorMode, calls: list[ShapedCall]) -> Callable:
    known: dict[Any, Any] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        fake_args, fake_kwargs = tree_map(lambda leaf: _without_values(leaf, mode), (args, kwargs))
        calls.append(ShapedCall(name, method, fake_args, fake_kwargs))
        key = [_shape(leaf) for leaf in tree_leaves((args, kwargs))]
        if str(key) not in known:
            with mode, torch.no_grad():
                known[str(key)] = run(*fake_args, **fake_kwargs)
        return tree_map(_zeros, known[str(key)])

    return call


def _without_values(leaf: Any, mode: FakeTensorMode) -> Any:
    return _empty(leaf, mode) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf


def _zeros(leaf: Any) -> Any:
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, FakeTensor) else leaf


def _shape(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
