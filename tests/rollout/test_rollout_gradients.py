"""Gradients of a rollout against LeapAlign's formula, written with plain autograd and its own denoiser calls."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from recordings import GLOBAL_SEED, Recording, errors, gradients, record
from rollout_cases import Case, ChosenSteps
from torch import Tensor

from trl_leapalign.rollout.run import run_rollout

TOLERANCE = 1e-9


def formula(recording: Recording, method: ChosenSteps) -> tuple[Tensor, list[Tensor]]:
    """The rewarded latents with LeapAlign's graph, and the distance of every landing, from the paper's equations."""
    alpha, sigmas, num_steps = method.gradient_discount, recording.sigmas, len(recording.sigmas) - 1
    joint = recording.latents[method.steps[0]]
    distances = []
    for here, there in pairwise((*method.steps, num_steps)):
        velocity = recording.velocity(here, alpha * joint + (1 - alpha) * joint.detach())
        start = joint.detach() if method.nested_gradient_only else joint
        leaped = start + (sigmas[there] - sigmas[here]) * velocity
        real = recording.latents[there]
        distances.append((real - leaped.detach()).abs().mean(dim=tuple(range(1, real.ndim))))
        joint = leaped + (real - leaped).detach()
    return (leaped if method.reward_input == "leap" else joint), distances


def check(case: Case, method: ChosenSteps, output_type: str = "latent", num_steps: int = 5) -> None:
    recording = record(replace(case, checkpointing=False), num_steps)
    latents, distances = formula(recording, method)
    reference = latents if output_type == "latent" else recording.decode(latents)
    expected = gradients(recording.pipeline, reference)

    pipeline = case.pipeline()
    torch.manual_seed(GLOBAL_SEED)
    rollout = run_rollout(pipeline, method, **case.inputs(num_steps), output_type=output_type)
    assert rollout.active_steps == method.steps
    torch.testing.assert_close(rollout.images, reference, rtol=0, atol=1e-11)
    overall, largest = errors(gradients(pipeline, rollout.images), expected)
    assert overall < TOLERANCE
    assert largest < TOLERANCE

    floored = torch.stack(distances).clamp(min=method.similarity_floor).sum(0)
    torch.testing.assert_close(rollout.weights, 1 / floored, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(rollout.metrics["d_0"], distances[-1], rtol=TOLERANCE, atol=1e-12)


def chosen(*steps: int, alpha: float = 0.3, **settings: Any) -> ChosenSteps:
    settings = {"similarity_floor": 1e-4, **settings}
    return ChosenSteps(steps=steps, gradient_discount=alpha, num_leaps=len(steps), **settings)


def float64(family: str, solver: str = "euler", **settings: Any) -> Case:
    return Case(family, solver, dtype=torch.float64, **settings)


@pytest.mark.parametrize("steps", [(0,), (4,), (2, 3), (0, 4), (3, 4), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_leaps_between_any_steps(family, steps):
    check(float64(family), chosen(*steps))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [(1, 3), (0, 2, 4)], ids=str)
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_any_gradient_discount(family, steps, alpha):
    check(float64(family), chosen(*steps, alpha=alpha))


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_images_with_and_without_guidance(family, guided, trained):
    check(float64(family, guided=guided, trained=trained), chosen(1, 3), output_type="pt")


SOLVERS = [
    ("flux", "stochastic_euler"),
    ("flux", "unipc"),
    ("flux", "dpm"),
    ("flux", "lcm"),
    ("sd3", "stochastic_euler"),
    ("sd3", "inverted_euler"),
    ("sd3", "unipc"),
    ("sd3", "dpm"),
    ("sd3", "lcm"),
]


@pytest.mark.parametrize("steps", [(0, 3), (0, 2, 4)], ids=str)
@pytest.mark.parametrize(("family", "solver"), SOLVERS)
def test_any_solver(family, solver, steps):
    check(float64(family, solver, guided=steps == (0, 3)), chosen(*steps))


@pytest.mark.parametrize("steps", [(0, 4), (2, 6), (0, 2, 4)], ids=str)
def test_heun_leaps_between_levels(steps):
    check(float64("sd3", "heun", guided=True), chosen(*steps), num_steps=4)


@pytest.mark.parametrize("output_type", ["latent", "pt"])
@pytest.mark.parametrize(("family", "solver"), [("flux", "euler"), ("flux", "lcm"), ("sd3", "euler"), ("sd3", "heun")])
def test_image_to_image_from_the_middle_of_the_schedule(family, solver, output_type):
    case = float64(family, solver, from_image=True)
    assert len(record(case, 5).calls) == (5 if solver == "heun" else 3)
    check(case, chosen(0, 2), output_type=output_type)


@pytest.mark.parametrize("settings", [{"nested_gradient_only": True}, {"reward_input": "leap"}], ids=str)
@pytest.mark.parametrize("steps", [(0, 3), (0, 2, 4)], ids=str)
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_variants_of_the_loss_path(family, steps, settings):
    check(float64(family), chosen(*steps, **settings), output_type="pt")


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_gradient_checkpointing_changes_nothing(family, trained):
    check(float64(family, trained=trained, checkpointing=True, guided=True), chosen(1, 3), output_type="pt")


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_autocast_cuts_no_gradient_off(family, trained):
    """Autocast caches the weights that it casts: one cast at an inactive step must not serve an active one."""
    case, method = Case(family, trained=trained), chosen(0, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        recording = record.__wrapped__(case, 5)
        expected = gradients(recording.pipeline, formula(recording, method)[0])
        pipeline = case.pipeline()
        output = run_rollout(pipeline, method, **case.inputs(5), output_type="latent")
        got = gradients(pipeline, output.images)
    overall, largest = errors(got, expected)
    assert overall < 0.02
    assert largest < 0.1


@pytest.mark.parametrize(
    "mistake",
    [{"gradient_discount": 0.3001}, {"steps": (1, 2)}, {"nested_gradient_only": True}, {"reward_input": "leap"}],
    ids=str,
)
def test_the_comparison_notices_mistakes(mistake):
    recording = record(float64("flux"), 5)
    method = chosen(1, 3)
    expected_latents, _ = formula(recording, method)
    expected = gradients(recording.pipeline, expected_latents)
    latents, _ = formula(recording, replace(method, **mistake))
    if mistake == {"reward_input": "leap"}:
        assert (latents - expected_latents).abs().max() > 1e-4
    else:
        assert errors(gradients(recording.pipeline, latents), expected)[0] > 1000 * TOLERANCE
