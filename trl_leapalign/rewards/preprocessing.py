"""From images to a model's pixels, with gradients: resizing, cropping, padding, normalising, patches.

Everything takes (B, 3, H, W) in float32 or float64. Resizing is antialiased, which equals torchvision's on tensors.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Subtract a mean and divide by a standard deviation; the default is CLIP's, which BLIP and Qwen2-VL use too.

    Args:
        images (Tensor): shape (B, 3, H, W) in [0, 1].
        mean (Sequence[float]): of each channel.
        std (Sequence[float]): of each channel.

    Returns:
        Tensor: the same shape.
    """
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize with antialiasing.

    Args:
        images (Tensor): shape (B, 3, H, W).
        height (int): pixels of the result.
        width (int): pixels of the result.
        mode (str): "bicubic" or "bilinear".

    Returns:
        Tensor: shape (B, 3, height, width); bicubic interpolation may leave [0, 1].
    """
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode=mode, align_corners=False, antialias=True)


def resize_and_crop(images: Tensor, size: int, mode: str = "bicubic", round_margins: bool = False) -> Tensor:
    """Resize the shortest edge to `size`, and cut out the centre.

    Args:
        images (Tensor): shape (B, 3, H, W).
        size (int): pixels of the square result.
        mode (str): "bicubic" or "bilinear".
        round_margins (bool): round half a margin as torchvision does, rather than down as transformers does. They
            differ by one pixel for some odd margins.

    Returns:
        Tensor: shape (B, 3, size, size).
    """
    height, width = images.shape[-2:]
    shortest = min(height, width)
    images = resize(images, int(size * height / shortest), int(size * width / shortest), mode)
    margins = (edge - size for edge in images.shape[-2:])
    top, left = (round(margin / 2) if round_margins else margin // 2 for margin in margins)
    return images[..., top : top + size, left : left + size]


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """Resize the longest edge to `size`, and pad the other with black on both sides.

    Args:
        images (Tensor): shape (B, 3, H, W) in [0, 1].
        size (int): pixels of the square result.

    Returns:
        Tensor: shape (B, 3, size, size).
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resize(images, max(1, round(height * scale)), max(1, round(width * scale)))
    rows, columns = (size - edge for edge in images.shape[-2:])
    return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def smart_resize(height: int, width: int, factor: int, pixels: int, max_pixels: int | None = None) -> tuple[int, int]:
    """Size of an image for Qwen-VL: edges are multiples of `factor`, the area is in range, the shape is kept.

    The arithmetic is Qwen's down to its rounding errors: 768 x 768 becomes 420 x 420, not 448 x 448.

    Args:
        height (int): of the image.
        width (int): of the image.
        factor (int): pixels of an image token's edge.
        pixels (int): least area.
        max_pixels (int | None): greatest area. None is the least one too.

    Returns:
        tuple[int, int]: height and width.

    Raises:
        ValueError: if one edge is more than 200 times as long as the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"Images of {height} x {width} pixels cannot be scored: Qwen2-VL takes edges that differ by a factor of "
            f"{MAX_ASPECT_RATIO} at the most."
        )
    rounded = (round(height / factor) * factor, round(width / factor) * factor)
    area = rounded[0] * rounded[1]
    largest = pixels if max_pixels is None else max_pixels
    if area > largest:
        shrink = math.sqrt((height * width) / largest)
        return tuple(max(factor, math.floor(edge / shrink / factor) * factor) for edge in (height, width))
    if area < pixels:
        grow = math.sqrt(pixels / (height * width))
        return tuple(math.ceil(edge * grow / factor) * factor for edge in (height, width))
    return rounded


def to_patches(images: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Cut images into the patches of Qwen2-VL, in its order: those that are merged into one token come together.

    Args:
        images (Tensor): shape (B, 3, H, W); H and W are multiples of patch x merge.
        patch (int): pixels of a patch's edge.
        merge (int): patches of a token's edge.
        frames (int): times that an image is repeated, as a video of one scene.

    Returns:
        Tensor: shape (B * H/patch * W/patch, 3 * frames * patch * patch).
    """
    batch, channels, height, width = images.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    grid = images.reshape(batch, channels, rows, merge, patch, columns, merge, patch)
    tokens = grid.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    repeated = tokens.expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return repeated.reshape(batch * rows * columns * merge * merge, channels * frames * patch * patch)
