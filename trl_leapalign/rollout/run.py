"""Runs the user's own pipeline with gradients where a method wants them. The file that knows diffusers' internals.

The pipeline's `__call__` runs as it is, without its `no_grad` decorator. What the method needs is threaded through the
scheduler: the real step is taken on detached values, the method decides what graph the next latents carry, and gradient
mode is switched between steps.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..media import by_sample
from ..methods.base import Method, Schedule
from ..methods.flow import connect
from .pipelines import (
    check_call_arguments,
    check_pipeline,
    is_flow_matching,
    modules_of,
    pipelines_of,
    quiet,
    schedulers_of,
    temporary_attribute,
)
from .streams import Stream, Timesteps, plain_attribute, read_schedule

OUTPUT_TYPES = ("pt", "latent")
CHECKPOINTING = "gradient_checkpointing"


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


def run_rollout(
    pipeline: DiffusionPipeline,
    method: Method,
    *,
    method_generator: torch.Generator | None = None,
    **pipeline_kwargs: Any,
) -> RolloutOutput:
    """Call a pipeline so that its output carries the gradient that a method defines.

    Values are those of `pipeline(**pipeline_kwargs)` bit for bit, the random state included, for every method that
    rewards the sampler's own result. The pipeline is left as a plain call leaves it, also after an exception.

    Args:
        pipeline (DiffusionPipeline): any pipeline with a flow-matching scheduler, on its device, not offloaded.
        method (Method): decides which steps run with gradients and how these reach the output.
        method_generator (torch.Generator | None): source of the method's choices; None draws fresh entropy.
        **pipeline_kwargs: arguments of the pipeline's call, untouched; `output_type` is "pt" (default) or "latent".

    Returns:
        RolloutOutput: images with graph, loss weights, active steps and metrics.

    Raises:
        TypeError: if an argument is of the wrong kind, or unknown to the pipeline's call.
        ValueError: if the pipeline cannot be differentiated, or has too few steps for the method.
        RuntimeError: if gradients cannot be recorded, the pipeline loses them, or it is in a rollout already.
    """
    check_pipeline(pipeline)
    check_call_arguments(pipeline, pipeline_kwargs)
    _check_kinds(method, method_generator, pipeline_kwargs.get("generator"))
    call_kwargs = {"output_type": "pt", **pipeline_kwargs, "return_dict": False}
    if call_kwargs["output_type"] not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type={call_kwargs['output_type']!r} is not differentiable; choose one of {OUTPUT_TYPES}."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "run_rollout() was called under torch.inference_mode(), where no gradient can be recorded. "
            "Leave inference mode, or call the pipeline itself if you need no gradient."
        )
    if method_generator is None:
        method_generator = torch.Generator()
        method_generator.seed()
    states = _RandomStates(method_generator, call_kwargs.get("generator"))
    first_index = 0
    tried = {first_index}
    while True:
        recorder = _Recorder(method, method_generator, call_kwargs.get("generator"), first_index)
        try:
            with _instrumented(pipeline, recorder), torch.no_grad():
                output = _without_no_grad(type(pipeline).__call__)(pipeline, **call_kwargs)
            break
        except _StartsLater as start:
            if start.index in tried:
                raise ValueError(
                    f"{type(pipeline).__name__} runs several sampling loops that begin at different steps without "
                    "calling scheduler.set_begin_index(), so their steps are not known beforehand."
                ) from None
            first_index = start.index
            tried.add(first_index)
            states.restore()
        except RuntimeError as error:
            if "Can't call numpy() on Tensor that requires grad" not in str(error):
                raise
            raise RuntimeError(
                f"{type(pipeline).__name__} turns its output into a numpy array (for a safety checker or a watermark), "
                "where the gradient ends. Leave that part out, or sample with output_type='latent' and decode the "
                "latents in the reward."
            ) from error
    return recorder.collect(output[0], pipeline)


def _check_kinds(method: Any, method_generator: Any, generator: Any) -> None:
    if not isinstance(method, Method):
        raise TypeError(f"method must be an instance of a method, such as LeapAlign(), but got {method!r}.")
    generators = {"method_generator": [method_generator], "generator": generator}
    for name, values in generators.items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None and not isinstance(value, torch.Generator):
                raise TypeError(f"{name}={value!r} is no torch.Generator. Make one: torch.Generator().manual_seed(3).")


class _StartsLater(Exception):
    """The pipeline entered its schedule at a later step than assumed, without saying so beforehand."""

    def __init__(self, index: int):
        super().__init__(f"the first step taken is step {index} of the schedule")
        self.index = index


class _RandomStates:
    """Random states at the start of a rollout, to start it again."""

    def __init__(self, method_generator: torch.Generator, generator: torch.Generator | list[torch.Generator] | None):
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        self.generators = [(g, g.get_state()) for g in (method_generator, *generators) if g is not None]
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        for generator, state in self.generators:
            generator.set_state(state)
        torch.set_rng_state(self.cpu)
        torch.cuda.set_rng_state_all(self.cuda)


class _Recorder:
    """Stands between a pipeline and its schedulers for the time of one rollout."""

    def __init__(self, method: Method, generator: torch.Generator, noise: Any, first_index: int):
        self.method = method
        self.generator = generator
        self.noise = noise
        self.copy_generators: torch.Generator | list[torch.Generator] | None = None
        self.state = generator.get_state()
        self.first_index = first_index
        self.streams: dict[int, Stream] = {}  # the latest of each scheduler, by id
        self.finished: list[Stream] = []
        self.schedulers: dict[int, SchedulerMixin] = {}

    def track(self, scheduler: SchedulerMixin) -> None:
        """Replace methods of one instance, and so of the deep copies made of it; its class stays as it is."""
        if "step" in vars(scheduler):
            raise RuntimeError(
                "The pipeline is already in a rollout. Run one at a time, or make another pipeline of its components "
                "with a scheduler of its own."
            )
        original, recorder = type(scheduler), self

        @functools.wraps(original.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            original.set_timesteps(self, *args, **kwargs)
            recorder.schedulers[id(self)] = self
            recorder.start(self, recorder.first_index)

        @functools.wraps(original.step)
        def step(self, *args, **kwargs):
            recorder.schedulers[id(self)] = self
            bound = inspect.signature(original.step).bind(self, *args, **kwargs)
            return recorder.step(self, original.step, bound)

        def set_begin_index(self, begin_index=0):
            original.set_begin_index(self, begin_index)
            recorder.start(self, begin_index)

        for replaced in (set_timesteps, step, set_begin_index):
            if hasattr(original, replaced.__name__):
                vars(scheduler)[replaced.__name__] = MethodType(replaced, scheduler)
        self.schedulers[id(scheduler)] = scheduler

    def release(self) -> None:
        for scheduler in self.schedulers.values():
            for name in ("set_timesteps", "step", "set_begin_index"):
                vars(scheduler).pop(name, None)
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
        if plan.copies and self.finished:
            raise ValueError(
                f"The pipeline sets a schedule after a sampling loop, and {type(self.method).__name__} repeats the "
                "last step of one loop. Choose a method without copies, such as LeapAlign."
            )
        if plan.copies:
            *times, end = schedule.times
            schedule = Schedule((*times, *times[-1:] * plan.copies, end), schedule.interpolant)
        self.streams[id(scheduler)] = Stream(first_index, inverted, schedule, plan, self.method.follow(plan, schedule))
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
                raise _StartsLater(index - 1)
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
        return stream.enter(latents)

    def _draw(self, latents: Tensor) -> Tensor:
        """Noise like the latents, from copies of the generators of the call: it leaves them as a plain call does."""
        if self.copy_generators is None:
            given = self.generator if self.noise is None else self.noise
            copies = [_copy(generator) for generator in (given if isinstance(given, (list, tuple)) else [given])]
            self.copy_generators = copies if len(copies) > 1 else copies[0]
        return randn_tensor(latents.shape, self.copy_generators, latents.device, latents.dtype)

    def before_call(self, module: nn.Module, args: tuple) -> None:
        """A schedule that was set after a loop may be another loop's or no one's: a denoiser's call tells."""
        if torch.is_grad_enabled():
            self.switch_gradients(in_call=True)

    def switch_gradients(self, in_call: bool = False) -> None:
        """Turn gradients on for an active step, and whenever no stream is in the middle of its steps."""
        streams = self.streams.values()
        next_active = any(stream.is_active(stream.num_taken) for stream in streams)
        begun = self.finished or any(stream.num_taken for stream in streams)
        running = any(stream.running or (in_call and stream.num_taken == 0) for stream in streams)
        enabled = bool(next_active or (begun and not running))
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
        images = by_sample(images, len(outcomes[0].weights), name)
        if not isinstance(images, Tensor):
            raise ValueError(f"{name} returned {type(images).__name__} for tensors; it cannot be differentiated.")
        trained = any(p.requires_grad for module in modules_of(pipeline).values() for p in module.parameters())
        if trained and not images.requires_grad:
            raise RuntimeError(
                f"The output of {name} carries no gradient: something between its denoiser and its output detaches it, "
                "or none of the parameters that require gradients take part in the sampling."
            )
        return RolloutOutput(
            images=images,
            weights=torch.stack([outcome.weights for outcome in outcomes]).mean(0),
            active_steps=streams[0].plan.active_steps,
            metrics={
                key: torch.stack([outcome.metrics[key] for outcome in outcomes]).mean(0) for key in outcomes[0].metrics
            },
            latents=tuple(stream.latest for stream in streams),
        )


@contextmanager
def _instrumented(pipeline: DiffusionPipeline, recorder: _Recorder) -> Iterator[None]:
    """Make a pipeline ready for a rollout, and put everything back afterwards."""
    with ExitStack() as stack:
        stack.callback(recorder.release)
        for scheduler in filter(is_flow_matching, schedulers_of(pipeline)):
            recorder.track(scheduler)
        for part in pipelines_of(pipeline):
            _record_gradients(part, stack)
            stack.enter_context(quiet(part))
        for module in modules_of(pipeline).values():
            if getattr(module, "_supports_gradient_checkpointing", False) and not hasattr(module, CHECKPOINTING):
                # Some models, made to be run without gradients, read this flag with them but never set it.
                stack.enter_context(temporary_attribute(module, CHECKPOINTING, False))
            if any(parameter.requires_grad for parameter in module.parameters()):
                stack.callback(module.register_forward_pre_hook(recorder.before_call, prepend=True).remove)
                for submodule in module.modules():
                    _record_gradients(submodule, stack)
            for submodule in filter(lambda part: part.training, module.modules()):
                stack.enter_context(temporary_attribute(submodule, "training", False))
        yield


def _record_gradients(instance: Any, stack: ExitStack) -> None:
    """Take the decorators off an instance's methods for a while."""
    for name, stripped, static in _methods_without_gradient(type(instance)):
        stack.enter_context(temporary_attribute(instance, name, stripped if static else MethodType(stripped, instance)))


@functools.cache
def _methods_without_gradient(owner: type) -> list[tuple[str, Callable, bool]]:
    """Name and bare function of methods that run under `no_grad`, and whether they are static; not the call itself."""
    found = []
    for name, method in inspect.getmembers(owner, inspect.isfunction):
        stripped = _without_no_grad(method)
        if stripped is not method and name != "__call__":
            found.append((name, stripped, isinstance(inspect.getattr_static(owner, name), staticmethod)))
    return found


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


def _without_no_grad(function: Callable) -> Callable:
    """Take `torch.no_grad` and `torch.inference_mode` decorators off a function."""
    while getattr(function, "__code__", None) is not None and function.__code__.co_name == "decorate_context":
        function = function.__wrapped__
    return function
