"""Guards against reward hacking: numbers of fixed pictures and of evaluations that warn of it, or stop the training."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from ..prompts.sources import split_row
from ..ranges import Range
from ..rewards import BlackBox
from ..rollout.base_penalty import adapters_off
from ..rollout.calls import sample_images
from ..rollout.pipelines import quiet
from .metrics import saturated
from .optimizers import evaluation_mode

logger = logging.getLogger(__name__)

COLORS = ("mean_red", "mean_green", "mean_blue")
SAMPLES = 4
"""Pictures of each prompt."""
LIMITS = {
    "diversity_share": 0.5,
    "color_diversity_share": 0.5,
    "feature_diversity_share": 0.5,
    "unsaturated_share": 0.5,
    "color_shift_share": 0.5,
    "base_distance_share": None,
    "held_out_falls": 3,
}
"""What each number must keep to; None is no limit."""
MEANINGS = {
    "diversity_share": "Pictures of one prompt have become alike",
    "color_diversity_share": "Pictures of one prompt have come to share their colours",
    "feature_diversity_share": "To the reward's own features, pictures of one prompt have become alike",
    "unsaturated_share": "Pictures burn out: more and more values lie at the ends of their range",
    "color_shift_share": "Over all pictures, some colours win and others are lost",
    "base_distance_share": "Pictures are far from those of the base with the same noise",
    "held_out_falls": "What is not trained on falls from evaluation to evaluation while the trained reward is higher",
}
LARGEST = ("color_shift_share", "base_distance_share", "held_out_falls")
"""Numbers that must stay at or below their limit (falls: below); the others must stay at or above it."""


class Watch(TrainerCallback):
    """Logs how diverse and how far from the base pictures are, and warns or stops when a number passes its limit.

    Every so many updates, four pictures of each prompt are sampled, always with the same noise, from the weights that
    are trained (not their average, which follows later). Over the pictures of a prompt, with rms the root mean square
    over pixels and channels in [0, 1], averaged over prompts:

    - watch/diversity: mean rms(a - b) over pairs of pictures;
    - watch/color_diversity: the same of the pictures' mean colours, which places do not blur; not for sound;
    - watch/mean_red, mean_green and mean_blue: the mean colour of all pictures;
    - watch/feature_diversity: mean 1 - cosine over pairs, of the first reward with a method `image_features(images)`
      that maps (B, 3, H, W) to (B, D), as those made of CLIP have;
    - watch/base_distance: mean rms(a - a_base), a_base the base's picture with the same noise;
    - watch/saturated: share of values at the ends of their range.

    Each ..._share is the number over that of the base's own pictures, 1 before training: of base_distance over the
    base's diversity, of saturation in shares that are not saturated; of color_shift, the rms between the mean colour
    and the base's, over the base's color_diversity. Where one colour is drawn in place of another, pictures may stay as
    diverse as they were, but their mean colour moves. The base is the pipeline without adapters, or
    before training where all weights are trained.

    Evaluations are watched without further sampling: watch/held_out_falls is how many times in a row an evaluated
    reward (eval_reward, and each reward with a weight of 0) has fallen since the last time it rose, or the training's
    own reward was not higher than before the falls; of several, the largest.

    Args:
        trainer (LeapAlignTrainer): gives the pipeline, its settings and the log.
        rows (list[dict]): the prompts with their other columns.

    Raises:
        ValueError: if a limit is unknown or out of range.
    """

    def __init__(self, trainer: Any, rows: list[dict[str, Any]]):
        self.limits = {**LIMITS, **check_limits(trainer.args.watch_limits)}
        self.trainer, self.rows = trainer, rows
        self.raised: set[str] = set()
        self.features = _features(trainer.rewards.functions)
        self.base: dict[int, tuple[Tensor, dict[str, float]]] | None = None
        if trainer.args.full_finetuning:
            self.base = self._sample_all()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.raised.clear()
        if state.global_step == 0:  # one that is resumed has looked already
            self._look(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.watch_steps == 0:
            self._look(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_in_train:
            return
        rewards = self.trainer.rewards
        held_out = {f"rewards/{n}" for n, weight in zip(rewards.names, rewards.weights, strict=True) if weight == 0}
        falls = held_out_falls(state.log_history, {"reward", *held_out})
        if falls is not None:
            self._report({"held_out_falls": falls}, control)

    def _look(self, control: Any) -> None:
        start = time.perf_counter()
        if self.base is None:
            with adapters_off(self.trainer.rollout_model):
                self.base = self._sample_all()
        own = []
        for index, (images, numbers) in self._sample_all().items():
            base_images, base_numbers = self.base[index]
            own.append((index, {**numbers, "base_distance": _rms(images - base_images).mean().item()}, base_numbers))
        gathered = sorted(gather_object(own), key=lambda each: each[0])
        numbers, base = (_means([each[part] for each in gathered]) for part in (1, 2))
        self._report({**numbers, **shares(numbers, base)}, control)
        self.trainer.leave_out_of_speed(time.perf_counter() - start)

    def _report(self, numbers: dict[str, float], control: Any) -> None:
        """Log the numbers, and act where one has just passed its limit; the same on all processes."""
        with _log_still_due(control):
            self.trainer.log({f"watch/{name}": value for name, value in numbers.items()})
        for name in numbers.keys() & self.limits.keys():
            value, limit = numbers[name], self.limits[name]
            if limit is None or within(name, value, limit):
                self.raised.discard(name)
                continue
            stops = self.trainer.args.watch_action == "stop"
            if name not in self.raised or stops:
                logger.warning(
                    "Update %s: watch/%s is %.3g; its limit is %.3g. %s. Look at the pictures: the reward may be "
                    "exploited. A base_penalty, a lower learning_rate, a reward_threshold or fewer updates help.%s",
                    *(self.trainer.state.global_step, name, value, limit, MEANINGS[name]),
                    " Training stops here (watch_action='stop')." if stops else "",
                )
            self.raised.add(name)
            control.should_training_stop |= stops

    @torch.no_grad()
    def _sample_all(self) -> dict[int, tuple[Tensor, dict[str, float]]]:
        """Of each prompt of this process: pictures on the CPU, shape (SAMPLES, ...), and their numbers."""
        trainer, found = self.trainer, {}
        mode = evaluation_mode(trainer.optimizer if trainer.is_in_train else None, trainer.rollout_model.parameters())
        with mode, quiet(trainer.pipeline):
            for index in range(trainer.args.process_index, len(self.rows), trainer.args.world_size):
                prompt, metadata = split_row(self.rows[index], trainer.args.prompt_column)
                with trainer.accelerator.autocast():
                    images = sample_images(
                        trainer.pipeline,
                        [prompt] * SAMPLES,
                        list(range(index * SAMPLES, (index + 1) * SAMPLES)),
                        trainer.args.call_kwargs(trainer.args.eval_num_steps),
                        trainer.args.seed,
                        columns=trainer.columns,
                        metadata=[metadata] * SAMPLES,
                    ).float()
                found[index] = images.cpu(), measure(images, self.features)
        return found


def measure(images: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """Say how diverse pictures of one prompt are.

    Args:
        images (Tensor): images or video in [0, 1], shape (B, 3, H, W) or (B, F, 3, H, W), or audio in [-1, 1], shape
            (B, C, T), with B above 1.
        features (Callable | None): maps images, shape (B, 3, H, W), to features, shape (B, D).

    Returns:
        dict[str, float]: "diversity", "saturated", of pictures "color_diversity" and the mean of each of `COLORS`, and
        with features of images "feature_diversity".
    """
    numbers = {"diversity": pairwise_mean(_rms, images), "saturated": saturated(images).mean().item()}
    if images.ndim > 3:
        colors = images.mean((-2, -1)) if images.ndim == 4 else images.mean((1, -2, -1))
        numbers["color_diversity"] = pairwise_mean(_rms, colors)
        numbers.update(zip(COLORS, colors.mean(0).tolist(), strict=True))
    if features is not None and images.ndim == 4:
        directions = F.normalize(features(images).double(), dim=-1)
        numbers["feature_diversity"] = pairwise_mean(lambda d: d.square().sum(-1) / 2, directions)  # 1 - cosine
    return numbers


def pairwise_mean(size: Callable[[Tensor], Tensor], values: Tensor) -> float:
    """Average the size of the difference over all pairs.

    Args:
        size (Callable): maps differences, shape (P, ...), to numbers, shape (P,).
        values (Tensor): shape (B, ...), with B above 1.

    Returns:
        float: the mean over the B (B - 1) / 2 pairs.
    """
    first, second = zip(*combinations(range(len(values)), 2), strict=True)
    return size(values[list(first)] - values[list(second)]).mean().item()


def shares(numbers: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Compare numbers with those of the base.

    Args:
        numbers (dict[str, float]): of `measure`, and "base_distance".
        base (dict[str, float]): of `measure`.

    Returns:
        dict[str, float]: by name with "_share", those whose denominator is not 0.
    """
    pairs = {name: (numbers[name], base[name]) for name in numbers if name.endswith("diversity")}
    pairs["unsaturated"] = (1 - numbers["saturated"], 1 - base["saturated"])
    pairs["base_distance"] = (numbers["base_distance"], base["diversity"])
    if "color_diversity" in base:
        shift = math.sqrt(fmean((numbers[name] - base[name]) ** 2 for name in COLORS))
        pairs["color_shift"] = (shift, base["color_diversity"])
    return {f"{name}_share": part / whole for name, (part, whole) in pairs.items() if whole > 0}


def held_out_falls(history: list[dict[str, float]], names: set[str]) -> int | None:
    """Count the last falls of evaluated rewards during which the training's reward rose.

    Args:
        history (list[dict]): `state.log_history`.
        names (set[str]): what evaluations call the rewards to look at, without "eval_" and the name of their prompts.

    Returns:
        int | None: of several the largest; None without two evaluations with training before each.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    trained: dict[str, list[float]] = {}
    for key in {key for entry in history for key in entry if key.startswith("eval_")}:
        prompts = next((key.removesuffix(f"_{name}") for name in names if key.endswith(f"_{name}")), "/")
        if "/" in prompts:
            continue
        series[key], trained[key] = [], []
        for entry in history:
            if "loss" in entry and "reward" in entry:
                trained[key].append(entry["reward"])
            if key in entry and trained[key]:
                series[key].append((fmean(trained[key]), entry[key]))
                trained[key] = []
    counts = [_falls(points) for points in series.values() if len(points) > 1]
    return max(counts) if counts else None


def _falls(points: list[tuple[float, float]]) -> int:
    count = 0
    for (_, later), (_, earlier) in pairwise(reversed(points)):
        if later >= earlier:
            break
        count += 1
    return count if points[-1][0] > points[-1 - count][0] else 0


def within(name: str, value: float, limit: float) -> bool:
    """Whether a number keeps to its limit; NaN does not.

    Args:
        name (str): one of `LIMITS`.
        value (float): the number.
        limit (float): its limit.
    """
    if name == "held_out_falls":
        return value < limit
    return value <= limit if name in LARGEST else value >= limit


def check_limits(limits: dict[str, float | None]) -> dict[str, float | None]:
    """Raise ValueError unless limits have known names and are numbers or None; return them.

    Args:
        limits (dict[str, float | None]): some of `LIMITS`.
    """
    unknown = sorted(set(limits) - set(LIMITS))
    if unknown:
        raise ValueError(f"watch_limits names {unknown}, which are not watched; choose some of {sorted(LIMITS)}.")
    for name, value in limits.items():
        if value is not None:
            allowed = Range(1, whole=True) if name == "held_out_falls" else Range(0)
            allowed.check(f"watch_limits[{name!r}]", value)
    return limits


def _features(functions: list[Any]) -> Callable[[Tensor], Tensor] | None:
    inner = (each.function if isinstance(each, BlackBox) else each for each in functions)
    return next((each.image_features for each in inner if callable(getattr(each, "image_features", None))), None)


def _means(numbers: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in numbers) for name in numbers[0]}


def _rms(difference: Tensor) -> Tensor:
    return difference.flatten(1).square().mean(1).sqrt()


@contextmanager
def _log_still_due(control: Any) -> Iterator[None]:
    """Logging ends what Trainer knows of a log that is due; what training has to log still is."""
    due = control.should_log
    yield
    control.should_log = due
