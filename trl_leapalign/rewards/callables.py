"""What a reward function is, what built-in ones are called with, and what they may return."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..media import check_images

RewardFunction: TypeAlias = Callable[[Tensor, list[str], list[dict[str, Any]]], "Tensor | tuple[Tensor, dict]"]
"""`reward(images, prompts, metadata)` with images (B, 3, H, W) in [0, 1] that carry the graph, or video
(B, F, 3, H, W), returns rewards (B,), or these and a dict of things to report."""


@dataclass(frozen=True)
class NamedReward:
    """A reward function under a name, loaded when it is needed.

    Args:
        name (str): what it is called in logs.
        load (Callable[[], RewardFunction]): returns it.
    """

    name: str
    load: Callable[[], RewardFunction]


def check_callable(function: Any) -> None:
    """Raise TypeError unless something can be called as a reward function, or will be loaded as one."""
    if isinstance(function, NamedReward):
        return
    if isinstance(function, type):
        raise TypeError(f"The reward {function.__name__} is a class. Pass an instance of it: {function.__name__}(...).")
    if not callable(function):
        raise TypeError(f"A reward must be callable as reward(images, prompts, metadata), but {function!r} is not.")
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # some built-in functions have none
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise TypeError(
            f"The reward {name_of(function)!r} is called as reward(images, prompts, metadata), but takes {signature}."
        ) from error


def name_of(function: RewardFunction | NamedReward | str) -> str:
    """Return what a reward function is called in logs."""
    if isinstance(function, str):
        return function
    if isinstance(function, NamedReward):
        return function.name
    return getattr(function, "__name__", type(function).__name__).replace("<lambda>", "lambda")


def check_rewards(rewards: Any, images: Tensor, name: str) -> None:
    """Check what a reward function returned for some images.

    Args:
        rewards (Any): what it returned.
        images (Tensor): what it was given, shape (B, ...).
        name (str): of the reward, for the message.

    Raises:
        TypeError: if it is not a floating tensor.
        ValueError: if it is not of shape (B,), or has no graph though the images have one.
    """
    if not isinstance(rewards, Tensor):
        raise TypeError(
            f"The reward {name!r} returned a {type(rewards).__name__}, through which no gradient flows. Return a "
            "tensor of shape (B,) computed from the images with torch operations, or pass BlackBox(reward)."
        )
    if not rewards.is_floating_point():
        raise TypeError(
            f"The reward {name!r} returned {rewards.dtype}, which has no gradient. Return floats, or pass BlackBox(it)."
        )
    if rewards.shape != (len(images),):
        raise ValueError(
            f"The reward {name!r} returned shape {tuple(rewards.shape)} for {len(images)} images. Return one reward an "
            f"image, shape ({len(images)},)."
        )
    if images.requires_grad and not rewards.requires_grad:
        raise ValueError(
            f"The reward {name!r} is detached from the images, so there is nothing to learn from. Compute it with "
            "torch operations only: no .detach(), .numpy(), PIL images, torch.no_grad() or image processors. If it has "
            "no gradient by nature, pass BlackBox(reward)."
        )


def check_inputs(
    images: Any, prompts: Any, metadata: Any, name: str, reads_prompts: bool = True, video: bool = False
) -> None:
    """Check the images, prompts and metadata that a built-in reward or evaluator is called with.

    Args:
        images (Any): should be a floating tensor of shape (B, 3, H, W), or (B, F, 3, H, W) for video, in [0, 1].
        prompts (Any): should be a list of B strings.
        metadata (Any): should be a list of B dicts; None is not checked.
        name (str): of the reward, for the message.
        reads_prompts (bool): whether the scores depend on the prompts, so that one that is empty is a mistake.
        video (bool): whether it scores videos.

    Raises:
        TypeError: if the images are no floating tensor, the prompts no list of strings, or the metadata no list.
        ValueError: if the shape, the range or the number of prompts or rows is wrong, or a prompt is empty.
    """
    check_images(images, name, video)
    if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)):
        raise TypeError(f"{name} takes a list of prompts, one an image, but got {prompts!r}. Pass [prompt].")
    strangers = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if strangers:
        raise TypeError(f"{name} takes prompts that are strings, but got {strangers[0]!r}.")
    if len(prompts) != len(images):
        raise ValueError(
            f"{name} got {len(prompts)} prompts for {len(images)} images. Pass one prompt an image, in their order."
        )
    empty = [index for index, prompt in enumerate(prompts) if not prompt.strip()]
    if reads_prompts and empty:
        raise ValueError(
            f"{name} compares images with prompts, but prompt {empty[0]} is {prompts[empty[0]]!r}. Pass what the image "
            "should show."
        )
    if metadata is not None and not isinstance(metadata, (list, tuple)):
        raise TypeError(f"{name} takes a list of metadata, a dict an image, but got {metadata!r}.")
    if metadata is not None and len(metadata) != len(images):
        raise ValueError(f"{name} got {len(metadata)} rows of metadata for {len(images)} images. Pass one an image.")
