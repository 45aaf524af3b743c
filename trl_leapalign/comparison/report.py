"""Tables, curves and a sheet of images from the results of several runs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..evaluation.statistics import Estimate, difference, mean_over_seeds
from ..markdown import escape
from ..media import read_preview

BASE = "base"
"""Name of the pipeline before training among the results."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Result:
    """One training run and what the evaluators say of it.

    Args:
        name (str): of the run.
        seed (int | None): of its training; None for the pipeline before training.
        settings (dict[str, Any]): in which it differs from the others.
        history (list[dict[str, float]]): what training logged, update by update.
        scores (dict[str, list[float]]): by evaluator, the score of each image, length N.
        groups (list[str]): what each image belongs to, length N.
    """

    name: str
    seed: int | None
    settings: dict[str, Any]
    history: list[dict[str, float]]
    scores: dict[str, list[float]]
    groups: list[str]

    @property
    def updates(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def seconds(self) -> list[float]:
        """Time of training up to each entry of the history."""
        total, previous, times = 0.0, 0, []
        for entry in self.history:
            total += entry["seconds_per_step"] * (entry["step"] - previous)
            previous = entry["step"]
            times.append(total)
        return times

    @property
    def gradient_norm(self) -> float:
        """Median over the updates, before it is limited; 0 without training."""
        return median(entry["grad_norm"] for entry in self.history) if self.history else 0.0

    def by_group(self, evaluator: str | None = None) -> dict[str, float]:
        """Mean score of each group, without images that have none (NaN); None is the first evaluator."""
        values = self.scores[evaluator or next(iter(self.scores))]
        chosen: dict[str, list[float]] = {}
        for group, value in zip(self.groups, values, strict=True):
            chosen.setdefault(group, []).extend([value] if math.isfinite(value) else [])
        return {group: fmean(each) if each else math.nan for group, each in chosen.items()}

    @property
    def overall(self) -> float:
        """Mean over the groups of the first evaluator's mean score."""
        return fmean(self.by_group().values())


def write_report(directory: Path, results: Sequence[Result]) -> Path:
    """Write report.md, report.json, curves.png and, if images were kept, images.png.

    Args:
        directory (Path): of the comparison, with `runs/` in it.
        results (Sequence[Result]): of all runs and seeds; the first run is what the others are compared with.

    Returns:
        Path: report.md.

    Raises:
        ImportError: if matplotlib or scipy is not installed.
    """
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    rows = {name: _row(each) for name, each in by_name.items()}
    tests = _significance({name: [result.overall for result in each] for name, each in by_name.items()})
    draw_curves(by_name, directory / "curves.png")
    has_sheet = draw_sheet(by_name, directory)
    report = {
        name: {column: vars(value) if isinstance(value, Estimate) else value for column, value in row.items()}
        | {"p_value": tests.get(name), "settings": [result.settings for result in by_name[name]]}
        for name, row in rows.items()
    }
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    path = directory / "report.md"
    path.write_text(_markdown(rows, tests, has_sheet), encoding="utf-8")
    return path


def _row(results: Sequence[Result]) -> dict[str, Estimate]:
    """Columns of a run's line in the table, each over its seeds."""
    evaluator, *others = results[0].scores
    columns = {group: [result.by_group()[group] for result in results] for group in results[0].by_group()}
    if len(columns) > 1:
        columns["mean"] = [result.overall for result in results]
    else:
        columns = {evaluator: next(iter(columns.values()))}
    columns |= {other: [fmean(result.by_group(other).values()) for result in results] for other in others}
    missing = [sum(not math.isfinite(value) for value in result.scores[evaluator]) for result in results]
    if any(missing):
        columns["images without score"] = missing
    summaries = {column: mean_over_seeds(values) for column, values in columns.items()}
    if not any(result.history for result in results):
        return summaries
    rates = [result.settings.get("learning_rate") for result in results]
    if None not in rates:
        summaries["learning rate"] = mean_over_seeds(rates[:1])
    trained = {
        "updates": [result.updates for result in results],
        "seconds": [result.seconds[-1] if result.history else math.nan for result in results],
        "gradient norm": [result.gradient_norm for result in results],
    }
    return summaries | {column: mean_over_seeds(values) for column, values in trained.items()}


def _significance(overall: dict[str, list[float]]) -> dict[str, float]:
    """Welch's test of each run against the first one, over seeds: two-sided p-values by name, corrected after Holm."""
    first, *others = [name for name in overall if name != BASE]
    values = {
        name: difference(mean_over_seeds(overall[name]), mean_over_seeds(overall[first])).p_value
        for name in others
        if len(overall[name]) > 1 and len({*overall[name], *overall[first]}) > 2
    }
    corrected, least = {}, 0.0
    for rank, name in enumerate(sorted((name for name in values if math.isfinite(values[name])), key=values.get)):
        least = max(least, min(1.0, (len(values) - rank) * values[name]))
        corrected[name] = least
    return corrected


def _markdown(rows: dict[str, dict[str, Estimate]], tests: dict[str, float], has_sheet: bool) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [
        "| run | " + " | ".join(map(escape, columns)) + " | against the first |",
        "|---|" + "---:|" * len(columns) + "---|",
    ]
    for name, row in rows.items():
        verdict = ""
        if name in tests:
            verdict = f"{'different' if tests[name] < SIGNIFICANT else 'not significant'}, p = {tests[name]:.2g}"
        cells = [str(row.get(column, "")) for column in columns]
        lines.append(f"| {escape(name)} | " + " | ".join(cells) + f" | {verdict} |")
    pictures = ["![Curves](curves.png)"] + (["![Images by run and group](images.png)"] if has_sheet else [])
    note = (
        "Mean ± standard error over seeds. The last column is Welch's test of the mean over groups against the first "
        "run, over seeds, corrected for their number after Holm. The gradient norm is the median over updates. The "
        "curves show the change of the reward since the first updates: methods that reward a prediction start lower."
    )
    return "\n".join([*lines, "", note, "", *pictures]) + "\n"


def draw_curves(by_name: dict[str, list[Result]], path: Path) -> None:
    """Plot reward against updates and seconds, and gradient norm against updates: means over seeds.

    Args:
        by_name (dict[str, list[Result]]): the seeds of each run.
        path (Path): of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    rewards, times, norms = figure.subplots(1, 3)
    for name, results in by_name.items():
        length = min(len(result.history) for result in results)
        if not length:
            continue
        steps = [entry["step"] for entry in results[0].history[:length]]
        seconds = [fmean(each) for each in zip(*(result.seconds[:length] for result in results), strict=True)]
        reward, norm = (_smooth_mean(results, key, length) for key in ("reward", "grad_norm"))
        start = reward[min(9, length - 1)]
        reward = [value - start for value in reward]
        label = name.replace("$", r"\$")
        rewards.plot(steps, reward, label=label)
        times.plot(seconds, reward, label=label)
        norms.plot(steps, norm, label=label)
    rewards.set(xlabel="update", ylabel="change of the reward in training")
    times.set(xlabel="seconds of training", ylabel="change of the reward in training")
    norms.set(xlabel="update", ylabel="gradient norm", yscale="log")
    rewards.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _smooth_mean(results: Sequence[Result], key: str, length: int, window: int = 10) -> list[float]:
    """Mean over seeds, then over up to `window` entries up to each one."""
    means = [fmean(result.history[index][key] for result in results) for index in range(length)]
    return [fmean(means[max(0, index + 1 - window) : index + 1]) for index in range(length)]


def draw_sheet(by_name: dict[str, list[Result]], directory: Path) -> bool:
    """Draw the images that were kept, a line for each run (its first seed) and a column for each prompt.

    Of a video it shows the first, middle and last frame; the whole one is in the run's folder.

    Args:
        by_name (dict[str, list[Result]]): the seeds of each run.
        directory (Path): of the comparison; images.png is written there.

    Returns:
        bool: whether there were images.
    """
    from matplotlib.figure import Figure

    folders = {}
    for name, results in by_name.items():
        seed = "" if results[0].seed is None else f"seed_{results[0].seed}"
        folders[name] = sorted((directory / "runs" / name / seed / "images").glob("*.png"))
    columns = max(map(len, folders.values()))
    if not columns:
        return False
    figure = Figure(figsize=(1.6 * columns, 1.7 * len(folders)), layout="constrained")
    axes = figure.subplots(len(folders), columns, squeeze=False)
    groups = next(iter(by_name.values()))[0].groups
    for line, (name, paths) in enumerate(folders.items()):
        for column, path in enumerate(paths):
            axes[line, column].imshow(read_preview(path))
            axes[line, column].set(xticks=[], yticks=[])
            if line == 0:
                axes[line, column].set_title(groups[int(path.stem)], fontsize=8, parse_math=False)
        axes[line, 0].set_ylabel(name, fontsize=8, parse_math=False)
    figure.savefig(directory / "images.png", dpi=110)
    return True
