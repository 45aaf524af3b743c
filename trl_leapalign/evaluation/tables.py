"""Scores in files, and what they come to: means by evaluator and group."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
from pyarrow import parquet
from torch import Tensor

from ..markdown import escape
from .geneval.metadata import TAGS
from .geneval.rules import summarize_geneval
from .statistics import UNKNOWN, Estimate, clustered_mean, mean_of

Columns: TypeAlias = dict[str, list]
"""A table: values by name of the column, all of the same length."""

FIXED = ("number", "prompt", "group", "score")
ALL = "all"
"""Name of the group of all images."""
NOTE = """Mean ± standard error of the scores. The standard error is clustered by prompt, as images of one prompt are
alike: it is that of the prompts' means if all have equally many images. Images without a score (NaN) are left out and
counted. For GenEval, groups are its tags, and "all" is the mean over the six; else it is the mean over all images."""


@dataclass(frozen=True)
class EvaluatorSummary:
    """What an evaluator says of all images.

    Args:
        overall (Estimate): mean over the images; for GenEval, over its six tags.
        by_group (dict[str, Estimate]): mean over the images of each group; for GenEval, of each tag.
        num_unscored (int): images without a score.
    """

    overall: Estimate
    by_group: dict[str, Estimate]
    num_unscored: int


def group_means(scores: Columns, is_geneval: bool = False) -> dict[str, Estimate]:
    """Average the scores of each group.

    Args:
        scores (Columns): with prompt, group and score; for GenEval, also tag.
        is_geneval (bool): whether groups are GenEval's tags.

    Returns:
        dict[str, Estimate]: "all" images first. For GenEval that is the mean over the six tags, NaN if one has no
            score; for others the groups are left out if there is but one.
    """
    names = scores["tag" if is_geneval else "group"]
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name, []).append(index)
    means = {
        name: clustered_mean(*([scores[key][index] for index in members[name]] for key in ("score", "prompt")))
        for name in (sorted(members, key=TAGS.index) if is_geneval else members)
    }
    if is_geneval:
        overall = mean_of(list(means.values())) if len(means) == len(TAGS) else UNKNOWN
    else:
        overall = clustered_mean(scores["score"], scores["prompt"])
        means = means if len(means) > 1 else {}
    return {ALL: overall, **{f"{name} (group)" if name == ALL else name: mean for name, mean in means.items()}}


def summarize(scores: Columns, is_geneval: bool = False) -> EvaluatorSummary:
    """Sum up an evaluator's scores; GenEval's by `summarize_geneval`.

    Args:
        scores (Columns): with prompt, group and score; for GenEval, also tag.
        is_geneval (bool): whether they are GenEval's verdicts.

    Returns:
        EvaluatorSummary: the means.

    Raises:
        ValueError: if a verdict of GenEval is neither 0 nor 1, or a tag is unknown.
    """
    means = group_means(scores, is_geneval)
    overall = means.pop(ALL)
    kept = [index for index, score in enumerate(scores["score"]) if not math.isnan(score)]
    if is_geneval:
        verdicts, tags = ([scores[key][index] for index in kept] for key in ("score", "tag"))
        overall = replace(overall, mean=summarize_geneval(verdicts, tags).score)
    return EvaluatorSummary(overall, means, len(scores["score"]) - len(kept))


def write_table(path: Path, columns: Mapping[str, list]) -> None:
    """Write a Parquet file, at once or not at all."""
    part = path.with_name(path.name + ".part")
    parquet.write_table(pyarrow.table(dict(columns)), part)
    os.replace(part, path)


def read_table(path: Path) -> Columns:
    """Read a Parquet file."""
    return parquet.read_table(path).to_pydict()


def details_of(details: Mapping[str, Any], count: int) -> list[dict[str, float | str]]:
    """Of what an evaluator returned beside its scores, numbers and texts that there is one of for each image.

    Args:
        details (Mapping[str, Any]): by name.
        count (int): images, B.

    Returns:
        list[dict[str, float | str]]: for each image, by name; numbers are floats.
    """
    rows: list[dict[str, float | str]] = [{} for _ in range(count)]
    for key, values in details.items():
        values = values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else values
        if not isinstance(values, (list, tuple)) or len(values) != count:
            continue
        name = f"{key}_detail" if key in FIXED else str(key)
        for row, value in zip(rows, values, strict=True):
            if isinstance(value, (int, float, str)):
                row[name] = value if isinstance(value, str) else float(value)
    return rows


def as_columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Turn rows into columns; what a row lacks is None, and a column with some texts is all texts."""
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    for key, values in columns.items():
        if any(isinstance(value, str) for value in values):
            columns[key] = [value if value is None else str(value) for value in values]
    return columns


def merge_scores(scores: Mapping[str, Columns]) -> Columns:
    """Put the scores of all evaluators into one table.

    Args:
        scores (Mapping[str, Columns]): by evaluator, in the same order of images.

    Returns:
        Columns: number, prompt, group, and for each evaluator its score under its name and each of its details under
            "evaluator/detail".
    """
    merged = {name: next(iter(scores.values()))[name] for name in FIXED[:-1]}
    for evaluator, columns in scores.items():
        merged[evaluator] = columns["score"]
        merged |= {f"{evaluator}/{key}": values for key, values in columns.items() if key not in FIXED}
    return merged


def write_summaries(directory: Path, summaries: Mapping[str, EvaluatorSummary]) -> Path:
    """Write report.md and report.json.

    Args:
        directory (Path): where they go.
        summaries (Mapping[str, EvaluatorSummary]): by evaluator.

    Returns:
        Path: report.md.
    """
    lines = ["| evaluator | group | score | images | prompts | without score |", "|---|---|---:|---:|---:|---:|"]
    for name, summary in summaries.items():
        for group, estimate in {ALL: summary.overall, **summary.by_group}.items():
            unscored = str(summary.num_unscored) if group == ALL else ""
            counts = f"{estimate.num_images} | {estimate.num_prompts} | {unscored}"
            lines.append(f"| {escape(name)} | {escape(group)} | {estimate} | {counts} |")
    path = directory / "report.md"
    path.write_text("\n".join([*lines, "", NOTE]) + "\n", encoding="utf-8")
    report = {name: finite(asdict(summary)) for name, summary in summaries.items()}
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def finite(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have, all the way down."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
