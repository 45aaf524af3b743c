"""What results were made with, kept beside them, so that results of different settings are not mixed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn settings into what they are after writing and reading JSON; what JSON cannot hold becomes text.

    Args:
        values (Mapping[str, Any]): settings by name.

    Returns:
        dict[str, Any]: the same, comparable with what `read_json` returns.
    """
    return json.loads(json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def read_json(path: Path) -> dict[str, Any]:
    """Read settings; those of a file that is not there are empty.

    Raises:
        ValueError: if the file holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. Choose another folder, or delete this one.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings. Choose another folder, or delete this one.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings, at once or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def check_unchanged(directory: Path, before: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    """Raise ValueError if a folder holds results of other settings.

    Args:
        directory (Path): the folder, for the message.
        before (Mapping[str, Any]): what its results were made with.
        now (Mapping[str, Any]): what they would be made with.
        remedy (str): what to do beside choosing another output_dir, for the message.
    """
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        what = ", ".join(f"{key} ({shorten(before.get(key))} before, {shorten(now.get(key))} now)" for key in changed)
        raise ValueError(
            f"{directory} holds the result of other settings: {', '.join(changed)} changed. {what}. Choose another "
            f"output_dir, or {remedy}."
        )


def check_same_pipeline(directory: Path, before: Mapping[str, str], now: Mapping[str, str], remedy: str) -> None:
    """Raise ValueError if a folder holds results of a pipeline with other weights, settings or adapters.

    Args:
        directory (Path): the folder, for the message.
        before (Mapping[str, str]): what `identify_pipeline` found when its results were made.
        now (Mapping[str, str]): what it finds now.
        remedy (str): what to do beside choosing another output_dir, for the message.
    """
    named = [{f"the pipeline's {name}": text for name, text in each.items()} for each in (before, now)]
    check_unchanged(directory, *named, remedy)


def shorten(value: Any, length: int = 60) -> str:
    """A value's text, cut to what fits a message."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
