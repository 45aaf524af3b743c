"""Images as evaluators see them: 8 bits a channel, as in a file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_bytes(images: Tensor) -> Tensor:
    """Round images to 8 bits a channel.

    Args:
        images (Tensor): shape (B, 3, H, W) in [0, 1]; values outside are clamped.

    Returns:
        Tensor: shape (B, 3, H, W), uint8.

    Raises:
        ValueError: if the shape or the values are wrong.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"Images must be floats of shape (B, 3, H, W) in [0, 1], got {images.dtype} of {tuple(images.shape)}."
        )
    images = images.detach().float()
    if not torch.isfinite(images).all():
        raise ValueError("The images have NaN or infinite values (a decoder in float16 gives such).")
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn images into PIL's.

    Args:
        images (Tensor): shape (B, 3, H, W) in [0, 1].

    Returns:
        list[Image.Image]: B images in RGB.
    """
    return [Image.fromarray(image) for image in to_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def read_images(paths: Sequence[Path]) -> Tensor:
    """Read images of the same size from files.

    Args:
        paths (Sequence[Path]): B files.

    Returns:
        Tensor: shape (B, 3, H, W) in [0, 1], float32.
    """
    images = []
    for path in paths:
        with Image.open(path) as picture:
            images.append(torch.from_numpy(np.array(picture.convert("RGB"))))
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255


def check_lengths(images: Tensor, prompts: list, metadata: list) -> None:
    """Raise ValueError unless there is one prompt and one row of metadata for each image."""
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(f"Got {len(images)} images, {len(prompts)} prompts and {len(metadata)} rows of metadata.")
