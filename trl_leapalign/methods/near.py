"""Samples of a group that stay close to each other: they share the first steps and part at a later one. Pure torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Method, Outcome, Plan, Schedule, Trajectory
from .flow import connect, leap


@dataclass(frozen=True)
class NearPairs(Method):
    """A method whose samples get new noise on the way, those of a group each another.

    Before step s the data and the noise are predicted from the latents and the velocity of step s - 1, at time t. With
    t' the time of step s, a sample goes on from

        x = alpha(t') x_hat_0 + beta(t') (sqrt(1 - rho^2) n_hat + rho noise),

    where x_hat_0 is the one-step leap from t to the data and n_hat that to the noise; for rectified flow x - t v and
    x + (1 - t) v. The graph that the latents have passes the change as if it were not there.

    Args:
        method (Method): the method that is followed.
        step (int): s, at least 1.
        strength (float): rho in (0, 1], the share of new noise.
        draw (Callable[[Tensor], list[Tensor | None]]): from the latents (B, ...) to each sample's noise, of shape
            (1, ...); None for a sample that keeps its latents.
    """

    method: Method
    step: int
    strength: float
    draw: Callable[[Tensor], list[Tensor | None]]

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> Plan:
        if self.step >= schedule.num_steps:
            raise ValueError(
                f"near_step={self.step} must be below the number of sampling steps, {schedule.num_steps}: samples "
                "share the steps before it and part with it."
            )
        return self.method.plan(schedule, generator)

    def follow(self, plan: Plan, schedule: Schedule) -> Trajectory:
        return _Parting(self.method.follow(plan, schedule), schedule, self)


class _Parting(Trajectory):
    """Follows a trajectory and changes what goes into one step."""

    def __init__(self, trajectory: Trajectory, schedule: Schedule, pairs: NearPairs):
        self.trajectory, self.schedule, self.pairs = trajectory, schedule, pairs
        self.before: tuple[Tensor, Tensor] | None = None  # latents and velocity of the step before

    def enter(self, step: int, latents: Tensor) -> Tensor:
        if step != self.pairs.step:
            return self.trajectory.enter(step, latents)
        parted = self._part(latents.detach())
        return self.trajectory.enter(step, connect(parted, latents) if latents.requires_grad else parted)

    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        if step == self.pairs.step - 1:
            self.before = latents.detach(), velocity.detach()
        self.trajectory.leave(step, latents, velocity)

    def outcome(self) -> Outcome:
        return self.trajectory.outcome()

    def _part(self, latents: Tensor) -> Tensor:
        before, to, interpolant = (
            *self.schedule.times[self.pairs.step - 1 : self.pairs.step + 1],
            self.schedule.interpolant,
        )
        entered, velocity = self.before
        data = leap(entered, velocity, before, 0.0, interpolant)
        noise = leap(entered, velocity, before, interpolant.noise_time, interpolant)
        kept, new = math.sqrt(1.0 - self.pairs.strength**2), self.pairs.strength
        parted = latents.clone()
        for index, fresh in enumerate(self.pairs.draw(latents)):
            if fresh is not None:
                mixed = kept * noise[index] + new * fresh[0].to(noise)
                parted[index] = (interpolant.alpha(to) * data[index] + interpolant.beta(to) * mixed).to(latents.dtype)
        return parted
