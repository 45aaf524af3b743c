"""What a checkpoint holds beside the files of Trainer, so that resuming equals never stopping."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from ..adapters.lora import trained_parameters
from .sharding import as_sharded, whole

TRAINED_FILE = "trained_parameters.safetensors"
RUN_FILE = "run.json"
FILES = (TRAINED_FILE, RUN_FILE, OPTIMIZER_NAME, SCHEDULER_NAME)


def save_run(directory: str | Path, model: nn.Module, run: dict[str, Any], writes: bool = True) -> None:
    """Write the trained parameters and what must stay the same when the training is resumed.

    Args:
        directory (str | Path): the checkpoint's folder.
        model (nn.Module): its parameters that require gradients are written.
        run (dict[str, Any]): settings that decide which noise, steps and prompts an update sees, for JSON.
        writes (bool): False in the other processes, which take part in gathering sharded parameters.
    """
    parameters = {name: whole(value.detach()).cpu().contiguous() for name, value in trained_parameters(model).items()}
    if not writes:
        return
    save_file(parameters, Path(directory) / TRAINED_FILE)
    (Path(directory) / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")


def load_run(directory: str | Path, model: nn.Module, run: dict[str, Any]) -> None:
    """Read the trained parameters of a checkpoint of the same training.

    Args:
        directory (str | Path): the checkpoint's folder.
        model (nn.Module): what they are read into.
        run (dict[str, Any]): settings as given to `save_run`.

    Raises:
        ValueError: if the checkpoint is not there or not whole, or of another training.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"The checkpoint {directory} does not exist.")
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} is not a whole checkpoint: it has no {', '.join(missing)}. Give a checkpoint-... folder that "
            "was not saved with save_only_model."
        )
    before = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    changed = [
        f"{name}={before.get(name)!r}, not {value!r}" for name, value in run.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(f"{directory} was saved with {'; '.join(changed)}. Resume with what it was saved with.")
    saved, trained = load_file(directory / TRAINED_FILE), trained_parameters(model)
    shapes, expected = ({(name, tuple(value.shape)) for name, value in each.items()} for each in (saved, trained))
    if shapes != expected:
        raise ValueError(
            f"{directory} is not a checkpoint of this training: {len(shapes ^ expected)} parameters are not there, "
            f"surplus or of another shape, such as {sorted(shapes ^ expected)[:2]}. Resume with the same peft_config."
        )
    parts = {name: as_sharded(value, trained[name].detach()) for name, value in saved.items()}
    model.load_state_dict(parts, strict=False)


def last_checkpoint(output_dir: str | Path) -> str:
    """Find the last checkpoint that was written to its end.

    Args:
        output_dir (str | Path): where the training writes its checkpoints.

    Returns:
        str: its folder.

    Raises:
        ValueError: if there is none.
    """
    whole = [path for path in sort_checkpoints(str(output_dir)) if (Path(path) / TRAINER_STATE_NAME).is_file()]
    if not whole:
        raise ValueError(
            f"No valid checkpoint found in {output_dir}: there is no whole checkpoint-... folder to resume."
        )
    return whole[-1]
