"""What pipelines do that would make a backward pass fail or be wrong: noticed before training. Pure torch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

WRITTEN_INTO = "modified by an inplace operation"


@contextmanager
def copies_of_saved_tensors() -> Iterator[None]:
    """Let the forward pass write into tensors that the backward pass needs: it gets copies, which take memory.

    Only for pipelines whose backward pass fails otherwise, with "modified by an inplace operation".
    """
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone(), lambda tensor: tensor
    ):
        yield


def check_checkpointing(
    modules: Iterable[nn.Module], plain: Callable[[], Tensor], rollout: Callable[[], Tensor], trained: list[Tensor]
) -> None:
    """Check that recomputing activations changes neither the images nor the gradients.

    The blocks that are computed again in the backward pass must return what they returned before, so no backward pass
    without checkpointing is needed, which might not fit in memory.

    Args:
        modules (Iterable[nn.Module]): those diffusers models among them that have checkpointing enabled are checked.
        plain (Callable[[], Tensor]): samples images without gradients, when nothing is checkpointed.
        rollout (Callable[[], Tensor]): samples the same images with a graph.
        trained (list[Tensor]): the parameters that are trained.

    Raises:
        RuntimeError: if the images differ, or the backward pass fails or computes something else.
    """
    expected = plain()
    try:
        with _verified(modules):
            images = rollout()
            gradients_of(images.float().sum(), trained)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or WRITTEN_INTO in str(error):
            raise
        raise RuntimeError(
            f"Gradient checkpointing does not work with this pipeline ({type(error).__name__}: {error}). Set "
            "activation_checkpointing=False."
        ) from error
    difference = (images.detach() - expected).abs().max().item()
    if difference > torch.finfo(images.dtype).eps ** 0.75:
        raise RuntimeError(
            f"Gradient checkpointing changes the output of this pipeline by up to {difference:.2g}, so what is trained "
            "would not be what is sampled. Set activation_checkpointing=False."
        )


def gradients_of(output: Tensor, parameters: list[Tensor], slope: Tensor | None = None) -> list[Tensor | None]:
    """Differentiate by a backward pass, which sharded parameters need: they are no leaves of the graph.

    Args:
        output (Tensor): with graph.
        parameters (list[Tensor]): whose `.grad` is afterwards what it was before.
        slope (Tensor | None): gradient of the output; None for a scalar.

    Returns:
        list[Tensor | None]: gradients, None where there is none.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        output.backward(slope)
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


@contextmanager
def _verified(modules: Iterable[nn.Module]) -> Iterator[None]:
    diffusers_models = [module for module in modules if hasattr(module, "enable_gradient_checkpointing")]
    enabled = [module for module in diffusers_models if module.is_gradient_checkpointing]
    for module in enabled:
        module.enable_gradient_checkpointing(_checkpoint)
    try:
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for module in enabled:
            module.enable_gradient_checkpointing()


def _checkpoint(block: nn.Module, *args: Any) -> Any:
    """Checkpoint a block, and compare its outputs when it is computed again."""
    first: list[Tensor] = []

    def run(*args: Any) -> Any:
        output = block(*args)
        leaves = torch.utils._pytree.tree_leaves(output)
        sizes = [leaf.detach().float().abs().sum() for leaf in leaves if isinstance(leaf, Tensor)]
        if not first:
            first.extend(sizes)
        elif len(sizes) != len(first) or not torch.allclose(torch.stack(sizes), torch.stack(first), rtol=1e-3):
            raise RuntimeError(f"a {type(block).__name__} returns something else when it is computed again")
        return output

    return checkpoint(run, *args, use_reentrant=False)
