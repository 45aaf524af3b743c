"""GenEval's detector: Mask2Former with the pre- and post-processing of mmdet, which the published scores come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation

from ...media import check_images, to_bytes
from ...rewards.weights import load_model
from .metadata import CLASS_NAMES
from .mmdet_checkpoint import UNUSED, load_mmdet_checkpoint
from .rules import Detection

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
PADDING = 128.0
"""Level of the strip on the right and below, before normalising."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Height and width of an image on its way through the detector.

    Args:
        original (Size): as it is given.
        resized (Size): after resizing, with the same proportions.
        padded (Size): after padding on the right and below, as the model sees it.
    """

    original: Size
    resized: Size
    padded: Size


class Mask2FormerDetector(nn.Module):
    """Finds things with Mask2Former.

    Args:
        model (Mask2FormerForUniversalSegmentation): the model, frozen here. Its class i is `class_names[i]`, whatever
            its own config calls it.
        class_names (Sequence[str]): names by position; the default is GenEval's for the 80 classes of COCO.
        max_size (Size): images are resized so that their long and short sides just stay within these.
        max_detections (int): how many pairs of query and class are looked at, the most probable ones.

    Raises:
        ValueError: if the model has another number of classes.
    """

    def __init__(
        self,
        model: Mask2FormerForUniversalSegmentation,
        class_names: Sequence[str] = CLASS_NAMES,
        max_size: Size = (1333, 800),
        max_detections: int = 100,
    ):
        super().__init__()
        if model.config.num_labels != len(class_names):
            raise ValueError(
                f"The detector knows {model.config.num_labels} classes, but {len(class_names)} names are given. "
                "GenEval needs a model for the 80 classes of COCO instances, in their order."
            )
        self.model = model.eval().requires_grad_(False)
        self.class_names = tuple(class_names)
        self.max_size = max_size
        self.max_detections = max_detections

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Mask2FormerDetector":
        """Load a detector.

        Args:
            source (str | Path): Hub id or folder of a transformers model, such as
                "facebook/mask2former-swin-small-coco-instance", or the .pth file of mmdet that GenEval uses.

        Returns:
            Mask2FormerDetector: on the CPU, in float32.

        Raises:
            FileNotFoundError: if the weights are neither on disk nor to be had from the Hub.
            ValueError: if they are not those of such a model, or cut off.
        """
        if str(source).endswith(".pth"):
            return cls(load_mmdet_checkpoint(source))
        return cls(load_model(Mask2FormerForUniversalSegmentation, source, argument="detector", unused=UNUSED))

    @torch.no_grad()
    def forward(self, images: Tensor, min_score: float = 0.0) -> list[list[Detection]]:
        """Find things in images.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            min_score (float): only detections with a score above this are returned.

        Returns:
            list[list[Detection]]: for each image, the most probable class first; boxes and masks are those of the
                image as it was given.
        """
        check_images(images, type(self).__name__)
        sizes = plan_sizes(tuple(images.shape[-2:]), self.max_size)
        self._check_window(sizes)
        outputs = self.model(pixel_values=preprocess(images, sizes).to(self.model.device))
        return [
            postprocess(classes.float(), masks.float(), sizes, self.class_names, self.max_detections, min_score)
            for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        ]

    def _check_window(self, sizes: Sizes) -> None:
        """Swin shrinks its windows for good when a picture is smaller than one, which mmdet's does not."""
        smallest, window = min(sizes.padded) // 32, self.model.config.backbone_config.window_size
        if smallest <= window:
            raise ValueError(
                f"Images of {sizes.original[0]} x {sizes.original[1]} pixels are too long and narrow: resized to "
                f"{sizes.resized}, their short side has no more than the {window * 32} pixels that the detector needs."
            )


def plan_sizes(original: Size, max_size: Size = (1333, 800)) -> Sizes:
    """Say how large an image gets.

    Args:
        original (Size): height and width.
        max_size (Size): of the long and the short side.

    Returns:
        Sizes: resized with the same proportions, up or down, and padded to multiples of 32.
    """
    scale = min(max(max_size) / max(original), min(max_size) / min(original))
    resized = (int(original[0] * scale + 0.5), int(original[1] * scale + 0.5))
    return Sizes(original, resized, (-(-resized[0] // 32) * 32, -(-resized[1] // 32) * 32))


def preprocess(images: Tensor, sizes: Sizes) -> Tensor:
    """Prepare images as mmdet 2.28.2 does: 8 bits, OpenCV's bilinear resizing, pad with the level 128, normalise.

    Args:
        images (Tensor): shape (B, 3, H, W) in [0, 1].
        sizes (Sizes): of these images.

    Returns:
        Tensor: shape (B, 3, *sizes.padded), float32.
    """
    levels = resize_bytes(to_bytes(images), sizes.resized).float()
    bottom, right = (padded - resized for padded, resized in zip(sizes.padded, sizes.resized, strict=True))
    levels = F.pad(levels, (0, right, 0, bottom), value=PADDING)
    mean, std = (levels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (levels - mean) / std


def resize_bytes(levels: Tensor, size: Size) -> Tensor:
    """Resize as `cv2.resize` does with INTER_LINEAR on 8-bit images: weights of 11 bits, and truncation between axes.

    Args:
        levels (Tensor): uint8, shape (..., H, W).
        size (Size): height and width of the result.

    Returns:
        Tensor: uint8, shape (..., *size).
    """
    low, high, first, second = _taps(levels.shape[-1], size[1], True, levels.device)
    rows = levels.to(torch.int32)
    rows = (rows[..., low] * first + rows[..., high] * second) >> 4
    low, high, first, second = (each.unsqueeze(-1) for each in _taps(levels.shape[-2], size[0], False, levels.device))
    above, below = rows[..., low.squeeze(-1), :], rows[..., high.squeeze(-1), :]
    return ((((above * first) >> 16) + ((below * second) >> 16) + 2) >> 2).to(torch.uint8)


def _taps(length: int, size: int, across: bool, device: torch.device) -> tuple[Tensor, ...]:
    """The two pixels that each result lies between, and their weights in 2048ths, as OpenCV rounds them.

    Beyond the edge both are the last pixel: across, it has the whole weight; down, the two weights stay as they are.
    """
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * (length / size) - 0.5
    places = places.float()  # OpenCV's places are of single precision
    low = places.floor()
    share = places - low
    if across:
        share = share.masked_fill((low < 0) | (low >= length - 1), 0.0)
    low = low.long()
    weights = [(weight * 2048).round().to(torch.int32) for weight in (1 - share, share)]
    taps = (low.clamp(0, length - 1), (low + 1).clamp(0, length - 1), *weights)
    return tuple(each.to(device) for each in taps)


def postprocess(
    class_logits: Tensor,
    mask_logits: Tensor,
    sizes: Sizes,
    class_names: Sequence[str],
    max_detections: int,
    min_score: float,
) -> list[Detection]:
    """Turn one image's predictions into detections as mmdet does; a query may be several classes.

    Args:
        class_logits (Tensor): shape (Q, C + 1), the last for nothing.
        mask_logits (Tensor): shape (Q, h, w).
        sizes (Sizes): of the image.
        class_names (Sequence[str]): C names.
        max_detections (int): how many pairs of query and class are looked at.
        min_score (float): only scores above this are returned.

    Returns:
        list[Detection]: the score is the class probability times the mean mask probability inside the mask.
    """
    probabilities = class_logits.softmax(-1)[:, :-1].flatten()
    top, indices = probabilities.topk(min(max_detections, len(probabilities)))
    # A score is never above its class probability, so the rest need no mask.
    top, indices = top[top > min_score], indices[top > min_score]
    queries, classes = indices // len(class_names), indices % len(class_names)
    scores, masks = _masks(mask_logits, queries, sizes)
    kept = zip(classes.tolist(), (top * scores).tolist(), masks, strict=True)
    return [Detection(class_names[c], score, _box(mask), mask) for c, score, mask in kept if score > min_score]


def _masks(mask_logits: Tensor, queries: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Mean probability inside each query's mask, shape (N,), and the masks, bool of shape (N, H, W)."""
    scores = mask_logits.new_zeros(len(queries))
    masks = torch.zeros(len(queries), *sizes.original, dtype=torch.bool, device=mask_logits.device)
    for index, query in enumerate(queries.tolist()):
        logits = _resize(mask_logits[None, None, query], sizes.padded)
        logits = _resize(logits[..., : sizes.resized[0], : sizes.resized[1]], sizes.original)[0, 0]
        masks[index] = logits > 0
        scores[index] = (logits.sigmoid() * masks[index]).sum() / (masks[index].sum() + 1e-6)
    return scores, masks


def _resize(logits: Tensor, size: Size) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """The tight box of a mask; right and bottom are those after its last pixel. An empty mask has no box: zeros."""
    rows, columns = (mask.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
