"""The detector: sizes, pixels and post-processing against plain loops."""

import numpy as np
import pytest
import torch
from geneval_cases import MAX_SIZE, random_images, tiny_detector, tiny_mask2former

from trl_leapalign.evaluation import Mask2FormerDetector
from trl_leapalign.evaluation.geneval.mask2former import (
    MEAN,
    STD,
    Sizes,
    plan_sizes,
    postprocess,
    preprocess,
    resize_bytes,
)
from trl_leapalign.evaluation.geneval.metadata import CLASS_NAMES


def bilinear(picture, size):
    """Bilinear interpolation of (..., H, W) between pixel centres, in float64, without antialiasing."""
    for axis, edge in zip((-2, -1), size, strict=True):
        length = picture.shape[axis]
        places = np.clip((np.arange(edge) + 0.5) * length / edge - 0.5, 0, length - 1)
        low = np.floor(places).astype(int)
        share = (places - low).reshape(-1, 1) if axis == -2 else places - low
        above = np.take(picture, np.minimum(low + 1, length - 1), axis)
        picture = np.take(picture, low, axis) * (1 - share) + above * share
    return picture


@pytest.mark.parametrize(
    "original, resized, padded",
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 512), (800, 800), (800, 800)),
        ((832, 1216), (800, 1169), (800, 1184)),
        ((1216, 832), (1169, 800), (1184, 800)),
        ((768, 1344), (762, 1333), (768, 1344)),
        ((480, 1920), (333, 1333), (352, 1344)),
    ],
)
def test_sizes(original, resized, padded):
    assert plan_sizes(original) == Sizes(original, resized, padded)


@pytest.mark.parametrize("size", [(64, 64), (40, 60), (300, 200), (96, 96)])
def test_pixels_equal_a_plain_computation(size):
    generator = torch.Generator().manual_seed(0)
    original = torch.randint(256, (2, 3, *size), generator=generator)
    between = 0.8 * torch.rand(original.shape, generator=generator) - 0.4
    sizes = plan_sizes(size, MAX_SIZE)
    pixels = preprocess(((original + between) / 255).clamp(0, 1), sizes)
    assert pixels.shape == (2, 3, *sizes.padded)
    height, width = sizes.resized
    levels = bilinear(original.numpy().astype(np.float64), sizes.resized)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))
    found = pixels[..., :height, :width].numpy() * std + mean
    assert np.abs(found - np.round(found)).max() < 1e-4
    # Weights of 11 bits and truncation between the axes: less than a level and a half from the exact value.
    assert np.abs(found - levels).max() < 1.5
    outside = np.ones(sizes.padded, dtype=bool)
    outside[:height, :width] = False
    strip = (pixels.numpy() * std + mean)[..., outside]
    assert np.abs(strip - 128).max(initial=0) < 1e-4
    assert sizes.padded[0] - height < 32 and sizes.padded[1] - width < 32


# What cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR) of OpenCV 4.14 gives for the picture below.
RESIZED = {
    (5, 7): [
        [0, 34, 87, 140, 161, 65, 43, 97, 150, 192, 96, 34],
        [16, 59, 126, 131, 129, 111, 103, 105, 157, 213, 130, 77],
        [44, 93, 170, 116, 85, 171, 182, 119, 165, 232, 169, 128],
        [113, 115, 117, 77, 65, 170, 200, 156, 149, 148, 104, 76],
        [126, 110, 85, 60, 58, 135, 162, 137, 112, 88, 63, 47],
        [81, 78, 72, 67, 63, 67, 67, 61, 56, 50, 45, 41],
        [79, 87, 101, 115, 129, 143, 115, 45, 41, 55, 68, 77],
        [80, 98, 125, 152, 180, 207, 160, 38, 34, 61, 88, 106],
    ],
    (12, 9): [
        [106, 148, 215, 100],
        [77, 75, 48, 46],
        [104, 212, 113, 141],
        [74, 79, 77, 94],
        [149, 154, 138, 166],
    ],
}


@pytest.mark.parametrize("size", RESIZED)
def test_resizing_is_that_of_opencv(size):
    rows, columns = np.mgrid[: size[0], : size[1]]
    picture = ((37 * rows * rows + 91 * columns + 53 * columns * rows) % 256).astype(np.uint8)
    expected = torch.tensor(RESIZED[size])
    found = resize_bytes(torch.from_numpy(picture), tuple(expected.shape))
    assert found.dtype == torch.uint8 and torch.equal(found.long(), expected)


def test_rounding_beyond_the_range_is_clamped_and_wrong_images_are_refused():
    images = torch.tensor([-9e-4, 1.0009, 0.5]).view(1, 3, 1, 1).expand(1, 3, 96, 96)
    pixels = preprocess(images, plan_sizes((96, 96), MAX_SIZE))
    levels = pixels[0, :, 5, 5] * torch.tensor(STD) + torch.tensor(MEAN)
    torch.testing.assert_close(levels, torch.tensor([0.0, 255.0, 128.0]))
    detector = tiny_detector()
    for wrong, message in (
        (images[0], r"Mask2FormerDetector takes images of shape \(B, 3, H, W\), but got \(3, 96, 96\)"),
        (images.repeat(1, 2, 1, 1), "shape"),
        (images * 2 - 1, r"takes images in \[0, 1\], but got values from -1"),
        (images * float("nan"), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            detector(wrong)
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        detector((images.clamp(0, 1) * 255).to(torch.uint8))


def naive_detections(class_logits, mask_logits, sizes, names, limit):
    """One pair of query and class after the other: name, score, box and mask."""
    class_logits, mask_logits = class_logits.double().numpy(), mask_logits.double().numpy()
    exp = np.exp(class_logits - class_logits.max(1, keepdims=True))
    probabilities = exp / exp.sum(1, keepdims=True)
    pairs = [(probabilities[q, c], q, c) for q in range(len(probabilities)) for c in range(len(names))]
    detections = []
    for probability, query, label in sorted(pairs, reverse=True)[:limit]:
        full = bilinear(mask_logits[query], sizes.padded)[: sizes.resized[0], : sizes.resized[1]]
        full = bilinear(full, sizes.original)
        inside = [1 / (1 + np.exp(-value)) for value in full[full > 0]]
        places = np.argwhere(full > 0)
        box = (0, 0, 0, 0)
        if len(places):
            box = (places[:, 1].min(), places[:, 0].min(), places[:, 1].max() + 1, places[:, 0].max() + 1)
        detections.append((names[label], probability * sum(inside) / (len(inside) + 1e-6), box, full > 0))
    return detections


def assert_same(found, expected):
    assert [(d.class_name, d.box) for d in found] == [(name, tuple(map(float, box))) for name, _, box, _ in expected]
    np.testing.assert_allclose([d.score for d in found], [score for _, score, _, _ in expected], rtol=1e-4)
    for detection, (_, _, _, mask) in zip(found, expected, strict=True):
        assert detection.mask.dtype == torch.bool and np.array_equal(detection.mask.numpy(), mask)


@pytest.mark.parametrize("size", [(64, 64), (150, 100), (60, 85)])
@pytest.mark.parametrize("limit", [5, 100])
def test_postprocessing_equals_a_plain_loop(size, limit):
    generator = torch.Generator().manual_seed(0)
    names = ("dog", "cat", "cup")
    class_logits = 3 * torch.randn(6, 4, generator=generator)
    sizes = plan_sizes(size, MAX_SIZE)
    mask_logits = 5 * torch.randn(6, sizes.padded[0] // 4, sizes.padded[1] // 4, generator=generator)
    mask_logits[0] = -1
    mask_logits[1, 2:] = -9
    found = postprocess(class_logits, mask_logits, sizes, names, limit, min_score=-1.0)
    expected = naive_detections(class_logits, mask_logits, sizes, names, limit)
    assert len(expected) == min(limit, 18)
    assert_same(found, expected)
    if limit == 100:
        assert {d.box for d in found if d.score == 0} == {(0, 0, 0, 0)}
        assert any(d.box[3] < size[0] / 2 for d in found if d.score > 0)
    least = 0.5 if limit == 5 else 0.2
    some = postprocess(class_logits, mask_logits, sizes, names, limit, min_score=least)
    assert_same(some, [detection for detection in expected if detection[1] > least])
    assert 0 < len(some) < len(found)


@pytest.mark.parametrize("size", [(96, 96), (64, 100)])
def test_detections_of_a_model(size):
    detector = tiny_detector()
    images = random_images(2, *size)
    found = detector(images)
    sizes = plan_sizes(size, MAX_SIZE)
    with torch.no_grad():
        outputs = detector.model(pixel_values=preprocess(images, sizes))
    for index in range(2):
        logits = outputs.class_queries_logits[index], outputs.masks_queries_logits[index]
        assert_same(found[index], naive_detections(*logits, sizes, CLASS_NAMES, 100))
        assert found[index][0].mask.shape == size
    few = detector(images, min_score=0.2)
    assert [[d.box for d in one] for one in few] == [[d.box for d in one if d.score > 0.2] for one in found]
    assert any(few)
    alone = detector(images[1:])
    np.testing.assert_allclose([d.score for d in alone[0]], [d.score for d in found[1]], rtol=1e-4)


def test_names_go_by_position():
    detector = tiny_detector()
    assert detector.model.config.id2label[64] != CLASS_NAMES[64]
    labels = {d.class_name for one in detector(random_images(2, 96, 96)) for d in one}
    assert labels <= set(CLASS_NAMES) and labels


def test_wrong_models_and_sizes_are_refused():
    with pytest.raises(ValueError, match="5 classes, but 80 names"):
        Mask2FormerDetector(tiny_mask2former(num_labels=5))
    with pytest.raises(ValueError, match="too long and narrow"):
        tiny_detector()(torch.rand(1, 3, 40, 160))


def test_a_saved_model_is_loaded_and_a_missing_one_explained(tmp_path):
    model = tiny_mask2former()
    model.save_pretrained(tmp_path / "detector")
    loaded = Mask2FormerDetector.from_pretrained(tmp_path / "detector")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    source = "facebook/mask2former-swin-small-coco-instance"
    with pytest.raises(FileNotFoundError, match=rf"Cannot find '{source}': .*`hf download .*detector='FOLDER'"):
        Mask2FormerDetector.from_pretrained(source)
    with pytest.raises(FileNotFoundError, match=r"no mmdet checkpoint .*detector.pth.*Download https://"):
        Mask2FormerDetector.from_pretrained(tmp_path / "detector.pth")
