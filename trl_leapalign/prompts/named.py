"""Several sets of prompts by name."""

from typing import Any

import datasets

from .sources import load_prompts


def is_named(source: Any) -> bool:
    """Whether it is a dict of sets by name; a DatasetDict holds splits, of which one must be chosen."""
    return isinstance(source, dict) and not isinstance(source, datasets.DatasetDict)


def load_named_prompts(source: Any, prompt_column: str = "prompt", split: str = "train") -> Any:
    """Read prompts as `load_prompts` does, also several sets of them.

    Args:
        source (PromptSource | dict[str, PromptSource] | None): prompts, or sets of them by name.
        prompt_column (str): the column that holds the prompt.
        split (str): the split to load from the Hub.

    Returns:
        datasets.Dataset | list[dict] | dict | None: rows, by name if there are several sets; None stays None.

    Raises:
        TypeError: if a source is of the wrong kind.
        ValueError: if one cannot be read, or a name is no text.
    """
    if source is None:
        return None
    if not is_named(source):
        return load_prompts(source, prompt_column, split)
    strange = [name for name in source if not isinstance(name, str) or not name]
    if strange:
        raise ValueError(f"Sets of prompts are named by texts, which metrics begin with, but got {strange[0]!r}.")
    return {name: load_prompts(own, prompt_column, split) for name, own in source.items()}
