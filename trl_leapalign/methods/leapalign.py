"""LeapAlign (https://huggingface.co/papers/2604.15311): back-propagation through a trajectory of a few leaps."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..flow import connect, leap
from ..ranges import Range, check_bool
from .base import Method, Outcome, Plan, Schedule, Trajectory

STEP_CHOICES = ("random", "fixed_distance")
REWARD_INPUTS = ("sample", "leap")
SIMILARITIES = ("all", "joints", "end", "none")


@dataclass(frozen=True)
class LeapAlign(Method):
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

    def __post_init__(self):
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
        check_bool("LeapAlign: nested_gradient_only", self.nested_gradient_only)
        bounds = tuple(self.step_range) if isinstance(self.step_range, (tuple, list)) else ()
        if len(bounds) != 2 or any(bound not in Range(0, 1) for bound in bounds) or bounds[0] >= bounds[1]:
            raise ValueError(
                f"LeapAlign: step_range={self.step_range!r} must be (low, high) with 0 <= low < high <= 1, times with "
                "1 = noise."
            )
        object.__setattr__(self, "step_range", bounds)
        if self.step_choice == "fixed_distance" and self.num_leaps != 2:
            raise ValueError(
                f"LeapAlign: step_choice='fixed_distance' draws a pair, but num_leaps={self.num_leaps}. Set "
                "num_leaps=2."
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

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> Plan:
        noise_time = schedule.interpolant.noise_time
        low, high = (bound * noise_time for bound in self.step_range)
        # TrigFlow schedules begin a rounding error above pure noise.
        candidates = [step for step in schedule.levels if low <= min(schedule.times[step], noise_time) <= high]
        if len(candidates) < self.num_leaps:
            raise ValueError(
                f"LeapAlign draws {self.num_leaps} different steps (num_leaps), but only {len(candidates)} of the "
                f"{schedule.num_steps} sampling steps have their time in step_range={self.step_range}. Use more "
                "sampling steps, a wider step_range or fewer leaps."
            )
        if self.step_choice == "fixed_distance":
            steps = self._draw_fixed_distance(candidates, schedule, low, high, generator)
        else:
            order = torch.randperm(len(candidates), generator=generator)[: self.num_leaps]
            steps = sorted(candidates[index] for index in order.tolist())
        return Plan(active_steps=tuple(steps), input_gradient_scale=self.gradient_discount)

    def _draw_fixed_distance(
        self, candidates: list[int], schedule: Schedule, low: float, high: float, generator: torch.Generator | None
    ) -> list[int]:
        times, distance = schedule.times, (high - low) / 2
        firsts = [step for step in candidates[:-1] if times[step] - distance >= max(low, times[-1])]
        if not firsts:
            raise ValueError(
                f"LeapAlign: no two of the {schedule.num_steps} sampling steps in step_range={self.step_range} are "
                "half the range apart. Use more sampling steps or step_choice='random'."
            )
        first = firsts[torch.randint(len(firsts), (), generator=generator).item()]
        later = [step for step in candidates if step > first]
        return [first, min(later, key=lambda step: abs(times[step] - (times[first] - distance)))]

    def follow(self, plan: Plan, schedule: Schedule) -> "LeapTrajectory":
        return LeapTrajectory(self, plan, schedule)


class LeapTrajectory(Trajectory):
    """Chains the leaps: each starts at an active step and lands on the next one, the last on the end."""

    def __init__(self, method: LeapAlign, plan: Plan, schedule: Schedule):
        self.method = method
        self.schedule = schedule
        stops = (*plan.active_steps, schedule.num_steps)
        self.landing = dict(pairwise(stops))
        self.first_step = stops[0]
        self.prediction: Tensor | None = None  # x_hat of the next landing, with the graph
        self.distances: list[Tensor] = []  # (B,) each, joints first, the end last

    def enter(self, step: int, latents: Tensor) -> Tensor:
        if self.prediction is None or step not in self.landing.values():
            return latents
        error = (latents.to(self.prediction.dtype) - self.prediction.detach()).abs()
        self.distances.append(error.flatten(1).mean(1))
        if step == self.schedule.num_steps and self.method.reward_input == "leap":
            return self.prediction.to(latents.dtype)
        return connect(latents, self.prediction)

    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        if step not in self.landing:
            return
        if step == self.first_step or self.method.nested_gradient_only:
            latents = latents.detach()
        times = self.schedule.times
        self.prediction = leap(latents, velocity, times[step], times[self.landing[step]], self.schedule.interpolant)

    def outcome(self) -> Outcome:
        *joints, end = self.distances
        counted = {"all": self.distances, "joints": joints, "end": [end], "none": []}[self.method.similarity]
        floored = [distance.clamp(min=self.method.similarity_floor) for distance in counted]
        weights = 1.0 / torch.stack(floored).sum(0) if floored else torch.ones_like(end)
        metrics = {"d_0": end, "weight": weights}
        if joints:
            metrics["d_j"] = torch.stack(joints).mean(0)
        return Outcome(weights=weights, metrics=metrics)
