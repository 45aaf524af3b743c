"""LeapAlign (https://huggingface.co/papers/2604.15311): back-propagation through a trajectory of a few leaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..ranges import Range, check_bool
from .base import Method, Schedule
from .flow import leap_weights
from .surrogate import Segment, Support, SurrogatePlan, SurrogateTrajectory, floored_similarity

STEP_CHOICES = ("random", "fixed_distance")
REWARD_INPUTS = ("sample", "leap")
SIMILARITIES = ("all", "joints", "end", "none")


@dataclass(frozen=True)
class LeapAlign(Method[SurrogatePlan]):
    """Back-propagate the reward through leaps between steps of the sampling run.

    With the default of two leaps, steps k < j are drawn and only they run with gradients (Sec. 4, Alg. 1):

        x_hat_j = leap(sg(x_k), v_k, t_k -> t_j)        x_j carries the gradient of x_hat_j
        x_hat_T = leap(x_j, v_j, t_j -> t_T)            x_T carries the gradient of x_hat_T
        w = 1 / (max(d_j, tau) + max(d_0, tau)),        d_j = mean |x_j - x_hat_j|, d_0 = mean |x_T - x_hat_T|

    where v_j's input has its gradient scaled by alpha. The gradient of x_T is, with times k and j down to 0 (Eq. 12),

        -j dv_j/dtheta - (k - j) dv_k/dtheta + alpha j (k - j) dv_j/dx_j dv_k/dtheta.

    Args:
        gradient_discount (float): alpha in [0, 1]. The paper uses 0.3 with HPSv2.1, 0.1 with PickScore and HPSv3.
        similarity_floor (float): tau > 0, the smallest distance that counts in the weight.
        num_leaps (int): leaps from the first drawn step to the end, 1 to 3 in the paper; as many steps are drawn.
        step_choice (str): "random" steps, or two at a "fixed_distance" of half the step range, to the nearest step.
        step_range (tuple[float, float]): drawn steps have their time in this part of [0, 1], 1 = noise. (0, 0.5) is
            the clean half.
        reward_input (str): what is decoded and rewarded: the sampler's own "sample" x_T, or the "leap" x_hat_T.
        similarity (str): the distances in the weight: "all", those at the "joints" (d_j), that at the "end" (d_0), or
            "none" (w = 1).
        nested_gradient_only (bool): drop the single-step terms of all drawn steps but the last, which then learn only
            through the denoiser's input at the next one (supplement, A3).
        pairs_per_rollout (int): P paths, each with steps of its own, that share the rollout, its decoding and the
            reward. The end carries the gradient of their mean, weighted by w, and the loss weight is the mean of w.

    Raises:
        ValueError: if a setting is out of its range, or two contradict each other.
    """

    gradient_discount: float = 0.3
    similarity_floor: float = 0.1
    num_leaps: int = 2
    step_choice: str = "random"
    step_range: tuple[float, float] = (0.0, 1.0)
    reward_input: str = "sample"
    similarity: str = "all"
    nested_gradient_only: bool = False
    pairs_per_rollout: int = 1

    def __post_init__(self) -> None:
        for name, choices in (
            ("step_choice", STEP_CHOICES),
            ("reward_input", REWARD_INPUTS),
            ("similarity", SIMILARITIES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"LeapAlign: {name}={getattr(self, name)!r} is unknown; choose one of {choices}.")
        Range(0, 1).check("LeapAlign: gradient_discount", self.gradient_discount)
        Range(0, excluded=True).check("LeapAlign: similarity_floor", self.similarity_floor)
        Range(1, whole=True).check("LeapAlign: num_leaps", self.num_leaps)
        Range(1, whole=True).check("LeapAlign: pairs_per_rollout", self.pairs_per_rollout)
        check_bool("LeapAlign: nested_gradient_only", self.nested_gradient_only)
        bounds = tuple(self.step_range) if isinstance(self.step_range, (tuple, list)) else ()
        if len(bounds) != 2 or any(bound not in Range(0, 1) for bound in bounds) or bounds[0] >= bounds[1]:
            raise ValueError(
                f"LeapAlign: step_range={self.step_range!r} must be (low, high) with 0 <= low < high <= 1, times with "
                "1 = noise."
            )
        object.__setattr__(self, "step_range", bounds)
        if self.step_choice == "fixed_distance" and (self.num_leaps, self.pairs_per_rollout) != (2, 1):
            raise ValueError(
                f"LeapAlign: step_choice='fixed_distance' draws a pair, but num_leaps={self.num_leaps} and "
                f"pairs_per_rollout={self.pairs_per_rollout}. Set num_leaps=2 and pairs_per_rollout=1."
            )
        if self.num_leaps == 1 and (self.similarity == "joints" or self.nested_gradient_only):
            raise ValueError(
                "LeapAlign: with num_leaps=1 there is no joint, so similarity='joints' and nested_gradient_only=True "
                "leave nothing to train. Set num_leaps=2 or change them."
            )
        if self.nested_gradient_only and self.gradient_discount == 0.0:
            raise ValueError(
                "LeapAlign: nested_gradient_only=True with gradient_discount=0 leaves all steps but the last without "
                "gradient. Set gradient_discount above 0."
            )

    def draw(self, schedule: Schedule, generator: torch.Generator | None) -> tuple[tuple[int, ...], ...]:
        """Draw the steps of each path, ascending.

        Raises:
            ValueError: if the schedule has too few steps in the step range.
        """
        noise_time = schedule.interpolant.noise_time
        low, high = (bound * noise_time for bound in self.step_range)
        # TrigFlow schedules begin a rounding error above pure noise.
        candidates = [step for step in schedule.levels if low <= min(schedule.times[step], noise_time) <= high]
        count = self.num_leaps * self.pairs_per_rollout
        if len(candidates) < count:
            raise ValueError(
                f"LeapAlign draws {count} different steps (num_leaps * pairs_per_rollout), but only {len(candidates)} "
                f"of the {schedule.num_steps} sampling steps have their time in step_range={self.step_range}. Use more "
                "sampling steps, a wider step_range, fewer leaps or fewer pairs."
            )
        if self.step_choice == "fixed_distance":
            return (self._draw_fixed_distance(candidates, schedule, low, high, generator),)
        order = torch.randperm(len(candidates), generator=generator)[:count].tolist()
        drawn = [candidates[index] for index in order]
        return tuple(tuple(sorted(drawn[n :: self.pairs_per_rollout])) for n in range(self.pairs_per_rollout))

    def _draw_fixed_distance(
        self, candidates: list[int], schedule: Schedule, low: float, high: float, generator: torch.Generator | None
    ) -> tuple[int, ...]:
        times, distance = schedule.times, (high - low) / 2
        firsts = [step for step in candidates[:-1] if times[step] - distance >= max(low, times[-1])]
        if not firsts:
            raise ValueError(
                f"LeapAlign: no two of the {schedule.num_steps} sampling steps in step_range={self.step_range} are "
                "half the range apart. Use more sampling steps or step_choice='random'."
            )
        first = firsts[int(torch.randint(len(firsts), (), generator=generator).item())]
        later = [step for step in candidates if step > first]
        return first, min(later, key=lambda step: abs(times[step] - (times[first] - distance)))

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> SurrogatePlan:
        drawn = self.draw(schedule, generator)
        return SurrogatePlan(
            active_steps=tuple(sorted(step for steps in drawn for step in steps)),
            input_gradient_scale=self.gradient_discount,
            paths=tuple(_leaps(steps, schedule) for steps in drawn),
        )

    def follow(self, plan: SurrogatePlan, schedule: Schedule) -> SurrogateTrajectory:
        return SurrogateTrajectory(
            plan,
            schedule,
            self._weigh,
            joined=not self.nested_gradient_only,
            rewards_prediction=self.reward_input == "leap",
        )

    def _weigh(self, distances: Sequence[Tensor]) -> Tensor:
        *joints, end = distances
        counted = {"all": distances, "joints": joints, "end": [end], "none": []}[self.similarity]
        return floored_similarity(counted, self.similarity_floor) if counted else torch.ones_like(end)


def _leaps(steps: tuple[int, ...], schedule: Schedule) -> tuple[Segment, ...]:
    """Leaps from each step to the next one, the last to the end."""
    segments = []
    for start, end in pairwise((*steps, schedule.num_steps)):
        weights = leap_weights(schedule.times[start], schedule.times[end], schedule.interpolant)
        segments.append(Segment(start, end, (Support(start, weights[1]),), latents_weight=weights[0]))
    return tuple(segments)
