"""A picture of how the images change in training, for the trackers of `report_to`."""

import logging
import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..prompts.sources import split_row
from ..rollout.base_penalty import adapters_off
from ..rollout.calls import sample_images
from ..rollout.pipelines import quiet
from .trackers import live_tracker, log_image

logger = logging.getLogger(__name__)

SHOWN_BY = ("tensorboard", "wandb", "trackio")
NAME = "images/base_live_average"
GAP = 2


class ImageGrid(TrainerCallback):
    """Reports images of fixed prompts with fixed noise: a column a prompt, rows of base, live and average weights.

    The base's images are sampled once: without the adapter, or before training where all weights are trained. The last
    row is there with `ema_decay` only. Of a video, the middle frame is shown.

    Args:
        trainer (Any): the LeapAlignTrainer, which gives the pipeline, its settings and the trackers.
        rows (list[dict]): the prompts with their other columns.
        every (int): updates from one picture to the next; the first shows the weights before training.

    Raises:
        ValueError: if none of `report_to` takes pictures.
    """

    def __init__(self, trainer: Any, rows: list[dict[str, Any]], every: int):
        if not set(trainer.args.report_to) & set(SHOWN_BY):
            raise ValueError(
                f"image_grid_steps={every} reports pictures, but report_to={trainer.args.report_to} takes none. Choose "
                f"some of {', '.join(SHOWN_BY)}, or leave image_grid_steps out; image_samples_hook=SampleFiles(...) "
                "writes samples into files."
            )
        self.trainer, self.rows, self.every = trainer, rows, every
        self.base: list[Tensor] | None = None
        self.last: tuple[int, list[Tensor]] | None = None
        if trainer.args.full_finetuning and trainer.is_world_process_zero():
            self.base = self._sample()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._report(state)

    def _report(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        start = time.perf_counter()
        rows = [self._sample_base(), self._sample()]
        if self.trainer.weight_average is not None:
            with self.trainer.weight_average.applied():
                rows.append(self._sample())
        self.last = (state.global_step, rows[-1])
        if any(image.ndim != 3 for row in rows for image in row):
            logger.warning("The outputs are no images, so image_grid_steps has nothing to show.")
            return
        names = [name for name in self.trainer.args.report_to if name in SHOWN_BY]
        callbacks = self.trainer.callback_handler.callbacks
        for tracker in (live_tracker(name, callbacks, self.trainer.tracker_run_name) for name in names):
            if tracker is not None:
                log_image(tracker, NAME, grid(rows), state.global_step)
        self.trainer.leave_out_of_speed(time.perf_counter() - start)

    def before_and_after(self) -> list[tuple[str, Tensor, Tensor]]:
        """Show what training changed.

        Returns:
            list[tuple[str, Tensor, Tensor]]: of each prompt, the images (3, H, W) of the base and of the weights that
                are saved now, the average if there is one; empty if the outputs are no images.
        """
        step = self.trainer.state.global_step
        base = self._sample_base()
        if self.last is None or self.last[0] != step:
            with self.trainer._averaged():
                self.last = (step, self._sample())
        prompts = [split_row(row, self.trainer.args.prompt_column)[0] for row in self.rows]
        samples = list(zip(prompts, base, self.last[1], strict=True))
        return samples if all(image.ndim == 3 for image in base) else []

    def _sample_base(self) -> list[Tensor]:
        if self.base is None:
            with adapters_off(self.trainer.rollout_model):
                self.base = self._sample()
        return self.base

    @torch.no_grad()
    def _sample(self) -> list[Tensor]:
        """One image a prompt, on the CPU."""
        trainer, images = self.trainer, []
        with quiet(trainer.pipeline), trainer.accelerator.autocast():
            for index, row in enumerate(self.rows):
                prompt, metadata = split_row(row, trainer.args.prompt_column)
                [sample] = sample_images(
                    trainer.pipeline,
                    [prompt],
                    [index],
                    trainer.args.call_kwargs(trainer.args.eval_num_steps),
                    trainer.args.seed,
                    columns=trainer.columns,
                    metadata=[metadata],
                )
                images.append((sample[len(sample) // 2] if sample.ndim == 4 else sample).float().clamp(0, 1).cpu())
        return images


def grid(rows: list[list[Tensor]]) -> Tensor:
    """Put images side by side.

    Args:
        rows (list[list[Tensor]]): images of shape (3, H, W), as many in each row; sizes may differ.

    Returns:
        Tensor: shape (3, height, width), white between the images.
    """
    height = max(image.shape[1] for row in rows for image in row) + GAP
    width = max(image.shape[2] for row in rows for image in row) + GAP
    canvas = torch.ones(3, height * len(rows) - GAP, width * len(rows[0]) - GAP)
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            top, left = number * height, column * width
            canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return canvas
