"""The colour classifier and the whole evaluator on tiny real models, against plain computations."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from geneval_cases import (
    busy_detector,
    color_tokenizer,
    random_images,
    tiny_classifier,
    tiny_color_clip,
    tiny_mask2former,
)
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trl_leapalign.evaluation import ColorClassifier, Detection, GenEval, GenEvalRules
from trl_leapalign.evaluation.geneval.colors import cut_out, to_pixels
from trl_leapalign.evaluation.geneval.metadata import COLORS, RELATIONS
from trl_leapalign.media import to_pil
from trl_leapalign.rewards import RewardSet
from trl_leapalign.rewards.preprocessing import CLIP_MEAN, CLIP_STD


def blob(height, width, box):
    """An ellipse in a box."""
    left, top, right, bottom = box
    y, x = np.mgrid[0.5:height, 0.5:width]
    inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 <= 1
    return Detection("dog", 0.9, tuple(map(float, box)), torch.from_numpy(inside))


BOXES = [(5, 3, 30, 37), (0, 0, 48, 40), (40, 10, 48, 12), (20, 20, 37, 23), (8, 0, 24, 16)]


@pytest.fixture
def picture():
    return to_pil(random_images(1, 40, 48))[0]


@pytest.mark.parametrize("box", BOXES)
def test_a_cut_out_is_grey_outside_of_its_mask(box, picture):
    thing = blob(40, 48, box)
    left, top, right, bottom = box
    pixels, mask = np.array(picture)[top:bottom, left:right], thing.mask.numpy()[top:bottom, left:right]
    expected = np.where(mask[..., None], pixels, 0x99)
    assert np.array_equal(np.array(cut_out(picture, thing)), expected)
    whole = Detection("dog", 0.9, thing.box)
    assert np.array_equal(np.array(cut_out(picture, whole)), pixels)


def test_pixels_equal_those_of_transformers(picture):
    """Its centre crop differs when the margin is odd, so these are even."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for size in ((16, 16), (48, 48), (40, 60), (7, 14), (60, 40)):
        image = picture.resize(size)
        expected = processor(image, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(to_pixels(image, 16), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size, left, top", [((16, 19), 0, 2), ((16, 21), 0, 2), ((19, 16), 2, 0), ((17, 16), 0, 0)])
def test_a_centre_crop_rounds_half_to_even(size, left, top, picture):
    image = picture.resize(size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    levels = ((to_pixels(image, 16) * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(levels, np.array(image)[top : top + 16, left : left + 16])


def naive_similarities(picture, name, detections):
    """Each thing with each text in a forward pass of its own."""
    model, tokenizer = tiny_color_clip(), color_tokenizer()
    rows = []
    for thing in detections:
        pixels = np.array(picture).copy()
        pixels[~thing.mask.numpy()] = 153
        left, top, right, bottom = map(int, thing.box)
        values = to_pixels(Image.fromarray(pixels[top:bottom, left:right]), 16)[None]
        row = []
        for color in COLORS:
            texts = (
                f"a photo of a {color} {name}",
                f"a photo of a {color}-colored {name}",
                f"a photo of a {color} object",
            )
            with torch.no_grad():
                outputs = [model(**tokenizer(text, return_tensors="pt"), pixel_values=values) for text in texts]
            mean = torch.stack([output.text_embeds[0] for output in outputs]).mean(0)
            row.append((outputs[0].image_embeds[0] @ mean / mean.norm()).item())
        rows.append(row)
    return np.array(rows)


def test_colors_equal_a_plain_computation(picture):
    classifier = tiny_classifier()
    things = [blob(40, 48, box) for box in BOXES]
    for name in ("dog", "couch"):
        expected = naive_similarities(picture, name, things)
        np.testing.assert_allclose(classifier.similarities(picture, name, things).numpy(), expected, atol=2e-6)
        colors = classifier(picture, name, things)
        assert colors == [COLORS[index] for index in expected.argmax(1)]
        # The case can tell colours apart, by more than the two computations differ.
        assert np.diff(np.sort(expected)[:, -2:]).min() > 1e-4
    assert len({color for name in ("dog", "cat") for color in classifier(picture, name, things)}) > 1


def test_text_features_are_remembered_by_class(picture):
    classifier = tiny_classifier()
    things = [blob(40, 48, BOXES[0])]
    first = classifier.similarities(picture, "dog", things)
    assert not torch.allclose(first, classifier.similarities(picture, "cat", things), atol=1e-3)
    assert torch.equal(first, classifier.similarities(picture, "dog", things))


@pytest.fixture(scope="module")
def evaluator():
    return GenEval(busy_detector(), tiny_classifier())


@pytest.fixture(scope="module")
def images():
    return random_images(3, 96, 100)


@pytest.fixture(scope="module")
def seen(evaluator, images):
    """What the detector sees in each image, by class, best first, and its colours."""
    found = []
    for image, picture in zip(images, to_pil(images), strict=True):
        groups = {}
        for thing in sorted(evaluator.detector(image[None])[0], key=lambda thing: -thing.score):
            if thing.score > 0.3:
                groups.setdefault(thing.class_name, []).append(thing)
        colors = {name: evaluator.color_classifier(picture, name, group) for name, group in groups.items()}
        found.append((groups, colors))
    assert all(groups for groups, _ in found)
    return found


def cases(groups, colors):
    """Rows with what their verdict should be, made from what there is."""
    name, group = next(iter(groups.items()))
    clause = {"class": name, "count": len(group)}
    yield {"tag": "single_object", "include": [clause]}, 1, ""
    yield {"tag": "single_object", "include": [clause | {"count": len(group) + 1}]}, 0, "wanted"
    yield {"tag": "colors", "include": [clause], "exclude": [clause]}, 0, "fewer than"
    yield {"tag": "colors", "include": [clause], "exclude": [clause | {"count": len(group) + 1}]}, 1, ""
    best = colors[name][0]
    yield {"tag": "color_attr", "include": [{"class": name, "count": 1, "color": best}]}, 1, ""
    other = next(color for color in COLORS if color != best)
    yield {"tag": "color_attr", "include": [{"class": name, "count": 1, "color": other}]}, 0, f"{best}, but 1 x {other}"
    one = {"class": name, "count": 1}
    last = list(groups)[-1]
    held = GenEvalRules().relations(groups[last][0].box, group[0].box)
    for relation in RELATIONS:
        row = {"tag": "position", "include": [one, {"class": last, "count": 1, "position": [relation, 0]}]}
        yield row, float(relation in held), "" if relation in held else f"{relation} is wanted"


def test_verdicts_on_what_the_detector_sees(evaluator, images, seen):
    rows = [list(cases(*one)) for one in seen]
    placed = [verdict for row in rows for case, verdict, _ in row if case["tag"] == "position"]
    assert 0 < sum(placed) < len(placed) and any(len(group) > 1 for groups, _ in seen for group in groups.values())
    for number in range(len(rows[0])):
        batch = [row[number] for row in rows]
        correct, details = evaluator(images, ["a prompt"] * 3, [row for row, _, _ in batch])
        assert correct.dtype == torch.float32 and correct.tolist() == [verdict for _, verdict, _ in batch]
        for (row, verdict, text), reason, tag in zip(batch, details["reason"], details["tag"], strict=True):
            assert text in reason and bool(reason) == (not verdict) and tag == row["tag"]
        for (groups, _), objects in zip(seen, details["objects"], strict=True):
            assert list(objects) == list(groups)
            for name, group in groups.items():
                expected = [[*thing.box, thing.score] for thing in group[:16]]
                torch.testing.assert_close(torch.tensor(objects[name]), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_counting_has_a_threshold_of_its_own(evaluator, images, seen):
    groups = [{n: [t for t in group if t.score > 0.9] for n, group in one.items()} for one, _ in seen]
    name = next(iter(seen[0][0]))
    rows = [{"tag": "counting", "include": [{"class": name, "count": 1}]}] * 3
    _, details = evaluator(images, [""] * 3, rows)
    found = [{n: len(group) for n, group in objects.items()} for objects in details["objects"]]
    assert found == [{n: len(group) for n, group in one.items() if group} for one in groups]
    assert found != [{n: len(group) for n, group in one.items()} for one, _ in seen]


def test_rules_reach_the_detector(evaluator, images, seen):
    """A lower threshold than the published one gets more detections."""
    loose = GenEval(evaluator.detector, evaluator.color_classifier, GenEvalRules(threshold=0.01))
    row = {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
    _, details = loose(images[:1], [""], [row])
    number = sum(map(len, details["objects"][0].values()))
    assert number > sum(map(len, seen[0][0].values()))


def test_it_keeps_the_contract_of_rewards(evaluator, images, seen):
    name = next(iter(seen[0][0]))
    rows = [{"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": "p", "more": 1}] * 3
    scores = RewardSet(evaluator)(images, ["p"] * 3, rows)
    assert scores.rewards.shape == (1, 3) and scores.rewards[0, 0] == 1 and not scores.rewards.requires_grad
    assert set(scores.details["GenEval"]) == {"tag", "reason", "objects"}


def test_the_program_in_the_docs_runs(evaluator, seen):
    page = (Path(__file__).parents[2] / "docs" / "geneval.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for loading, name in (
        ('GenEval.from_pretrained("mask2former.pth", device="cuda")', "loaded"),
        ("read_geneval()", "read"),
    ):
        assert loading in program
        program = program.replace(loading, name)
    rows = [
        {"tag": tag, "include": [{"class": next(iter(seen[0][0])), "count": 1}], "prompt": tag}
        for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    ]
    asked = []

    def pipe(prompts, output_type):
        asked.extend(prompts)
        return SimpleNamespace(images=random_images(3, 96, 100)[[0, 0, 0, 1]])

    names = {"loaded": evaluator, "read": rows, "pipe": pipe}
    exec(compile(program, "geneval.md", "exec", dont_inherit=True), names)
    assert asked == [row["prompt"] for row in rows for _ in range(4)] and names["tags"] == asked
    assert names["correct"][:3] == [1, 1, 1]


def test_wrong_input_is_refused(evaluator, images):
    row = {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
    with pytest.raises(ValueError, match="Metadata row 1 has no 'tag'"):
        evaluator(images[:2], [""] * 2, [row, {"prompt": "a dog"}])
    with pytest.raises(ValueError, match="GenEval got 2 prompts for 3 images"):
        evaluator(images, [""] * 2, [row] * 3)
    with pytest.raises(ValueError, match="GenEval got 2 rows of metadata for 3 images"):
        evaluator(images, [""] * 3, [row] * 2)
    with pytest.raises(ValueError, match=r"GenEval takes images in \[0, 1\], but got values from -0"):
        evaluator(images * 2 - 1, [""] * 3, [row] * 3)


def test_from_pretrained(evaluator, images, tmp_path):
    tiny_mask2former().save_pretrained(tmp_path / "detector")
    tiny_color_clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="holds a tokenizer without words"):
        GenEval.from_pretrained(tmp_path / "detector", tmp_path / "clip")
    color_tokenizer().save_pretrained(tmp_path / "clip")
    loaded = GenEval.from_pretrained(tmp_path / "detector", tmp_path / "clip", GenEvalRules(threshold=0.5))
    assert loaded.rules.threshold == 0.5 and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    picture, thing = to_pil(images)[0], blob(96, 100, (10, 10, 90, 60))
    found = loaded.color_classifier.similarities(picture, "dog", [thing])
    torch.testing.assert_close(found, evaluator.color_classifier.similarities(picture, "dog", [thing]))
    assert not torch.allclose(found, evaluator.color_classifier.similarities(picture, "cat", [thing]), atol=1e-3)
    with pytest.raises(FileNotFoundError, match=r"Cannot find 'openai/clip-vit-large.*color_classifier='FOLDER'"):
        ColorClassifier.from_pretrained()
