"""Scores a pipeline on prompts by evaluators: images with fixed noise first, then one evaluator after another."""

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from ..prompts.columns import read_columns
from ..prompts.sources import PromptSource
from ..rewards import RewardSet
from .evaluators import Evaluator, EvaluatorSource, as_evaluators
from .generation import Generation, PipelineSource, process_device
from .identity import identify_pipeline
from .partial import PartialScores
from .rows import load_rows
from .settings import as_json, check_same_pipeline, check_unchanged, read_json, write_json
from .tables import (
    ALL,
    Columns,
    EvaluatorSummary,
    as_columns,
    details_of,
    merge_scores,
    read_table,
    summarize,
    write_summaries,
    write_table,
)

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "trl-leapalign")
SETTINGS = "settings.json"
STATE = "pipeline_state"
COMMIT = "adapter_commit"
"""Where the settings keep what `identify_pipeline` found."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found and where it is kept.

    Args:
        output_dir (Path): the folder.
        report (Path): the table, Markdown.
        summaries (dict[str, EvaluatorSummary]): by evaluator, in the order in which they first judged.
    """

    output_dir: Path
    report: Path
    summaries: dict[str, EvaluatorSummary]


def evaluate(
    pipeline: PipelineSource,
    rows: PromptSource,
    evaluators: EvaluatorSource | Sequence[EvaluatorSource],
    output_dir: str | Path,
    *,
    adapter: str | Path | None = None,
    adapter_kwargs: dict[str, str] | None = None,
    images_per_prompt: int = 4,
    seed: int = 0,
    batch_size: int = 1,
    call_kwargs: dict[str, Any] | None = None,
    group_by: str | None = None,
    prompt_column: str = "prompt",
    pipeline_columns: list[str] | dict[str, str] | None = None,
) -> Evaluation:
    """Sample images of prompts, have them judged, and write tables; all processes share the work.

    Image k of row p has the number `p * images_per_prompt + k`, and its noise follows from the seed and that number.
    Images and scores that are in `output_dir` are not made again, so that a run that was stopped goes on where it was,
    also within an evaluator, and further evaluators judge the same images.

    Args:
        pipeline (PipelineSource): a pipeline, its Hub id or path, or a function that returns one.
        rows (PromptSource): prompts with other columns: "geneval", a file of its metadata, or whatever
            `load_prompts` takes.
        evaluators (EvaluatorSource | Sequence[EvaluatorSource]): names of `EVALUATORS`, callables of a reward's
            contract, or `Evaluator`s, which are loaded one after another.
        output_dir (str | Path): where images, scores and tables go.
        adapter (str | Path | None): LoRA for a pipeline that is not given loaded: a folder, a file or a Hub id.
        adapter_kwargs (dict[str, str] | None): "revision", "subfolder" and "weight_name" of the adapter. The commit
            that a revision is at is kept with the results; results of other weights are not used again.
        images_per_prompt (int): images of each row.
        seed (int): of the noise.
        batch_size (int): images sampled, or judged, at a time.
        call_kwargs (dict[str, Any] | None): arguments of the pipeline's call, such as `num_inference_steps`.
        group_by (str | None): the column whose values the scores are split by.
        prompt_column (str): the column that holds the prompt.
        pipeline_columns (list[str] | dict[str, str] | None): columns that go into the call, or the column of each
            argument. None takes columns of images and texts that are called like an argument; [] takes none.

    Returns:
        Evaluation: the means, also those of evaluators that judged these images before.

    Raises:
        TypeError: if something is of the wrong kind.
        ValueError: if something does not fit, or `output_dir` holds results of other settings.
    """
    judges = as_evaluators(evaluators)
    rows = load_rows(rows, prompt_column)
    for judge in judges:
        judge.check_rows(rows)
    if group_by is not None and any(group_by not in row for row in rows):
        raise ValueError(f"group_by={group_by!r} is no column of all prompts. The first has {sorted(rows[0])}.")
    directory = Path(output_dir)
    options = (adapter, images_per_prompt, seed, batch_size, call_kwargs or {}, prompt_column)
    options += (read_columns(pipeline_columns), adapter_kwargs or {})
    generation = Generation(pipeline, rows, directory / "images", *options)
    groups = [ALL] * len(generation)
    if group_by is not None:
        groups = [str(row[group_by]) for row in rows for _ in range(images_per_prompt)]
    before = _read_settings(directory, generation, judges)
    _make_images(directory, generation, before)
    for judge in judges:
        _judge(directory, generation, judge, groups)
    return _write_tables(directory, groups)


def _read_settings(directory: Path, generation: Generation, judges: Sequence[Evaluator]) -> dict[str, Any]:
    """What is in a folder was made with, once it is sure that it fits."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir={str(directory)!r} is a file. Choose a folder.")
    before = read_json(directory / SETTINGS)
    if before and not {"images", "versions", "evaluators"} <= before.keys():
        raise ValueError(f"{directory / SETTINGS} is none of an evaluation. Choose another output_dir.")
    if not before and generation.directory.exists() and any(generation.directory.iterdir()):
        raise ValueError(
            f"{directory} has images, but no {SETTINGS} that says what made them. Choose another output_dir."
        )
    if before:
        images = {key: value for key, value in before["images"].items() if key not in (STATE, COMMIT)}
        check_unchanged(directory, images, as_json(generation.made_with), "delete that folder")
        now = _versions()
        changed = [name for name in now if now[name] != before["versions"].get(name)]
        if changed:
            logger.warning(
                f"{directory} was begun with other versions of {', '.join(changed)}; results may differ a little."
            )
    for judge in judges:
        known = before.get("evaluators", {}).get(judge.name, {})
        for path in (score_path(directory, judge.name), _partial_path(directory, judge.name)):
            if path.exists():
                what = "folder" if path.is_dir() else "file"
                check_unchanged(path, known, as_json(judge.made_with), f"delete that {what}")
    PartialState().wait_for_everyone()
    return before


def _make_images(directory: Path, generation: Generation, before: dict[str, Any]) -> None:
    """Phase one: sample what is missing."""
    state = PartialState()
    missing = generation.missing()
    state.wait_for_everyone()
    if not missing and isinstance(generation.source, (str, Path)):
        return  # its files are among the settings, which were compared
    pipeline = generation.load()
    found = identify_pipeline(pipeline)
    if before:
        check_same_pipeline(directory, before["images"].get(STATE, {}), found, "delete that folder")
    elif state.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        files = generation.adapter_files
        notes = {} if files is None or files.commit is None else {COMMIT: files.commit}
        images = {**generation.made_with, STATE: found, **notes}
        write_json(directory / SETTINGS, {"images": images, "versions": _versions(), "evaluators": {}})
    state.wait_for_everyone()  # no image before the settings that it was made with
    logger.info(f"{len(missing)} of {len(generation)} images are sampled.")
    generation.sample(pipeline, missing)
    del pipeline
    _free()


def _judge(directory: Path, generation: Generation, judge: Evaluator, groups: Sequence[str]) -> None:
    """Phase two: load one evaluator, score the images that it has not judged, write the scores and let go of it."""
    path, partial = score_path(directory, judge.name), PartialScores(_partial_path(directory, judge.name))
    exists, before = path.exists(), partial.read() if judge.reusable else []
    state = PartialState()
    state.wait_for_everyone()
    if exists and judge.reusable:
        return
    if state.is_main_process and not judge.reusable:
        partial.remove()
    if state.is_main_process:
        settings = read_json(directory / SETTINGS)
        settings["evaluators"][judge.name] = as_json(judge.made_with)
        write_json(directory / SETTINGS, settings)
    done = {row["number"] for row in before}
    missing = [number for number in range(len(generation)) if number not in done]
    logger.info(f"{judge.name} judges {len(missing)} of {len(generation)} images.")
    function = judge.load()
    device = next((p.device for p in function.parameters()), None) if isinstance(function, nn.Module) else None
    rewards = RewardSet([function])
    rewards.prepare(process_device())
    found = _score(generation, rewards, missing[state.process_index :: state.num_processes], partial)
    if device is not None:
        function.to(device)
    del function, rewards
    _free()
    scored = sorted([*before, *gather_object(found)], key=lambda row: row["number"])
    if state.is_main_process:
        path.parent.mkdir(exist_ok=True)
        write_table(path, as_columns([{**row, "group": groups[row["number"]]} for row in scored]))
        partial.remove()
    state.wait_for_everyone()


def _score(
    generation: Generation, rewards: RewardSet, numbers: Sequence[int], partial: PartialScores
) -> list[dict[str, Any]]:
    """Scores and details of some images, one row each, which are also kept batch by batch."""
    rows = []
    for begin in range(0, len(numbers), generation.batch_size):
        batch = list(numbers[begin : begin + generation.batch_size])
        prompts, metadata = zip(*map(generation.row, batch), strict=True)
        images = generation.read(batch).to(process_device())
        with torch.no_grad():
            scores = rewards(images, list(prompts), list(metadata))
        details = details_of(scores.details[rewards.names[0]], len(batch))
        for number, prompt, score, detail in zip(batch, prompts, scores.rewards[0].tolist(), details, strict=True):
            if math.isinf(score):
                logger.warning("%s gives image %d an infinite score, which counts as none.", rewards.names[0], number)
                score = math.nan
            rows.append({"number": number, "prompt": prompt, "group": "", "score": score, **detail})
        partial.add(PartialState().process_index, rows[-len(batch) :])
    return rows


def _write_tables(directory: Path, groups: list[str]) -> Evaluation:
    """Sum up all scores that are there, under the groups of this call."""
    state = PartialState()
    known = read_json(directory / SETTINGS)["evaluators"]
    scores: dict[str, Columns] = {}
    for name in known:
        path = score_path(directory, name)
        if path.exists():
            table = read_table(path)
            if state.is_main_process and table["group"] != groups:
                write_table(path, {**table, "group": groups})
            scores[name] = {**table, "group": groups}
    summaries = {name: summarize(table, known[name]["is_geneval"]) for name, table in scores.items()}
    if state.is_main_process:
        write_table(directory / "scores.parquet", merge_scores(scores))
        write_summaries(directory, summaries)
    state.wait_for_everyone()
    return Evaluation(directory, directory / "report.md", summaries)


def score_path(directory: Path, name: str) -> Path:
    """File of an evaluator's scores."""
    return directory / "scores" / f"{name}.parquet"


def _partial_path(directory: Path, name: str) -> Path:
    """Folder of the scores of an evaluator that is not done."""
    return directory / "scores" / f"{name}.partial"


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _free() -> None:
    """Give memory of what is no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
