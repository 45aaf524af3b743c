"""Every method against its formula: gradients, images, denoiser calls, active steps, and what it leaves behind."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from recordings import GLOBAL_SEED, Recording, errors, gradients, record
from rollout_cases import Case, ChosenSteps, seeded
from torch import Tensor

from trl_leapalign.methods import (
    METHODS,
    DRaFT,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    Method,
    Plan,
    ReFL,
    Schedule,
)
from trl_leapalign.methods.flow import RECTIFIED, TRIGFLOW
from trl_leapalign.methods.flowbp import lagrange_weights
from trl_leapalign.rollout.recorder import RolloutOutput
from trl_leapalign.rollout.run import run_rollout

EXACT, SOLVER = 1e-9, 1e-7  # the solvers cast to float32
NUM_STEPS = 6


def scaled(tensor: Tensor, scale: float) -> Tensor:
    return scale * tensor + (1 - scale) * tensor.detach()


def connected(value: Tensor, path: Tensor) -> Tensor:
    return path + (value - path).detach()


def solve(recording: Recording, live: set[int], stop: int, stop_inputs: bool) -> tuple[Tensor, Tensor]:
    """Take the solver's steps with autograd: what enters step `stop`, and its velocity (or the end, if it is none)."""
    pipeline, x = recording.pipeline, recording.latents[0]
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler._step_index = None
    scheduler.timesteps = scheduler.timesteps.clone()
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs = [None] * len(scheduler.model_outputs)
        scheduler.lower_order_nums = 0
        if hasattr(scheduler, "last_sample"):
            scheduler.last_sample, scheduler.this_order = None, 0
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = recording.velocity(step, x.detach() if stop_inputs else x)
        velocity = velocity if step in live else velocity.detach()
        if step == stop:
            return x, velocity
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    return x, velocity


def refl_formula(recording: Recording, method: ReFL, plan: Plan) -> Tensor:
    x = recording.latents[plan.stop]
    return x - recording.sigmas[plan.stop] * recording.velocity(plan.stop, x)


def draft_formula(recording: Recording, method: DRaFT, plan: Plan) -> Tensor:
    return solve(recording, set(plan.active_steps), stop=-1, stop_inputs=False)[0]


def draft_lv_formula(recording: Recording, method: DRaFTLV, plan: Plan) -> Tensor:
    last, sigma = NUM_STEPS - 1, recording.sigmas[-2]
    ends = [solve(recording, {last}, stop=-1, stop_inputs=False)[0]]
    generator = seeded(1)
    torch.randn(recording.latents[0].shape, generator=generator, dtype=torch.float64)
    for _ in range(method.num_copies):
        noise = torch.randn(ends[0].shape, generator=generator, dtype=torch.float64)
        noisy = (1 - sigma) * ends[0].detach() + sigma * noise
        ends.append(noisy - sigma * recording.velocity(last, noisy))
    return torch.cat(ends)


def drtune_formula(recording: Recording, method: DRTune, plan: Plan) -> Tensor:
    x, velocity = solve(recording, set(plan.active_steps), plan.stop, stop_inputs=True)
    return x - recording.sigmas[plan.stop] * velocity


def euler_sum(recording: Recording, start: Tensor, first: int, end: int, velocities: dict[int, Tensor]) -> Tensor:
    sigmas = recording.sigmas
    for step in range(first, end):
        velocity = velocities.get(step)
        if velocity is None:
            velocity = recording.velocity(step, recording.latents[step]).detach()
        start = start + (sigmas[step + 1] - sigmas[step]) * velocity
    return start


def rescale(recording: Recording, method: Any, plan: Plan) -> float:
    lengths = [recording.sigmas[step] - recording.sigmas[step + 1] for step in range(NUM_STEPS)]
    active = sum(lengths[step] for step in plan.active_steps)
    return 1 + method.gradient_rescale * (sum(lengths) / active - 1)


def sparse_formula(recording: Recording, method: FlowBPSparse, plan: Plan) -> Tensor:
    rho = rescale(recording, method, plan)
    velocities = {step: scaled(recording.velocity(step, recording.latents[step]), rho) for step in plan.active_steps}
    return connected(recording.latents[-1], euler_sum(recording, recording.latents[0], 0, NUM_STEPS, velocities))


def bridge_formula(recording: Recording, method: FlowBPBridge, plan: Plan) -> Tensor:
    rho, joint = rescale(recording, method, plan), plan.paths[0][0].end
    assert joint in plan.active_steps and min(plan.active_steps) < joint
    velocities = {
        step: scaled(recording.velocity(step, recording.latents[step]), rho)
        for step in plan.active_steps
        if step != joint
    }
    x_joint = connected(recording.latents[joint], euler_sum(recording, recording.latents[0], 0, joint, velocities))
    velocities[joint] = scaled(recording.velocity(joint, scaled(x_joint, method.gradient_discount)), rho)
    return connected(recording.latents[-1], euler_sum(recording, x_joint, joint, NUM_STEPS, velocities))


def lagrange_formula(recording: Recording, method: FlowBPLagrange, plan: Plan) -> Tensor:
    first, joint = plan.paths[0][0].start, plan.paths[0][0].end
    x = recording.latents[first]
    for start, end in ((first, joint), (joint, NUM_STEPS)):
        places = torch.linspace(0, end - start - 1, min(method.order, end - start)).round().long().tolist()
        supports = [start + place for place in places]
        points = [recording.sigmas[step] for step in supports]
        weights = []
        for place, point in enumerate(points):
            others = np.delete(points, place)
            integral = (np.poly1d(others, r=True) / np.prod(point - others)).integ()
            weights.append(integral(recording.sigmas[end]) - integral(recording.sigmas[start]))
        weights = torch.tensor(weights, dtype=torch.float64)
        rho = 1 + method.gradient_rescale * (weights.abs().sum() / weights[:2].abs().sum() - 1).item()
        prediction = x
        for place, (step, weight) in enumerate(zip(supports, weights, strict=True)):
            inside = scaled(x, method.gradient_discount) if place == 0 else recording.latents[step]
            scale = (rho, 0.25 * rho, 0.0)[place]
            prediction = prediction + weight * scaled(recording.velocity(step, inside), scale)
        x = connected(recording.latents[end], prediction)
    return x


def pairs_formula(recording: Recording, method: ChosenSteps, plan: Plan) -> Tensor:
    predictions, weights = [], []
    sigmas, latents = recording.sigmas, recording.latents
    for first, joint in (method.steps, *method.more_steps):
        x = latents[first] + (sigmas[joint] - sigmas[first]) * recording.velocity(first, latents[first])
        d_j = (latents[joint] - x).detach().abs().flatten(1).mean(1)
        x = connected(latents[joint], x)
        x = x - sigmas[joint] * recording.velocity(joint, scaled(x, method.gradient_discount))
        d_0 = (latents[-1] - x).detach().abs().flatten(1).mean(1)
        predictions.append(x)
        weights.append(1 / (d_j.clamp(min=method.similarity_floor) + d_0.clamp(min=method.similarity_floor)))
    total = sum(weights)
    mean = sum((w / total).view(-1, *[1] * (x.ndim - 1)) * x for w, x in zip(weights, predictions, strict=True))
    return connected(latents[-1], mean)


PAIRS = ChosenSteps(steps=(1, 4), more_steps=((0, 2), (3, 5)), pairs_per_rollout=3, similarity_floor=1e-3)
CASES = {
    "refl": (ReFL(), refl_formula, EXACT),
    "refl_all": (ReFL(num_late_steps=6), refl_formula, EXACT),
    "draft_1": (DRaFT(), draft_formula, SOLVER),
    "draft_3": (DRaFT(num_last_steps=3), draft_formula, SOLVER),
    "draft_all": (DRaFT(num_last_steps=None), draft_formula, SOLVER),
    "alignprop": (DRaFT(num_last_steps=None, random_truncation=True), draft_formula, SOLVER),
    "draft_lv": (DRaFTLV(), draft_lv_formula, SOLVER),
    "drtune": (DRTune(), drtune_formula, SOLVER),
    "drtune_3": (DRTune(num_train_steps=3, num_late_steps=2), drtune_formula, SOLVER),
    "sparse": (FlowBPSparse(), sparse_formula, EXACT),
    "sparse_sd3": (FlowBPSparse(4, 1.0, 0.5), sparse_formula, EXACT),
    "bridge": (FlowBPBridge(), bridge_formula, EXACT),
    "bridge_sd3": (FlowBPBridge(4, 4.0, 0.0, 0.5), bridge_formula, EXACT),
    "lagrange": (FlowBPLagrange(), lagrange_formula, EXACT),
    "lagrange_sd3": (FlowBPLagrange(gradient_rescale=0.0, num_late_steps=2), lagrange_formula, EXACT),
    "pairs": (PAIRS, pairs_formula, EXACT),
}
REWARDS_SAMPLE = [name for name in CASES if not name.startswith(("refl", "drtune"))]


def schedule_of(recording: Recording) -> Schedule:
    return Schedule(tuple(recording.sigmas), RECTIFIED)


def rolled(case: Case, method: Method, seed: int, **changes: Any) -> tuple[Any, RolloutOutput]:
    pipeline = case.pipeline()
    torch.manual_seed(GLOBAL_SEED)
    inputs = {**case.inputs(NUM_STEPS), "output_type": "latent", **changes}
    return pipeline, run_rollout(pipeline, method, method_generator=seeded(seed), **inputs)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_formulas(name, seed):
    case = Case("flux" if seed else "sd3", dtype=torch.float64, guided=not seed)
    method, formula, tolerance = CASES[name]
    recording = record(case, NUM_STEPS)
    plan = method.plan(schedule_of(recording), seeded(seed))
    reference = formula(recording, method, plan)
    expected = gradients(recording.pipeline, reference)

    pipeline, output = rolled(case, method, seed)
    assert output.active_steps == plan.active_steps
    torch.testing.assert_close(output.images, reference, rtol=0, atol=1e-10 if tolerance == EXACT else 1e-6)
    overall, largest = errors(gradients(pipeline, output.images), expected)
    assert overall < tolerance
    assert largest < 10 * tolerance


@pytest.mark.parametrize("solver", ["unipc", "dpm"])
@pytest.mark.parametrize("name", ["refl", "draft_3", "drtune", "sparse", "lagrange"])
def test_gradients_with_multistep_solvers(name, solver):
    case = Case("sd3", solver, dtype=torch.float64)
    method, formula, tolerance = CASES[name]
    recording = record(case, NUM_STEPS)
    plan = method.plan(schedule_of(recording), seeded(3))
    expected = gradients(recording.pipeline, formula(recording, method, plan))
    pipeline, output = rolled(case, method, 3)
    assert errors(gradients(pipeline, output.images), expected)[0] < tolerance
    for value in vars(pipeline.scheduler).values():
        tensors = value if isinstance(value, list) else [value]
        assert not any(isinstance(each, Tensor) and each.requires_grad for each in tensors)


def test_the_solvers_own_gradient_is_not_eulers():
    recording = record(Case("sd3", "unipc", dtype=torch.float64), NUM_STEPS)
    through = draft_formula(recording, DRaFT(num_last_steps=3), Plan((3, 4, 5)))
    euler = recording.latents[3]
    for step in (3, 4, 5):
        slope = recording.sigmas[step + 1] - recording.sigmas[step]
        path = euler + slope * recording.velocity(step, euler)
        euler = connected(recording.latents[step + 1], path)
    pair = [gradients(recording.pipeline, each) for each in (euler, through)]
    assert errors(*pair)[0] > 1e-2


@pytest.mark.parametrize("num_steps", [2, 50])
@pytest.mark.parametrize("name", METHODS)
def test_two_steps_and_fifty_work(name, num_steps):
    settings = {"flowbp_sparse": {"num_active_steps": 2}, "flowbp_bridge": {"num_active_steps": 2}}.get(name, {})
    case, method = Case("sd3"), METHODS[name](**settings)
    pipeline, output = rolled(case, method, 0, num_inference_steps=num_steps)
    assert sum(gradient.abs().sum() for gradient in gradients(pipeline, output.images).values()) > 0
    assert output.images.isfinite().all()


@pytest.mark.parametrize("solver", ["euler", "unipc", "heun"])
@pytest.mark.parametrize("name", REWARDS_SAMPLE)
def test_the_rewarded_image_is_the_pipelines(name, solver):
    case, method = Case("sd3", solver), CASES[name][0]
    reference = case.pipeline()
    inputs = case.inputs(NUM_STEPS)
    expected = reference(**inputs, output_type="pt", return_dict=False)[0]
    generator = inputs["generator"]
    inputs = case.inputs(NUM_STEPS)
    pipeline = case.pipeline()
    output = run_rollout(pipeline, method, method_generator=seeded(0), **inputs)
    assert torch.equal(output.images[: len(expected)], expected)
    assert torch.equal(inputs["generator"].get_state(), generator.get_state())
    copies = getattr(method, "num_copies", 0)
    assert len(output.images) == (1 + copies) * len(expected)
    assert output.weights.shape == (len(output.images),)
    if name not in ("pairs", "lagrange", "lagrange_sd3"):
        assert (output.weights == 1 + copies).all()


def modes_of_calls(pipeline, run) -> list[bool]:
    modes = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    run()
    hook.remove()
    return modes


@pytest.mark.parametrize("from_image", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("name", CASES)
def test_one_denoiser_call_a_step_and_none_after_the_stop(name, family, from_image):
    case, method = Case(family, from_image=from_image), CASES[name][0]
    num_steps = 10 if from_image else NUM_STEPS
    pipeline, plans = case.pipeline(), []
    modes = modes_of_calls(
        pipeline,
        lambda: plans.append(
            run_rollout(pipeline, method, method_generator=seeded(2), **case.inputs(num_steps)).active_steps
        ),
    )
    taken = 6 + getattr(method, "num_copies", 0)
    if name.startswith(("refl", "drtune")):
        times = (*torch.linspace(1, 0.1, 6).tolist(), 0.0)
        taken = method.plan(Schedule(times, RECTIFIED), seeded(2)).stop + 1
    assert len(modes) == taken
    assert tuple(step for step, enabled in enumerate(modes) if enabled) == plans[0]


@pytest.mark.parametrize("name", CASES)
def test_a_rollout_leaves_scheduler_and_pipeline_as_a_plain_call_does(name):
    case = Case("flux", "unipc")
    pipeline, plain = case.pipeline(), case.pipeline()
    run_rollout(pipeline, CASES[name][0], method_generator=seeded(0), **case.inputs(NUM_STEPS))
    plain(**case.inputs(NUM_STEPS))
    assert type(pipeline.scheduler) is type(plain.scheduler)
    assert type(pipeline.scheduler.timesteps) is Tensor
    assert torch.equal(pipeline.scheduler.timesteps, plain.scheduler.timesteps)
    again = [each(**case.inputs(NUM_STEPS), output_type="pt").images for each in (pipeline, plain)]
    assert torch.equal(*again)


@pytest.mark.parametrize("name", CASES)
def test_plans_follow_from_the_generator(name):
    method, schedule = CASES[name][0], Schedule((*torch.linspace(1, 0.04, 25).tolist(), 0.0), RECTIFIED)
    plans = [[method.plan(schedule, seeded(seed)) for seed in range(20)] for _ in range(2)]
    assert plans[0] == plans[1]
    if name not in ("pairs", "draft_1", "draft_3", "draft_all", "draft_lv"):
        assert len({plan.active_steps for plan in plans[0]}) > 3


SCHEDULE = Schedule((*[1 - step / 25 for step in range(25)], 0.0), RECTIFIED)


def test_refl_stops_at_one_of_the_last_eleven_of_25():
    stops = [ReFL().plan(SCHEDULE, seeded(seed)).stop for seed in range(300)]
    assert set(stops) == set(range(14, 25))


def test_drtune_draws_as_the_paper_says():
    plans = [DRTune().plan(SCHEDULE, seeded(seed)) for seed in range(600)]
    assert {plan.stop for plan in plans} == set(range(14, 25))
    assert all(plan.active_steps and max(plan.active_steps) <= plan.stop for plan in plans)
    assert {plan.active_steps[0] for plan in plans} == set(range(0, 13))
    pairs = [plan.active_steps for plan in plans if len(plan.active_steps) == 2]
    assert pairs and all(second - first == 12 for first, second in pairs)


def test_sparse_prefers_late_steps_as_its_bias_says():
    counts = torch.zeros(25)
    for seed in range(3000):
        counts[FlowBPSparse(num_active_steps=1).plan(SCHEDULE, seeded(seed)).active_steps[0]] += 1
    odds = torch.arange(1, 26.0) ** 2
    expected = 3000 * odds / odds.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 51.2  # chi-square, 24 degrees of freedom, 0.999


def test_bridge_splits_its_steps_in_proportion_and_reaches_both_sides():
    for seed in range(300):
        plan = FlowBPBridge().plan(SCHEDULE, seeded(seed))
        joint = plan.paths[0][0].end
        before = sum(step < joint for step in plan.active_steps)
        assert len(plan.active_steps) == 5 and joint in plan.active_steps
        proportional = min(max(round(5 * joint / 25), 1), joint, 4)
        assert before == max(proportional, 5 - (25 - joint))


def test_lagrange_lengths_are_dirichlet():
    cuts = torch.tensor([FlowBPLagrange().draw(SCHEDULE, seeded(seed)) for seed in range(4000)]).double()
    to_end, between = (25 - cuts[:, 1]) / 25, (cuts[:, 1] - cuts[:, 0]) / 25
    assert to_end.mean().item() == pytest.approx(2.5 / 10.5, abs=0.01)
    assert between.mean().item() == pytest.approx(6 / 10.5, abs=0.01)
    variance = 6 / 10.5 * (1 - 6 / 10.5) / 11.5
    assert between.var().item() == pytest.approx(variance, rel=0.1)
    late = [FlowBPLagrange(num_late_steps=3).draw(SCHEDULE, seeded(seed)) for seed in range(200)]
    assert min(joint for _, joint in late) == 22


def test_random_truncation_draws_every_length():
    method = DRaFT(num_last_steps=4, random_truncation=True)
    counts = {len(method.plan(SCHEDULE, seeded(seed)).active_steps) for seed in range(100)}
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize("points", [[0.9], [0.9, 0.4], [0.9, 0.5, 0.2], [1.0, 0.8, 0.3, 0.1]])
def test_lagrange_weights_integrate_polynomials_exactly(points):
    weights = lagrange_weights(points, 1.0, 0.1)
    for power in range(len(points)):
        got = sum(weight * point**power for weight, point in zip(weights, points, strict=True))
        assert got == pytest.approx((0.1 ** (power + 1) - 1) / (power + 1), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReFL(num_late_steps=0), "num_late_steps=0"),
        (lambda: DRaFT(num_last_steps=0), "num_last_steps=0"),
        (lambda: DRaFT(random_truncation=1), "random_truncation=1"),
        (lambda: DRaFTLV(num_copies=0), "num_copies=0"),
        (lambda: DRTune(num_train_steps=0), "num_train_steps=0"),
        (lambda: DRTune(num_late_steps=1.5), "num_late_steps=1.5"),
        (lambda: FlowBPSparse(num_active_steps=0), "num_active_steps=0"),
        (lambda: FlowBPSparse(late_bias=-1), "late_bias=-1"),
        (lambda: FlowBPSparse(gradient_rescale=math.nan), "gradient_rescale=nan"),
        (lambda: FlowBPBridge(num_active_steps=1), "num_active_steps=1"),
        (lambda: FlowBPBridge(gradient_discount=2), "gradient_discount=2"),
        (lambda: FlowBPLagrange(order=0), "order=0"),
        (lambda: FlowBPLagrange(concentrations=(1, 2)), "concentrations"),
        (lambda: FlowBPLagrange(concentrations=(1, 2, 0)), "concentrations"),
        (lambda: FlowBPLagrange(similarity_floor=0), "similarity_floor=0"),
        (lambda: LeapAlign(pairs_per_rollout=0), "pairs_per_rollout=0"),
        (lambda: LeapAlign(pairs_per_rollout=2, step_choice="fixed_distance"), "draws a pair"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ReFL(num_late_steps=5), "num_late_steps=5"),
        (DRaFT(num_last_steps=5), "num_last_steps=5"),
        (DRTune(num_train_steps=5), "num_train_steps=5"),
        (DRTune(num_train_steps=1, num_late_steps=2), "would train none"),
        (FlowBPSparse(num_active_steps=5), "at least 5 sampling steps"),
        (FlowBPBridge(num_active_steps=5), "at least 5 sampling steps"),
        (LeapAlign(pairs_per_rollout=3), "draws 6 different steps"),
    ],
)
def test_too_few_steps_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        method.plan(Schedule((1.0, 0.7, 0.5, 0.2, 0.0), RECTIFIED), seeded(0))


@pytest.mark.parametrize("method", [FlowBPSparse(2), FlowBPBridge(2), FlowBPLagrange()])
def test_sums_of_velocities_need_a_rectified_flow(method):
    with pytest.raises(ValueError, match="rectified flow"):
        method.plan(Schedule((1.5, 1.0, 0.5, 0.0), TRIGFLOW), seeded(0))


def test_a_discount_of_zero_is_refused_in_float16():
    case = Case("sd3", dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        rolled(case, replace(PAIRS, gradient_discount=0.0), 0)
