"""A path beside the sampling run that gradients go back along: segments between steps, each a sum of velocities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Outcome, Plan, Schedule, Trajectory
from .flow import connect, scale_gradient


@dataclass(frozen=True)
class Support:
    """A velocity that a segment is made of.

    Args:
        step (int): the step that it is of.
        weight (float): its factor in the sum.
        gradient_scale (float): factor of its gradient alone.
    """

    step: int
    weight: float
    gradient_scale: float = 1.0


@dataclass(frozen=True)
class Segment:
    """A prediction `x_hat_end = latents_weight * x_start + sum of weight * v_step` of the sampler's latents.

    Args:
        start (int): step that it starts from.
        end (int): step whose latents it predicts; `num_steps` is the end of the sampling.
        supports (tuple[Support, ...]): at steps in [start, end); without gradient where these are not active.
        latents_weight (float): factor of the latents at the start.
    """

    start: int
    end: int
    supports: tuple[Support, ...]
    latents_weight: float = 1.0


@dataclass(frozen=True)
class SurrogatePlan(Plan):
    """A plan whose gradient goes along one or several paths.

    Args:
        paths (tuple[tuple[Segment, ...], ...]): each a chain of segments, the last to the end of the sampling. No two
            share an active step.
    """

    paths: tuple[tuple[Segment, ...], ...] = ()


class SurrogateTrajectory(Trajectory):
    """Follows the paths: where a segment ends, the sampler's latents take on the gradient of its prediction.

    With several paths the end takes on that of their mean, weighted by their loss weights (`sum w_p x_p / sum w_p`),
    and the loss weight is the mean of theirs.

    Args:
        plan (SurrogatePlan): the paths.
        schedule (Schedule): the times of the steps.
        weigh (Callable[[Sequence[Tensor]], Tensor]): from the distances (B,) of a path's predictions to the sampler's
            latents, one a segment, to its loss weight (B,).
        joined (bool): whether a segment starts from the gradient of the one before; its denoiser input always does.
        rewards_prediction (bool): end with the prediction in place of the sampler's own latents.
    """

    def __init__(
        self,
        plan: SurrogatePlan,
        schedule: Schedule,
        weigh: Callable[[Sequence[Tensor]], Tensor],
        joined: bool = True,
        rewards_prediction: bool = False,
    ):
        self.end = schedule.num_steps
        self.weigh = weigh
        self.rewards_prediction = rewards_prediction
        self.paths = [_Path(segments, joined) for segments in plan.paths]

    def enter(self, step: int, latents: Tensor) -> Tensor:
        landing = [path for path in self.paths if path.lands_on(step)]
        for path in landing:
            path.measure(latents)
        if not landing:
            return latents
        prediction = self._mean_prediction() if step == self.end else landing[0].prediction
        if step == self.end and self.rewards_prediction:
            return prediction.to(latents.dtype)
        return connect(latents, prediction)

    def _mean_prediction(self) -> Tensor:
        if len(self.paths) == 1:
            return self.paths[0].prediction
        weights = torch.stack([self.weigh(path.distances) for path in self.paths])
        shares = (weights / weights.sum(0)).unbind(0)
        predictions = [path.prediction for path in self.paths]
        weighted = [share.view(-1, *[1] * (x.ndim - 1)) * x for share, x in zip(shares, predictions, strict=True)]
        return sum(weighted[1:], weighted[0])

    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        for path in self.paths:
            path.leave(step, latents, velocity)

    def outcome(self) -> Outcome:
        weights = torch.stack([self.weigh(path.distances) for path in self.paths]).mean(0)
        ends = torch.stack([path.distances[-1] for path in self.paths])
        metrics = {"d_0": ends.mean(0), "weight": weights}
        joints = [distance for path in self.paths for distance in path.distances[:-1]]
        if joints:
            metrics["d_j"] = torch.stack(joints).mean(0)
        return Outcome(weights=weights, metrics=metrics)


class _Path:
    """One chain of segments on its way."""

    def __init__(self, segments: tuple[Segment, ...], joined: bool):
        self.starts = {segment.start: segment for segment in segments}
        self.first_step = segments[0].start
        self.joined = joined
        self.segment: Segment | None = None
        self.supports: dict[int, Support] = {}
        self.prediction: Tensor  # of the latents at the segment's end, with the graph; set at the first segment's start
        self.distances: list[Tensor] = []  # (B,) each, joints first, the end last

    def lands_on(self, step: int) -> bool:
        return self.segment is not None and self.segment.end == step

    def measure(self, latents: Tensor) -> None:
        error = (latents.to(self.prediction.dtype) - self.prediction.detach()).abs()
        self.distances.append(error.flatten(1).mean(1))

    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        dtype = torch.promote_types(latents.dtype, torch.float32)
        if step in self.starts:
            self.segment = self.starts[step]
            self.supports = {support.step: support for support in self.segment.supports}
            if step == self.first_step or not self.joined:
                latents = latents.detach()
            self.prediction = self.segment.latents_weight * latents.to(dtype)
        if step in self.supports and self.segment is not None:
            support = self.supports[step]
            self.prediction = self.prediction + support.weight * scale_gradient(
                velocity.to(dtype), support.gradient_scale
            )


def floored_similarity(distances: Sequence[Tensor], floor: float) -> Tensor:
    """LeapAlign's loss weight, `1 / sum of max(d, tau)`.

    Args:
        distances (Sequence[Tensor]): distances d that count, shape (B,) each, at least one.
        floor (float): tau.

    Returns:
        Tensor: weights, shape (B,).
    """
    return 1.0 / torch.stack([distance.clamp(min=floor) for distance in distances]).sum(0)


def unit_weight(distances: Sequence[Tensor]) -> Tensor:
    """A loss weight of 1, shape (B,)."""
    return torch.ones_like(distances[-1])
