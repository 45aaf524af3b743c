"""The run that Trainer's own callback reports to, as an Accelerate tracker."""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch import Tensor
from transformers import TrainerCallback

LIVE = {
    "tensorboard": ("writer", "TensorBoardCallback", lambda callback: callback.tb_writer),
    "wandb": ("run", "WandbCallback", lambda callback: _module("wandb").run),
    "trackio": ("run", "TrackioCallback", lambda callback: _module("trackio").context_vars.current_run.get()),
    "mlflow": ("active_run", "MLflowCallback", lambda callback: _module("mlflow").active_run()),
    "comet_ml": ("writer", "CometCallback", lambda callback: callback._experiment),
    "swanlab": ("run", "SwanLabCallback", lambda callback: _module("swanlab").get_run()),
    "clearml": ("task", "ClearMLCallback", lambda callback: callback._clearml_task),
    "dvclive": ("live", "DVCLiveCallback", lambda callback: callback.live),
}
"""By entry of `report_to`: the attribute of Accelerate's tracker that holds the run, the name of Trainer's callback,
and how to find its run."""


def live_tracker(name: str, callbacks: Iterable[TrainerCallback], run_name: str) -> GeneralTracker | None:
    """Find the run that is open, without beginning one.

    Args:
        name (str): entry of `report_to`.
        callbacks (Iterable[TrainerCallback]): those of the trainer.
        run_name (str): what the tracker calls its run.

    Returns:
        GeneralTracker | None: a tracker of the run; None if none is open or Accelerate has no tracker of this kind.
    """
    if name not in LIVE or name not in LOGGER_TYPE_TO_CLASS:
        return None
    attribute, kind, find = LIVE[name]
    for callback in callbacks:
        if any(base.__name__ == kind for base in type(callback).__mro__):
            run = find(callback)
            if run is None:
                return None
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            folder = {"logging_dir": "."} if tracker_class.requires_logging_directory else {}
            tracker = tracker_class(run_name, **folder)
            setattr(tracker, attribute, run)
            return tracker
    return None


def log_image(tracker: GeneralTracker, name: str, image: Tensor, step: int) -> None:
    """Report an image.

    Args:
        tracker (GeneralTracker): of TensorBoard, Weights & Biases or Trackio.
        name (str): what it is called there.
        image (Tensor): shape (3, H, W) in [0, 1].
        step (int): updates so far.
    """
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    if tracker.name == "tensorboard":
        tracker.tracker.add_image(name, pixels, global_step=step, dataformats="HWC")
        tracker.tracker.flush()
    else:  # without a step of their own: Trainer's callbacks report theirs as a value
        tracker.tracker.log({name: _module(tracker.name).Image(pixels), "train/global_step": step})


def _module(name: str) -> Any:
    return sys.modules[name]
