"""Guidance whose unconditional call has no gradient, against the formula with that call detached."""

import pytest
import torch
from rollout_cases import Case, add_lora, enliven, seeded
from training_cases import make_trainer, trained_weights

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign import DRaFT, run_rollout
from trl_leapalign.rollout.guidance import detached_unconditional_calls


def guided_flux():
    pipeline = tiny_flux()
    enliven(pipeline.transformer)
    add_lora(pipeline.transformer)
    return pipeline.to(torch.float64)


def gradients(pipeline, output):
    trained = {name: p for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output.square().sum(), list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def by_formula(pipeline, detach):
    """Two Euler steps through all of the sampling, v = u + w (c - u), written out."""
    inputs = Case("flux", guided=True).inputs(2)
    given = {}

    def remember(module, args, kwargs):
        given.setdefault("calls", []).append(dict(kwargs))

    handle = pipeline.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        pipeline(**{**inputs, "generator": seeded(1)}, output_type="latent")
    handle.remove()
    conditional, unconditional = given["calls"][:2]
    latents, sigmas = conditional["hidden_states"].clone(), pipeline.scheduler.sigmas.double()
    for index in range(2):
        time = given["calls"][2 * index]["timestep"]

        def call(arguments, latents=latents, time=time):
            return pipeline.transformer(**{**arguments, "hidden_states": latents, "timestep": time})[0]

        conditioned, free = call(conditional), call(unconditional)
        free = free.detach() if detach else free
        velocity = free + inputs["true_cfg_scale"] * (conditioned - free)
        latents = latents + (sigmas[index + 1] - sigmas[index]) * velocity
    return latents


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_is_that_of_the_formula_with_the_unconditional_call_detached(detach):
    pipeline = guided_flux()
    expected_latents = by_formula(pipeline, detach)
    expected = gradients(pipeline, expected_latents)
    inputs = {**Case("flux", guided=True).inputs(2), "output_type": "latent"}
    with detached_unconditional_calls([pipeline.transformer] if detach else []) as calls:
        output = run_rollout(pipeline, DRaFT(num_last_steps=2), method_generator=seeded(0), **inputs)
    assert calls == (["uncond"] * 2 if detach else [])
    assert "cache_context" not in vars(pipeline.transformer)
    # The scheduler's sigmas are in float32.
    torch.testing.assert_close(output.images, expected_latents, rtol=1e-6, atol=1e-6)
    found = gradients(pipeline, output.images)
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_images_stay_and_fewer_activations_are_kept():
    kept, images = [], []
    for detach in (False, True):
        pipeline = guided_flux()
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t)
        with detached_unconditional_calls([pipeline.transformer] if detach else []), hooks:
            inputs = {**Case("flux", guided=True).inputs(2), "output_type": "latent"}
            output = run_rollout(pipeline, DRaFT(num_last_steps=2), method_generator=seeded(0), **inputs)
        kept.append(sum(sizes))
        images.append(output.images.detach())
    assert torch.equal(*images)
    assert 0.4 * kept[0] < kept[1] < 0.6 * kept[0]


GUIDED = {"true_cfg_scale": 2.0, "negative_prompt": "a dog"}


def test_training_with_the_unconditional_call_detached(tmp_path):
    settings = {"sample_kwargs": GUIDED, "max_steps": 1, "base_penalty": 0.1}
    runs = []
    for flag in (True, False):
        trainer = make_trainer(tmp_path, tiny_flux(), unconditional_gradient=flag, dry_run=True, **settings)
        trainer.train()
        runs.append(trained_weights(trainer))
    assert any(not torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3])
def test_where_there_is_no_unconditional_call_of_its_own_the_option_is_refused(build, tmp_path):
    with pytest.raises(ValueError, match=r"unconditional_gradient=False has no effect: .* makes no unconditional call"):
        make_trainer(tmp_path, build(), unconditional_gradient=False, dry_run=True)
