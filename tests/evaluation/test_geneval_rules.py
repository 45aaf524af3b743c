"""GenEval's rules against a second, naive implementation, and by hand where a boundary lies."""

import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from trl_leapalign.evaluation import Detection, GenEvalRules, parse_task, summarize_geneval
from trl_leapalign.evaluation.geneval.metadata import COLORS, RELATIONS, TAGS, Clause, GenEvalTask
from trl_leapalign.evaluation.geneval.rules import box_iou

NAMES = ("dog", "cat", "cup")
SETTINGS = (
    GenEvalRules(),
    GenEvalRules(max_overlap=0.5),
    GenEvalRules(threshold=0.6, counting_threshold=0.4, max_objects=2, max_overlap=0.2, position_margin=0.3),
)


def naive_selection(boxes, tag, rules):
    """Indices by class, best first; each rule as a filter of its own."""
    bar = {"counting": rules.counting_threshold}.get(tag, rules.threshold)
    selected = {}
    for name in NAMES:
        order = [i for i, box in enumerate(boxes) if box[0] == name and box[1] > bar]
        order = sorted(order, key=lambda i: boxes[i][1], reverse=True)[: rules.max_objects]
        if rules.max_overlap < 1:
            chosen = []
            while order:
                best, *order = order
                chosen.append(best)
                order = [i for i in order if naive_iou(boxes[best][2], boxes[i][2]) < rules.max_overlap]
            order = chosen
        if order:
            selected[name] = order
    return selected


def naive_iou(a, b):
    """Count pixels; the last row and column belong to the box."""
    overlap = 1
    for low, high in ((0, 2), (1, 3)):
        overlap *= max(0, min(a[high], b[high]) + 1 - max(a[low], b[low]))
    areas = [(box[2] + 1 - box[0]) * (box[3] + 1 - box[1]) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


def naive_relations(a, b, margin):
    corners = np.array([a, b], dtype=float).reshape(2, 2, 2)  # box, corner, axis
    centre, size = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    delta = centre[0] - centre[1]
    far = np.clip(np.abs(delta) - margin * size.sum(0), 0, None) * np.sign(delta)
    if (np.abs(far) < 1e-3).all():
        return set()
    x, y = far / np.sqrt((delta**2).sum())
    return {name for name, value in zip(RELATIONS, (-x, x, -y, y), strict=True) if value > 0.5}


def naive_verdict(row, boxes, colors, rules):
    """Whether all clauses hold, and how many fail."""
    selected = naive_selection(boxes, row["tag"], rules)
    fine, failures = [], 0
    for clause in row["include"]:
        things = selected.get(clause["class"], [])[: clause["count"]]
        good = len(things) == clause["count"]
        if good and "color" in clause:
            good = sum(colors[i] == clause["color"] for i in things) == clause["count"]
        if good and "position" in clause:
            relation, index = clause["position"]
            good = fine[index] is not None and all(
                relation in naive_relations(boxes[i][2], boxes[j][2], rules.position_margin)
                for i in things
                for j in fine[index]
            )
        fine.append(things if good else None)
        failures += not good
    for clause in row.get("exclude", []):
        failures += len(selected.get(clause["class"], [])) >= clause["count"]
    return failures


def random_case(random):
    boxes = []
    for _ in range(random.randrange(9)):
        left, top, width, height = (random.randrange(100) for _ in range(4))
        score = random.choice([0.3, 0.9, random.random(), 1 - random.random() ** 3 / 10])
        boxes.append((random.choice(NAMES), score, (left, top, left + 1 + width // 2, top + 1 + height // 2)))
    include = []
    for index in range(random.randint(1, 3)):
        clause = {"class": random.choice(NAMES), "count": random.randint(1, 1 if index else 3)}
        if random.random() < 0.3:
            clause["color"] = random.choice(COLORS[:2])
        if index and random.random() < 0.6:
            clause["position"] = [random.choice(RELATIONS), random.randrange(index)]
        include.append(clause)
    row = {"tag": random.choice(TAGS), "include": include}
    if random.random() < 0.3:
        row["exclude"] = [{"class": random.choice(NAMES), "count": random.randint(1, 3)}]
    return row, boxes, random.choices(COLORS[:2], k=len(boxes))


def test_verdicts_equal_a_naive_implementation():
    random = Random(0)
    outcomes = {tag: [] for tag in TAGS}
    for number in range(20_000):
        row, boxes, colors = random_case(random)
        rules = SETTINGS[number % len(SETTINGS)]
        things = [Detection(*box) for box in boxes]
        color_of = {id(thing): color for thing, color in zip(things, colors, strict=True)}
        task = parse_task(row)
        objects = rules.select(things, task.tag)
        indices = {name: [things.index(thing) for thing in group] for name, group in objects.items()}
        assert indices == naive_selection(boxes, row["tag"], rules)
        verdict = rules.judge(task, objects, lambda _, found, table=color_of: [table[id(thing)] for thing in found])
        failures = naive_verdict(row, boxes, colors, rules)
        assert (len(verdict.reasons), verdict.correct) == (failures, failures == 0), (row, boxes, colors)
        outcomes[row["tag"]].append(verdict.correct)
    shares = {tag: np.mean(verdicts) for tag, verdicts in outcomes.items()}
    assert all(0.03 < share < 0.5 for share in shares.values()), f"The cases hardly test the rules: {shares}"


def thing(name="dog", score=0.95, box=(0, 0, 10, 10)):
    return Detection(name, score, box)


@pytest.mark.parametrize("tag, threshold", [("single_object", 0.3), ("position", 0.3), ("counting", 0.9)])
def test_a_score_must_be_above_the_threshold(tag, threshold):
    found = [thing(score=threshold), thing(score=math.nextafter(threshold, 1)), thing("cat", score=0.1)]
    assert GenEvalRules().select(found, tag) == {"dog": [found[1]]}


def test_sixteen_of_a_class_count_and_the_best_come_first():
    found = [thing(score=0.5 + i / 100) for i in range(20)] + [thing("cat")] * 17
    selected = GenEvalRules().select(found, "single_object")
    assert selected["dog"] == found[19:3:-1]
    assert len(selected["cat"]) == 16


def test_overlaps_are_dropped_only_when_asked():
    same = [thing(score=0.9), thing(score=0.8), thing("cat")]
    assert GenEvalRules().select(same, "colors") == {"dog": same[:2], "cat": same[2:]}
    assert GenEvalRules(max_overlap=0.99).select(same, "colors") == {"dog": same[:1], "cat": same[2:]}
    half = [thing(box=(0, 0, 9, 9)), thing(score=0.9, box=(0, 0, 9, 4))]  # 50 pixels of 100
    assert GenEvalRules(max_overlap=0.5).select(half, "colors") == {"dog": half[:1]}
    assert GenEvalRules(max_overlap=0.51).select(half, "colors") == {"dog": half}
    # 11 x 11 and 11 x 11 pixels with 11 x 5 in common
    assert box_iou((0, 0, 10, 10), (0, 6, 10, 16)) == pytest.approx(55 / (242 - 55))
    assert box_iou((0, 0, 4, 4), (20, 20, 24, 24)) == 0


@pytest.mark.parametrize(
    "center, relations",
    [
        ((-30, 0), {"left of"}),
        ((30, 5), {"right of"}),
        ((0, -30), {"above"}),
        ((3, 30), {"below"}),
        ((30, 30), {"right of", "below"}),
        ((-30, -30), {"left of", "above"}),
        ((0, 0), set()),
        ((2, 2), set()),  # within the margin of 0.1 * (10 + 10)
        ((3.9, 0), set()),  # 1.9 / 3.9 < 0.5
        ((4.1, 0), {"right of"}),  # 2.1 / 4.1 > 0.5
        ((100, 55), {"right of"}),  # 53 / 114.1 < 0.5
    ],
)
def test_relations_by_hand(center, relations):
    x, y = center
    assert GenEvalRules().relations((x - 5, y - 5, x + 5, y + 5), (-5, -5, 5, 5)) == relations


def test_an_offset_below_a_thousandth_of_a_pixel_is_none():
    assert GenEvalRules().relations((0.0009, 0, 0.0009, 0), (0, 0, 0, 0)) == set()
    assert GenEvalRules().relations((0.0011, 0, 0.0011, 0), (0, 0, 0, 0)) == {"right of"}


def test_relation_depends_on_each_axis_own_size():
    wide = (-50, -1, 50, 1)
    assert GenEvalRules().relations((-10, 9, 10, 11), wide) == {"below"}
    assert GenEvalRules().relations((9, -10, 11, 10), wide) == set()


def judge(task, found, colors_of=None):
    def unexpected(name, things):
        raise AssertionError(f"asked for the colour of {name}")

    return GenEvalRules().judge(task, GenEvalRules().select(found, task.tag), colors_of or unexpected)


def test_position_is_relative_to_the_entry_that_is_named():
    cup, dog = Clause("cup", 1), Clause("dog", 1, relation="left of", target=0)
    left, right = (0, 0, 10, 10), (50, 0, 60, 10)
    assert judge(GenEvalTask("position", (cup, dog)), [thing(box=left), thing("cup", box=right)]).correct
    verdict = judge(GenEvalTask("position", (cup, dog)), [thing(box=right), thing("cup", box=left)])
    assert verdict.reasons == ("dog is right of cup, but left of is wanted",)
    third = replace(dog, class_name="cat", target=1)
    found = [thing("cat", box=left), thing("dog", box=(25, 0, 35, 10)), thing("cup", box=right)]
    assert judge(GenEvalTask("position", (cup, dog, third)), found).correct
    verdict = judge(GenEvalTask("position", (replace(cup, count=2), dog)), found)
    assert verdict.reasons == (
        "1 x cup, but 2 wanted",
        "dog should be left of something that is not there as wanted",
    )


def test_only_the_best_are_asked_for_their_colour():
    found = [thing(score=0.5), thing(score=0.9), thing(score=0.7)]
    asked = []

    def colors_of(name, things):
        asked.append((name, [item.score for item in things]))
        return ["red", "blue"][: len(things)]

    task = GenEvalTask("color_attr", (Clause("dog", 2, color="red"), Clause("cat", 1, color="red")))
    verdict = judge(task, found, colors_of)
    assert asked == [("dog", [0.9, 0.7])]
    assert verdict.reasons == ("dog is red, blue, but 2 x red wanted", "0 x cat, but 1 wanted")
    assert judge(GenEvalTask("colors", (Clause("dog", 1, color="red"),)), found, colors_of).correct


def test_exclude_fails_from_its_count_on():
    task = GenEvalTask("counting", (Clause("dog", 2),), (Clause("dog", 3),))
    assert judge(task, [thing()] * 2).correct
    assert judge(task, [thing()] * 3).reasons == ("3 x dog, but fewer than 3 are wanted",)
    assert not judge(task, [thing()]).correct


@pytest.mark.parametrize(
    "setting", [{"threshold": 1.5}, {"counting_threshold": -1}, {"max_overlap": 2}, {"max_objects": 0}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        GenEvalRules(**setting)
    with pytest.raises(ValueError, match="position_margin"):
        GenEvalRules(position_margin=-0.1)


def test_summary_weighs_tags_and_not_images():
    tags = ["counting"] * 4 + ["single_object"] * 8 + ["two_object", "colors", "position", "color_attr"]
    correct = torch.tensor([1, 0, 0, 0] + [1] * 6 + [0] * 2 + [1, 0, 1, 0], dtype=torch.float32)
    summary = summarize_geneval(correct, tags)
    assert list(summary.by_tag) == list(TAGS)
    assert summary.by_tag["counting"].mean == 0.25 and summary.by_tag["counting"].num_images == 4
    assert summary.by_tag["single_object"].standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 8))
    assert summary.score == pytest.approx((0.25 + 0.75 + 1 + 0 + 1 + 0) / 6)
    assert summary.overall.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 4 + 0.25 * 0.75 / 8) / 6)


def test_summary_of_some_tags_has_no_score():
    summary = summarize_geneval([1.0, 0.0, 1.0], ["colors", "colors", "position"])
    assert math.isnan(summary.score) and math.isnan(summary.overall.standard_error)
    assert {tag: accuracy.mean for tag, accuracy in summary.by_tag.items()} == {"colors": 0.5, "position": 1.0}


@pytest.mark.parametrize(
    "correct, tags, message",
    [([1.0], [], "1 verdicts for 0 tags"), ([1.0], ["colour"], "colour"), ([0.5], ["colors"], "1 or 0")],
)
def test_wrong_verdicts_are_refused(correct, tags, message):
    with pytest.raises(ValueError, match=message):
        summarize_geneval(correct, tags)
