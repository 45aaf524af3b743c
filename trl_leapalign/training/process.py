"""What the process must be like for a training."""

import logging

import torch

from ..leapalign_config import LeapAlignConfig
from ..process_state import begin_state

logger = logging.getLogger(__name__)


def check_gradients_possible() -> None:
    """Raise RuntimeError under torch.inference_mode(), where no gradient can be recorded."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Training under torch.inference_mode() cannot record gradients. Leave inference mode; it may have been "
            "turned on for the whole process."
        )


def prepare_process(config: LeapAlignConfig) -> None:
    """Begin a state of Accelerate's for a trainer, of one GPU a process, of which the first alone warns.

    Args:
        config (LeapAlignConfig): of the trainer; changed where it counts the GPUs of the process.
    """
    begin_state(config.distributed_state)
    if config.process_index > 0:
        logging.getLogger(__name__.partition(".")[0]).setLevel(logging.ERROR)
    if config.n_gpu > 1:
        logger.warning(
            f"This process sees {config.n_gpu} GPUs and trains on one. To train on all of them: accelerate launch "
            f"--num_processes {config.n_gpu} SCRIPT.py; or hide the others with CUDA_VISIBLE_DEVICES."
        )
    # Trainer would copy the denoisers to all devices of the process, but the rollout runs the pipeline's own.
    config._n_gpu = min(config.n_gpu, 1)
