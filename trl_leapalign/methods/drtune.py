"""DRTune (https://huggingface.co/papers/2405.00760): spread steps; the denoiser's input has no gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ranges import Range
from .base import Method, Plan, Schedule, Trajectory
from .draft import SolverTrajectory
from .flow import leap
from .refl import late_steps


@dataclass(frozen=True)
class DRTune(Method[Plan]):
    """Train K evenly spread steps through the solver's residual path, and stop early:

        v_i = v_theta(sg(x_i), t_i) at training steps, sg(v_i) at all others
        x_{i+1} = step(x_i, v_i), the solver's own on live values, up to the stop s
        x_hat_T = leap(x_s, v_s, t_s -> t_T),        w = 1

    Counted from the end (1 = last step) the stop is drawn uniformly from 1 to m, and the training steps are
    `first + i * floor(T / K)` with i = 0 ... K - 1. Those after the stop are not run.

    Args:
        num_train_steps (int): K.
        num_late_steps (int | None): m. None is 44% of the steps, rounded up (11 of 25).

    Raises:
        ValueError: if a setting is out of its range.
    """

    ends_sampling: ClassVar[bool] = False

    num_train_steps: int = 2
    num_late_steps: int | None = None

    def __post_init__(self) -> None:
        Range(1, whole=True).check("DRTune: num_train_steps", self.num_train_steps)
        if self.num_late_steps is not None:
            Range(1, whole=True).check("DRTune: num_late_steps", self.num_late_steps)

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> Plan:
        levels, count = schedule.levels, self.num_train_steps
        if count > len(levels):
            raise ValueError(
                f"DRTune trains num_train_steps={count} steps, but there are {len(levels)}. Use more sampling steps."
            )
        num_late, spacing = late_steps("DRTune", self.num_late_steps, len(levels)), len(levels) // count
        most = 1 + (count - 1) * spacing
        if num_late > most:
            raise ValueError(
                f"DRTune stops at one of the last {num_late} of {len(levels)} steps, but its earliest training step "
                f"may be number {most} from the end, so some rollouts would train none. Set num_late_steps to at most "
                f"{most}, or more num_train_steps."
            )
        from_end = 1 + int(torch.randint(num_late, (), generator=generator).item())
        first = 1 + int(torch.randint(len(levels) - most + 1, (), generator=generator).item())
        trained = [first + index * spacing for index in range(count)]
        steps = sorted(levels[-number] for number in trained if number >= from_end)
        return Plan(tuple(steps), input_gradient_scale=0.0, stop=levels[-from_end], through_solver=True)

    def follow(self, plan: Plan, schedule: Schedule) -> Trajectory:
        return StoppedTrajectory(plan, schedule)


class StoppedTrajectory(SolverTrajectory):
    """Leaps from the stop to the end."""

    def __init__(self, plan: Plan, schedule: Schedule):
        self.stop = plan.stop
        self.schedule = schedule
        self.prediction: Tensor  # of the latents at the end, once the stop was reached

    def enter(self, step: int, latents: Tensor) -> Tensor:
        self.end = latents if step < self.schedule.num_steps else self.prediction.to(latents.dtype)
        return self.end

    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        if step == self.stop:
            times = self.schedule.times
            self.prediction = leap(latents, velocity, times[step], times[-1], self.schedule.interpolant)
