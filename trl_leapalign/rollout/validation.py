"""Whether a method, also one of the user's own, plans and follows a rollout as it must."""

from typing import Any

import torch
from torch import Tensor

from ..methods.base import Method, Outcome, Plan, Schedule, Trajectory


def check_plan(method: Method, plan: Any, schedule: Schedule) -> None:
    """Check what a method planned.

    Args:
        method (Method): the method, for the message.
        plan (Any): should be a Plan for these steps.
        schedule (Schedule): the steps, without copies.

    Raises:
        TypeError: if it is no Plan.
        ValueError: if its steps are not steps of the schedule.
    """
    name = type(method).__name__
    if not isinstance(plan, Plan):
        raise TypeError(f"{name}.plan() returned {plan!r:.100}. Return a Plan.")
    count = schedule.num_steps
    last = count - 1 if plan.stop is None else plan.stop
    if not _is_whole(plan.copies) or plan.copies < 0:
        raise ValueError(f"{name}.plan() returned copies={plan.copies!r}, which must be a whole number of at least 0.")
    if not _is_whole(last) or not 0 <= last < count:
        raise ValueError(f"{name}.plan() stops after step {last!r}, but the {count} steps are 0 to {count - 1}.")
    if plan.copies and plan.stop is not None:
        raise ValueError(f"{name}.plan() returned stop={plan.stop} and copies, which repeat the last step. Drop one.")
    steps = list(plan.active_steps)
    if not steps and not method.has_gradients:
        return
    if not steps or not all(map(_is_whole, steps)) or steps != sorted(set(steps)):
        raise ValueError(
            f"{name}.plan() returned active_steps={plan.active_steps!r:.100}. Return at least one step number, in "
            "ascending order, each once."
        )
    if not 0 <= steps[0] <= steps[-1] <= last + plan.copies:
        raise ValueError(
            f"{name}.plan() returned active_steps={plan.active_steps}, but the steps that are taken are 0 to "
            f"{last + plan.copies}."
        )


def check_trajectory(method: Method, trajectory: Any) -> None:
    """Raise TypeError unless `method.follow` returned a Trajectory."""
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"{type(method).__name__}.follow() returned {trajectory!r:.100}. Return a Trajectory.")


def check_entered(trajectory: Trajectory, entered: Any, latents: Tensor, step: int, copies: int) -> None:
    """Check what a trajectory let the pipeline go on with.

    Args:
        trajectory (Trajectory): of the method, for the message.
        entered (Any): should be a tensor like `latents`.
        latents (Tensor): the sampler's own, shape (B, ...).
        step (int): the step that they go into.
        copies (int): images that come after each sample's own, at the end; 0 before.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it has another shape.
    """
    name = type(trajectory).__name__
    if not isinstance(entered, Tensor):
        raise TypeError(f"{name}.enter() returned a {type(entered).__name__} for step {step}. Return the latents.")
    expected = ((copies + 1) * len(latents), *latents.shape[1:])
    if tuple(entered.shape) != expected:
        raise ValueError(
            f"{name}.enter() returned latents of shape {tuple(entered.shape)} for step {step}, but the pipeline goes "
            f"on with {expected}. Return the latents that were given, with another graph if you like."
        )


def check_outcome(trajectory: Trajectory, outcome: Any, num_images: int) -> None:
    """Check what a trajectory has to say when it is over.

    Args:
        trajectory (Trajectory): of the method, for the message.
        outcome (Any): should be an Outcome.
        num_images (int): (n + 1) * B with n copies.

    Raises:
        TypeError: if it is no Outcome.
        ValueError: if weights or metrics do not have one value an image, or carry a graph.
    """
    name = type(trajectory).__name__
    if not isinstance(outcome, Outcome):
        raise TypeError(f"{name}.outcome() returned {outcome!r:.100}. Return an Outcome.")
    for key, value in {"weights": outcome.weights, **outcome.metrics}.items():
        if not isinstance(value, Tensor) or (value.shape != (num_images,) and key == "weights"):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name}.outcome() gives {key} of shape {shape} for {num_images} images. Give a tensor of one value an "
                "image."
            )
    if outcome.weights.requires_grad:
        raise ValueError(f"{name}.outcome() gives weights with a graph. Detach them.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def own_generator(generator: torch.Generator) -> torch.Generator:
    """Methods draw on the CPU: for a generator of another device, one whose seed is drawn from it.

    Args:
        generator (torch.Generator): on any device.

    Returns:
        torch.Generator: on the CPU; the given one if it is there.
    """
    if generator.device.type == "cpu":
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item())
    return torch.Generator().manual_seed(seed)
