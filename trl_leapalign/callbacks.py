"""Callbacks of the trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback

AVERAGE_FILE = "weight_average.pt"


class WeightAverage(TrainerCallback):
    """Keeps an exponential moving average of the trained weights, and leaves it in the model after training.

    Args:
        model (nn.Module): its parameters that require gradients are averaged.
        decay (float): in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Without the minimum, diffusers averages over few steps at the start and reaches 0.995 after 1,800.
        self.average = EMAModel(self.parameters, decay=decay, min_decay=decay, update_after_step=-1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.step(self.parameters)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.copy_to(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights for a while."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def save(self, directory: str | Path) -> None:
        """Write the average into a checkpoint."""
        torch.save(self.average.state_dict(), Path(directory) / AVERAGE_FILE)

    def load(self, directory: str | Path) -> None:
        """Read the average of a checkpoint that has one of the same decay."""
        device = self.parameters[0].device
        self.average.load_state_dict(torch.load(Path(directory) / AVERAGE_FILE, device, weights_only=True))
