"""Differences of a reward between two prompts."""

import pytest
import torch
from reward_cases import CASES, PROMPTS, random_images
from training_cases import make_trainer, redness, sample

from examples.tiny import tiny_flux
from trl_leapalign.rewards import OCRReward, RelativeReward, RewardSet


@pytest.mark.parametrize("name", ["clip", "hpsv2", "imagereward", "hpsv3"])
def test_difference_and_gradient(name):
    reward = CASES[name]().double()
    relative = RelativeReward(reward, "a photo of {prompt}", "the dog and {prompt}")
    assert relative.__name__ == f"relative_{type(reward).__name__}" and relative.differentiable
    images, leaf = random_images(3, 3, 20, 20, dtype=torch.float64), None
    found = []
    for score in (
        lambda x: relative(x, PROMPTS, [{}] * 3)[0],
        lambda x: (
            reward(x, [f"a photo of {p}" for p in PROMPTS], [{}] * 3)
            - reward(x, [f"the dog and {p}" for p in PROMPTS], [{}] * 3)
        ),
    ):
        leaf = images.clone().requires_grad_()
        rewards = score(leaf)
        rewards.sum().backward()
        found.append((rewards.detach(), leaf.grad))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert found[0][0].abs().min() > 1e-6
    details = relative(images, PROMPTS, [{}] * 3)[1]
    torch.testing.assert_close(details["words"] - details["against"], found[0][0])


def test_any_callable_and_its_metadata():
    seen = []

    def reward(images, prompts, metadata):
        seen.append((prompts, metadata))
        return redness(images, prompts, metadata), {"note": "kept by nobody"}

    relative = RelativeReward(reward, "red {prompt}")
    images = random_images(2, 3, 4, 4).requires_grad_()
    scores = RewardSet([relative, redness])(images, ["a dog", "a red dog"], [{"n": 1}, {"n": 2}])
    assert seen == [
        (["red a dog", "red a red dog"], [{"n": 1}, {"n": 2}]),
        (["a dog", "a red dog"], [{"n": 1}, {"n": 2}]),
    ]
    torch.testing.assert_close(scores.rewards[0], torch.stack([2 * images[0, 0].mean(), torch.zeros(())]))
    assert "rewards/relative_reward/against" in scores.metrics


def test_rewards_without_gradient_stay_so():
    relative = RelativeReward(OCRReward(lambda image: "red"), '{prompt} "red"', '{prompt} "blue"')
    assert relative.differentiable is False
    assert relative(random_images(1, 3, 4, 4), ["a sign"], [{}])[0].tolist() == [1.0]


def test_bad_settings():
    reward = CASES["clip"]()
    with pytest.raises(ValueError, match=r"words='Realistic' must hold \{prompt\}"):
        RelativeReward(reward, "Realistic")
    with pytest.raises(ValueError, match=r"both '\{prompt\}', so the reward would always be 0"):
        RelativeReward(reward, "{prompt}")
    with pytest.raises(ValueError, match="'AestheticScore' does not read the prompt"):
        RelativeReward(CASES["aesthetic"](), "a {prompt}")
    with pytest.raises(ValueError, match="no built-in reward 'clip'"):
        RelativeReward("clip", "a {prompt}")
    with pytest.raises(TypeError, match="is not"):
        RelativeReward(3, "a {prompt}")


def test_training_moves_the_difference(tmp_path):
    pipeline, relative = tiny_flux(), RelativeReward(CASES["clip"](), "red {prompt}", "blue {prompt}")

    def score():
        images = torch.cat([sample(pipeline, seed) for seed in range(50, 58)])
        with torch.no_grad():
            return relative(images, ["a circle"] * 8, [{}] * 8)[0].mean().item()

    before = score()
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "dry_run": True}
    make_trainer(tmp_path, pipeline, relative, prompts=["a circle"], **settings).train()
    assert score() > before
