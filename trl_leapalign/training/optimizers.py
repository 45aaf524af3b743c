"""Optimizers whose weights in training are not those to be used, such as schedule-free ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer has a train and an eval mode.

    Args:
        optimizer (Optimizer | AcceleratedOptimizer | None): as it is, or as Accelerate wraps it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    return all(callable(getattr(inner, mode, None)) for mode in ("train", "eval"))


@contextmanager
def evaluation_mode(optimizer: Any, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Use the weights of an optimizer's eval mode for a while; afterwards those of training are back, bit for bit.

    Args:
        optimizer (Optimizer | AcceleratedOptimizer | None): nothing happens if it has no modes.
        parameters (Iterable[nn.Parameter]): what it trains.
    """
    if not has_modes(optimizer):
        yield
        return
    trained = list(parameters)
    kept = [parameter.detach().clone() for parameter in trained]  # going there and back would round
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)


class EndInEvaluationMode(TrainerCallback):
    """Leaves the weights of an optimizer's eval mode in the model after training."""

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if has_modes(optimizer):
            optimizer.eval()
