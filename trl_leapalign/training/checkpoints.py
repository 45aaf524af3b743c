"""Checkpoints that are whole or do not count: begun, written by all processes, and sealed last.

A checkpoint's folder gets the file `unfinished` first. When all processes have written, `complete.json` is put beside
their files in one step: it holds the size and the SHA-256 of each, and a number that tells which was sealed last.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.trainer_utils import sort_checkpoints

from ..adapters.lora import adapter_name, trained_parameters
from .sharding import as_sharded, whole

logger = logging.getLogger(__name__)

TRAINED_FILE = "trained_parameters.safetensors"
RUN_FILE = "run.json"
SEAL_FILE = "complete.json"
UNFINISHED_FILE = "unfinished"
REMOVED_PREFIX = "removed-"


def begin_checkpoint(directory: str | Path) -> None:
    """Make an empty folder for a checkpoint, and remove what earlier saves did not finish.

    Args:
        directory (str | Path): the checkpoint's folder; what is there is removed.
    """
    directory = Path(directory)
    remove_unfinished(directory.parent)
    if directory.exists():
        _remove(directory)
    directory.mkdir(parents=True)
    (directory / UNFINISHED_FILE).write_text("This checkpoint is being written, or its writing was stopped.\n")


def seal_checkpoint(directory: str | Path) -> None:
    """Declare a checkpoint whole. To be called by one process, when all have written their files.

    Args:
        directory (str | Path): the checkpoint's folder.
    """
    directory = Path(directory)
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            _sync(path)
        elif path.name not in (SEAL_FILE, UNFINISHED_FILE):
            _sync(path)
            files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    others = (_read_seal(path).get("number", 0) for path in _folders(directory.parent) if path != directory)
    seal = {"number": 1 + max(others, default=0), "files": files}
    part = directory / f"{SEAL_FILE}.part"
    part.write_text(json.dumps(seal, indent=1), encoding="utf-8")
    _sync(part)
    part.replace(directory / SEAL_FILE)
    _sync(directory)
    (directory / UNFINISHED_FILE).unlink(missing_ok=True)
    _sync(directory.parent)


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove the folders of checkpoints that were not written, or not removed, to their end.

    All others are left alone: who deletes a checkpoint's optimizer.pt to save space wants to keep the rest.

    Args:
        output_dir (str | Path): where the training writes its checkpoints.
    """
    for path in Path(output_dir).glob(f"{REMOVED_PREFIX}checkpoint-*"):
        shutil.rmtree(path)
    for path in _folders(output_dir):
        begun = (path / UNFINISHED_FILE).exists() or not any(path.iterdir())
        if begun and not (path / SEAL_FILE).exists():
            logger.warning("Removing %s, which was not written to its end.", path)
            _remove(path)


@contextmanager
def only_writing(config: Any) -> Iterator[None]:
    """Let Trainer's saving neither push nor remove anything for a while, since both come after the seal.

    Args:
        config (TrainingArguments): settings.
    """
    push_to_hub, limit = config.push_to_hub, config.save_total_limit
    config.push_to_hub, config.save_total_limit = False, None
    try:
        yield
    finally:
        config.push_to_hub, config.save_total_limit = push_to_hub, limit


def rotate_checkpoints(output_dir: str | Path, limit: int | None, best: str | Path | None = None) -> None:
    """Remove whole checkpoints but the last ones.

    Args:
        output_dir (str | Path): where the training writes its checkpoints.
        limit (int | None): how many are kept; None is all.
        best (str | Path | None): one of them that is kept in any case.
    """
    if limit is None:
        return
    whole = _whole(output_dir)
    kept = {path.name for path in whole[-1:]} | ({Path(best).name} if best else set())
    excess = len(whole) - max(limit, len(kept))
    for path in [path for path in whole if path.name not in kept][: max(excess, 0)]:
        _remove(path)


def last_checkpoint(output_dir: str | Path) -> str:
    """Find the last checkpoint that is whole and can be resumed.

    Args:
        output_dir (str | Path): where the training writes its checkpoints.

    Returns:
        str: the folder of the one that was sealed last.

    Raises:
        ValueError: if there is none; each that is not whole is named.
    """
    problems = {}
    for path in sorted(_folders(output_dir), key=lambda path: _read_seal(path).get("number", math.inf), reverse=True):
        problem = find_problem(path)
        if problem is None:
            for name, found in problems.items():
                logger.warning("%s is not a whole checkpoint: %s. %s is resumed.", name, found, path.name)
            return str(path)
        problems[path.name] = problem
    named = "; ".join(f"{name} is not a whole checkpoint: {problem}" for name, problem in sorted(problems.items()))
    raise ValueError(
        f"No valid checkpoint found in {output_dir}: {named or 'there is no checkpoint-... folder'}. Start without "
        "resume_from_checkpoint, or set output_dir to the folder of the training."
    )


def check_whole(directory: str | Path) -> None:
    """Raise ValueError unless a checkpoint is there, was written to its end, and is what was written.

    Args:
        directory (str | Path): the checkpoint's folder.
    """
    if not Path(directory).is_dir():
        raise ValueError(f"The checkpoint {directory} does not exist. Give a checkpoint-... folder, or True.")
    problem = find_problem(directory)
    if problem is not None:
        raise ValueError(
            f"{directory} is not a whole checkpoint: {problem}. Resume from an earlier one; True takes the last that "
            "is whole."
        )


def find_problem(directory: str | Path, digests: bool = True) -> str | None:
    """Say why a checkpoint cannot be resumed.

    Args:
        directory (str | Path): the checkpoint's folder.
        digests (bool): compare the files' content too, and see that it can be resumed; else their sizes alone.

    Returns:
        str | None: None if it can.
    """
    directory = Path(directory)
    if not (directory / SEAL_FILE).exists():
        if (directory / UNFINISHED_FILE).exists():
            return "it was not written to its end"
        return f"it has no {SEAL_FILE}, which is written last"
    files = _read_seal(directory).get("files")
    if files is None:
        return f"its {SEAL_FILE} is damaged"
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        return f"it has no {', '.join(missing)}"
    for name, known in files.items():
        size = (directory / name).stat().st_size
        if size != known["size"]:
            return f"its {name} is damaged, with {size} bytes instead of {known['size']}"
    if digests and RUN_FILE not in files:
        return "it was saved with save_only_model=True, so it holds weights alone"
    for name, known in files.items() if digests else ():
        if _sha256(directory / name) != known["sha256"]:
            return f"its {name} is damaged, or was changed after it was saved"
    return None


def save_run(directory: str | Path, model: nn.Module, run: dict[str, Any], writes: bool = True) -> None:
    """Write the trained parameters, and what the training was made with.

    Args:
        directory (str | Path): the checkpoint's folder.
        model (nn.Module): its parameters that require gradients are written.
        run (dict[str, Any]): see `resuming.describe_run`.
        writes (bool): False in the other processes, which take part in gathering sharded parameters.
    """
    parameters = {name: whole(value.detach()).cpu().contiguous() for name, value in named_parameters(model).items()}
    if not writes:
        return
    save_file(parameters, Path(directory) / TRAINED_FILE)
    (Path(directory) / RUN_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")


def read_run(directory: str | Path) -> dict[str, Any]:
    """Read what the training of a whole checkpoint was made with."""
    return json.loads((Path(directory) / RUN_FILE).read_text(encoding="utf-8"))


@torch.no_grad()
def load_parameters(directory: str | Path, model: nn.Module) -> None:
    """Read the trained parameters of a whole checkpoint, one after another.

    Args:
        directory (str | Path): the checkpoint's folder.
        model (nn.Module): what they are read into.

    Raises:
        ValueError: if the model's trained parameters are others.
    """
    trained = named_parameters(model)
    expected = {(name, tuple(value.shape)) for name, value in trained.items()}
    with safe_open(Path(directory) / TRAINED_FILE, "pt") as file:
        shapes = {(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
        if shapes != expected:
            raise ValueError(
                f"{directory} is not a checkpoint of this training: {len(shapes ^ expected)} parameters are not "
                f"there, surplus or of another shape, such as {sorted(shapes ^ expected)[:2]}. Resume with the same "
                "peft_config."
            )
        for name, parameter in trained.items():
            parameter.copy_(as_sharded(file.get_tensor(name), parameter.detach()))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by names that do not depend on what their adapter is called.

    Args:
        model (nn.Module): a RolloutModel.

    Returns:
        dict[str, nn.Parameter]: those of adapters as if they were called "default".
    """
    adapters = {name: adapter_name(each) for name, each in model.denoisers.items() if getattr(each, "peft_config", {})}
    named = {}
    for name, parameter in trained_parameters(model).items():
        parts = name.split(".")
        own = adapters.get(parts[1])
        kinds = [index for index, part in enumerate(parts[:-1]) if part.startswith("lora_") and parts[index + 1] == own]
        if kinds:
            parts[kinds[-1] + 1] = "default"
        named[".".join(parts)] = parameter
    return named


def _folders(output_dir: str | Path) -> list[Path]:
    return [Path(path) for path in sort_checkpoints(str(output_dir))]


def _whole(output_dir: str | Path) -> list[Path]:
    """Folders of the checkpoints whose files are all there, the one sealed last at the end."""
    whole = [path for path in _folders(output_dir) if find_problem(path, digests=False) is None]
    return sorted(whole, key=lambda path: _read_seal(path)["number"])


def _read_seal(directory: Path) -> dict[str, Any]:
    """Empty if there is none, or it cannot be read."""
    try:
        seal = json.loads((directory / SEAL_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return seal if isinstance(seal, dict) and seal.keys() >= {"number", "files"} else {}


def _remove(directory: Path) -> None:
    """Remove a checkpoint's folder; a part that is left if this is stopped does not look like a checkpoint."""
    aside = directory.with_name(f"{REMOVED_PREFIX}{directory.name}")
    if aside.exists():
        shutil.rmtree(aside)
    directory.rename(aside)
    shutil.rmtree(aside)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if path.is_dir() and os.name != "posix":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
