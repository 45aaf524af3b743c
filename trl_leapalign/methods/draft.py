"""DRaFT (https://huggingface.co/papers/2309.17400): back-propagation through the last steps of the solver itself."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ranges import Range, check_bool
from .base import Method, Outcome, Plan, Schedule, Trajectory
from .flow import leap


@dataclass(frozen=True)
class DRaFT(Method[Plan]):
    """Differentiate the last K steps as they are: denoiser, its input and the solver's own step; w = 1.

    K = 1 is DRaFT-1, all steps are full back-propagation, whose memory grows with K. With `random_truncation` it is
    AlignProp (https://huggingface.co/papers/2310.03739).

    Args:
        num_last_steps (int | None): K. None is all steps.
        random_truncation (bool): draw the number of steps uniformly from 1 to K for every rollout.

    Raises:
        ValueError: if a setting is out of its range.
    """

    num_last_steps: int | None = 1
    random_truncation: bool = False

    def __post_init__(self) -> None:
        if self.num_last_steps is not None:
            Range(1, whole=True).check("DRaFT: num_last_steps", self.num_last_steps)
        check_bool("DRaFT: random_truncation", self.random_truncation)

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> Plan:
        levels = schedule.levels
        count = len(levels) if self.num_last_steps is None else self.num_last_steps
        if count > len(levels):
            raise ValueError(
                f"DRaFT differentiates the last num_last_steps={count} steps, but there are {len(levels)}. Use more "
                "sampling steps, or num_last_steps=None for all."
            )
        if self.random_truncation:
            count = 1 + int(torch.randint(count, (), generator=generator).item())
        return Plan(tuple(range(levels[-count], schedule.num_steps)), through_solver=True)

    def follow(self, plan: Plan, schedule: Schedule) -> Trajectory:
        return SolverTrajectory()


class SolverTrajectory(Trajectory):
    """Leaves the solver's graph as it is."""

    end: Tensor

    def enter(self, step: int, latents: Tensor) -> Tensor:
        self.end = latents
        return latents

    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        pass

    def outcome(self) -> Outcome:
        return Outcome(weights=self.end.new_ones(len(self.end), dtype=torch.promote_types(self.end.dtype, torch.float)))


@dataclass(frozen=True)
class DRaFTLV(Method[Plan]):
    """DRaFT-LV: the last step's gradient, averaged over new noise (Alg. 1 of the paper, n copies).

    The last step is differentiated as in DRaFT-1. Then n times new noise is put on the clean latents, at the last
    step's time t, and taken off again with a gradient:

        x^i = alpha_t sg(x_T) + beta_t noise_i,        x_hat^i = leap(x^i, v_theta(x^i, t), t -> t_T)

    All n + 1 images of each sample are rewarded and the loss is the sum of their terms, which their weight of n + 1
    makes of the mean. The images of a rollout are copy-major: the samples, then their first copies, and so on.

    Args:
        num_copies (int): n, at least 1; the paper's 2.

    Raises:
        ValueError: if a setting is out of its range.
    """

    ends_sampling: ClassVar[bool] = False

    num_copies: int = 2

    def __post_init__(self) -> None:
        Range(1, whole=True).check("DRaFT-LV: num_copies", self.num_copies)

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> Plan:
        last = schedule.num_steps - 1
        return Plan(tuple(range(last, last + self.num_copies + 1)), through_solver=True, copies=self.num_copies)

    def follow(self, plan: Plan, schedule: Schedule) -> Trajectory:
        return CopiesTrajectory(plan, schedule)


class CopiesTrajectory(SolverTrajectory):
    """Ends with the samples and their copies."""

    def __init__(self, plan: Plan, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.copied_steps = plan.active_steps[1:]
        self.predictions: list[Tensor] = []

    def enter(self, step: int, latents: Tensor) -> Tensor:
        if step < self.schedule.num_steps:
            return latents
        self.end = torch.cat([latents, *(prediction.to(latents.dtype) for prediction in self.predictions)])
        return self.end

    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        if step in self.copied_steps:
            *_, time, end = self.schedule.times
            self.predictions.append(leap(latents, velocity, time, end, self.schedule.interpolant))

    def outcome(self) -> Outcome:
        return Outcome(weights=(1 + len(self.predictions)) * super().outcome().weights)
