"""Prompt files: what is text in a file stays the text that it is, and a broken line is an error with its number."""

import csv
import glob
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

Rows = list[dict[str, Any]]

TEXT_FILES = (".txt", "")
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")


def read_file(path: Path, prompt_column: str) -> datasets.Dataset | Rows:
    """Read a file of prompts.

    Text has one prompt a line. The other kinds have columns, the same for all rows: what a row lacks is None. The cells
    of a CSV are texts; a column other than the prompts is one of numbers if each of its cells is written as Python
    writes that number, so that "7" is 7 and "007" stays "007".

    Args:
        path (Path): the file: .txt, or without a suffix; .json, .jsonl, .csv or .parquet.
        prompt_column (str): the column that holds the prompt.

    Returns:
        datasets.Dataset | list[dict]: rows; a Dataset of a .parquet file.

    Raises:
        ValueError: if the file is of another kind, empty or broken, or not in UTF-8.
    """
    suffix = path.suffix.lower()
    if suffix not in (*TEXT_FILES, *DATA_FILES):
        raise ValueError(
            f"The prompt file {str(path)!r} is of no known kind. Give text with one prompt a line as .txt, or "
            f"{', '.join(DATA_FILES)}."
        )
    try:
        if suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        text = path.read_bytes().decode("utf-8-sig")
        if suffix in TEXT_FILES:
            return [{prompt_column: line.strip()} for line in text.split("\n") if line.strip()]
        if not text.strip():
            raise ValueError("there is nothing in it")
        rows = _csv_rows(text, prompt_column) if suffix == ".csv" else _json_rows(text, prompt_column)
    except (DatasetGenerationError, StopIteration, ValueError, RecursionError) as error:
        raise ValueError(f"The prompt file {str(path)!r} is empty, broken or not in UTF-8: {error}") from error
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _csv_rows(text: str, prompt_column: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    names = [name or f"Unnamed: {index}" for index, name in enumerate(lines[0][1])]
    if len(set(names)) < len(names):
        raise ValueError(f"line {lines[0][0]} names a column twice: {names}")
    for number, fields in lines[1:]:
        if len(fields) != len(names):
            raise ValueError(
                f"line {number} has {len(fields)} fields, but the columns are {names}: {fields!r:.200}. Put a text "
                'with a comma in double quotes: "a cat, sitting".'
            )
    columns = {name: [fields[index] for _, fields in lines[1:]] for index, name in enumerate(names)}
    for name, cells in columns.items():
        values = list(map(_number, cells))
        if name != prompt_column and any(cells) and not any(isinstance(value, str) for value in values):
            columns[name] = values
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _number(cell: str) -> int | float | str | None:
    """The number that a cell is the Python spelling of, else its text; None for an empty one."""
    for kind in (int, float):
        try:
            value = kind(cell)
        except ValueError:
            continue
        if repr(value) == cell and math.isfinite(value):
            return value
    return cell or None


def _json_rows(text: str, prompt_column: str) -> Rows:
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not _is_json(lines[0][1]):  # one object over several lines, which is broken
            raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
        return [_json_row(line, number) for number, line in lines]
    if isinstance(content, dict) and content and all(isinstance(each, list) for each in content.values()):
        if len({len(each) for each in content.values()}) == 1 and isinstance(content.get(prompt_column), list):
            return [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
    rows = content if isinstance(content, list) else [content]
    rows = [{prompt_column: row} if isinstance(row, str) else row for row in rows]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} is {row!r:.100}, where an object {{{prompt_column!r}: ...}} is needed")
    return rows


def _json_row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}: {line.strip()!r:.100}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no object: {line.strip()!r:.100}")
    return row


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return line.strip() not in ("{", "[") and not line.strip().endswith((",", "{", "["))
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"an object has {twice[0]!r} twice")
    return dict(pairs)
