"""Seeds: the same for the same purpose, unrelated otherwise."""

import random

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from examples.tiny import tiny_sd3
from trl_leapalign.methods import LeapAlign
from trl_leapalign.prompts.seeds import Purpose, cuda_devices, derive_seed, make_generator, seeded
from trl_leapalign.rollout.calls import solver_noise
from trl_leapalign.rollout.rollout_model import RolloutModel


def test_seeds_differ_by_every_part_of_their_key():
    keys = [(seed, purpose, index) for seed in (0, 1) for purpose in Purpose for index in range(50)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(3, Purpose.NOISE, 5) == derive_seed(3, Purpose.NOISE, 5)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


def test_noise_of_samples_is_uncorrelated():
    noise = torch.stack([torch.randn(4096, generator=make_generator(0, Purpose.NOISE, i)) for i in range(8)])
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 5 / 4096**0.5


def test_the_solvers_noise_is_not_the_initial_noise():
    state = torch.get_rng_state()
    for purpose in (Purpose.NOISE, Purpose.EVALUATION):
        with solver_noise(0, purpose, 3):
            drawn = torch.randn(64)
        initial = torch.randn(64, generator=make_generator(0, purpose, 3))
        assert not torch.equal(drawn, initial) and torch.corrcoef(torch.stack([drawn, initial]))[0, 1].abs() < 0.5
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stochastic_solver_depends_on_the_sample_alone():
    pipeline = tiny_sd3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pipeline.transformer.requires_grad_(True)
    kwargs = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    model = RolloutModel(pipeline, {"transformer": pipeline.transformer}, LeapAlign(), kwargs, 0, 4)
    torch.manual_seed(1)
    images = model(["a cat"], [0]).images
    torch.manual_seed(2)
    assert torch.equal(model(["a cat"], [0]).images, images)
    assert not torch.equal(model(["a cat"], [1]).images, images)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_all_random_states_are_seeded_and_put_back():
    with seeded(3):
        expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    following = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with seeded(3):
        assert draw() == expected
    assert draw() == following


def test_gpus_that_were_not_used_are_not_seeded(monkeypatch):
    """Torch would do it when they are first used, and nothing would put that back."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", calls.append)
    with seeded(3):
        first = torch.rand(3)
    with seeded(3):
        assert torch.equal(first, torch.rand(3))
    assert cuda_devices() == [] and calls == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_states_of_all_gpus_are_put_back():
    devices = range(torch.cuda.device_count())
    for device in devices:
        torch.rand(1, device=f"cuda:{device}")
    before = [torch.cuda.get_rng_state(device) for device in devices]
    for noise in (seeded(3), solver_noise(0, Purpose.NOISE, 1)):
        with noise:
            drawn = [torch.rand(4, device=f"cuda:{device}").cpu() for device in devices]
            assert all(torch.equal(drawn[0], each) for each in drawn)
        after = [torch.cuda.get_rng_state(device) for device in devices]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
