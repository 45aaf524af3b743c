"""Preprocessing against plain formulas, transformers' processors and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_cases import random_images
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_leapalign.rewards.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    normalize,
    resize,
    resize_and_crop,
    resize_and_pad,
    smart_resize,
    to_patches,
)

SIZES = [(16, 16), (32, 16), (16, 48), (10, 12), (33, 70), (5, 5), (200, 160), (1, 40)]


def test_normalize():
    images = random_images(2, 3, 4, 5, dtype=torch.float64)
    pixels = normalize(images)
    for channel in range(3):
        expected = (images[:, channel] - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(pixels[:, channel], expected, rtol=1e-14, atol=0)
    assert CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073) and CLIP_STD == (0.26862954, 0.26130258, 0.27577711)


def smooth(height, width):
    """An image with no frequency that resizing would lose, and no value near 0 or 1."""
    rows, columns = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 4, width)[None]
    planes = [0.5 + 0.3 * torch.sin(rows * a + columns * b) for a, b in ((1, 0.5), (0.3, 1), (0.8, -0.7))]
    return (torch.stack(planes)[None] * 255).round() / 255


@pytest.mark.parametrize("size", [(40, 64), (65, 48), (33, 33)])
def test_crop_is_that_of_transformers(size):
    images = smooth(*size)
    pil = Image.fromarray((images[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy())
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(pil, return_tensors="pt").pixel_values
    pixels = normalize(resize_and_crop(images, 32))
    assert pixels.shape == expected.shape == (1, 3, 32, 32)
    levels = (pixels - expected).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    # It rounds to 8 bits after each of two passes: half a level, and half a level times the filter's absolute sum of
    # at most 1.3 (its negative lobes).
    assert levels.max() < 1.15 and levels.mean() < 0.4
    sideways = (normalize(resize_and_crop(images.flip(-1), 32)) - expected).abs().max()
    assert sideways > 0.1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_crop_keeps_the_centre(size, mode):
    images = random_images(1, 3, *size, dtype=torch.float64)
    scale = 16 / min(size)
    target = [16 if edge == min(size) else int(edge * scale) for edge in size]
    resized = F.interpolate(images, size=target, mode=mode, antialias=True)
    top, left = ((edge - 16) // 2 for edge in target)
    cropped = resize_and_crop(images, 16, mode)
    torch.testing.assert_close(cropped, resized[..., top : top + 16, left : left + 16], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("width", "left", "rounded"), [(17, 0, 0), (18, 1, 1), (19, 1, 2), (21, 2, 2), (23, 3, 4)])
def test_odd_margins(width, left, rounded):
    """torchvision rounds half of them to even, transformers down."""
    images = random_images(1, 3, 16, width)
    assert torch.equal(resize_and_crop(images, 16), images[..., left : left + 16])
    assert torch.equal(resize_and_crop(images, 16, round_margins=True), images[..., rounded : rounded + 16])


@pytest.mark.parametrize(
    ("size", "inner", "offset"),
    [
        ((20, 20), (16, 16), (0, 0)),
        ((32, 16), (16, 8), (0, 4)),
        ((12, 32), (6, 16), (5, 0)),
        ((24, 31), (12, 16), (2, 0)),
        ((31, 10), (16, 5), (0, 5)),  # 11 columns of padding: 5 on the left, 6 on the right
        ((8, 4), (16, 8), (0, 4)),
        ((16, 16), (16, 16), (0, 0)),
        ((640, 1), (16, 1), (0, 7)),
        ((32, 5), (16, 2), (0, 7)),  # 2.5 columns are rounded to even
        ((32, 7), (16, 4), (0, 6)),  # so are 3.5
    ],
)
def test_padding_surrounds_the_whole_image(size, inner, offset):
    images = random_images(2, 3, *size, dtype=torch.float64) + 1
    padded = resize_and_pad(images, 16)
    expected = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    resized = F.interpolate(images, size=inner, mode="bicubic", antialias=True)
    expected[..., offset[0] : offset[0] + inner[0], offset[1] : offset[1] + inner[1]] = resized
    torch.testing.assert_close(padded, expected, rtol=1e-13, atol=1e-13)


def test_padding_is_black():
    pixels = normalize(resize_and_pad(random_images(1, 3, 8, 16), 16))
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels[0, :, 0, 0], black)
    torch.testing.assert_close(pixels[0, :, -1, -1], black)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (448, 448)),
        ((720, 720), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((1280, 1280), (448, 448)),
        ((768, 768), (420, 420)),  # an error of rounding that must be kept
        ((832, 1216), (364, 532)),
        ((1024, 768), (504, 364)),
        ((448, 448), (448, 448)),
        ((224, 224), (448, 448)),
        ((20, 20), (448, 448)),
        ((20, 3000), (56, 5488)),
    ],
)
def test_smart_resize(size, expected):
    assert smart_resize(*size, 28, 256 * 28 * 28) == expected


def test_smart_resize_refuses_ribbons():
    with pytest.raises(ValueError, match="1 x 201 pixels cannot be scored"):
        smart_resize(1, 201, 28, 200704)


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (6, 4)])
def test_patches_are_those_of_transformers(grid):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (grid[0] * 14, grid[1] * 14, 3), dtype=np.uint8) for _ in range(2)]
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
    processor = Qwen2VLImageProcessorPil(size=size)
    expected = processor([Image.fromarray(array) for array in arrays], return_tensors="pt")
    assert expected.image_grid_thw.tolist() == [[1, *grid]] * 2
    images = torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    patches = to_patches(normalize(images), 14, 2, 2)
    assert patches.shape == (2 * grid[0] * grid[1], 1176)
    torch.testing.assert_close(patches, expected.pixel_values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "preprocess"),
    [
        ((6, 5), lambda x: normalize(resize_and_crop(x, 4))),
        ((3, 7), lambda x: normalize(resize_and_crop(x, 4, round_margins=True))),
        ((6, 5), lambda x: normalize(resize_and_crop(x, 4, "bilinear"))),
        ((6, 5), lambda x: normalize(resize_and_pad(x, 4))),
        ((2, 3), lambda x: normalize(resize_and_pad(x, 4))),
        ((5, 7), lambda x: to_patches(normalize(resize(x, *smart_resize(5, 7, 4, 64))), 2, 2, 2)),
    ],
)
def test_gradients(size, preprocess):
    images = random_images(1, 3, *size, dtype=torch.float64).requires_grad_()
    assert preprocess(images).dtype == torch.float64
    assert torch.autograd.gradcheck(preprocess, images)
