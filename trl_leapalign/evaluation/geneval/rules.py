"""GenEval's rules: which detections count, where one thing lies of another, and whether an image is right.

No model is needed here: detections come in, verdicts go out. https://huggingface.co/papers/2310.11513
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from ..statistics import UNKNOWN, Estimate, mean_of, share
from .metadata import TAGS, Clause, GenEvalTask

Box: TypeAlias = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """One thing that a detector found.

    Args:
        class_name (str): what it is.
        score (float): the detector's confidence in [0, 1].
        box (Box): left, top, right and bottom in pixels; right and bottom are those after the last pixel.
        mask (Tensor | None): bool, shape (H, W), where the thing is; None if the detector gives boxes alone.
    """

    class_name: str
    score: float
    box: Box
    mask: Tensor | None = None


ColorsOf: TypeAlias = Callable[[str, Sequence[Detection]], Sequence[str]]
"""`colors_of(class_name, detections)` names the colour of each detection."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its prompt asks for.

    Args:
        correct (bool): whether it does.
        reasons (tuple[str, ...]): what is wrong, one entry for each clause that fails.
    """

    correct: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class GenEvalRules:
    """GenEval's settings; the defaults are the published evaluator's.

    Args:
        threshold (float): a detection counts if its score is above this.
        counting_threshold (float): the same for the tag "counting".
        max_objects (int): how many detections of a class count, the best ones.
        max_overlap (float): a detection that overlaps a better one of its class by this IoU or more does not count;
            1.0 keeps all.
        position_margin (float): share of the two sizes by which the centres must be apart to be in a relation.

    Raises:
        ValueError: if a setting is out of range.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1

    def __post_init__(self):
        for name in ("threshold", "counting_threshold", "max_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be between 0 and 1.")
        if self.max_objects < 1:
            raise ValueError(f"max_objects={self.max_objects!r} must be at least 1.")
        if self.position_margin < 0:
            raise ValueError(f"position_margin={self.position_margin!r} must not be negative.")

    def select(self, detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
        """Keep the detections that count.

        Args:
            detections (Iterable[Detection]): of one image, in any order.
            tag (str): the kind of task.

        Returns:
            dict[str, list[Detection]]: by class, best first; classes without a detection are left out. Of equal
                scores, the one that came first is the better.
        """
        threshold = self.counting_threshold if tag == "counting" else self.threshold
        by_class: dict[str, list[Detection]] = {}
        for detection in sorted(detections, key=lambda detection: -detection.score):
            if detection.score > threshold:
                by_class.setdefault(detection.class_name, []).append(detection)
        return {name: self._without_overlaps(found[: self.max_objects]) for name, found in by_class.items()}

    def _without_overlaps(self, detections: list[Detection]) -> list[Detection]:
        if self.max_overlap == 1:
            return detections
        kept: list[Detection] = []
        for detection in detections:
            if all(box_iou(better.box, detection.box) < self.max_overlap for better in kept):
                kept.append(detection)
        return kept

    def relations(self, box: Box, target: Box) -> frozenset[str]:
        """Where a box lies relative to another.

        Args:
            box (Box): in pixels, y downwards.
            target (Box): the box that it is relative to.

        Returns:
            frozenset[str]: none, one or two of "left of", "right of", "above" and "below".
        """
        offsets, shrunk = [], []
        for low, high in ((0, 2), (1, 3)):
            offset = (box[low] + box[high] - target[low] - target[high]) / 2
            sizes = abs(box[high] - box[low]) + abs(target[high] - target[low])
            offsets.append(offset)
            shrunk.append(math.copysign(max(abs(offset) - self.position_margin * sizes, 0.0), offset))
        if max(abs(shrunk[0]), abs(shrunk[1])) < 1e-3:
            return frozenset()
        dx, dy = (value / math.hypot(*offsets) for value in shrunk)
        held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
        return frozenset(relation for relation, holds in held.items() if holds)

    def judge(self, task: GenEvalTask, objects: dict[str, list[Detection]], colors_of: ColorsOf) -> Verdict:
        """Say whether an image shows what its prompt asks for.

        Args:
            task (GenEvalTask): what the prompt asks for.
            objects (dict[str, list[Detection]]): what counts in the image, from `select`.
            colors_of (ColorsOf): names colours; called only for clauses with a colour and enough detections.

        Returns:
            Verdict: correct if all of include holds and nothing of exclude does.
        """
        reasons: list[str] = []
        groups: list[Sequence[Detection] | None] = []
        for clause in task.include:
            found = objects.get(clause.class_name, [])[: clause.count]
            problem = self._problem(clause, found, groups, colors_of)
            groups.append(None if problem else found)
            reasons += [problem] if problem else []
        for clause in task.exclude:
            number = len(objects.get(clause.class_name, []))
            if number >= clause.count:
                reasons.append(f"{number} x {clause.class_name}, but fewer than {clause.count} are wanted")
        return Verdict(not reasons, tuple(reasons))

    def _problem(
        self, clause: Clause, found: Sequence[Detection], groups: list[Sequence[Detection] | None], colors_of: ColorsOf
    ) -> str:
        """What is wrong with one clause of include, or nothing."""
        name, count = clause.class_name, clause.count
        if len(found) < count:
            return f"{len(found)} x {name}, but {count} wanted"
        if clause.color is not None:
            colors = list(colors_of(name, found))
            if colors.count(clause.color) < count:
                return f"{name} is {', '.join(colors)}, but {count} x {clause.color} wanted"
        if clause.relation is not None:
            targets = groups[clause.target]
            if targets is None:
                return f"{name} should be {clause.relation} something that is not there as wanted"
            for thing in found:
                for target in targets:
                    relations = self.relations(thing.box, target.box)
                    if clause.relation not in relations:
                        held = " and ".join(sorted(relations)) or "in no clear relation to"
                        return f"{name} is {held} {target.class_name}, but {clause.relation} is wanted"
        return ""


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union as GenEval counts it: right and bottom belong to the box."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


@dataclass(frozen=True)
class GenEvalSummary:
    """GenEval's score and what it consists of.

    Args:
        overall (Estimate): mean over the six tags of the share of right images; NaN if a tag has no image, since a mean
            over fewer tags is another number.
        by_tag (dict[str, Estimate]): the share of right images of each tag that has images, in the order of `TAGS`. The
            standard error takes images as independent; for repeats on one prompt the true one is smaller or equal.
    """

    overall: Estimate
    by_tag: dict[str, Estimate]

    @property
    def score(self) -> float:
        """GenEval's score, in [0, 1]."""
        return self.overall.mean


def summarize_geneval(correct: Sequence[float] | Tensor, tags: Sequence[str]) -> GenEvalSummary:
    """Sum up verdicts as GenEval does: every tag weighs the same.

    Args:
        correct (Sequence[float] | Tensor): 1 for a right image and 0 for a wrong one, length N.
        tags (Sequence[str]): the tag of each image's prompt, length N.

    Returns:
        GenEvalSummary: the score and the accuracy by tag.

    Raises:
        ValueError: if the lengths differ, a tag is unknown, or a value is neither 0 nor 1.
    """
    values = [float(value) for value in correct]
    if len(values) != len(tags):
        raise ValueError(f"There are {len(values)} verdicts for {len(tags)} tags; give one tag an image.")
    if not set(tags) <= set(TAGS):
        raise ValueError(f"Unknown tags {sorted(set(tags) - set(TAGS))}. GenEval's are {', '.join(TAGS)}.")
    if not set(values) <= {0.0, 1.0}:
        raise ValueError("A verdict is 1 or 0; average over images is what this function does.")
    by_tag = {}
    for name in TAGS:
        chosen = [value for value, tag in zip(values, tags, strict=True) if tag == name]
        if chosen:
            by_tag[name] = share(sum(chosen), len(chosen))
    overall = mean_of(list(by_tag.values())) if len(by_tag) == len(TAGS) else UNKNOWN
    return GenEvalSummary(overall, by_tag)
