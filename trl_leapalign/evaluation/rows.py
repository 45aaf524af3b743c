"""Prompts to evaluate on, GenEval's among them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from ..prompts.sources import PromptSource, load_prompts
from .geneval.metadata import parse_task, read_geneval


def load_rows(source: PromptSource, prompt_column: str = "prompt") -> Sequence[dict[str, Any]]:
    """Read prompts and the other columns of their rows.

    Args:
        source (PromptSource): "geneval" for its published prompts, a file or URL of GenEval's metadata, or whatever
            `load_prompts` takes.
        prompt_column (str): the column that holds the prompt.

    Returns:
        Sequence[dict]: rows that have `prompt_column`; a Dataset where they have images, which are read when needed.

    Raises:
        TypeError: if the source is of another kind.
        ValueError: if a file cannot be read, there are no prompts, or one is missing or empty.
        OSError: if GenEval's prompts cannot be downloaded.
    """
    rows = load_prompts(read_if_geneval(source, prompt_column), prompt_column)
    decodes = isinstance(rows, datasets.Dataset) and any(isinstance(f, datasets.Image) for f in rows.features.values())
    return rows if decodes else [dict(row) for row in rows]


def read_if_geneval(source: Any, prompt_column: str = "prompt") -> Any:
    """Read GenEval's prompts, whose mixed lists `datasets` cannot read, and pass on any other source.

    Args:
        source (Any): "geneval" for the published prompts, a file or URL of GenEval's metadata, or anything else.
        prompt_column (str): the column that holds the prompt.

    Returns:
        Any: rows of GenEval's, or the source.

    Raises:
        ValueError: if a row of GenEval's is broken.
        OSError: if GenEval's prompts cannot be downloaded.
    """
    if isinstance(source, str) and source == "geneval":
        return read_geneval()
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return read_geneval(source)
    if isinstance(source, (str, Path)) and prompt_column == "prompt" and _is_geneval(Path(source)):
        return read_geneval(source)
    return source


def _is_geneval(path: Path) -> bool:
    """Whether the first line of a file is a task of GenEval's, whose mixed lists `datasets` cannot read."""
    if path.suffix.lower() not in (".jsonl", ".json") or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8-sig") as lines:
            first = next((line for line in lines if line.strip()), "")
        parse_task(json.loads(first))
    except ValueError:
        return False
    return True
