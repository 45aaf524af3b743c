"""What a method is: which steps carry gradients, and what graph the latents carry from step to step. Pure torch.

A method is a frozen dataclass of its settings. For every rollout it draws a `Plan`, then follows each stream of
latents (most pipelines have one) with a `Trajectory`. `trl_leapalign.rollout.run` runs the pipeline and calls the two.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from .flow import Interpolant


@dataclass(frozen=True)
class Schedule:
    """The times at which a rollout evaluates the denoiser.

    Args:
        times (tuple[float, ...]): noise time of each step's input, first step first, then the time at which the last
            step ends: one entry more than there are steps.
        interpolant (Interpolant): the path that the times refer to.
    """

    times: tuple[float, ...]
    interpolant: Interpolant

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    @property
    def levels(self) -> tuple[int, ...]:
        """The steps to draw from: one a noise level, the last where a solver evaluates a level twice (Heun)."""
        return tuple(i for i in range(self.num_steps) if self.times[i] != self.times[i + 1])


@dataclass(frozen=True)
class Plan:
    """What is decided before the first step of a rollout.

    Args:
        active_steps (tuple[int, ...]): steps whose denoiser call runs with gradients, ascending, 0 = first (noisiest).
        input_gradient_scale (float): factor of the gradient that flows back through the denoiser's input at the
            active steps; the residual path of the latents keeps its whole gradient.
        stop (int | None): the last step that is taken; None is the last of the schedule.
        through_solver (bool): whether the solver's own step is differentiated: it runs on live values, and `enter` is
            given latents that carry its graph.
        copies (int): how often the last step is repeated for new noise on the clean latents.
    """

    active_steps: tuple[int, ...]
    input_gradient_scale: float = 1.0
    stop: int | None = None
    through_solver: bool = False
    copies: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a trajectory has to say when it is over.

    Args:
        weights (Tensor): loss weight of each sample, shape (B,), detached; of each image if there are copies,
            copy-major.
        metrics (dict[str, Tensor]): values to log, shape (B,), detached.
    """

    weights: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Trajectory(ABC):
    """Follows one stream of latents through one rollout. Step `num_steps` stands for the end of the sampling.

    Copies count as further steps at the time of the last one: with n copies of T steps, the schedule has T + n.
    """

    @abstractmethod
    def enter(self, step: int, latents: Tensor) -> Tensor:
        """Decide what graph the latents carry into a step.

        Called for every step that is taken but the first, and once more with `step == num_steps` for the end.

        Args:
            step (int): the step that the latents go into.
            latents (Tensor): the sampler's own latents, shape (B, ...), detached unless the plan goes through the
                solver; of a copy, the clean latents with new noise; at the end after copies, the clean latents.

        Returns:
            Tensor: what the pipeline goes on with. Its values are those of `latents` unless the method rewards
            something else than the sampler's image.
        """

    @abstractmethod
    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        """Take note of a step's denoiser call.

        Args:
            step (int): the step that was taken.
            latents (Tensor): what went into it, with the graph that `enter` gave it, shape (B, ...).
            velocity (Tensor): d latents / d noise time after guidance, same shape; with a graph at active steps.
        """

    @abstractmethod
    def outcome(self) -> Outcome:
        """Return weights and metrics; called after `enter(num_steps, ...)`."""


PlanT = TypeVar("PlanT", bound=Plan)


class Method(ABC, Generic[PlanT]):
    """A way of turning the gradient of a reward into a gradient of the denoiser; `PlanT` is the plan that it draws.

    `ends_sampling` says whether what is rewarded comes from the end of the whole sampling, one image a sample; rewards
    without gradient need it. `has_gradients` is False for one that only samples.
    """

    ends_sampling: ClassVar[bool] = True
    has_gradients: ClassVar[bool] = True

    @abstractmethod
    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> PlanT:
        """Draw the plan of a rollout.

        Args:
            schedule (Schedule): the times of the rollout's steps.
            generator (torch.Generator | None): source of all randomness; None is the global one.

        Returns:
            Plan: the same for every sample of the batch.

        Raises:
            ValueError: if the schedule has too few steps for the method's settings.
        """

    @abstractmethod
    def follow(self, plan: PlanT, schedule: Schedule) -> Trajectory:
        """Start following one stream of latents."""
