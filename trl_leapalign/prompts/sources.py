"""Prompts from a list, a file, a Hub id, a Dataset or a function, and the endless stream that training reads."""

import pickle
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from .files import DATA_FILES, read_file
from .seeds import Purpose, derive_seed, seeded

PromptFunction: TypeAlias = Callable[[], tuple[str, dict[str, Any]]]
PromptSource: TypeAlias = str | Path | Sequence[str] | Sequence[dict[str, Any]] | datasets.Dataset


def load_prompts(source: PromptSource, prompt_column: str = "prompt", split: str = "train") -> datasets.Dataset | list:
    """Read prompts and the other columns of their rows.

    Args:
        source (PromptSource): a Dataset; a list of prompts or of rows; the path of a text file with one prompt a line,
            or of a .json, .jsonl, .csv or .parquet file; or the id of a dataset on the Hub.
        prompt_column (str): the column that holds the prompt.
        split (str): the split to load from the Hub.

    Returns:
        datasets.Dataset | list[dict]: rows that have `prompt_column`.

    Raises:
        TypeError: if the source is of another kind.
        ValueError: if a file cannot be read, there are no prompts, or one is missing or empty.
    """
    rows = _read(source, prompt_column, split)
    if len(rows) == 0:
        raise ValueError("There are no prompts: the dataset, list or file that was given is empty.")
    columns = rows.column_names if isinstance(rows, datasets.Dataset) else sorted({key for row in rows for key in row})
    if prompt_column not in columns:
        raise ValueError(
            f"The prompts have no column {prompt_column!r}; there are {columns}. Set prompt_column to the one that "
            "holds the prompt."
        )
    prompts = rows[prompt_column] if isinstance(rows, datasets.Dataset) else [row.get(prompt_column) for row in rows]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"Prompt {index} is {prompt!r}; every row needs a text that is not empty.")
        check_text(prompt, f"Prompt {index}")
    return rows


def check_text(text: str, name: str) -> None:
    """Raise ValueError if a text has half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is no whole Unicode: {text!a:.200} has half of a surrogate pair at {error.start}. Mend the "
            "text where it comes from, or drop the character: text.encode(errors='ignore').decode()."
        ) from None


def choose_prompts(
    prompt_column: str, prompt_function: PromptFunction | None, **sources: PromptSource | None
) -> "datasets.Dataset | list[dict[str, Any]] | PromptFunction":
    """Take the one source of training prompts that was given.

    Args:
        prompt_column (str): the column that holds the prompt.
        prompt_function (PromptFunction | None): returns a prompt and its metadata.
        **sources (PromptSource | None): other sources, by the name that the user knows them by.

    Returns:
        datasets.Dataset | list[dict] | PromptFunction: rows, or the function.

    Raises:
        TypeError: if a source is of the wrong kind.
        ValueError: if none or several were given, or there are no prompts in it.
    """
    sources = {"prompt_function": prompt_function, **sources}
    given = {name: source for name, source in sources.items() if source is not None}
    if len(given) != 1:
        raise ValueError(
            f"Prompts must come from exactly one of {', '.join(sources)}; got {', '.join(given) or 'none'}."
        )
    if prompt_function is None:
        return load_prompts(next(iter(given.values())), prompt_column)
    if not callable(prompt_function):
        raise TypeError(f"prompt_function must be callable, got {type(prompt_function).__name__}.")
    return prompt_function


def _read(source: PromptSource, prompt_column: str, split: str) -> datasets.Dataset | list[dict[str, Any]]:
    if isinstance(source, (str, Path)):
        return _read_path(str(source), prompt_column, split)
    if isinstance(source, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise TypeError(
            "A streaming dataset cannot be resumed exactly. Load it with streaming=False, or give a prompt_function."
        )
    if isinstance(source, datasets.DatasetDict):
        raise TypeError(f"Got a DatasetDict with the splits {list(source)}; pass one of them.")
    if isinstance(source, datasets.Dataset):
        frames = source.format["type"] in ("pandas", "polars", "arrow")  # rows would be tables
        return source.with_format(None) if frames else source
    if isinstance(source, Sequence):
        return [{prompt_column: row} if not isinstance(row, dict) else row for row in source]
    raise TypeError(
        f"Prompts come from a Dataset, a list, a file or a Hub id, but a {type(source).__name__} was given. Convert "
        "it: Dataset.from_pandas(frame), Dataset.from_dict(columns) or list(generator)."
    )


def _read_path(source: str, prompt_column: str, split: str) -> datasets.Dataset | list[dict[str, Any]]:
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file():
        return read_file(path, prompt_column)
    if path.is_dir() and source:
        raise ValueError(f"{source!r} is a folder. Give a file in it, or a Dataset that datasets has loaded from it.")
    if suffix in (".txt", *DATA_FILES):
        raise ValueError(f"The prompt file {source!r} does not exist.")
    if not source or any(map(str.isspace, source)):
        raise ValueError(
            f"{source!r} is neither a file nor the id of a dataset. A single prompt must be a list: [...]."
        )
    return datasets.load_dataset(source, split=split)


class PromptStream(Dataset):
    """Numbered training samples: sample i is the same in every run, on any number of processes.

    Rows are read in a new random order each time through; a function is called under random states of its own.

    Args:
        source (datasets.Dataset | list[dict] | PromptFunction): rows, or a function that returns a prompt and metadata.
        num_samples (int): samples that training will read.
        seed (int): of the order, or of the function's random states.
        prompt_column (str): the column that holds the prompt; the other columns are the metadata.
        shuffle (bool): whether rows are shuffled.
        group_size (int): consecutive samples that share one prompt.
    """

    def __init__(
        self,
        source: "datasets.Dataset | list[dict[str, Any]] | PromptFunction",
        num_samples: int,
        seed: int,
        prompt_column: str = "prompt",
        shuffle: bool = True,
        group_size: int = 1,
    ):
        self.source = source
        self.num_samples = num_samples
        self.seed = seed
        self.prompt_column = prompt_column
        self.shuffle = shuffle
        self.group_size = group_size
        self._drawn: tuple[int, tuple[str, dict[str, Any]]] | None = None  # of the last group

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, metadata = self._draw(index // self.group_size)
        return {"prompt": prompt, "metadata": metadata, "index": index}

    def _draw(self, group: int) -> tuple[str, dict[str, Any]]:
        if callable(self.source):
            if self.group_size == 1 or self._drawn is None or self._drawn[0] != group:
                seed = derive_seed(self.seed, Purpose.PROMPTS, group)
                self._drawn = group, call_prompt_function(self.source, seed)
            return self._drawn[1]
        epoch, position = divmod(group, len(self.source))
        row = _order(len(self.source), self.seed, epoch)[position] if self.shuffle else position
        return split_row(self.source[row], self.prompt_column)


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()


def split_row(row: dict[str, Any], prompt_column: str) -> tuple[str, dict[str, Any]]:
    """Split a row into its prompt and the metadata, which are all of its other columns."""
    return row[prompt_column], {key: value for key, value in row.items() if key != prompt_column}


def collate(samples: list[dict[str, Any]]) -> dict[str, list]:
    """Gather samples of a `PromptStream` into lists: prompts, metadata and indices."""
    batch = {
        "prompts": [sample["prompt"] for sample in samples],
        "metadata": [sample["metadata"] for sample in samples],
        "indices": [sample["index"] for sample in samples],
    }
    if get_worker_info() is not None:  # the queue to the training would drop what fails, which then waits for ever
        check_picklable(batch["metadata"])
    return batch


def check_picklable(metadata: Sequence[dict[str, Any]]) -> None:
    """Raise TypeError if dataloader workers could not send metadata to the training.

    Args:
        metadata (Sequence[dict]): rows.
    """
    for row in metadata:
        for name, value in row.items():
            if isinstance(value, (str, int, float, torch.Tensor)):
                continue
            try:
                pickle.dumps(value)
            except Exception as error:
                raise TypeError(
                    f"The metadata {name!r} is a {type(value).__name__} that dataloader workers cannot send to the "
                    f"training ({error}). Set dataloader_num_workers=0, or give a name or number in its place that "
                    "the reward looks up."
                ) from error


def check_stateless(function: PromptFunction, seed: int) -> None:
    """Raise ValueError if a prompt function goes through prompts by itself, instead of drawing one.

    A resumed training and dataloader workers call it from the start again, so they would see other prompts.

    Args:
        function (PromptFunction): called a few times under the same random states.
        seed (int): of these.
    """
    first, *others = (call_prompt_function(function, seed) for _ in range(3))
    for other in others:
        if not _equal(first, other):
            raise ValueError(
                f"prompt_function returned {_short(first)} and then {_short(other)}, though random, numpy.random and "
                "torch were seeded alike: it keeps a state of its own, which neither a resumed training nor dataloader "
                "workers would have. Draw from one of the three, such as random.choice(prompts), or give a list as "
                "train_dataset, which is gone through in a random order."
            )


def _equal(first: Any, second: Any) -> bool:
    """Whether two answers say the same; objects that cannot be compared may be other ones."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.shape == second.shape and bool((first == second).all())
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return first == second if isinstance(first, (str, int, float, bool)) else True


def _short(answer: tuple[str, dict[str, Any]]) -> str:
    text = repr(answer)
    return text if len(text) <= 120 else f"{text[:120]}..."


def call_prompt_function(function: PromptFunction, seed: int) -> tuple[str, dict[str, Any]]:
    """Call a prompt function under its own random states, so that its answer depends on the seed alone.

    Args:
        function (PromptFunction): returns a prompt and its metadata; may draw from `random`, numpy and torch.
        seed (int): of these three.

    Returns:
        tuple[str, dict]: prompt and metadata.

    Raises:
        TypeError: if the function returns something else.
        RuntimeError: if it has no more prompts.
    """
    with seeded(seed):
        try:
            result = function()
        except StopIteration as error:
            raise RuntimeError(
                "prompt_function ran out of prompts, but must return one whenever it is called. Draw at random, such "
                "as random.choice(prompts), or give a list as train_dataset."
            ) from error
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], str) and result[0].strip()):
        raise TypeError(
            f"prompt_function must return (prompt, metadata) with a prompt that is not empty, but returned {result!r}."
        )
    prompt, metadata = result
    check_text(prompt, "The prompt of prompt_function")
    if not isinstance(metadata, dict):
        raise TypeError(f"prompt_function must return its metadata as a dict, but returned {metadata!r}.")
    return prompt, metadata
