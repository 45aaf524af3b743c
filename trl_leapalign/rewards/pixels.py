"""A vision-language model's images, prepared with gradients as its image processor prepares them without."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from ..media import to_pil
from .preprocessing import normalize, resize, resize_and_crop, smart_resize, to_patches

RESAMPLING = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
PROBE_SIZES = ((48, 80), (130, 90))
"""Height and width of the pictures on which the image processor is compared with its copy."""
MAX_LEVELS = 3.0
"""Greatest difference from the image processor, of 255 levels: it rounds to 8 bits after each pass of its resizing."""


class PixelValues:
    """Prepares images for a vision-language model, differentiably.

    Two kinds of image processors are known: those of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which cut an image of any shape
    into patches, and those that resize, crop and normalise, as LLaVA's. What is computed is compared with the image
    processor's own pixels on two pictures, so that any other kind is refused.

    Args:
        processor (BaseImageProcessor): the model's image processor.
        max_pixels (int | None): greatest area of an image, for those that cut patches; None is the processor's own.

    Raises:
        ValueError: if the image processor does something else, or `max_pixels` does not apply to it.
    """

    def __init__(self, processor: BaseImageProcessor, max_pixels: int | None = None):
        self.processor = processor
        self.cuts_patches = hasattr(processor, "merge_size") and hasattr(processor, "temporal_patch_size")
        self.size = {key: value for key, value in dict(processor.size).items() if value is not None}
        if max_pixels is not None:
            if not self.cuts_patches or max_pixels < (processor.patch_size * processor.merge_size) ** 2:
                raise ValueError(
                    f"max_pixels={max_pixels} does not fit {type(processor).__name__}, whose size is {self.size}. It "
                    "is for image processors of Qwen's kind, and must leave room for one token."
                )
            self.size["longest_edge"] = max_pixels
            self.size["shortest_edge"] = min(self.size["shortest_edge"], max_pixels)
        try:
            self._check()
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(self._problem(f"{type(error).__name__}: {error}")) from error

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Prepare images.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1], float32 or float64.

        Returns:
            dict[str, Tensor]: arguments of the model's forward pass: `pixel_values`, with graph, and for models that
                take patches their `image_grid_thw`, shape (B, 3).
        """
        own = self.processor
        if not self.cuts_patches:
            return {"pixel_values": self._normalize(self._resize(images))}
        factor = own.patch_size * own.merge_size
        limits = self.size["shortest_edge"], self.size["longest_edge"]
        height, width = smart_resize(*images.shape[-2:], factor, *limits)
        pixels = self._normalize(resize(images, height, width, self._mode))
        patches = to_patches(pixels, own.patch_size, own.merge_size, own.temporal_patch_size)
        grid = [1, height // own.patch_size, width // own.patch_size]
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([grid] * len(images), device=images.device)}

    @property
    def _mode(self) -> str:
        return RESAMPLING[Image.Resampling(self.processor.resample)]

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.processor.image_mean, self.processor.image_std)

    def _resize(self, images: Tensor) -> Tensor:
        if "height" in self.size:
            return resize(images, self.size["height"], self.size["width"], self._mode)
        return resize_and_crop(images, self.size["shortest_edge"], self._mode)

    def _check(self) -> None:
        """Compare with the image processor on pictures without frequencies that resizing loses."""
        for height, width in PROBE_SIZES:
            rows, columns = torch.linspace(0, 2, height)[:, None], torch.linspace(0, 3, width)[None]
            planes = [0.5 + 0.3 * torch.sin(a * rows + b * columns) for a, b in ((1, 0.5), (0.3, 1), (0.8, -0.7))]
            images = (torch.stack(planes)[None] * 255).round() / 255
            expected = self.processor(images=to_pil(images), size=self.size, return_tensors="pt")
            actual = self(images)
            if expected.keys() != actual.keys():
                raise ValueError(self._problem(f"it returns {', '.join(expected)}"))
            shapes = tuple(expected["pixel_values"].shape), tuple(actual["pixel_values"].shape)
            if shapes[0] != shapes[1]:
                raise ValueError(self._problem(f"its pixels have shape {shapes[0]}, not {shapes[1]}"))
            difference = (expected["pixel_values"] - actual["pixel_values"]).abs().max()
            levels = 255 * difference * max(self.processor.image_std)
            if levels > MAX_LEVELS or not torch.equal(
                expected.get("image_grid_thw", torch.tensor(0)), actual.get("image_grid_thw", torch.tensor(0))
            ):
                raise ValueError(self._problem(f"its pixels differ by {levels:.1f} of 255 levels"))

    def _problem(self, reason: Any) -> str:
        return (
            f"{type(self.processor).__name__} cannot be made differentiable: {reason}. Known are image processors that "
            "cut patches as Qwen2-VL's, and those that resize, crop and normalise."
        )
