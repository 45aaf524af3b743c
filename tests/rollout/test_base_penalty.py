"""The distance to the base model against a second pipeline without adapter."""

import pytest
import torch
from recordings import errors
from rollout_cases import Case, trained_parameters
from torch import nn
from training_cases import make_trainer

from trl_leapalign.methods import DRaFTLV, LeapAlign
from trl_leapalign.rollout.base_penalty import distances_to_base
from trl_leapalign.rollout.rollout_model import RolloutModel


def rollout_model(pipeline, case, method, base_penalty=True):
    arguments = {key: value for key, value in case.inputs(5).items() if key not in ("prompt", "generator")}
    return RolloutModel(
        pipeline,
        {"transformer": pipeline.transformer},
        method,
        {**arguments, "output_type": "latent"},
        0,
        2,
        base_penalty,
    )


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_distance_and_gradient_are_those_of_a_model_without_adapter(family, guided):
    case = Case(family, guided=guided, dtype=torch.float64)
    pipeline, plain, calls = case.pipeline(), case.pipeline(), []
    plain.transformer.disable_adapters()
    model = rollout_model(pipeline, case, LeapAlign(gradient_discount=0.0))
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((torch.is_grad_enabled(), dict(kwargs))), with_kwargs=True
    )
    output = model(["a red circle", "two blue squares"], [0, 1])
    hook.remove()
    active = [kwargs for enabled, kwargs in calls if enabled]
    a_step = 2 if guided and family == "flux" else 1
    assert len(calls) == 5 * a_step + len(active) and len(active) == 2 * a_step

    expected = 0.0
    for kwargs in active:
        kwargs["hidden_states"] = kwargs["hidden_states"].detach()
        with torch.no_grad():
            base = plain.transformer(**kwargs)[0]
        error = (pipeline.transformer(**kwargs)[0] - base).square().flatten(1).mean(1)
        expected = expected + error.view(-1, 2).mean(0) / len(active)
    torch.testing.assert_close(output.penalty.double(), expected, rtol=1e-6, atol=0)
    assert (expected > 1e-6).all()

    gradients = []
    for penalty in (output.penalty, expected):
        pipeline.transformer.zero_grad()
        penalty.sum().backward()
        gradients.append({name: p.grad for name, p in trained_parameters(pipeline).items() if p.grad is not None})
    assert errors(*gradients)[0] < 1e-5


def test_images_weights_and_flags_stay_as_they_are():
    case = Case("sd3", guided=True)
    pipelines = [case.pipeline(), case.pipeline()]
    flags = {name: p.requires_grad for name, p in pipelines[0].transformer.named_parameters()}
    with_penalty, without = (
        rollout_model(pipeline, case, LeapAlign(), penalty)(["a dog", "a cat"], [0, 1])
        for pipeline, penalty in zip(pipelines, (True, False), strict=True)
    )
    assert torch.equal(with_penalty.images, without.images)
    assert without.penalty is None
    assert {name: p.requires_grad for name, p in pipelines[0].transformer.named_parameters()} == flags
    gradients = []
    for pipeline, output in zip(pipelines, (with_penalty, without), strict=True):
        output.images.sum().backward()
        gradients.append({name: p.grad for name, p in trained_parameters(pipeline).items() if p.grad is not None})
    assert errors(*gradients) == (0.0, 0.0)


def test_copies_of_samples_count_too():
    case = Case("sd3")
    output = rollout_model(case.pipeline(), case, DRaFTLV())(["a dog", "a cat"], [0, 1])
    assert output.penalty.shape == (2,) and len(output.images) == 6


def test_an_untrained_adapter_is_no_distance_away_and_the_penalty_holds_it_back(tmp_path):
    trainer = make_trainer(tmp_path, base_penalty=0.5, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["base_distance"] == 0.0
    moved = []
    for penalty in (1e-6, 1e6):
        trainer = make_trainer(tmp_path, base_penalty=penalty, max_steps=4, learning_rate=1e-3)
        trainer.train()
        moved.append([entry["base_distance"] for entry in trainer.state.log_history if "base_distance" in entry][-1])
    assert moved[1] < moved[0]


class ListDenoiser(nn.Module):
    """Some denoisers take and give one tensor a sample."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, samples):
        return ([self.scale * sample for sample in samples],)


def test_one_tensor_a_sample():
    module = ListDenoiser()
    with distances_to_base([module], batch_size=2) as distances:
        module([torch.ones(3), torch.ones(5)])
    assert [distance.tolist() for distance in distances] == [[0.0, 0.0]]
