"""ReFL (ImageReward, https://huggingface.co/papers/2304.05977): the reward of a late prediction of the end."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ranges import Range
from .base import Method, Schedule
from .flow import leap_weights
from .surrogate import Segment, Support, SurrogatePlan, SurrogateTrajectory, unit_weight

LATE_SHARE = 0.44
"""Share of the steps among which ReFL and DRTune stop: 11 of 25."""


@dataclass(frozen=True)
class ReFL(Method[SurrogatePlan]):
    """Stop at a late step s, drawn uniformly, and reward where it leads in one leap:

        x_hat_T = leap(sg(x_s), v_s, t_s -> t_T),        w = 1

    Later steps are not run. The pre-training loss of the paper is left out, as in LeapAlign's comparison.

    Args:
        num_late_steps (int | None): m, how many steps at the end s is drawn from. None is 44% of the steps, rounded up
            (11 of 25).

    Raises:
        ValueError: if a setting is out of its range.
    """

    ends_sampling: ClassVar[bool] = False

    num_late_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_late_steps is not None:
            Range(1, whole=True).check("ReFL: num_late_steps", self.num_late_steps)

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> SurrogatePlan:
        levels = schedule.levels
        late = levels[-late_steps("ReFL", self.num_late_steps, len(levels)) :]
        stop = late[int(torch.randint(len(late), (), generator=generator).item())]
        latents_weight, velocity_weight = leap_weights(schedule.times[stop], schedule.times[-1], schedule.interpolant)
        segment = Segment(stop, schedule.num_steps, (Support(stop, velocity_weight),), latents_weight)
        return SurrogatePlan((stop,), stop=stop, paths=((segment,),))

    def follow(self, plan: SurrogatePlan, schedule: Schedule) -> SurrogateTrajectory:
        return SurrogateTrajectory(plan, schedule, unit_weight, rewards_prediction=True)


def late_steps(method: str, setting: int | None, num_steps: int) -> int:
    """How many steps at the end a method stops at.

    Args:
        method (str): its name, for the error.
        setting (int | None): the user's number; None is a share of 44%.
        num_steps (int): steps of the schedule.

    Returns:
        int: between 1 and `num_steps`.

    Raises:
        ValueError: if there are fewer steps than the setting.
    """
    count = math.ceil(LATE_SHARE * num_steps) if setting is None else setting
    if count > num_steps:
        raise ValueError(
            f"{method}: num_late_steps={setting}, but there are {num_steps} sampling steps. Use more steps, or leave "
            "num_late_steps to its default."
        )
    return count
