"""Trains several methods, or settings of one, on the same prompts and seeds, and judges them on the same images."""

import gc
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..evaluation.evaluators import Evaluator, check_rows, named_rewards
from ..evaluation.identity import Unidentifiable, identify, identify_pipeline
from ..evaluation.scoring import score_pipeline
from ..evaluation.settings import as_json, check_same_pipeline, check_unchanged, read_json, write_json
from ..leapalign_config import LeapAlignConfig
from ..leapalign_trainer import LeapAlignTrainer
from ..media import as_text, save_sample
from ..prompts.columns import CallColumns
from ..ranges import Range
from ..rewards import NamedReward, RewardFunction, RewardSet
from ..rewards.reward_set import unwrapped
from ..rollout.pipelines import quiet
from ..training.guards import NothingLearnt
from .report import BASE, Result, write_report

logger = logging.getLogger(__name__)

KEPT = ("step", "reward", "grad_norm", "loss", "seconds_per_step", "d_j", "d_0")
"""Of what training logs."""
GIVEN: dict[str, Any] = {
    **dict.fromkeys(("output_dir", "seed", "train_prompts", "eval_prompts", "model_init_kwargs")),
    **{"logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "no", "eval_on_start": False},
}
"""Settings that a comparison makes itself."""
SHARED = (
    *GIVEN,
    *("num_train_epochs", "eval_num_steps", "per_device_eval_batch_size", "pipeline_columns"),
    *("bf16", "fp16", "push_to_hub", "reward_kwargs"),
)
"""Settings that no run can have for itself: those, and those by which all runs are judged."""


@dataclass(frozen=True)
class Job:
    """One training run, or none for the pipeline as it is.

    Args:
        name (str): of the run.
        seed (int | None): of training; None does not train.
        learning_rate (float | None): in place of that of the settings.
        tuning (bool): whether it is a trial of that learning rate, judged on the tuning prompts.
    """

    name: str
    seed: int | None = None
    learning_rate: float | None = None
    tuning: bool = False

    @property
    def folder(self) -> Path:
        """Where its results are kept."""
        if self.tuning:
            return Path("tuning", self.name, f"lr_{self.learning_rate:g}")
        return Path("runs", self.name) if self.seed is None else Path("runs", self.name, f"seed_{self.seed}")


@dataclass(frozen=True)
class Comparison:
    """What is trained, on what, and how it is judged.

    Every run trains for `config.max_steps` updates or, with `train_seconds`, as many of these as it can in that time.
    Runs of one seed see the same prompts and the same noise. Results are kept in files: what is there is not done
    again.

    Args:
        make_pipeline (Callable[[], DiffusionPipeline]): returns a fresh pipeline, the same each time.
        reward (RewardFunction | Sequence[RewardFunction]): what is trained on.
        config (LeapAlignConfig): the settings that all runs share; results go to its `output_dir`.
        runs (dict[str, dict]): by name, the settings in which a run differs.
        train_rows (Sequence[dict]): prompts to train on.
        eval_rows (Sequence[dict]): prompts to judge on, which no run trains on.
        evaluators (Sequence[RewardFunction]): what judges; the first decides. None is the reward.
        seeds (Sequence[int]): each run is trained once with each.
        num_images (int | None): images to judge a run by, the rows in turn; None is one a row.
        group_by (str | None): the column whose values the scores are split by; the overall score is their mean.
        train_seconds (float | None): time of training, without evaluation.
        learning_rates (Sequence[float]): tried for each run that has none of its own, on `tuning_rows` with
            `tuning_seed`; the best is used.
        tuning_rows (Sequence[dict] | None): a third set of prompts.
        tuning_seed (int): of these trials.
        peft_config (LoraConfig | None): the adapter of all runs; None is the trainer's default.
        pipeline_name (str | None): what the pipeline is called, kept with the results.

    Raises:
        ValueError: if the runs, seeds or learning rates cannot be compared.
        ImportError: if matplotlib or scipy is not installed.
    """

    make_pipeline: Callable[[], DiffusionPipeline]
    reward: RewardFunction | Sequence[RewardFunction]
    config: LeapAlignConfig
    runs: dict[str, dict[str, Any]]
    train_rows: Sequence[dict[str, Any]]
    eval_rows: Sequence[dict[str, Any]]
    evaluators: Sequence[RewardFunction] | None = None
    seeds: Sequence[int] = (0, 1, 2)
    num_images: int | None = None
    group_by: str | None = None
    train_seconds: float | None = None
    learning_rates: Sequence[float] = ()
    tuning_rows: Sequence[dict[str, Any]] | None = None
    tuning_seed: int = 1000
    peft_config: LoraConfig | None = None
    pipeline_name: str | None = None
    judges: RewardSet = field(init=False)

    def __post_init__(self):
        if not self.runs or not all(isinstance(k, str) and isinstance(v, dict) for k, v in self.runs.items()):
            raise ValueError(
                f"runs={self.runs!r} must name at least one run, by a text: {{'leapalign': {{'method': 'leapalign'}}}}."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or self.tuning_seed in self.seeds:
            raise ValueError(f"seeds={list(self.seeds)} must differ, and not be the tuning seed {self.tuning_seed}.")
        for rate in self.learning_rates:
            Range(0, excluded=True).check("learning_rates", rate)
        if bool(self.learning_rates) != (self.tuning_rows is not None):
            raise ValueError("learning_rates are chosen on prompts of their own, tuning_rows: set both or neither.")
        if self.num_images is not None:
            Range(1, whole=True).check("num_images", self.num_images)
        for name in ("train_rows", "eval_rows", "tuning_rows"):
            if getattr(self, name) is not None and not len(getattr(self, name)):
                raise ValueError(f"{name} is empty: there must be at least one prompt.")
        for name in self.runs:
            self._check_run(name)
        if self.train_seconds is not None:
            Range(0, excluded=True).check("train_seconds", self.train_seconds)
        if missing := [name for name in ("matplotlib", "scipy") if find_spec(name) is None]:
            raise ImportError(f'The report needs {" and ".join(missing)}: pip install "trl-leapalign[compare]".')
        if self.group_by is not None and any(self.group_by not in row for row in self.eval_rows):
            raise ValueError(f"group_by={self.group_by!r} is no column of all prompts to judge on.")
        named = named_rewards(self.reward, self.config.reward_kwargs)
        check_rows(named, self.train_rows, self.tuning_rows, *([self.eval_rows] if self.evaluators is None else []))
        rewards = RewardSet(named, self.config.reward_weights, self.config.reward_threshold)
        object.__setattr__(self, "reward", _loaded(rewards, named))
        object.__setattr__(self, "judges", RewardSet(self.reward if self.evaluators is None else self.evaluators))
        groups = {str(row[self.group_by]) for row in self.eval_rows} if self.group_by is not None else set()
        if taken := groups & {"mean", *self.judges.names}:
            raise ValueError(
                f"group_by={self.group_by!r} has groups called like columns of the report: {sorted(taken)}."
            )

    def _check_run(self, name: str) -> None:
        settings = self.runs[name]
        wrong = set(settings) & set(SHARED)
        if name in (BASE, "", ".", "..") or "/" in name or not name.isprintable() or len(name.encode()) > 200 or wrong:
            raise ValueError(
                f"The run {name!r:.250} with {settings} cannot be compared: it is called {BASE!r}, its name is no name "
                f"of a folder, or it sets what all runs share ({', '.join(SHARED)})."
            )
        configs = [self.config_of(Job(name, seed)) for seed in (self.tuning_seed, *self.seeds)]
        ema_decay = configs[0].ema_decay
        if ema_decay is not None and self.train_seconds is not None:
            raise ValueError(
                f"The run {name!r} has ema_decay={ema_decay} beside train_seconds: runs that make fewer "
                "updates would keep more of the untrained weights. Leave ema_decay out."
            )
        if configs[0].full_finetuning and self.peft_config is not None:
            raise ValueError(f"The run {name!r} trains all weights, so the LoRA of all runs has no effect. Drop one.")
        if settings.get("full_finetuning") and "learning_rate" not in settings and not self.learning_rates:
            raise ValueError(f"The run {name!r} trains all weights: set its learning_rate, such as 1e-5.")

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def config_of(self, job: Job) -> LeapAlignConfig:
        """The whole settings of a training run.

        Raises:
            TypeError: if it sets something that `LeapAlignConfig` does not have.
            ValueError: if a setting is out of range.
        """
        own = GIVEN | {"output_dir": str(self.output_dir / job.folder), "seed": job.seed}
        return replace(self.config, **self.settings_of(job), **own)

    def settings_of(self, job: Job) -> dict[str, Any]:
        """The settings in which a training run differs from the others."""
        chosen = {} if job.learning_rate is None else {"learning_rate": job.learning_rate}
        return {**self.runs.get(job.name, {}), **chosen}

    def run(self) -> Path:
        """Do what is not done yet, and write the report.

        Returns:
            Path: the report, Markdown.

        Raises:
            ValueError: if `output_dir` holds results of other settings.
        """
        results = [self._result(Job(BASE))]
        for name in self.runs:
            learning_rate = self._tuned_learning_rate(name)
            results += [self._result(Job(name, seed, learning_rate)) for seed in self.seeds]
        if PartialState().is_main_process:
            write_report(self.output_dir, results)
        PartialState().wait_for_everyone()
        return self.output_dir / "report.md"

    def _tuned_learning_rate(self, name: str) -> float | None:
        """The one of `learning_rates` with which the first evaluator is highest on `tuning_rows`."""
        if not self.learning_rates or "learning_rate" in self.runs[name]:
            return None
        trials = {rate: self._result(Job(name, self.tuning_seed, rate, tuning=True)) for rate in self.learning_rates}
        trained = {rate: trial.overall for rate, trial in trials.items() if not math.isnan(trial.overall)}
        if not trained:
            raise ValueError(
                f"The run {name!r} fails with each of learning_rates={list(trials)}, or gets no score. Try lower ones, "
                "or check the evaluator."
            )
        best = max(trained, key=trained.__getitem__)
        if len(trials) > 1 and best in (min(trials), max(trials)):
            logger.warning(
                f"{name}: {best:g} is at an end of learning_rates={list(trials)}: a better one may lie beyond."
            )
        return best

    def _result(self, job: Job) -> Result:
        """Train and judge once, unless that is done already."""
        directory = self.output_dir / job.folder
        directory.mkdir(parents=True, exist_ok=True)
        made_with = self._made_with(job)
        path, settings_path = directory / "result.json", directory / "settings.json"
        if _agreed(path.exists() and not _holds_unknown(made_with)):
            check_unchanged(directory, read_json(settings_path), made_with, remedy="delete that folder")
            return Result(**read_json(path))
        result = self._measure(job, directory)
        if PartialState().is_main_process:
            write_json(settings_path, made_with)
            write_json(path, asdict(result))
        PartialState().wait_for_everyone()
        return result

    def _made_with(self, job: Job) -> dict[str, Any]:
        """What a result follows from, as far as JSON can hold it."""
        names = [
            item.made_with if isinstance(item, Evaluator) else name
            for item, name in zip(self.reward, RewardSet(self.reward).names, strict=True)
        ]
        known = {
            "code and weights of the judges": [_identity(judge) for judge in self.judges.functions],
            "pipeline": self.pipeline_name,
            "precision": [self.config.bf16, self.config.fp16],
            "judges": self.judges.names,
            "judged_rows": _fingerprint(self.tuning_rows if job.tuning else self.eval_rows),
            "num_images": self.num_images,
            "group_by": self.group_by,
            "call": self.config.call_kwargs(self.config.eval_num_steps),
            "pipeline_columns": self.config.pipeline_columns,
        }
        if job.seed is not None:
            known |= {
                "code and weights of the reward": [_identity(reward) for reward in RewardSet(self.reward).functions]
            }
            known |= {"reward": names, "train_rows": _fingerprint(self.train_rows), "train_seconds": self.train_seconds}
            known |= {"peft_config": self.peft_config and self.peft_config.to_dict()}
            known |= {name: value for name, value in self.config_of(job).to_dict().items() if name != "output_dir"}
        return as_json(known)

    def _measure(self, job: Job, directory: Path) -> Result:
        start = time.perf_counter()
        pipeline = self.make_pipeline().to(self.config.device)
        self._check_same_weights(pipeline)
        placement = {"own_device": self.config.reward_device, "offload": self.config.offload_rewards}
        self.judges.prepare(self.config.device, **placement)
        history, failed = [], False
        if job.seed is not None:
            try:
                history = self._train(pipeline, self.config_of(job))
            except (FloatingPointError, NothingLearnt) as error:
                logger.warning(f"{job.folder}: {error}")
                failed = True
        rows = self.tuning_rows if job.tuning else self.eval_rows
        count = len(rows) if self.num_images is None else self.num_images
        groups = [str(rows[index % len(rows)].get(self.group_by, "all")) for index in range(count)]
        unknown = {name: [math.nan] * count for name in self.judges.names}
        scores = unknown if failed else self._score(pipeline, directory, rows, groups)
        result = Result(job.name, job.seed, as_json(self.settings_of(job)), history, scores, groups)
        logger.info(
            f"{job.folder}: {self.judges.names[0]} {result.overall:.3f} after {result.updates} updates, "
            f"{time.perf_counter() - start:.0f} s"
        )
        del pipeline
        _free_memory()
        return result

    def _check_same_weights(self, pipeline: DiffusionPipeline) -> None:
        """Raise ValueError if what is done was done with other weights or settings of the pipeline."""
        path, found = self.output_dir / "pipeline.json", identify_pipeline(pipeline)
        check_same_pipeline(self.output_dir, read_json(path) or found, found, remedy="delete that folder")
        if PartialState().is_main_process:
            write_json(path, found)

    def _train(self, pipeline: DiffusionPipeline, config: LeapAlignConfig) -> list[dict[str, float]]:
        limit = [] if self.train_seconds is None else [TimeLimit(self.train_seconds)]
        arguments = {"train_dataset": self.train_rows, "peft_config": self.peft_config, "callbacks": limit}
        config = replace(config, reward_kwargs=None)  # the rewards are loaded
        trainer = LeapAlignTrainer(pipeline, self.reward, config, **arguments)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [{name: entry[name] for name in KEPT if name in entry} for entry in logged]

    def _score(
        self, pipeline: DiffusionPipeline, directory: Path, rows: Sequence[dict[str, Any]], groups: list[str]
    ) -> dict[str, list[float]]:
        """Score an image for each entry of `groups`, and keep the first of each group."""
        shown = {groups.index(group) for group in groups}
        (directory / "images").mkdir(exist_ok=True)

        def keep(index: int, image: Tensor) -> None:
            if index in shown and image.ndim >= 3:
                save_sample(image, directory / "images" / f"{index:05d}.png")

        precision = torch.float16 if self.config.fp16 else torch.bfloat16
        mixed = self.config.fp16 or self.config.bf16
        call_kwargs = self.config.call_kwargs(self.config.eval_num_steps)
        options = (self.config.pipeline_columns, rows, call_kwargs, self.config.prompt_column)
        columns = CallColumns.of(pipeline, *options)
        with quiet(pipeline), torch.autocast(self.config.device.type, precision, enabled=mixed):
            return score_pipeline(
                pipeline,
                self.judges,
                rows,
                call_kwargs,
                num_images=len(groups),
                prompt_column=self.config.prompt_column,
                batch_size=self.config.per_device_eval_batch_size,
                columns=columns,
                keep=keep,
            )


class TimeLimit(TrainerCallback):
    """Ends training when its updates have taken some time.

    Args:
        seconds (float): without what happens between updates, such as evaluation.
    """

    def __init__(self, seconds: float):
        self.left = seconds
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= time.perf_counter() - self.start
        control.should_training_stop |= _agreed(self.left <= 0)


def _loaded(rewards: RewardSet, named: Sequence[Any]) -> list[Any]:
    """The rewards, those that were given by name still under it but loaded once for all runs."""
    return [
        replace(item, load=partial(_same, function)) if isinstance(item, NamedReward) else function
        for item, function in zip(named, rewards.functions, strict=True)
    ]


def _same(value: Any) -> Any:
    return value


def _agreed(value: bool) -> bool:
    """What the main process says, in all of them."""
    return broadcast_object_list([value])[0]


def _identity(function: RewardFunction) -> str | None:
    """What a reward or judge is, in a word; None if that cannot be told, so that its results are not used again."""
    try:
        return identify(unwrapped(function))
    except Unidentifiable as error:
        logger.warning(f"{function!r} cannot be identified, so what is finished with it is done again: {error}")
        return None


def _holds_unknown(made_with: dict[str, Any]) -> bool:
    return any(
        None in made_with.get(key, ()) for key in ("code and weights of the judges", "code and weights of the reward")
    )


def _fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    text = json.dumps([dict(row) for row in rows], default=as_text, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _free_memory() -> None:
    """Trainers and pipelines hold each other, and CUDA does not ask the garbage collector for its memory."""
    for _ in range(2):
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
