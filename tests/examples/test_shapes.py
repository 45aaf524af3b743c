"""The shapes world, its reward, its judge and its base pipeline agree with each other."""

import copy
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline

from examples.shapes import evaluator, pretrain, world
from examples.shapes.muon import Muon, orthogonalized
from examples.shapes.reward import nearness_first, shapes_reward

MODEL = Path(__file__).parents[2] / "examples" / "shapes" / "model"
Rows = list[world.Row]


@pytest.fixture(scope="module")
def pipeline() -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def all_rows(count: int) -> Rows:
    return evaluator.balanced([row for split in world.SPLITS for row in world.prompt_rows(split)], count)


def scenes(rows: Rows, seed: int, change: Callable | None = None) -> torch.Tensor:
    rng = random.Random(seed)
    said = [world.content_of(row) for row in rows]
    said = [change(content, rng) for content in said] if change else said
    return torch.from_numpy(np.stack([world.render(world.place(content, rng)) for content in said]))


def two_things(first: tuple[str, str, tuple[int, int]], second: tuple[str, str, tuple[int, int]]) -> torch.Tensor:
    return torch.from_numpy(world.render((world.Thing(*first), world.Thing(*second))))


def row_of(tag: str, *things: world.Thing, relation: str | None = None) -> world.Row:
    return world.row(world.Content(tag, things, relation), "a photo of")


# World


def test_splits_share_no_prompt_and_no_content():
    rows = {split: world.prompt_rows(split) for split in world.SPLITS}
    prompts = {split: {row["prompt"] for row in rows[split]} for split in world.SPLITS}
    assert all({row["tag"] for row in rows[split]} == set(world.TAGS) for split in world.SPLITS)
    for a, b in (("train", "tuning"), ("train", "held-out"), ("tuning", "held-out")):
        assert not prompts[a] & prompts[b]
        meanings = []
        for split in (a, b):
            contents = [world.content_of(row) for row in rows[split] if row["tag"] != "single_object"]
            meanings.append({said for content in contents for said in world.wordings(content)})
        assert not meanings[0] & meanings[1]


def test_training_never_names_a_color_shape_pair_of_another_split():
    def pairs(split: str) -> set[tuple[str, str]]:
        items = [item for row in world.prompt_rows(split) for item in row["include"]]
        return {(item["class"], item["color"]) for item in items if item["color"]}

    asked = {
        (row["include"][0]["class"], row["include"][0]["color"])
        for row in world.prompt_rows("held-out")
        if row["tag"] == "colors"
    }
    assert len(asked) == 4
    assert not asked & pairs("train")
    assert not asked & pairs("tuning")
    for row in world.prompt_rows("held-out"):
        if row["tag"] == "color_attr":
            assert asked & {(item["class"], item["color"]) for item in row["include"]}


def test_rows_survive_json_and_arrow():
    rows = world.prompt_rows("train")
    assert json.loads(json.dumps(rows)) == rows
    dataset = Dataset.from_list(rows)
    assert [dataset[index] for index in range(len(dataset))] == rows
    assert [world.row(world.content_of(row), "")["include"] for row in rows] == [row["include"] for row in rows]


def test_prompt_rows_are_deterministic_and_can_be_balanced():
    rows = world.prompt_rows("train", per_tag=50)
    assert rows == world.prompt_rows("train", per_tag=50)
    assert [sum(row["tag"] == tag for row in rows) for tag in world.TAGS] == [50] * len(world.TAGS)
    with pytest.raises(ValueError, match="Unknown split"):
        world.prompt_rows("validation")


def test_corruption_always_changes_the_content():
    rng = random.Random(0)
    for tag in world.TAGS:
        for content in world.contents(tag):
            for _ in range(5):
                assert world.corrupted(content, rng) not in world.wordings(content)


# Evaluator


@pytest.mark.parametrize("tag", world.TAGS)
def test_evaluator_knows_right_scenes_from_wrong_ones(tag: str):
    rows = [row for row in all_rows(600) if row["tag"] == tag]
    assert evaluator.score(scenes(rows, seed=1), rows).overall >= 0.99
    assert evaluator.score(scenes(rows, seed=2, change=world.corrupted), rows).overall <= 0.08


def test_evaluator_refuses_tricks():
    row = row_of("colors", world.Thing("square", "red"))
    good = torch.from_numpy(world.render((world.Thing("square", "red", (20, 20)),)))
    two_coloured, faint, stained, hollow = good.clone(), 0.5 + 0.4 * (good - 0.5), good.clone(), good.clone()
    two_coloured[:, :, 20:] = torch.from_numpy(world.render((world.Thing("square", "blue", (20, 20)),)))[:, :, 20:]
    stained[:, 38:42, 38:42] = torch.tensor([0.92, 0.16, 0.16])[:, None, None]
    hollow[:, 17:24, 17:24] = 0.5
    assert evaluator.is_correct(good.numpy(), row)
    for image in (two_coloured, faint, stained, hollow, torch.full_like(good, 0.5)):
        assert not evaluator.is_correct(image.numpy(), row)


def test_balanced_takes_every_tag_and_prompt_in_turn():
    rows = world.prompt_rows("held-out")
    chosen = evaluator.balanced(rows, 600)
    assert [sum(row["tag"] == tag for row in chosen) for tag in world.TAGS] == [100] * len(world.TAGS)
    assert {row["prompt"] for row in chosen} == {row["prompt"] for row in rows}


def test_scores_average_tasks_and_propagate_errors():
    scores = evaluator.Scores({"a": 0.5, "b": 1.0}, {"a": 100, "b": 10})
    assert scores.overall == 0.75
    assert scores.standard_error("a") == pytest.approx(0.05)
    assert scores.standard_error() == pytest.approx(0.025)
    assert "| **mean of tasks** | 110 | **75.0 ± 2.5** |" in scores.table()


# Reward


def test_reward_prefers_right_scenes():
    rows = all_rows(600)
    right, terms = shapes_reward(scenes(rows, seed=3), [], rows)
    wrong, _ = shapes_reward(scenes(rows, seed=4, change=world.corrupted), [], rows)
    assert right.mean() > 0.95 and right.min() > 0.85 and right.max() <= 1
    assert wrong.mean() < 0.4
    assert (right > wrong).float().mean() >= 0.99
    assert torch.equal(right, (terms["nearness"] + terms["posterior"]) / 2)
    trained_on, _ = nearness_first(scenes(rows, seed=3), [], rows)
    torch.testing.assert_close(trained_on, 0.8 * terms["nearness"] + 0.2 * terms["posterior"])


def test_reward_knows_binding_relation_and_count():
    red, blue = world.Thing("ring", "red"), world.Thing("cross", "blue")
    image = two_things(("ring", "red", (12, 24)), ("cross", "blue", (34, 24)))
    right = [
        row_of("color_attr", red, blue),
        row_of("color_attr", blue, red),
        row_of("position", replace(red, color=None), replace(blue, color=None), relation="left of"),
        row_of("position", replace(blue, color=None), replace(red, color=None), relation="right of"),
    ]
    wrong = [
        row_of("color_attr", replace(red, color="blue"), replace(blue, color="red")),
        row_of("position", replace(red, color=None), replace(blue, color=None), relation="right of"),
        row_of("position", replace(red, color=None), replace(blue, color=None), relation="above"),
        row_of("single_object", replace(red, color=None)),
        row_of("counting", *[replace(red, color=None)] * 2),
        row_of("counting", *[replace(red, color=None)] * 3),
    ]
    rows = right + wrong
    rewards, _ = shapes_reward(image.expand(len(rows), -1, -1, -1), [], rows)
    assert (rewards[: len(right)] > 0.95).all()
    assert (rewards[len(right) :] < 0.5).all()


def test_reward_is_not_fooled_by_mixtures():
    """A shape between two shapes, two colours in one object, a faint object and an extra one all pay less."""
    row = row_of("colors", world.Thing("square", "red"))
    good, triangle, blue = (
        torch.from_numpy(world.render((world.Thing(shape, color, (20, 20)),)))
        for shape, color in (("square", "red"), ("triangle", "red"), ("square", "blue"))
    )
    half_blue, extra = good.clone(), two_things(("square", "red", (12, 12)), ("square", "red", (34, 34)))
    half_blue[:, :, 20:] = blue[:, :, 20:]
    tricks = torch.stack([(good + triangle) / 2, (good + blue) / 2, half_blue, 0.5 + 0.5 * (good - 0.5), extra])
    rewards, _ = shapes_reward(torch.cat([good[None], tricks]), [], [row] * 6)
    assert rewards[0] > 0.95
    assert (rewards[1:] < rewards[0] - 0.1).all()
    assert (rewards[2:] < 0.7).all()


def test_reward_gradient_matches_finite_differences():
    generator = torch.Generator().manual_seed(0)
    rows = all_rows(18)
    right, wrong = scenes(rows, seed=5), scenes(rows, seed=6, change=world.corrupted)
    images = (0.6 * right + 0.4 * wrong + 0.05 * torch.randn(right.shape, generator=generator)).double()
    images.requires_grad_()
    rewards, _ = shapes_reward(images, [], rows)
    (gradient,) = torch.autograd.grad(rewards.sum(), images)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    step = 1e-5
    ahead, behind = (shapes_reward(images.detach() + s * direction, [], rows)[0] for s in (step, -step))
    torch.testing.assert_close(
        (gradient * direction).sum((1, 2, 3)), (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-7
    )
    assert rewards.dtype == torch.float64
    assert (gradient.abs().amax((1, 2, 3)) > 1e-4).all()


def test_reward_gradient_is_finite_everywhere():
    rows = all_rows(12)
    for images in (torch.full((12, 3, 48, 48), 0.5), torch.zeros(12, 3, 48, 48), scenes(rows, seed=7)):
        images.requires_grad_()
        rewards, _ = shapes_reward(images, [], rows)
        rewards.sum().backward()
        assert rewards.isfinite().all() and images.grad.isfinite().all()


def test_reward_climbs_to_a_right_picture():
    """Following the gradient from a grey picture draws what the judge accepts: reward and judge agree."""
    rows = all_rows(12)
    images = (0.5 + 0.02 * torch.randn(12, 3, 48, 48, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.02)
    for _ in range(150):
        rewards, _ = shapes_reward(images.clamp(0, 1), [], rows)
        optimizer.zero_grad()
        (-rewards.sum()).backward()
        optimizer.step()
    assert rewards.min() > 0.8
    assert evaluator.score(images.detach().clamp(0, 1), rows).overall >= 0.9


# Pipeline


def test_every_prompt_has_known_words_and_fits(pipeline: DiffusionPipeline):
    prompts = [row["prompt"] for split in world.SPLITS for row in world.prompt_rows(split)]
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        tokens = tokenizer(prompts).input_ids
        assert all(tokenizer.unk_token_id not in each and each[-1] == tokenizer.eos_token_id for each in tokens)
        assert max(len(each) for each in tokens) <= world.PIPELINE_KWARGS["max_sequence_length"]
        assert [tokenizer.decode(each[:-1]) for each in tokens] == prompts


def test_clip_pools_at_the_end_of_the_prompt(pipeline: DiffusionPipeline):
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id != 2
    tokens = pipeline.tokenizer(["a photo of a ring"], padding="max_length", return_tensors="pt").input_ids
    output = pipeline.text_encoder(tokens)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 5])


def test_pipeline_follows_its_prompts_in_part(pipeline: DiffusionPipeline):
    rows = [row for row in world.prompt_rows("held-out") if row["tag"] in ("single_object", "colors", "position")]
    chosen = evaluator.balanced(rows, 120)
    images = evaluator.sample(pipeline, chosen, seed=1)
    assert images.shape == (120, 3, 48, 48) and images.min() >= 0 and images.max() <= 1
    scores = evaluator.score(images, chosen)
    assert scores.accuracy["single_object"] >= 0.75 and scores.accuracy["colors"] >= 0.75
    assert 0.1 <= scores.accuracy["position"] <= 0.8
    rewards, _ = shapes_reward(images, [], chosen)
    correct = torch.tensor(
        [evaluator.is_correct(image.numpy(), row) for image, row in zip(images, chosen, strict=True)]
    )
    assert rewards[correct].mean() > rewards[~correct].mean() + 0.3


def test_sampling_does_not_depend_on_the_batch(pipeline: DiffusionPipeline):
    pipeline = copy.deepcopy(pipeline).to(torch.float64)
    rows = world.prompt_rows("held-out")[:5]
    whole = evaluator.sample(pipeline, rows, seed=2, batch_size=5, num_inference_steps=4)
    parts = evaluator.sample(pipeline, rows, seed=2, batch_size=2, num_inference_steps=4)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)


# Pretraining


@pytest.mark.parametrize("shape", [(3, 20, 50), (3, 50, 20), (2, 16, 16)])
def test_orthogonalized_keeps_directions_and_levels_singular_values(shape: tuple[int, int, int]):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.diagonal(left.mT @ orthogonalized(matrices) @ right.mT, dim1=1, dim2=2)
    assert (values[:, :-1] > 0.6).all() and (values < 1.3).all()


def test_muon_fits_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    target, weight = torch.randn(8, 12, generator=generator), torch.nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([weight], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        inputs = torch.randn(64, 12, generator=generator)
        (inputs @ (weight - target).mT).square().mean().backward()
        optimizer.step()
    assert (weight - target).norm() < 0.2 * target.norm()


def test_pretraining_runs_from_its_start_and_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    sizes = "--pool 48 --vae-steps 2 --vae-batch 8 --decoder-steps 2 --flow-batch 8"

    def pretrained(name: str, flow_steps: int, checkpoint: str) -> DiffusionPipeline:
        places = ["--output", str(tmp_path / name), "--checkpoint", str(tmp_path / checkpoint)]
        monkeypatch.setattr(sys, "argv", ["pretrain", *sizes.split(), "--flow-steps", str(flow_steps), *places])
        pretrain.main()
        return DiffusionPipeline.from_pretrained(tmp_path / name)

    whole = pretrained("whole", 4, "a")
    images = evaluator.sample(whole, world.prompt_rows("held-out")[:2], num_inference_steps=2)
    assert images.shape == (2, 3, 48, 48) and images.std() > 0
    assert whole.vae.config.scaling_factor != 1 and whole.transformer.proj_out.weight.any()
    again = pretrained("again", 4, "a")
    for name, value in whole.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[name]), name
