"""Columns of the prompts that go into the pipeline's call, beside the prompt."""

import difflib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from diffusers import DiffusionPipeline
from PIL import Image

from ..media import open_image
from .arguments import PASSED_ON, call_parameters

logger = logging.getLogger(__name__)

COPIES = dict.fromkeys(
    ("num_images_per_prompt", "num_videos_per_prompt"),
    "each prompt of the batch gets one output; repeat prompts for more",
)
OWN_ARGUMENTS = {
    "prompt": "the prompts come from prompt_column",
    "generator": "noise follows from the seed",
    "latents": "noise follows from the seed",
    "num_inference_steps": "it is the same for all samples",
    "sigmas": "the steps are the same for all samples",
    "timesteps": "the steps are the same for all samples",
    "output_type": "it is always 'pt'",
    "return_dict": "it is always False",
    **COPIES,
}
"""Arguments of the pipeline's call that no column can be, and why."""

PICTURE_THREADS = 4
PICTURE, TEXT_LIST = r"Image\b", "list[str]"
Rows = datasets.Dataset | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CallColumns:
    """Which columns go into the pipeline's call, and how they make up the calls of a batch.

    A batch is one call if its columns are texts of arguments that take a list of texts, or single texts and numbers
    that are the same for all of its samples. Else each sample has a call of its own: pipelines take a list of images as
    a batch, as several images of one sample, or not at all, and nothing tells which.

    Args:
        columns (dict[str, str]): by argument of the call, the column that it comes from.
        texts (frozenset[str]): those of the arguments that take a text.
        text_lists (frozenset[str]): those of them that take a list of texts, one a sample.
        pictures (frozenset[str]): those of the arguments that take images.
    """

    columns: dict[str, str] = field(default_factory=dict)
    texts: frozenset[str] = frozenset()
    text_lists: frozenset[str] = frozenset()
    pictures: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        pipeline: DiffusionPipeline,
        wanted: dict[str, str] | None,
        rows: Rows,
        call_kwargs: Mapping[str, Any],
        prompt_column: str,
    ) -> "CallColumns":
        """Find the columns that go into a pipeline's call.

        Args:
            pipeline (DiffusionPipeline): the pipeline.
            wanted (dict[str, str] | None): by argument, the column. None takes the columns of images and texts that
                have the name of an argument and are not in `call_kwargs`.
            rows (Rows): prompts with their other columns, at least one.
            call_kwargs (Mapping[str, Any]): arguments that are the same for every batch.
            prompt_column (str): the column that holds the prompt.

        Returns:
            CallColumns: checked against these rows.

        Raises:
            TypeError: if the call does not take an argument, or needs one that is not given.
            ValueError: if a column or a value is missing, an argument is given twice or not the user's to give, or it
                is not clear whether a column is an argument.
        """
        parameters = call_parameters(pipeline)
        kinds = {key: str(parameter.annotation) for key, parameter in parameters.items()}
        found = cls(
            texts=frozenset(key for key, kind in kinds.items() if _takes_text(kind)),
            text_lists=frozenset(key for key, kind in kinds.items() if _takes_text(kind) and TEXT_LIST in kind.lower()),
            pictures=frozenset(takes_images(pipeline)),
        )
        name = type(pipeline).__name__
        if wanted is None:
            wanted = found._automatic(name, parameters, rows, call_kwargs, prompt_column)
        else:
            _check_wanted(name, wanted, parameters, call_kwargs)
        found = replace(found, columns=dict(wanted))
        found.check(rows)
        _check_required(name, parameters, {*OWN_ARGUMENTS, *call_kwargs, *found.columns})
        return found

    def _automatic(
        self,
        pipeline: str,
        parameters: Mapping[str, inspect.Parameter],
        rows: Rows,
        call_kwargs: Mapping[str, Any],
        prompt_column: str,
    ) -> dict[str, str]:
        """Columns that are meant for the call by their name and kind."""
        others = [name for name in column_names(rows) if name in parameters and name != prompt_column]
        others = [name for name in others if name not in OWN_ARGUMENTS and name not in call_kwargs]
        chosen = [name for name in others if self._fits(name, _example(rows, name))]
        unclear = [name for name in others if name not in chosen]
        if unclear:
            raise ValueError(
                f"The prompts have columns that are called like arguments of {pipeline}: {', '.join(unclear)}. Say "
                f"whether they go into the call: pipeline_columns={[*chosen, *unclear]}, or {chosen} to keep them as "
                "metadata."
            )
        if chosen:
            logger.warning(
                f"Columns of the prompts go into each call of {pipeline}, which has arguments of their names: "
                f"{', '.join(chosen)}. pipeline_columns={chosen} says the same without this warning; "
                "pipeline_columns=[] keeps them as metadata."
            )
        return {name: name for name in chosen}

    def _fits(self, argument: str, value: Any) -> bool:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, (Image.Image, dict)):
            return argument in self.pictures
        return isinstance(first, str) and argument in (self.pictures | self.texts)

    def check(self, rows: Rows) -> None:
        """Check that rows have what goes into the call.

        Args:
            rows (Rows): prompts with their other columns.

        Raises:
            ValueError: if a column or a value is missing, or an image cannot be read: each is decoded once.
        """
        known = column_names(rows)
        for argument, column in self.columns.items():
            if column not in known:
                raise ValueError(
                    f"pipeline_columns takes {argument} from the column {column!r}, which the prompts do not have. "
                    f"They have {known}.{_hint(column, known)}"
                )
            for index, value in _unread_values(rows, column):
                _check_given(value, argument, column, f"row {index}")
            if argument in self.pictures - self.texts:
                _check_pictures(rows, column)

    def calls(self, metadata: Sequence[Mapping[str, Any]]) -> list[tuple[slice, dict[str, Any]]]:
        """Divide a batch into calls of the pipeline.

        Args:
            metadata (Sequence[Mapping[str, Any]]): rows of the batch, length B.

        Returns:
            list[tuple[slice, dict]]: of each call, its samples and the arguments that come from columns.

        Raises:
            ValueError: if a row lacks a value, or a file of an image cannot be read.
        """
        together: dict[str, Any] = {}
        for argument, column in self.columns.items():
            values = [row.get(column) for row in metadata]
            for value in values:
                _check_given(value, argument, column, "a row")
            if argument in self.text_lists and all(isinstance(value, str) for value in values):
                together[argument] = values if len(values) > 1 else values[0]
            elif self._is_shared(argument, values):
                together[argument] = values[0]
            else:
                return [(slice(i, i + 1), self._single(row)) for i, row in enumerate(metadata)]
        return [(slice(0, len(metadata)), together)]

    def _is_shared(self, argument: str, values: list[Any]) -> bool:
        plain = all(isinstance(value, (str, int, float)) and value == values[0] for value in values)
        return plain and (argument in self.texts or not isinstance(values[0], str))

    def _single(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the call of one sample."""
        return {argument: self._value(argument, row[column]) for argument, column in self.columns.items()}

    def _value(self, argument: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._opened(argument, each) for each in value]
        return self._opened(argument, value)

    def _opened(self, argument: str, value: Any) -> Any:
        encoded = isinstance(value, dict) and value.keys() == {"bytes", "path"}
        return (
            open_image(value) if isinstance(value, Image.Image) or encoded or self._is_path(argument, value) else value
        )

    def _is_path(self, argument: str, value: Any) -> bool:
        return isinstance(value, (str, Path)) and argument in self.pictures - self.texts


def read_columns(value: Any) -> dict[str, str] | None:
    """Read which columns go into the pipeline's call.

    Args:
        value (Any): names of columns that are called like the argument, or "argument=column"; or {argument: column}.

    Returns:
        dict[str, str] | None: by argument, the column; None stays None.

    Raises:
        ValueError: if it is something else, or names an argument twice.
    """
    if value is None:
        return None
    entries = [value] if isinstance(value, str) else value
    if isinstance(entries, dict):
        pairs = list(entries.items())
    elif isinstance(entries, (list, tuple)) and all(isinstance(entry, str) for entry in entries):
        pairs = [(entry.partition("=")[0], entry.partition("=")[2] or entry) for entry in entries]
    else:
        pairs = [(None, None)]
    if not all(isinstance(name, str) and name for pair in pairs for name in pair):
        raise ValueError(
            f"pipeline_columns={value!r} must be a list of columns, such as ['image'], or {{argument: column}}, such "
            "as {'image': 'source'}."
        )
    arguments = [argument for argument, _ in pairs]
    if len(set(arguments)) < len(arguments):
        raise ValueError(f"pipeline_columns={value!r} names an argument twice.")
    return dict(pairs)


def column_names(rows: Rows) -> list[str]:
    """Names of all columns, in alphabetical order."""
    return sorted(rows.column_names if isinstance(rows, datasets.Dataset) else {key for row in rows for key in row})


def takes_images(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the arguments of a pipeline's call that take images."""
    parameters = call_parameters(pipeline)
    return [name for name, parameter in parameters.items() if re.search(PICTURE, str(parameter.annotation))]


def _takes_text(annotation: str) -> bool:
    return re.search(r"\bstr\b", re.sub(r"\b([Ll]ist|[Dd]ict)\[str[^]]*]", "", annotation)) is not None


def _example(rows: Rows, column: str) -> Any:
    """The first value of a column that is there."""
    for index, value in _unread_values(rows, column):
        if value is not None:
            return rows[index][column]
    return None


def _unread_values(rows: Rows, column: str) -> Iterator[tuple[int, Any]]:
    """Values of a column by row, of a Dataset without decoding images: those that are there are True."""
    if not isinstance(rows, datasets.Dataset):
        yield from enumerate(row.get(column) for row in rows)
    elif isinstance(rows.features[column], datasets.Value):
        yield from enumerate(rows[column])
    elif not rows.data.column(column).null_count:
        yield 0, True
    else:
        start = 0
        for batch in rows.select_columns([column]).with_format("arrow").iter(1000):
            for offset, valid in enumerate(batch.column(0).is_valid().to_pylist()):
                yield start + offset, valid or None
            start += len(batch)


def _check_given(value: Any, argument: str, column: str, where: str) -> None:
    if value is None:
        raise ValueError(
            f"The column {column!r} goes into the pipeline's call as {argument}, but {where} has no value in it. Give "
            "each row one ('' for no text), or leave it out of pipeline_columns."
        )


def _check_pictures(rows: Rows, column: str) -> None:
    """Decode all images of a column, in threads and a few at a time: a broken one is found before training."""
    if isinstance(rows, datasets.Dataset) and isinstance(rows.features[column], datasets.Image):
        rows = rows.with_format(None).cast_column(column, datasets.Image(decode=False))

    def check(index: int) -> None:
        value = rows[index][column]
        try:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, (Image.Image, dict, str, Path)):
                    open_image(each)
        except ValueError as error:
            raise ValueError(f"Row {index}, column {column!r}: {error}") from error

    with ThreadPoolExecutor(PICTURE_THREADS) as threads:
        for start in range(0, len(rows), 16 * PICTURE_THREADS):
            list(threads.map(check, range(start, min(start + 16 * PICTURE_THREADS, len(rows)))))


def _check_wanted(
    pipeline: str, wanted: dict[str, str], parameters: Mapping[str, inspect.Parameter], call_kwargs: Mapping[str, Any]
) -> None:
    for argument in wanted:
        if argument in OWN_ARGUMENTS:
            raise ValueError(f"pipeline_columns cannot give {argument}: {OWN_ARGUMENTS[argument]}.")
        if argument not in parameters:
            known = [name for name in parameters if name not in OWN_ARGUMENTS]
            raise TypeError(
                f"pipeline_columns gives {argument}, but {pipeline} cannot be called with it.{_hint(argument, known)} "
                f"It takes: {', '.join(known)}. A column of another name is given as {{argument: column}}."
            )
        if argument in call_kwargs:
            raise ValueError(
                f"The argument {argument} comes from pipeline_columns and is set for all samples, to "
                f"{call_kwargs[argument]!r:.100}. Drop one of them."
            )


def _check_required(pipeline: str, parameters: Mapping[str, inspect.Parameter], given: set[str]) -> None:
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind not in PASSED_ON]
    missing = [name for name in required if name not in given]
    if missing:
        raise TypeError(
            f"{pipeline} cannot be called without {', '.join(missing)}. Give the prompts a column for each, called so "
            "or named by pipeline_columns={argument: column}, or set what is the same for all in sample_kwargs "
            "(call_kwargs in an evaluation)."
        )


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""
