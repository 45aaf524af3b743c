"""Guards against reward hacking: their numbers, and that they warn when pictures become alike, and only then."""

import logging
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from training_cases import blueness, logged, make_trainer, redness, same, trained_weights

from examples.shapes import world
from examples.tiny import tiny_clip, tiny_flux, tiny_tokenizer
from trl_leapalign.rewards import CLIPReward
from trl_leapalign.training.watch import LIMITS, MEANINGS, held_out_falls, measure, shares

MODEL = Path(__file__).parents[2] / "examples" / "shapes" / "model"
OPEN = ["a drawing of a ring", "a drawing of two squares"]
"""Prompts that leave the colour open."""


def watched(trainer, name):
    return [entry[f"watch/{name}"] for entry in trainer.state.log_history if f"watch/{name}" in entry]


# Numbers


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (3, 2, 3, 4, 5), (3, 2, 7)])
def test_numbers_are_those_of_numpy(shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images.flatten()[::3] = 1.0
    found = measure(images)
    values = images.numpy()
    pairs = list(combinations(values, 2))
    diversity = np.mean([math.sqrt(np.mean((a - b) ** 2)) for a, b in pairs])
    assert found["diversity"] == pytest.approx(diversity, rel=1e-12)
    assert found["saturated"] == pytest.approx((values == 1.0).mean(), rel=1e-6)
    assert ("color_diversity" in found) == (len(shape) > 3)
    if len(shape) > 3:
        others = tuple(axis for axis in range(len(shape) - 1) if axis != len(shape) - 4)
        colors = [each.mean(axis=others) for each in values]
        expected = np.mean([math.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(colors, 2)])
        assert found["color_diversity"] == pytest.approx(expected, rel=1e-12)


def test_features_are_compared_by_their_cosine():
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure(images, lambda images: images.flatten(1)[:, :5])["feature_diversity"]
    vectors = [each[:5] for each in images.flatten(1).numpy()]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(vectors, 2)]
    assert found == pytest.approx(1 - np.mean(cosines), rel=1e-12)


def test_shares_leave_out_what_the_base_lacks():
    gray = {"mean_red": 0.5, "mean_green": 0.5, "mean_blue": 0.5}
    base = {"diversity": 0.0, "color_diversity": 0.5, "saturated": 0.75, **gray}
    moved = {"color_diversity": 0.25, "saturated": 0.5, **gray, "mean_red": 0.5 + 0.1 * 3**0.5}
    found = shares({"diversity": 0.1, "base_distance": 0.1, **moved}, base)
    expected = {"color_diversity_share": 0.5, "unsaturated_share": 2.0, "color_shift_share": 0.2}
    assert found == pytest.approx(expected, rel=1e-12)
    assert LIMITS.keys() == MEANINGS.keys()


def history(trained, *evaluated, name="eval_reward"):
    entries = []
    for reward, value in zip(trained, *evaluated, strict=True):
        entries += [{"loss": 0.0, "reward": reward - 1}, {"loss": 0.0, "reward": reward + 1}, {name: value}]
    return entries


@pytest.mark.parametrize(
    ("entries", "count"),
    [
        (history([1, 2, 3, 4], [5, 4, 3, 2]), 3),
        (history([1, 2, 3, 4], [5, 6, 3, 2]), 2),
        (history([4, 3, 2, 1], [5, 4, 3, 2]), 0),  # what is trained falls too
        (history([1, 2, 3], [1, 2, 3]), 0),
        (history([1, 2], [2, 1], name="eval_new_reward"), 1),
        (history([1, 2], [2, 1], name="eval_rewards/beauty"), 1),
        (history([1, 2], [2, 1], name="eval_new_rewards/beauty"), 1),
        (history([1, 2], [2, 1], name="eval_rewards/my_reward"), None),  # trained on: no reward of weight 0
        ([{"eval_reward": 9}, *history([1, 2], [2, 1])], 1),  # nothing was trained before the first
        (history([1], [1]), None),
    ],
)
def test_falls_of_evaluations_while_the_trained_reward_rises(entries, count):
    assert held_out_falls(entries, {"reward", "rewards/beauty"}) == count


# Training


def shapes_trainer(directory, reward, **settings):
    pipeline = DiffusionPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    call = {"sample_height": world.IMAGE_SIZE, "sample_width": world.IMAGE_SIZE, "sample_num_steps": 4}
    return make_trainer(
        directory,
        pipeline,
        reward,
        prompts=OPEN,
        arguments={"peft_config": lora},
        sample_kwargs={"max_sequence_length": 12},
        watch_prompts=2,
        **{**call, "watch_steps": 4, "max_steps": 4, "per_device_train_batch_size": 4, **settings},
    )


def greyness(images, prompts, metadata):
    return -(images - 0.5).square().mean((1, 2, 3))


def test_a_base_that_hardly_moves_is_not_warned_of(tmp_path, caplog):
    trainer = shapes_trainer(tmp_path, greyness, learning_rate=1e-6)
    trainer.train()
    assert "watch/" not in caplog.text
    assert watched(trainer, "diversity_share") == pytest.approx([1, 1], abs=0.05)
    assert watched(trainer, "color_diversity_share") == pytest.approx([1, 1], abs=0.05)
    assert watched(trainer, "base_distance")[0] == 0 and 0 < watched(trainer, "base_distance_share")[1] < 0.05
    assert watched(trainer, "diversity")[0] > 0.05
    assert sum("loss" in entry for entry in trainer.state.log_history) == 4


def likeness(images, prompts, metadata):
    """A reward that can be exploited: it is highest where all pictures are the same."""
    return -(images - images.detach().mean(0)).square().mean((1, 2, 3))


def test_pictures_that_become_alike_are_said(tmp_path, caplog):
    trainer = shapes_trainer(tmp_path, likeness, learning_rate=3e-2, max_steps=12)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert watched(trainer, "diversity_share")[-1] < 0.5 and watched(trainer, "color_diversity_share")[-1] < 0.5
    for name in ("diversity_share", "color_diversity_share"):  # once while it lasts
        assert caplog.text.count(f"watch/{name} is") == 1 and MEANINGS[name] in caplog.text
    assert trainer.state.global_step == 12


def test_the_training_stops_if_asked_to(tmp_path, caplog):
    settings = {"watch_action": "stop", "watch_limits": {"base_distance_share": 0.01, "unsaturated_share": None}}
    trainer = shapes_trainer(tmp_path, likeness, learning_rate=1e-2, watch_steps=2, max_steps=4, **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 2
    assert "watch/base_distance_share" in caplog.text and "Training stops here" in caplog.text


def test_watching_changes_nothing_else(tmp_path):
    settings = {"logging_steps": 2, "max_steps": 3, "ema_decay": 0.5}
    clip = CLIPReward(tiny_clip(), tiny_tokenizer())
    trainer = make_trainer(tmp_path, reward=[redness, clip], watch_steps=1, watch_prompts=2, **settings)
    plain = make_trainer(tmp_path / "plain", reward=[redness, clip], **settings)
    trainer.train()
    plain.train()
    assert same(trained_weights(trainer), trained_weights(plain))
    own = [entry for entry in logged(trainer) if not any(key.startswith("watch/") for key in entry)]
    assert own == logged(plain)
    assert len(watched(trainer, "feature_diversity_share")) == 4 and watched(trainer, "feature_diversity")[0] > 0


def test_a_training_that_was_stopped_goes_on_with_the_same_numbers(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "watch_steps": 1, "watch_prompts": 1}
    limits = {"base_distance_share": 0.0}
    stopped = make_trainer(tmp_path, watch_action="stop", watch_limits=limits, **settings)
    stopped.train()
    resumed, whole = make_trainer(tmp_path, **settings), make_trainer(tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert (stopped.state.global_step, resumed.state.global_step) == (1, 2)
    assert same(trained_weights(resumed), trained_weights(whole))
    assert watched(resumed, "diversity") == watched(whole, "diversity") and len(watched(whole, "diversity")) == 3


def test_full_finetuning_is_compared_with_the_weights_before_training(tmp_path):
    trainer = make_trainer(tmp_path, full_finetuning=True, learning_rate=1e-3, watch_steps=1, watch_prompts=1)
    trainer.train()
    distances = watched(trainer, "base_distance")
    assert distances[0] == 0 and distances[1] > 0


def test_a_reward_of_weight_0_is_held_out(tmp_path, caplog):
    """What is trained on makes pictures red, which costs them their blue; prompts with noise of its own say so."""
    trainer = make_trainer(
        tmp_path,
        reward=[lambda images, prompts, metadata: images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2)), blueness],
        prompts=["a red circle"],
        arguments={"eval_dataset": ["a red circle", "the green dog"]},
        reward_weights=[1, 0],
        per_device_train_batch_size=4,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        watch_steps=100,
        watch_prompts=1,
        watch_action="stop",
        watch_limits={"held_out_falls": 1},
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    falls = watched(trainer, "held_out_falls")
    assert falls and falls[-1] >= 1 and "watch/held_out_falls" in caplog.text
    assert trainer.state.global_step == len(falls) + 1 < 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"watch_action": "mail"}, "choose 'warn' or 'stop'"),
        ({"watch_limits": {"diversity_share": 0.5}, "watch_steps": None}, "Set watch_steps"),
        ({"watch_limits": {"beauty": 1}}, "not watched; choose some of .*diversity_share"),
        ({"watch_limits": {"diversity_share": -1}}, "must be a finite number of at least 0"),
        ({"watch_limits": {"held_out_falls": 0.5}}, "must be a whole number"),
        ({"watch_steps": 0}, "watch_steps=0 must be"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_flux(), **{"watch_steps": 1, **settings})
