"""What pipelines do that would make a backward pass fail or be wrong: noticed before training. Pure torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    modules: Iterable[nn.Module],
    plain: Callable[[], Tensor],
    rollout: Callable[[Callable], Tensor],
    trained: list[Tensor],
) -> None:
    """Check that recomputing activations changes neither the images nor the gradients.

    The blocks that are computed again in the backward pass must return what they returned before, so no backward pass
    without checkpointing is needed, which might not fit in memory.

    Args:
        modules (Iterable[nn.Module]): those diffusers models among them that have checkpointing enabled are checked.
        plain (Callable[[], Tensor]): samples images without gradients, when nothing is checkpointed.
        rollout (Callable[[Callable], Tensor]): samples the same images with a graph, and computes other blocks again
            by what it is given, which is called as `apply(function, *args, **kwargs)`.
        trained (list[Tensor]): the parameters that are trained.

    Raises:
        RuntimeError: if the images differ, or the backward pass fails or computes something else.
    """
    expected = plain()
    try:
        with _verified(modules):
            images = rollout(_checkpoint)
            gradients_of([images.float().sum()], trained)
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


def gradients_of(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], slopes: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Differentiate by a backward pass, which sharded parameters need: they are no leaves of the graph.

    Args:
        outputs (Sequence[Tensor]): with graph.
        parameters (Sequence[Tensor]): whose `.grad` is afterwards what it was before.
        slopes (Sequence[Tensor] | None): gradient of each output; None for scalars.

    Returns:
        list[Tensor | None]: gradients, None where there is none.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        torch.autograd.backward(tuple(outputs), None if slopes is None else tuple(slopes))
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


@contextmanager
def _verified(modules: Iterable[nn.Module]) -> Iterator[None]:
    diffusers_models: list[Any] = [module for module in modules if hasattr(module, "enable_gradient_checkpointing")]
    enabled = [module for module in diffusers_models if module.is_gradient_checkpointing]
    for module in enabled:
        module.enable_gradient_checkpointing(_checkpoint_of_diffusers)
    try:
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for module in enabled:
            module.enable_gradient_checkpointing()


def _checkpoint_of_diffusers(block: Callable, *args: Any) -> Any:
    """As diffusers calls it: its own function takes no arguments by name either."""
    return _checkpoint(block, *args)


def _checkpoint(block: Callable, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a block, and compare its outputs when it is computed again."""
    first: list[Tensor] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        output = block(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves(output)
        sizes = [leaf.detach().float().abs().sum() for leaf in leaves if isinstance(leaf, Tensor)]
        if not first:
            first.extend(sizes)
        elif len(sizes) != len(first) or not torch.allclose(torch.stack(sizes), torch.stack(first), rtol=1e-3):
            name = getattr(block, "name", type(block).__name__)
            raise RuntimeError(f"a {name} returns something else when it is computed again")
        return output

    return checkpoint(run, *args, use_reentrant=False, **kwargs)
