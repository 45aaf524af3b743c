"""What built-in rewards and evaluators are called with, checked in one place."""

from typing import Any

from ..media import check_images


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
