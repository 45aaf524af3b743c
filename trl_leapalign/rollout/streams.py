"""The steps of one sampling loop: their times, what goes into and comes out of each, and how many are taken."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..methods.base import Plan, Schedule, Trajectory
from ..methods.flow import RECTIFIED, TRIGFLOW, connect, scale_gradient
from .validation import check_entered

# Stands for a gradient discount of 0: the scale is taken off again after the denoiser, so it must be invertible.
_ZERO_SCALE = 2.0**-60


def read_schedule(scheduler: SchedulerMixin, first_index: int) -> tuple[Schedule, bool]:
    """Read the noise times of the steps from `first_index` on, and whether the scheduler counts them upwards."""
    if scheduler.config.get("prediction_type") == "trigflow":
        return Schedule(tuple(scheduler.timesteps.tolist()[first_index:]), TRIGFLOW), False
    if hasattr(scheduler, "sigmas"):
        times = scheduler.sigmas.tolist()
    else:
        times = [*(scheduler.timesteps / scheduler.config.num_train_timesteps).tolist(), 0.0]
    inverted = times[0] < times[-1]
    if inverted:
        times = [1.0 - time for time in times]
    return Schedule(tuple(times[first_index:]), RECTIFIED), inverted


@dataclass
class Stream:
    """One sampling loop: one `set_timesteps` of one scheduler."""

    first_index: int
    inverted: bool
    schedule: Schedule
    plan: Plan
    trajectory: Trajectory
    num_taken: int = 0
    entered: Tensor | None = None  # the latents that the next step was given, if they carry a graph
    clean: Tensor | None = None  # the sampler's result, while copies are taken
    last_output: Any = None  # of the scheduler
    latest: Tensor | None = None  # what an inactive step, or at last the decoder, was given

    @property
    def num_to_take(self) -> int:
        return self.schedule.num_steps if self.plan.stop is None else self.plan.stop + 1

    @property
    def end(self) -> Tensor:
        """What the loop ended with, with the graph that the method gave it."""
        assert self.latest is not None, "a loop that took its steps has an end"
        return self.latest

    @property
    def running(self) -> bool:
        return 0 < self.num_taken < self.num_to_take

    @property
    def scale(self) -> float:
        return max(self.plan.input_gradient_scale, _ZERO_SCALE)

    def is_active(self, step: int) -> bool:
        return step in self.plan.active_steps

    def enter(self, latents: Tensor) -> Tensor:
        step = self.num_taken if self.num_taken < self.num_to_take else self.schedule.num_steps
        entered = self.trajectory.enter(step, latents)
        at_end = step == self.schedule.num_steps
        check_entered(self.trajectory, entered, latents, step, self.plan.copies if at_end else 0)
        self.entered = entered if entered.requires_grad else None
        if self.is_active(step) and entered.requires_grad:
            if self.scale == _ZERO_SCALE and latents.dtype == torch.float16:
                raise ValueError(
                    "A gradient discount of 0 cannot be represented in float16. Load the pipeline in bfloat16 or "
                    "float32, or set a discount above 0."
                )
            return scale_gradient(entered, self.scale)
        # Never the scheduler's own tensor: some pipelines write into their latents.
        self.latest = entered.clone()
        return self.latest

    def restored(self, latents: Tensor) -> Tensor:
        """The latents that a step was given, with the graph that they had before they went into the denoiser."""
        active = self.is_active(self.num_taken)
        if active and latents.requires_grad:
            # Those of a loop's first step come from the pipeline, and were not scaled.
            return latents if self.entered is None else scale_gradient(latents, 1.0 / self.scale)
        if active and self.entered is not None:
            raise RuntimeError(
                f"Something detached the latents before step {self.num_taken}, so no gradient would flow through the "
                "steps before it. Leave out what replaces them between the steps, such as callback_on_step_end."
            )
        if self.plan.through_solver and self.entered is not None and not latents.requires_grad:
            return connect(latents, self.entered)
        return latents

    def leave(self, latents: Tensor, velocity: Tensor) -> None:
        self.trajectory.leave(self.num_taken, latents, -velocity if self.inverted else velocity)
        self.num_taken += 1

    def with_noise(self, noise: Tensor) -> Tensor:
        """The clean latents at the time of the last step."""
        assert self.clean is not None, "noise is put on clean latents, which are there after the last step"
        time, interpolant = self.schedule.times[-2], self.schedule.interpolant
        return interpolant.alpha(time) * self.clean.detach() + interpolant.beta(time) * noise


class Timesteps(Tensor):
    """Timesteps that a loop goes through as far as a stream needs, and beyond for its copies."""

    stream: Callable[[], Stream]

    @staticmethod
    def of(timesteps: Tensor, stream: Callable[[], Stream]) -> "Timesteps":
        tracked = timesteps.as_subclass(Timesteps)
        tracked.stream = stream
        return tracked

    def __iter__(self) -> Iterator[Tensor]:
        timestep = None
        for timestep in self.as_subclass(Tensor).unbind():
            if self.stream().num_taken >= self.stream().num_to_take:
                return
            yield timestep
        while timestep is not None and self.stream().num_taken < self.stream().num_to_take:
            yield timestep

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Parts of it, and copies on a device, are such timesteps too; all else that is computed is a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        part = function is Tensor.__getitem__ and isinstance(args[1], slice)
        return cls.of(result, args[0].stream) if part or function is Tensor.to else result


def plain_attribute(value: Any) -> Any:
    """An attribute of a scheduler without what a rollout left in it."""
    if isinstance(value, Timesteps):
        return value.as_subclass(Tensor)
    if isinstance(value, list):
        return [plain_attribute(each) for each in value]
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
