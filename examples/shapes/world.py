"""A procedural world of coloured shapes with compositional prompts: GenEval's six tasks in miniature.

A picture shows one to four objects on a grey ground. A prompt names them, and its row holds what it asks for:

    {"prompt": "a photo of a red ring and a blue cross", "tag": "color_attr", "relation": None,
     "include": [{"class": "ring", "count": 1, "color": "red"}, {"class": "cross", "count": 1, "color": "blue"}]}

A picture is right if it shows exactly the objects of `include`, the first standing in `relation` to the second.
"""

import itertools
import math
import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

IMAGE_SIZE = 48
BACKGROUND = (0.5, 0.5, 0.5)
COLORS = {
    "red": (0.92, 0.16, 0.16),
    "green": (0.16, 0.84, 0.16),
    "blue": (0.16, 0.20, 0.94),
    "white": (0.90, 0.90, 0.90),
}
SHAPES = ("ring", "triangle", "cross", "square")
NUMBERS = ("one", "two", "three", "four")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction (x, y) from the second object to the first; y points down."""

HALF_BOX = 7
"""Every shape lies in a box of `2 * HALF_BOX + 1` pixels around the pixel at its centre."""
MIN_SEPARATION = 20
"""Least Chebyshev distance between two centres: boxes stay five pixels apart."""
CENTERS = range(HALF_BOX + 1, IMAGE_SIZE - HALF_BOX, 8)
"""Coordinates of centres: eight pixels apart, as are the tokens of the pipeline's transformer."""

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "tuning", "held-out")
PREFIXES = {
    "train": ("a photo of", "a picture of", "a painting of"),
    "tuning": ("an image of",),
    "held-out": ("a drawing of",),
}
PIPELINE_KWARGS = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_sequence_length": 12, "num_inference_steps": 12}
"""What a call of the shapes pipeline needs."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Thing:
    """An object of a scene: `center` is (x, y) in pixels; `color` None (any) and `center` None (anywhere) are open."""

    shape: str
    color: str | None = None
    center: tuple[int, int] | None = None


@dataclass(frozen=True)
class Content:
    """What a prompt says, apart from its wording. The first thing stands in `relation` to the second."""

    tag: str
    things: tuple[Thing, ...]
    relation: str | None = None


@cache
def template(shape: str, supersampling: int = 8) -> np.ndarray:
    """Antialiased coverage of a shape, values in [0, 1], (2 * HALF_BOX + 1, 2 * HALF_BOX + 1)."""
    size = 2 * HALF_BOX + 1
    axis = (np.arange(size * supersampling) + 0.5) / supersampling - size / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    if shape == "ring":
        radius = np.hypot(x, y)
        inside = (radius < 7.4) & (radius > 3.7)
    elif shape == "triangle":
        inside = (y < 6.0) & (y > -7.2 + 1.85 * np.abs(x))
    elif shape == "cross":
        inside = np.minimum(np.abs(x), np.abs(y)) < 2.3
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) < 5.6
    else:
        raise ValueError(f"Unknown shape {shape!r}; choose one of {SHAPES}.")
    return inside.reshape(size, supersampling, size, supersampling).mean(axis=(1, 3))


def render(things: tuple[Thing, ...]) -> np.ndarray:
    """Draws things with a colour and a centre: values in [0, 1], (3, IMAGE_SIZE, IMAGE_SIZE), float32."""
    image = np.empty((3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    image[:] = np.reshape(BACKGROUND, (3, 1, 1))
    for thing in things:
        x, y = thing.center
        box = image[:, y - HALF_BOX : y + HALF_BOX + 1, x - HALF_BOX : x + HALF_BOX + 1]
        box += template(thing.shape).astype(np.float32) * (np.reshape(COLORS[thing.color], (3, 1, 1)) - box)
    return image


def place(content: Content, rng: random.Random) -> tuple[Thing, ...]:
    """A scene that shows `content`: centres drawn until apart and in relation, open colours drawn at random."""
    while True:
        centers = [(rng.choice(CENTERS), rng.choice(CENTERS)) for _ in content.things]
        apart = all(
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= MIN_SEPARATION for a, b in itertools.combinations(centers, 2)
        )
        if apart and (content.relation is None or _within_45_degrees(centers, content.relation)):
            break
    return tuple(
        replace(thing, color=thing.color or rng.choice(list(COLORS)), center=center)
        for thing, center in zip(content.things, centers, strict=True)
    )


def _within_45_degrees(centers: list[tuple[int, int]], relation: str) -> bool:
    (x0, y0), (x1, y1) = centers[:2]
    direction = RELATIONS[relation]
    along = (x0 - x1) * direction[0] + (y0 - y1) * direction[1]
    return along * math.sqrt(2) >= math.hypot(x0 - x1, y0 - y1)


def contents(tag: str) -> list[Content]:
    """All that prompts of a task can say, in a fixed order; the order of two things counts as wording."""
    pairs = list(itertools.combinations(SHAPES, 2))
    if tag == "single_object":
        return [Content(tag, (Thing(shape),)) for shape in SHAPES]
    if tag == "colors":
        return [Content(tag, (Thing(shape, color),)) for shape in SHAPES for color in COLORS]
    if tag == "counting":
        return [Content(tag, (Thing(shape),) * count) for shape in SHAPES for count in (2, 3, 4)]
    if tag == "two_object":
        return [Content(tag, (Thing(a), Thing(b))) for a, b in pairs]
    if tag == "position":
        return [Content(tag, (Thing(a), Thing(b)), relation) for a, b in pairs for relation in RELATIONS]
    if tag == "color_attr":
        return [
            Content(tag, (Thing(a, color_a), Thing(b, color_b)))
            for a, b in pairs
            for color_a, color_b in itertools.permutations(COLORS, 2)
        ]
    raise ValueError(f"Unknown tag {tag!r}; choose one of {TAGS}.")


def content_split(content: Content) -> str | None:
    """The one split whose prompts may say `content`, None if no split may; single objects are split by wording only.

    A colour of a shape belongs to one split: training never asks for the colour-shape pairs of the other two.
    """
    things = content.things
    shapes = [SHAPES.index(thing.shape) for thing in things]
    if content.tag == "two_object":
        return {(0, 1): "held-out", (2, 3): "held-out", (0, 2): "tuning"}.get(tuple(shapes), "train")
    if content.tag == "position":
        return _split_of_number(sum(shapes) + list(RELATIONS).index(content.relation))
    if content.tag == "counting":
        return _split_of_number(shapes[0] + len(things))
    if content.tag in ("colors", "color_attr"):
        colors = [list(COLORS).index(thing.color) for thing in things]
        splits = {_split_of_number(color + shape) for color, shape in zip(colors, shapes, strict=True)}
        others = splits - {"train"}
        return None if len(others) == 2 else others.pop() if others else "train"
    return None


def _split_of_number(number: int) -> str:
    return ("held-out", "tuning", "train", "train")[number % 4]


def mirrored(content: Content) -> Content:
    """The same content said the other way round: "a ring left of a cross" is "a cross right of a ring"."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return replace(content, things=content.things[::-1], relation=opposite.get(content.relation))


def wordings(content: Content) -> list[Content]:
    """The content and, if it has two different things, its mirror image."""
    return [content, mirrored(content)] if content.things[0] != content.things[-1] else [content]


def caption(content: Content) -> str:
    """The words for a content, without a prefix."""
    if content.tag == "counting":
        return f"{NUMBERS[len(content.things) - 1]} {plural(content.things[0].shape)}"
    names = [f"a {thing.color} {thing.shape}" if thing.color else f"a {thing.shape}" for thing in content.things]
    return f" {content.relation or 'and'} ".join(names)


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def row(content: Content, prefix: str) -> Row:
    """The row of a prompt: its text, tag, included objects and relation. All values are JSON and Arrow types."""
    things = content.things[:1] if content.tag == "counting" else content.things
    count = len(content.things) // len(things)
    include = [{"class": thing.shape, "count": count, "color": thing.color} for thing in things]
    return {
        "prompt": f"{prefix} {caption(content)}",
        "tag": content.tag,
        "include": include,
        "relation": content.relation,
    }


def content_of(row: Row) -> Content:
    """The content that a row asks for."""
    things = tuple(Thing(item["class"], item["color"]) for item in row["include"] for _ in range(item["count"]))
    return Content(row["tag"], things, row["relation"])


def prompt_rows(split: str, per_tag: int | None = None) -> list[Row]:
    """The prompts of "train", "tuning" or "held-out", task by task.

    Args:
        split (`str`): one of `SPLITS`. No two splits share a prompt, a prefix, or (single objects apart) a content.
        per_tag (`int`, *optional*): exactly this many rows of each task, its prompts repeated or cut short in a fixed
            shuffled order; by default each prompt once, so that tasks with many prompts weigh more.

    Returns:
        `list[dict]`: the rows. `datasets.Dataset.from_list` takes them.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; choose one of {SPLITS}.")
    rows = []
    for tag in TAGS:
        chosen = [content for content in contents(tag) if tag == "single_object" or content_split(content) == split]
        tag_rows = [row(said, prefix) for content in chosen for said in wordings(content) for prefix in PREFIXES[split]]
        if per_tag is not None:
            random.Random(f"{split} {tag}").shuffle(tag_rows)
            tag_rows = list(itertools.islice(itertools.cycle(tag_rows), per_tag))
        rows += tag_rows
    return rows


def corrupted(content: Content, rng: random.Random) -> Content:
    """A plausible wrong content for a caption: another shape, colour, count or relation, or swapped colours."""
    things = list(content.things)
    if content.tag == "position":
        others = [relation for relation in RELATIONS if relation != content.relation]
        opposite = mirrored(content).relation
        return replace(content, relation=opposite if rng.random() < 0.6 else rng.choice(others))
    if content.tag == "counting":
        counts = [count for count in (len(things) - 1, len(things) + 1) if count <= len(NUMBERS)]
        return replace(content, things=(things[0],) * rng.choice(counts))
    if content.tag == "color_attr" and rng.random() < 0.6:
        swapped = (replace(things[0], color=things[1].color), replace(things[1], color=things[0].color))
        return replace(content, things=swapped)
    if content.tag == "two_object" and rng.random() < 0.3:
        return replace(content, things=(rng.choice(things),))
    index = rng.randrange(len(things))
    thing = things[index]
    if thing.color is not None:
        things[index] = replace(thing, color=rng.choice([color for color in COLORS if color != thing.color]))
    else:
        things[index] = replace(thing, shape=rng.choice([shape for shape in SHAPES if shape != thing.shape]))
    return replace(content, things=tuple(things))
