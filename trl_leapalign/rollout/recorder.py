"""Stands between a pipeline and its schedulers during one rollout: the real step on detached values, the method's graph
on the latents, gradient mode switched between steps.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..media import by_sample
from ..methods.base import Method, Schedule
from ..methods.flow import connect
from .pipelines import (
    modules_of,
)
from .streams import Stream, Timesteps, plain_attribute, read_schedule
from .validation import check_outcome, check_plan, check_trajectory

REPLACED = ("set_timesteps", "step", "set_begin_index")


@dataclass(frozen=True)
class RolloutOutput:
    """What a rollout returns.

    Args:
        images (Tensor): the pipeline's own output with the method's graph: images (B, 3, H, W) in [0, 1], video
            (B, F, 3, H, W), or latents for `output_type="latent"`.
        weights (Tensor): loss weight of each sample, shape (B,), detached.
        active_steps (tuple[int, ...]): steps that ran with gradients, in sampling order, 0 = first (noisiest).
        metrics (dict[str, Tensor]): what the method reports, shape (B,) each, detached.
        latents (tuple[Tensor, ...]): what each sampling loop ended with, shape (B, ...) as the pipeline packs it, with
            the graph: all of the reward's gradient goes through it.
        penalty (Tensor | None): distance of each sample to the base model, shape (B,), with graph, where it is
            measured.
        num_calls (int): calls of the pipeline that a batch was divided into; the latents of each loop are those of all
            calls, one after another.

    With a method that adds copies, images and weights are (n + 1) * B, copy-major.
    """

    images: Tensor
    weights: Tensor
    active_steps: tuple[int, ...]
    metrics: dict[str, Tensor]
    latents: tuple[Tensor, ...]
    penalty: Tensor | None = None
    num_calls: int = 1


class StartsLater(Exception):
    """The pipeline entered its schedule at a later step than assumed, without saying so beforehand."""

    def __init__(self, index: int):
        super().__init__(f"the first step taken is step {index} of the schedule")
        self.index = index


class Replacement:
    """A function in the place of a scheduler's method, with the signature of the method, which pipelines look at."""

    def __init__(self, function: Callable, method: Callable):
        functools.update_wrapper(self, method)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Recorder:
    """Stands between a pipeline and its schedulers for the time of one rollout."""

    def __init__(
        self,
        method: Method,
        generator: torch.Generator,
        noise: Any,
        first_index: int,
        differentiate_output: bool = True,
    ):
        self.method = method
        self.generator = generator
        self.noise = noise
        self.copy_generators: torch.Generator | list[torch.Generator] | None = None
        self.state = generator.get_state()
        self.first_index = first_index
        self.differentiate_output = differentiate_output
        self.streams: dict[int, Stream] = {}  # the latest of each scheduler, by id
        self.finished: list[Stream] = []
        self.schedulers: dict[int, SchedulerMixin] = {}
        self.replaced_by_user: dict[int, dict[str, Any]] = {}  # methods on the instance, by id of the scheduler

    def track(self, scheduler: SchedulerMixin) -> None:
        """Replace methods of one instance, and so of the deep copies made of it; its class stays as it is."""
        if isinstance(getattr(vars(scheduler).get("step"), "__func__", None), Replacement):
            raise RuntimeError(
                "The pipeline is already in a rollout. Run one at a time, or make another pipeline of its components "
                "with a scheduler of its own."
            )
        original, recorder = type(scheduler), self
        own = {name: vars(scheduler)[name] for name in REPLACED if name in vars(scheduler)}
        self.replaced_by_user[id(scheduler)] = own

        def take_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            return own["step"](*args, **kwargs) if "step" in own else original.step(self, *args, **kwargs)

        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
            call = own.get("set_timesteps") or MethodType(original.set_timesteps, self)
            call(*args, **kwargs)
            recorder.schedulers[id(self)] = self
            recorder.start(self, recorder.first_index)

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            recorder.schedulers[id(self)] = self
            bound = inspect.signature(original.step).bind(self, *args, **kwargs)
            return recorder.step(self, take_step, bound)

        def set_begin_index(self: Any, begin_index: int = 0) -> None:
            call = own.get("set_begin_index") or MethodType(original.set_begin_index, self)
            call(begin_index)
            recorder.start(self, begin_index)

        for replaced in (set_timesteps, step, set_begin_index):
            if hasattr(original, replaced.__name__):
                wrapper = Replacement(replaced, getattr(original, replaced.__name__))
                vars(scheduler)[replaced.__name__] = MethodType(wrapper, scheduler)
        self.schedulers[id(scheduler)] = scheduler

    def release(self) -> None:
        for scheduler in self.schedulers.values():
            for name in REPLACED:
                vars(scheduler).pop(name, None)
            vars(scheduler).update(self.replaced_by_user.get(id(scheduler), {}))
            for name, value in vars(scheduler).items():
                setattr(scheduler, name, plain_attribute(value))

    def start(self, scheduler: SchedulerMixin, first_index: int) -> None:
        """Begin a stream when its steps are known, and switch the mode for its first one."""
        previous = self.streams.get(id(scheduler))
        if previous is not None and previous.num_taken > 0:
            self.finished.append(previous)
        self.generator.set_state(self.state)  # streams of equally many steps draw the same ones
        schedule, inverted = read_schedule(scheduler, first_index)
        plan = self.method.plan(schedule, self.generator)
        check_plan(self.method, plan, schedule)
        if plan.copies and self.finished:
            raise ValueError(
                f"The pipeline sets a schedule after a sampling loop, and {type(self.method).__name__} repeats the "
                "last step of one loop. Choose a method without copies, such as LeapAlign."
            )
        if plan.copies:
            *times, end = schedule.times
            schedule = Schedule((*times, *times[-1:] * plan.copies, end), schedule.interpolant)
        trajectory = self.method.follow(plan, schedule)
        check_trajectory(self.method, trajectory)
        self.streams[id(scheduler)] = Stream(first_index, inverted, schedule, plan, trajectory)
        if plan.stop is not None or plan.copies:
            scheduler.timesteps = Timesteps.of(scheduler.timesteps, lambda: self.streams[id(scheduler)])
        self.switch_gradients()

    def step(self, scheduler: SchedulerMixin, original: Callable, bound: inspect.BoundArguments) -> Any:
        """Take the real step on detached values and give its result the method's graph."""
        if id(scheduler) not in self.streams:
            self.start(scheduler, self.first_index)
        stream = self.streams[id(scheduler)]
        with torch.enable_grad():
            velocity, latents = bound.arguments["model_output"], stream.restored(bound.arguments["sample"])
        if not stream.is_active(stream.num_taken):
            velocity = velocity.detach()
        bound.arguments.update(model_output=velocity, sample=latents)
        if stream.clean is not None:
            output = stream.last_output
        else:
            output = stream.last_output = self._solve(stream, original, bound)
            index = getattr(scheduler, "step_index", None)
            if index is not None and stream.num_taken == 0 and index - 1 != stream.first_index:
                raise StartsLater(index - 1)
        with torch.enable_grad():
            # Euler's solver takes the velocity with the opposite sign where each token has a time of its own.
            stream.leave(latents, velocity if bound.arguments.get("per_token_timesteps") is None else -velocity)
            output = _with_latents(output, lambda value: self._next(stream, value), at_end=not stream.running)
        self.switch_gradients()
        return output

    def _solve(self, stream: Stream, original: Callable, bound: inspect.BoundArguments) -> Any:
        """The scheduler's own step."""
        if stream.plan.through_solver:
            with torch.enable_grad():
                return original(*bound.args, **bound.kwargs)
        live = {name: bound.arguments[name].detach() for name in ("model_output", "sample")}
        bound.arguments.update(live)
        with torch.no_grad():
            return original(*bound.args, **bound.kwargs)

    def _next(self, stream: Stream, latents: Tensor) -> Tensor:
        """What goes into the next step: the solver's result, new noise on it for a copy, or itself after the copies."""
        if stream.plan.copies and stream.num_taken == stream.schedule.num_steps - stream.plan.copies:
            stream.clean = latents
        if stream.clean is not None:
            latents = stream.with_noise(self._draw(stream.clean)) if stream.running else stream.clean
        entered = stream.enter(latents)
        return entered if stream.running or self.differentiate_output else entered.detach().clone()

    def _draw(self, latents: Tensor) -> Tensor:
        """Noise like the latents, from copies of the generators of the call: it leaves them as a plain call does."""
        if self.copy_generators is None:
            given = self.generator if self.noise is None else self.noise
            copies = [_copy(generator) for generator in (given if isinstance(given, (list, tuple)) else [given])]
            self.copy_generators = copies if len(copies) > 1 else copies[0]
        return randn_tensor(latents.shape, self.copy_generators, latents.device, latents.dtype)

    def decoder_of(self, decode: Any) -> Callable:
        """Decode copies in calls of their own, so that the samples' images are those of a plain call bit for bit."""

        @functools.wraps(decode)
        def decode_apart(latents: Any, *args: Any, **kwargs: Any) -> Any:
            parts = 1 + max((stream.plan.copies for stream in self.streams.values()), default=0)
            if parts == 1 or not isinstance(latents, Tensor) or len(latents) % parts:
                return decode(latents, *args, **kwargs)
            outputs = [decode(part, *args, **kwargs) for part in latents.chunk(parts)]
            if isinstance(outputs[0], Tensor):
                return torch.cat(outputs)
            return _with_latents(outputs[0], lambda _: torch.cat([output[0] for output in outputs]), at_end=False)

        return decode_apart

    def before_call(self) -> None:
        """A schedule that was set after a loop may be another loop's or no one's: a denoiser's call tells."""
        if torch.is_grad_enabled():
            self.switch_gradients(in_call=True)

    def switch_gradients(self, in_call: bool = False) -> None:
        """Turn gradients on for an active step, and whenever no stream is in the middle of its steps."""
        streams = self.streams.values()
        next_active = any(stream.is_active(stream.num_taken) for stream in streams)
        begun = self.finished or any(stream.num_taken for stream in streams)
        running = any(stream.running or (in_call and stream.num_taken == 0) for stream in streams)
        enabled = bool(next_active or (self.differentiate_output and begun and not running))
        if enabled != torch.is_grad_enabled():
            torch.set_grad_enabled(enabled)
            # A weight that autocast cast without gradient would be used again with gradient.
            torch.clear_autocast_cache()

    def collect(self, images: Any, pipeline: DiffusionPipeline) -> RolloutOutput:
        name = type(pipeline).__name__
        streams = self.finished + [stream for stream in self.streams.values() if stream.num_taken > 0]
        if not streams:
            raise ValueError(f"{name} never called scheduler.step(), so there is no step to differentiate.")
        for stream in streams:
            if stream.num_taken != stream.num_to_take:
                raise ValueError(
                    f"{name} stopped after {stream.num_taken} of {stream.num_to_take} steps. Leave out the "
                    "arguments that end the sampling early."
                )
        outcomes = [stream.trajectory.outcome() for stream in streams]
        for stream, outcome in zip(streams, outcomes, strict=True):
            check_outcome(stream.trajectory, outcome, len(stream.end))
        images = by_sample(images, len(outcomes[0].weights), name)
        if not isinstance(images, Tensor):
            raise ValueError(f"{name} returned {type(images).__name__} for tensors; it cannot be differentiated.")
        trained = any(p.requires_grad for module in modules_of(pipeline).values() for p in module.parameters())
        ends = [images] if self.differentiate_output else [stream.end for stream in streams]
        expected = trained and any(stream.plan.active_steps for stream in streams)
        if expected and not any(end.requires_grad for end in ends):
            raise RuntimeError(
                f"The output of {name} carries no gradient: something between its denoiser and its output detaches it, "
                "or none of the parameters that require gradients take part in the sampling. An image-to-video "
                "pipeline keeps its first frame: sample so many that there are more latent frames than that one."
            )
        return RolloutOutput(
            images=images,
            weights=torch.stack([outcome.weights for outcome in outcomes]).mean(0),
            active_steps=streams[0].plan.active_steps,
            metrics={
                key: torch.stack([outcome.metrics[key] for outcome in outcomes]).mean(0) for key in outcomes[0].metrics
            },
            latents=tuple(stream.end for stream in streams),
        )


def _copy(generator: torch.Generator) -> torch.Generator:
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied


def _with_latents(output: Any, enter: Callable[[Tensor], Tensor], at_end: bool) -> Any:
    """Replace the next latents in a step's output; at the end also give their graph to other predictions in it."""
    values = list(output) if isinstance(output, tuple) else list(output.values())
    values[0] = enter(values[0])
    if at_end:
        values[1:] = [
            connect(value, values[0]) if isinstance(value, Tensor) and value.shape == values[0].shape else value
            for value in values[1:]
        ]
    return tuple(values) if isinstance(output, tuple) else type(output)(**dict(zip(output.keys(), values, strict=True)))
