"""Several evaluations side by side, and the paired differences to the first."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..markdown import escape
from .run import SETTINGS, score_path
from .settings import read_json, shorten
from .statistics import Estimate
from .tables import ALL, Columns, finite, group_means, read_table

SHARED = ("prompts_sha256", "num_prompts", "images_per_prompt", "seed")
"""Settings in which runs must agree, so that image i of each has the same prompt and the same random numbers."""
NOTE = """Mean ± standard error, clustered by prompt. A difference is that of the run to the first one, image by image
of the same prompt and noise; p is of the two-sided paired t-test (prompts - 1 degrees of freedom), not corrected for
the number of tests. Images that either run has no score for are left out of the difference. For GenEval, groups are its
tags, and "all" is the mean over the six."""


@dataclass(frozen=True)
class ComparedScore:
    """A run's scores beside those of the first run.

    Args:
        evaluator (str): what judged.
        group (str): of the images.
        run (str): name of the run.
        estimate (Estimate): mean of its scores.
        difference (Estimate | None): mean of its scores minus those of the first run; None for the first.
        p_value (float | None): of the paired test; None for the first.
    """

    evaluator: str
    group: str
    run: str
    estimate: Estimate
    difference: Estimate | None
    p_value: float | None


@dataclass(frozen=True)
class PairedComparison:
    """Evaluations side by side.

    Args:
        runs (tuple[str, ...]): their names, the first being what the others are compared with.
        scores (tuple[ComparedScore, ...]): one for each evaluator, group and run.
    """

    runs: tuple[str, ...]
    scores: tuple[ComparedScore, ...]

    def find(self, evaluator: str, run: str, group: str = ALL) -> ComparedScore:
        """The entry of an evaluator, a run and a group.

        Raises:
            KeyError: if there is none.
        """
        for score in self.scores:
            if (score.evaluator, score.group, score.run) == (evaluator, group, run):
                return score
        raise KeyError((evaluator, run, group))

    def markdown(self) -> str:
        """Two tables: runs by evaluators; then each group, with the differences to the first run."""
        names = list(dict.fromkeys(score.evaluator for score in self.scores))
        overall = [f"| run | {' | '.join(map(escape, names))} |", "|---|" + "---:|" * len(names)]
        for run in self.runs:
            overall.append(f"| {escape(run)} | {' | '.join(str(self.find(name, run).estimate) for name in names)} |")
        columns = [escape(self.runs[0])]
        for run in map(escape, self.runs[1:]):
            columns += [run, f"{run} - {columns[0]}"]
        lines = ["| evaluator | group | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
        by_line: dict[tuple[str, str], list[str]] = {}
        for score in self.scores:
            cells = by_line.setdefault((score.evaluator, score.group), [])
            cells.append(str(score.estimate))
            if score.difference is not None:
                cells.append(f"{score.difference}, p = {score.p_value:.2g}")
        lines += [
            f"| {escape(name)} | {escape(group)} | " + " | ".join(row) + " |" for (name, group), row in by_line.items()
        ]
        return "\n".join([*overall, "", *lines, "", NOTE]) + "\n"

    def write(self, directory: str | Path) -> Path:
        """Write comparison.md and comparison.json.

        Args:
            directory (str | Path): where they go.

        Returns:
            Path: comparison.md.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        rows = [finite(asdict(score)) for score in self.scores]
        (directory / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        path = directory / "comparison.md"
        path.write_text(self.markdown(), encoding="utf-8")
        return path


def compare_evaluations(directories: Sequence[str | Path]) -> PairedComparison:
    """Compare evaluations of the same prompts with the same noise.

    Args:
        directories (Sequence[str | Path]): output folders of `evaluate`, at least two; the first is what the others
            are compared with. Evaluators that not all have are left out.

    Returns:
        PairedComparison: scores and differences.

    Raises:
        ValueError: if a folder has no evaluation, or the evaluations cannot be compared.
        ImportError: if scipy is not installed.
    """
    folders = [Path(directory) for directory in directories]
    if len(folders) < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"Give at least two different folders to compare, got {[str(folder) for folder in folders]}.")
    settings = [_settings_of(folder) for folder in folders]
    for folder, other in zip(folders[1:], settings[1:], strict=True):
        _check_comparable(folders[0], settings[0]["images"], folder, other["images"], SHARED)
    runs = _names(folders)
    names = [name for name in settings[0]["evaluators"] if all(score_path(folder, name).exists() for folder in folders)]
    if not names:
        raise ValueError(
            f"No evaluator has judged all of {[str(folder) for folder in folders]}. Run one on all of them."
        )
    found: list[ComparedScore] = []
    for name in names:
        first, *others = (each["evaluators"][name] for each in settings)
        for folder, other in zip(folders[1:], others, strict=True):
            _check_comparable(folders[0], first, folder, other, sorted(first.keys() | other.keys()), f"{name}'s ")
        found += _compare(name, runs, [read_table(score_path(folder, name)) for folder in folders], first["is_geneval"])
    return PairedComparison(tuple(runs), tuple(found))


def _compare(evaluator: str, runs: Sequence[str], tables: Sequence[Columns], is_geneval: bool) -> list[ComparedScore]:
    """The entries of one evaluator, under the first run's groups."""
    first = tables[0]
    base = group_means(first, is_geneval)
    found = [ComparedScore(evaluator, group, runs[0], estimate, None, None) for group, estimate in base.items()]
    for run, table in zip(runs[1:], tables[1:], strict=True):
        means = group_means({**first, "score": table["score"]}, is_geneval)
        pairs = zip(table["score"], first["score"], strict=True)
        differences = group_means({**first, "score": [ours - theirs for ours, theirs in pairs]}, is_geneval)
        for group, difference in differences.items():
            found.append(ComparedScore(evaluator, group, run, means[group], difference, difference.p_value))
    return found


def _settings_of(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / SETTINGS)
    if not (settings.get("evaluators") and settings.get("images")):
        raise ValueError(
            f"{folder} holds no finished evaluation. Run trl-leapalign evaluate --output_dir {folder} first."
        )
    return settings


def _check_comparable(
    first: Path, expected: dict[str, Any], folder: Path, found: dict[str, Any], names: Sequence[str], of: str = ""
) -> None:
    for name in names:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{folder} cannot be compared with {first}: {of}{name} is {shorten(found.get(name))}, not "
                f"{shorten(expected.get(name))}. Evaluate both with the same prompts, images_per_prompt, seed and "
                "evaluator settings."
            )


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the runs: those of their folders if they differ, else the whole paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
