"""Decoding with less memory: the decoder's smallest blocks are computed again in the backward pass.

Works on decoders that have no gradient checkpointing of their own (Wan, Qwen-Image, HunyuanImage, Sana). Those that
have it compute a whole resolution again at a time; with both, the blocks inside of it are not all kept at once.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .pipelines import modules_of, temporary_attribute

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
Checkpoint = Callable[..., Any]


def decoders_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components of a pipeline that decode latents, by name."""
    return {name: module for name, module in modules_of(pipeline).items() if callable(getattr(module, "decode", None))}


def smallest_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks to compute again: the innermost modules with several layers, such as residual blocks and attentions.

    Args:
        module (nn.Module): a decoder.

    Returns:
        list[nn.Module]: none lies in another; single layers (convolutions, norms) belong to none of them if they stand
            beside blocks.
    """
    return _search(module)[1]


def _search(module: nn.Module) -> tuple[int, list[nn.Module]]:
    """How many layers with weights a module has, and the smallest blocks in it."""
    children = [_search(child) for child in module.children()]
    count = sum(layers for layers, _ in children) or int(any(True for _ in module.parameters(recurse=False)))
    blocks = [block for _, found in children for block in found]
    if not blocks and count > 1 and not isinstance(module, CONTAINERS):
        blocks = [module]
    return count, blocks


@contextmanager
def checkpointed_decoders(pipeline: DiffusionPipeline, apply: Checkpoint | None = None) -> Iterator[None]:
    """Keep the inputs of the decoders' blocks alone for the backward pass, in the calls made meanwhile.

    Args:
        pipeline (DiffusionPipeline): its decoders are changed for the time being.
        apply (Checkpoint | None): called as `apply(function, *args, **kwargs)`; None is
            `torch.utils.checkpoint.checkpoint` without reentrance.
    """
    apply = apply or _checkpoint
    with ExitStack() as stack:
        for decoder in decoders_of(pipeline).values():
            stack.enter_context(_recomputed(smallest_blocks(decoder), apply))
            for part in filter(lambda part: getattr(part, "gradient_checkpointing", False), decoder.modules()):
                stack.enter_context(temporary_attribute(part, "_gradient_checkpointing_func", _Outer(apply)))
        yield


@contextmanager
def _recomputed(blocks: list[nn.Module], apply: Checkpoint) -> Iterator[None]:
    with ExitStack() as stack:
        for block in blocks:
            recomputed = _Recomputed(type(block).__name__, block.forward, apply)
            stack.enter_context(temporary_attribute(block, "forward", recomputed))
        yield


class _Outer:
    """What a decoder with checkpointing of its own calls: when it runs a part again, the blocks inside are recomputed
    one by one.
    """

    def __init__(self, apply: Checkpoint):
        self.apply = apply

    def __call__(self, part: Callable, *args: Any, **kwargs: Any) -> Any:
        blocks = smallest_blocks(part) if isinstance(part, nn.Module) else []
        if any(block is part for block in blocks):
            return part(*args, **kwargs)
        runs = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            with nullcontext() if runs == 1 else _recomputed(blocks, self.apply):
                return part(*args, **kwargs)

        run.name = type(part).__name__  # type: ignore[attr-defined]
        return self.apply(run, *args, **kwargs)


def _checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


class _Recomputed:
    """The forward pass of a block, whose second run finds the lists that it writes into as the first one found them.

    Causal video decoders carry frames from call to call in `feat_cache`, a list, and count in `feat_idx`, another.
    """

    def __init__(self, name: str, forward: Callable, apply: Checkpoint):
        self.name = name
        self.forward = forward
        self.apply = apply

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return self.forward(*args, **kwargs)
        found = [(_copied(value) if isinstance(value, (list, dict)) else value) for value in args]
        found_by_name = {key: _copied(value) for key, value in kwargs.items() if isinstance(value, (list, dict))}
        runs = 0

        def run(*given: Any, **named: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1:
                return self.forward(*given, **named)
            again = [
                _copied(old) if isinstance(old, (list, dict)) else new for old, new in zip(found, given, strict=True)
            ]
            return self.forward(*again, **{**named, **{key: _copied(value) for key, value in found_by_name.items()}})

        run.name = self.name  # type: ignore[attr-defined]
        return self.apply(run, *args, **kwargs)


def _copied(value: list | dict) -> list | dict:
    return value.copy()
