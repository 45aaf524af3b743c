"""Callbacks of the trainer, and a hook for its samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback

from ..media import save_sample
from .sharding import as_sharded, whole

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

    def save(self, directory: str | Path, writes: bool = True) -> None:
        """Write the average into a checkpoint; other processes than the first help to gather it."""
        state = self.average.state_dict()
        state["shadow_params"] = [whole(value) for value in state["shadow_params"]]
        if writes:
            torch.save(state, Path(directory) / AVERAGE_FILE)

    def load(self, directory: str | Path) -> None:
        """Read the average of a checkpoint that has one of the same decay."""
        device = self.parameters[0].device
        state = torch.load(Path(directory) / AVERAGE_FILE, device, weights_only=True)
        pairs = zip(state["shadow_params"], self.parameters, strict=True)
        state["shadow_params"] = [as_sharded(value, parameter.detach()) for value, parameter in pairs]
        self.average.load_state_dict(state)


class SampleFiles:
    """An `image_samples_hook` that writes samples into files: PNG, animated for video, in a folder for each step.

    Args:
        directory (str | Path): where the folders go.
        every (int): write when the number of updates is a multiple of it.
        most (int): files of one step.
    """

    def __init__(self, directory: str | Path, every: int = 1, most: int = 8):
        self.directory, self.every, self.most = Path(directory), every, most

    def __call__(self, image_data: list[tuple], global_step: int, tracker: Any) -> None:
        """Write the first samples; those that are neither images nor video are left out.

        Args:
            image_data (list[tuple]): (images, prompts, metadata, rewards, details) of each batch.
            global_step (int): updates so far.
            tracker (GeneralTracker | None): unused.
        """
        if global_step % self.every:
            return
        samples = [sample for images, *_ in image_data for sample in images if sample.ndim in (3, 4)][: self.most]
        folder = self.directory / f"step_{global_step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(samples):
            save_sample(sample, folder / f"{number:02d}.png")
