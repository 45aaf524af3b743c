"""max_sample_grad_norm: what one sample may contribute to an update."""

import pytest
import torch
from training_cases import make_config, make_trainer, relative_error

from examples.tiny import tiny_flux
from trl_leapalign.training.losses import limit_sample_gradients


@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.25])
def test_each_sample_is_limited_by_itself(scale):
    """With L = mean of c_i sum(x_i), sample i's gradient has norm |c_i| sqrt(n), however the loss is scaled."""
    latents = torch.ones(3, 2, 2, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([0.5, -3.0, 0.0], dtype=torch.float64)
    passed = latents * 1.0
    loss = (factors * passed.sum((1, 2))).mean()
    norms = []
    limit_sample_gradients(loss, passed, 2.0, norms.append)
    (scale * loss).backward()
    assert norms[0].tolist() == pytest.approx([1.0, 6.0, 0.0])
    expected = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)[:, None, None].expand(3, 2, 2) * scale / 3
    assert torch.allclose(latents.grad, expected, rtol=1e-6, atol=0)


def test_without_limit_nothing_changes():
    latents = torch.randn(2, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    passed = latents * 1.0
    loss = passed.square().sum(1).mean()
    expected = torch.autograd.grad(loss, latents, retain_graph=True)[0]
    limit_sample_gradients(loss, passed, None)
    loss.backward()
    assert torch.equal(latents.grad, expected)


def gradients(trainer, prompts, indices):
    """Of the trained parameters, and the norm of the gradient at the clean latents of each sample."""
    trainer.rollout_model.zero_grad()
    inputs = {"prompts": prompts, "metadata": [{} for _ in prompts], "indices": indices}
    loss, output = trainer.compute_loss(trainer.rollout_model, inputs, return_outputs=True)
    at_latents = torch.autograd.grad(loss, output.latents[0], retain_graph=True)[0]
    loss.backward()
    trained = {name: p.grad.clone() for name, p in trainer.rollout_model.named_parameters() if p.grad is not None}
    return trained, at_latents.flatten(1).norm(dim=1) * len(prompts)


@pytest.mark.parametrize("method", ["leapalign", "draft", "refl"])
def test_a_batch_is_the_mean_of_limited_samples(method, tmp_path):
    prompts = ["a red circle", "two blue squares"]
    settings = {"per_device_train_batch_size": 2, "method": method}
    trainer = make_trainer(tmp_path, tiny_flux().to(torch.float64), prompts=prompts, **settings)
    single = [gradients(trainer, [prompt], [index]) for index, prompt in enumerate(prompts)]
    norms = [norm.item() for _, (norm,) in single]
    assert norms[0] != pytest.approx(norms[1], rel=0.05)
    limit = sum(norms) / 2
    factors = [min(1.0, limit / norm) for norm in norms]
    expected = {
        name: sum(factor * each[name] for factor, (each, _) in zip(factors, single, strict=True)) / 2
        for name in single[0][0]
    }
    limited = make_trainer(
        tmp_path, tiny_flux().to(torch.float64), prompts=prompts, max_sample_grad_norm=limit, **settings
    )
    limited.rollout_model.load_state_dict(trainer.rollout_model.state_dict())
    assert relative_error(gradients(limited, prompts, [0, 1])[0], expected) < 1e-6
    assert relative_error(gradients(trainer, prompts, [0, 1])[0], expected) > 1e-2


def test_the_norm_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, max_sample_grad_norm=1e-3, gradient_accumulation_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["sample_grad_norm"] > 0 for entry in logs)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "much", True])
def test_limits_that_are_refused(value, tmp_path):
    with pytest.raises(ValueError, match="max_sample_grad_norm"):
        make_config(tmp_path, max_sample_grad_norm=value)
