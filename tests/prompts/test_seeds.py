"""Seeds: the same for the same purpose, unrelated otherwise."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from examples.tiny import tiny_sd3
from trl_leapalign.methods import LeapAlign
from trl_leapalign.prompts.seeds import Purpose, derive_seed, make_generator
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
