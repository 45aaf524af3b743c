"""Directions from differences: against loops, and against the gradient of a smooth reward."""

import pytest
import torch

from trl_leapalign.training.differences import directions, group_scales


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("shared", [False, True])
def test_directions_are_the_mean_over_the_other_samples(power, shared):
    latents, rewards = normal(6, 2, 3), torch.tensor([0.0, 1.0, 1.0, 5.0, -2.0, 0.5], dtype=torch.float64)
    found = directions(latents, rewards, 3, power, shared)
    expected, differing = torch.zeros_like(latents), torch.zeros(6, dtype=torch.float64)
    for group in ((0, 1, 2), (3, 4, 5)):
        for a in group:
            for b in set(group) - {a}:
                d = latents[a] - latents[b]
                expected[a] += (rewards[a] - rewards[b]) * d / d.square().sum() ** (power / 2) / 2
                differing[a] += (rewards[a] != rewards[b]) / 2
        if shared:
            expected[list(group)] = expected[list(group)].mean(0)
    torch.testing.assert_close(found.gradients, expected, rtol=1e-13, atol=1e-15)
    assert torch.equal(found.differing, differing) and not found.gradients.requires_grad


def test_equal_rewards_or_equal_latents_say_nothing():
    latents = normal(4, 5)
    found = directions(latents, torch.ones(4), 4)
    assert not found.gradients.any() and not found.differing.any()
    same = latents[:1].expand(4, 5)
    assert not directions(same, torch.arange(4.0), 2, power=2.0).gradients.any()


def test_low_precision_is_widened():
    latents = normal(4, 5)
    found = directions(latents.bfloat16(), torch.arange(4.0), 2, 2.0)
    expected = directions(latents.bfloat16().double(), torch.arange(4.0), 2, 2.0)
    assert found.gradients.dtype == torch.float32
    torch.testing.assert_close(found.gradients.double(), expected.gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_small_differences_find_the_gradient_of_a_smooth_reward(power):
    """Over isotropic pairs the cosine to the gradient is about sqrt(n / (n + D)) for n pairs in D dimensions."""
    dimensions, center = 24, normal(24, seed=1)
    weights, matrix = normal(24, seed=2), normal(24, 24, seed=3) / 24

    def reward(x):
        return torch.tanh(x @ weights / 5) + torch.einsum("bi,ij,bj->b", x, matrix, x)

    point = center[None].clone().requires_grad_()
    [gradient] = torch.autograd.grad(reward(point).sum(), point)
    for count in (8, 128, 4096):
        latents = center + 1e-3 * normal(2 * count, dimensions, seed=4)
        estimate = directions(latents, reward(latents), 2, power).gradients.mean(0)
        cosine = torch.cosine_similarity(estimate, gradient[0], dim=0).item()
        assert cosine == pytest.approx((count / (count + dimensions)) ** 0.5, abs=0.12)
    assert cosine > 0.99


def test_scales_are_one_over_the_deviation_of_a_group():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    assert group_scales(rewards, 2).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert group_scales(1000 * rewards, 2)[0] == pytest.approx(1e-3)
