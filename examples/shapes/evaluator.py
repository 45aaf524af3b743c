"""The judge: does a picture show exactly what its prompt asks for? Hard yes or no, with no code of the reward's.

    python -m examples.shapes.evaluator examples/shapes/model --split held-out --num-images 1000

Objects are connected components, named by the direction of their colour and by overlap with the shapes' templates;
relations follow GenEval's rule. A picture with a malformed, two-coloured, faint, missing or extra object is wrong.
"""

import argparse
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from scipy import ndimage

from examples.shapes import world

FOREGROUND = 0.3
"""Least distance from the background's colour of an object's pixel; the colours are 0.57 to 0.69 away."""
LEAST_PIXELS = 6
LEAST_PURITY = 0.85
LEAST_OVERLAP = 0.75


@dataclass(frozen=True)
class Detection:
    """A connected component: `shape` and `color` are None where unclear; centre and size are (x, y) in pixels."""

    shape: str | None
    color: str | None
    center: tuple[float, float]
    size: tuple[int, int]


@dataclass(frozen=True)
class Scores:
    """Share of right pictures by tag, and their number by tag."""

    accuracy: dict[str, float]
    count: dict[str, int]

    @property
    def overall(self) -> float:
        """The mean over the tags."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def standard_error(self, tag: str | None = None) -> float:
        """Binomial standard error of a tag's accuracy, or of `overall`."""
        if tag is not None:
            return (self.accuracy[tag] * (1 - self.accuracy[tag]) / self.count[tag]) ** 0.5
        return sum(self.standard_error(tag) ** 2 for tag in self.accuracy) ** 0.5 / len(self.accuracy)

    def table(self) -> str:
        """A Markdown table in percent, with standard errors."""
        lines = ["| task | pictures | right (%) |", "|---|---:|---:|"]
        lines += [
            f"| {tag} | {self.count[tag]} | {100 * self.accuracy[tag]:.1f} ± {100 * self.standard_error(tag):.1f} |"
            for tag in self.accuracy
        ]
        total = f"{100 * self.overall:.1f} ± {100 * self.standard_error():.1f}"
        return "\n".join([*lines, f"| **mean of tasks** | {sum(self.count.values())} | **{total}** |"])


def detect(image: np.ndarray) -> list[Detection]:
    """Finds the objects of an image with values in [0, 1], (3, H, W)."""
    offset = np.asarray(image, dtype=np.float64) - np.reshape(world.BACKGROUND, (3, 1, 1))
    labels, count = ndimage.label(np.linalg.norm(offset, axis=0) > FOREGROUND, structure=np.ones((3, 3)))
    masks = [labels == index for index in range(1, count + 1)]
    return [_describe(offset, mask) for mask in masks if mask.sum() >= LEAST_PIXELS]


def _describe(offset: np.ndarray, mask: np.ndarray) -> Detection:
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    center = ((left + right) / 2, (top + bottom) / 2)
    return Detection(_shape(mask, center), _color(offset[:, mask]), center, (right - left + 1, bottom - top + 1))


def _color(pixels: np.ndarray) -> str | None:
    directions = np.array(list(world.COLORS.values())) - world.BACKGROUND
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    votes = np.bincount((directions @ pixels).argmax(axis=0), minlength=len(directions))
    return list(world.COLORS)[votes.argmax()] if votes.max() >= LEAST_PURITY * votes.sum() else None


def _shape(mask: np.ndarray, center: tuple[float, float]) -> str | None:
    overlaps = {shape: _overlap(mask, world.template(shape) > 0.5, center) for shape in world.SHAPES}
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= LEAST_OVERLAP else None


def _overlap(mask: np.ndarray, shape_mask: np.ndarray, center: tuple[float, float]) -> float:
    """Intersection over union with the template in the best place within 1.5 pixels of the centre."""
    margin = len(shape_mask)
    padded = np.pad(mask, margin)
    best = 0.0
    for dx, dy in itertools.product((-1.0, 0.0, 1.0), repeat=2):
        left, top = (int(np.floor(c + d + 0.5)) + margin - margin // 2 for c, d in zip(center, (dx, dy), strict=True))
        inside = padded[top : top + margin, left : left + margin]
        common = (inside & shape_mask).sum()
        best = max(best, common / (mask.sum() + shape_mask.sum() - common))
    return best


def is_related(first: Detection, second: Detection, relation: str) -> bool:
    """GenEval's rule: the centres' offset, less a tenth of the sizes, points mainly in the relation's direction."""
    offset = np.subtract(first.center, second.center)
    revised = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * np.add(first.size, second.size), 0)
    length = np.linalg.norm(revised)
    return bool(length > 0 and revised @ world.RELATIONS[relation] > 0.5 * length)


def is_correct(image: np.ndarray, row: world.Row) -> bool:
    """Whether an image in [0, 1], (3, H, W), shows exactly the objects of `row`, in its relation."""
    wanted = world.content_of(row).things
    found = detect(image)
    if len(found) != len(wanted) or any(each.shape is None or each.color is None for each in found):
        return False
    return any(
        all(
            thing.shape == each.shape and thing.color in (None, each.color)
            for thing, each in zip(wanted, order, strict=True)
        )
        and (row["relation"] is None or is_related(order[0], order[1], row["relation"]))
        for order in itertools.permutations(found)
    )


def is_right(images: torch.Tensor, prompts: list[str], metadata: list[world.Row]) -> torch.Tensor:
    """`is_correct` of a batch, called as rewards are: 1 for right and 0 for wrong pictures, shape (B,)."""
    verdicts = [is_correct(image.cpu().numpy(), row) for image, row in zip(images, metadata, strict=True)]
    return torch.tensor(verdicts, dtype=torch.float32)


def balanced(rows: list[world.Row], num_images: int) -> list[world.Row]:
    """`num_images` rows, the tags in turn and each tag's prompts in turn, in a fixed shuffled order."""
    by_tag = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(row)
    for tag_rows in by_tag.values():
        random.Random(0).shuffle(tag_rows)
    endless = [itertools.cycle(tag_rows) for tag_rows in by_tag.values()]
    return [next(endless[index % len(endless)]) for index in range(num_images)]


def score(images: np.ndarray | torch.Tensor, rows: list[world.Row]) -> Scores:
    """Scores images in [0, 1], (N, 3, H, W), against their N rows."""
    verdicts = {}
    for image, row in zip(np.asarray(images), rows, strict=True):
        verdicts.setdefault(row["tag"], []).append(is_correct(image, row))
    return Scores({tag: float(np.mean(v)) for tag, v in verdicts.items()}, {tag: len(v) for tag, v in verdicts.items()})


def sample(
    pipeline: DiffusionPipeline, rows: list[world.Row], seed: int = 0, batch_size: int = 50, **pipeline_kwargs: object
) -> torch.Tensor:
    """One image for each row; image i depends on `seed` and i alone, whatever the batch size.

    Returns:
        `torch.Tensor`: images in [0, 1], (len(rows), 3, H, W), float32 on the CPU.
    """
    noise_seeds = [seed * 1_000_000 + index for index in range(len(rows))]
    images = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(noise_seed) for noise_seed in noise_seeds[part]]
        prompts = [row["prompt"] for row in rows[part]]
        kwargs = world.PIPELINE_KWARGS | pipeline_kwargs
        images.append(pipeline(prompts, generator=generators, output_type="pt", **kwargs).images.float().cpu())
    return torch.cat(images)


def evaluate(
    pipeline: DiffusionPipeline,
    rows: list[world.Row],
    num_images: int = 1000,
    seed: int = 0,
    batch_size: int = 50,
    **pipeline_kwargs: object,
) -> Scores:
    """Samples and scores `num_images` pictures, equally many of each task.

    Args:
        pipeline (`DiffusionPipeline`): the pipeline, with or without adapters.
        rows (`list[dict]`): prompts, as from `world.prompt_rows("held-out")`.
        num_images (`int`): pictures in all, at least one for each tag.
        seed (`int`): seed of the noise.
        batch_size (`int`): pictures at a time; it does not change the noise.
        pipeline_kwargs: additions to `world.PIPELINE_KWARGS`, such as `num_inference_steps`.
    """
    chosen = balanced(rows, num_images)
    return score(sample(pipeline, chosen, seed, batch_size, **pipeline_kwargs), chosen)


def save_grid(images: torch.Tensor, rows: list[world.Row], path: Path, columns: int = 12) -> None:
    """Writes the first images of each tag as a PNG, a line for each: images in [0, 1], (N, 3, H, W), and their rows."""
    lines = []
    for tag in dict.fromkeys(row["tag"] for row in rows):
        chosen = [image for image, row in zip(images, rows, strict=True) if row["tag"] == tag][:columns]
        lines.append(torch.cat(chosen, dim=2))
    pixels = (torch.cat(lines, dim=1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).resize((2 * pixels.shape[1], 2 * pixels.shape[0]), Image.NEAREST).save(path)


def main() -> None:
    """Prints the scores of a saved pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the pipeline")
    parser.add_argument("--split", choices=world.SPLITS, default="held-out")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-inference-steps", type=int, default=world.PIPELINE_KWARGS["num_inference_steps"])
    parser.add_argument("--lora", type=Path, help="folder of LoRA weights to load")
    parser.add_argument("--grid", type=Path, help="PNG to write with pictures of each task")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.lora:
        pipeline.load_lora_weights(arguments.lora)
    rows = balanced(world.prompt_rows(arguments.split), arguments.num_images)
    images = sample(pipeline, rows, arguments.seed, num_inference_steps=arguments.num_inference_steps)
    print(score(images, rows).table())
    if arguments.grid:
        save_grid(images, rows, arguments.grid)


if __name__ == "__main__":
    main()
