import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from rollout_cases import ChosenSteps

from trl_leapalign.methods import LeapAlign, Schedule
from trl_leapalign.methods.flow import RECTIFIED, TRIGFLOW

BATCH = (3, 2, 4)


def shifted_times(num_steps, shift=3.0):
    """SD3's sigmas: far from evenly spaced, most of them above 1/2."""
    linear = [1 - step / num_steps for step in range(num_steps)]
    return (*(shift * time / (1 + (shift - 1) * time) for time in linear), 0.0)


def draw(method, schedule, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Counter(method.plan(schedule, generator).active_steps for _ in range(count))


def chi_square(counts, outcomes):
    expected = sum(counts.values()) / len(outcomes)
    return sum((counts[outcome] - expected) ** 2 / expected for outcome in outcomes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_choice": "uniform"}, "step_choice='uniform' is unknown"),
        ({"reward_input": "x_hat"}, "reward_input='x_hat' is unknown"),
        ({"similarity": "both"}, "similarity='both' is unknown"),
        ({"gradient_discount": -0.1}, "gradient_discount=-0.1"),
        ({"gradient_discount": 1.1}, "gradient_discount=1.1"),
        ({"gradient_discount": math.nan}, "gradient_discount=nan"),
        ({"similarity_floor": 0.0}, "similarity_floor=0.0"),
        ({"similarity_floor": -1.0}, "similarity_floor=-1.0"),
        ({"similarity_floor": math.nan}, "similarity_floor=nan"),
        ({"gradient_discount": "0.3"}, "gradient_discount='0.3' must be a finite number between 0 and 1"),
        ({"gradient_discount": None}, "gradient_discount=None"),
        ({"similarity_floor": "0.1"}, "similarity_floor='0.1' must be a finite number above 0"),
        ({"similarity_floor": math.inf}, "similarity_floor=inf"),
        ({"num_leaps": True}, "num_leaps=True must be a whole number of at least 1"),
        ({"nested_gradient_only": "no"}, "nested_gradient_only='no' must be True or False"),
        ({"step_range": None}, "step_range=None"),
        ({"step_range": 0.5}, "step_range=0.5"),
        ({"step_range": "ab"}, "step_range='ab'"),
        ({"step_range": (0, None)}, "step_range"),
        ({"num_leaps": 0}, "num_leaps=0"),
        ({"num_leaps": 1.5}, "num_leaps=1.5"),
        ({"step_range": (0.5, 0.5)}, "step_range"),
        ({"step_range": (0.6, 0.5)}, "step_range"),
        ({"step_range": (-0.1, 0.5)}, "step_range"),
        ({"step_range": (0.0, 1.1)}, "step_range"),
        ({"step_range": (0.0, 0.5, 1.0)}, "step_range"),
        ({"step_choice": "fixed_distance", "num_leaps": 1}, "draws a pair"),
        ({"step_choice": "fixed_distance", "num_leaps": 3}, "draws a pair"),
        ({"num_leaps": 1, "similarity": "joints"}, "no joint"),
        ({"num_leaps": 1, "nested_gradient_only": True}, "no joint"),
        ({"nested_gradient_only": True, "gradient_discount": 0.0}, "without gradient"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LeapAlign(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_discount": 0.0},
        {"gradient_discount": 1.0},
        {"num_leaps": 1},
        {"num_leaps": 5},
        {"step_range": [0.0, 0.5]},
        {"step_choice": "fixed_distance"},
        {"nested_gradient_only": True, "num_leaps": 3},
    ],
)
def test_the_edges_of_the_settings_are_allowed(settings):
    assert hash(LeapAlign(**settings)) == hash(LeapAlign(**settings))


def test_defaults_are_the_papers():
    method = LeapAlign()
    assert (method.gradient_discount, method.similarity_floor, method.num_leaps) == (0.3, 0.1, 2)
    assert (method.step_choice, method.step_range) == ("random", (0.0, 1.0))
    assert (method.reward_input, method.similarity, method.nested_gradient_only) == ("sample", "all", False)


@pytest.mark.parametrize(("num_leaps", "quantile"), [(1, 20.5), (2, 36.1), (3, 43.8)])
def test_every_set_of_steps_is_equally_likely(num_leaps, quantile):
    """The quantile is the chi-square distribution's at 0.999, for 5, 14 and 19 degrees of freedom."""
    outcomes = list(itertools.combinations(range(6), num_leaps))
    counts = draw(LeapAlign(num_leaps=num_leaps), Schedule(shifted_times(6), RECTIFIED), 200 * len(outcomes))
    assert set(counts) == set(outcomes)
    assert chi_square(counts, outcomes) < quantile


def test_plan_carries_the_discount_and_depends_on_the_generator_alone():
    schedule = Schedule(shifted_times(25), RECTIFIED)
    plans = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        plans.append(LeapAlign(gradient_discount=0.1).plan(schedule, torch.Generator().manual_seed(7)))
        assert torch.equal(torch.get_rng_state(), state)
    assert plans[0] == plans[1]
    assert plans[0].input_gradient_scale == 0.1
    assert len(draw(LeapAlign(), schedule, 50)) > 30


@pytest.mark.parametrize("step_range", [(0.0, 0.5), (0.5, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize(("interpolant", "noise_time"), [(RECTIFIED, 1.0), (TRIGFLOW, math.pi / 2)])
def test_step_range_is_in_time_not_in_counts(step_range, interpolant, noise_time):
    times = shifted_times(25)
    schedule = Schedule(tuple(noise_time * time for time in times), interpolant)
    allowed = {step for step in range(25) if step_range[0] <= times[step] <= step_range[1]}
    if step_range == (0.0, 0.5):
        assert len(allowed) == 6, "half of the time is 6 of the 25 steps at shift 3"
    drawn = {step for steps in draw(LeapAlign(step_range=step_range), schedule, 500) for step in steps}
    assert drawn == allowed


def test_the_first_step_counts_where_a_schedule_begins_a_rounding_error_above_pure_noise():
    schedule = Schedule((1.57080, 1.3, 0.0), TRIGFLOW)  # SCMScheduler's: pi / 2 = 1.570796
    assert LeapAlign().plan(schedule, torch.Generator()).active_steps == (0, 1)


def fixed_distance_pairs(times, low, high):
    pairs = []
    for first in range(len(times) - 1):
        target = times[first] - (high - low) / 2
        later = [step for step in range(first + 1, len(times) - 1) if low <= times[step]]
        if times[first] > high or target < max(low, times[-1]) or not later:
            continue
        distances = [abs(times[step] - target) for step in later]
        pairs.append((first, later[distances.index(min(distances))]))
    return pairs


@pytest.mark.parametrize("step_range", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.2, 0.9)])
@pytest.mark.parametrize("times", [shifted_times(25), shifted_times(12, shift=1.0), shifted_times(40)[16:]])
def test_fixed_distance_is_half_of_the_range_to_the_nearest_step(step_range, times):
    schedule = Schedule(times, RECTIFIED)
    outcomes = fixed_distance_pairs(times, *step_range)
    counts = draw(LeapAlign(step_choice="fixed_distance", step_range=step_range), schedule, 200 * len(outcomes))
    assert set(counts) == set(outcomes)
    assert chi_square(counts, outcomes) < len(outcomes) + 5 * math.sqrt(2 * len(outcomes))
    half = (step_range[1] - step_range[0]) / 2
    gap = max(before - after for before, after in itertools.pairwise(times[:-1]))
    assert all(abs(times[first] - times[second] - half) <= max(gap, times[-2]) + 1e-12 for first, second in outcomes)


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({}, (1.0, 0.0)),
        ({"num_leaps": 3}, (1.0, 0.5, 0.0)),
        ({"step_range": (0.0, 0.4)}, (1.0, 0.8, 0.5, 0.3, 0.0)),
        ({"num_leaps": 3}, (1.0, 0.5, 0.5, 0.0)),
        ({"step_choice": "fixed_distance"}, (0.4, 0.3, 0.2, 0.0)),
    ],
)
def test_too_few_steps_are_refused_with_what_to_do(settings, times):
    with pytest.raises(ValueError, match="more sampling steps"):
        LeapAlign(**settings).plan(Schedule(times, RECTIFIED), torch.Generator())


def test_as_many_steps_as_leaps_are_enough():
    schedule = Schedule((1.0, 0.7, 0.2, 0.0), RECTIFIED)
    assert LeapAlign(num_leaps=3).plan(schedule, torch.Generator()).active_steps == (0, 1, 2)


def test_of_a_level_that_is_evaluated_twice_only_the_last_call_is_drawn():
    schedule = Schedule((1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.2, 0.0), RECTIFIED)
    counts = draw(LeapAlign(), schedule, 1200)
    outcomes = list(itertools.combinations((0, 2, 4, 6), 2))
    assert set(counts) == set(outcomes)
    assert chi_square(counts, outcomes) < 20.5


TIMES = (1.0, 0.9, 0.7, 0.4, 0.15, 0.0)


def trajectory(dtype=torch.float64, seed=0):
    """Latents that enter steps 0 to 5 and velocities of steps 0 to 4; no solver relates them."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(6, *BATCH, generator=generator, dtype=torch.float64).to(dtype)
    return latents, torch.randn(5, *BATCH, generator=generator, dtype=torch.float64).to(dtype)


def follow(method, steps, latents, velocities):
    """Drive a trajectory as the sampler would; returns it and what came out at the end."""
    schedule = Schedule(TIMES, RECTIFIED)
    plan = ChosenSteps(steps=steps, **vars(method)).plan(schedule, None)
    following = method.follow(plan, schedule)
    current = latents[0]
    for step, velocity in enumerate(velocities):
        following.leave(step, current, velocity)
        current = following.enter(step + 1, latents[step + 1])
    return following, current


def distances(steps, latents, velocities):
    """Per-sample mean distance at each landing, from the definition."""
    found = []
    for here, there in itertools.pairwise((*steps, 5)):
        prediction = latents[here] + (TIMES[there] - TIMES[here]) * velocities[here]
        found.append([(latents[there][b] - prediction[b]).abs().sum().item() / 8 for b in range(BATCH[0])])
    return found


@pytest.mark.parametrize("similarity", ["all", "joints", "end", "none"])
@pytest.mark.parametrize("steps", [(0,), (4,), (1, 3), (0, 4), (2, 3), (0, 2, 4)])
@pytest.mark.parametrize("floor", [0.1, 0.9, 100.0])
def test_weights_are_one_over_the_sum_of_floored_distances(similarity, steps, floor):
    if similarity == "joints" and len(steps) == 1:
        pytest.skip("refused by the settings")
    latents, velocities = trajectory()
    method = LeapAlign(similarity_floor=floor, similarity=similarity, num_leaps=len(steps))
    outcome = follow(method, steps, latents, velocities)[0].outcome()
    *joints, end = distances(steps, latents, velocities)
    counted = {"all": [*joints, end], "joints": joints, "end": [end], "none": []}[similarity]
    expected = [1 / sum(max(distance[b], floor) for distance in counted) if counted else 1.0 for b in range(BATCH[0])]
    assert outcome.weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert not outcome.weights.requires_grad
    assert outcome.metrics["weight"].tolist() == outcome.weights.tolist()
    assert outcome.metrics["d_0"].tolist() == pytest.approx(end, rel=1e-12)
    if joints:
        mean = [sum(distance[b] for distance in joints) / len(joints) for b in range(BATCH[0])]
        assert outcome.metrics["d_j"].tolist() == pytest.approx(mean, rel=1e-12)
    else:
        assert "d_j" not in outcome.metrics


def test_the_floors_of_this_file_bind_for_some_distances_only():
    values = [value for found in distances((1, 3), *trajectory()) for value in found]
    assert min(values) < 0.9 < max(values)


def test_distances_and_weights_of_bfloat16_latents_are_float32():
    latents, velocities = trajectory(torch.bfloat16)
    outcome = follow(LeapAlign(), (1, 3), latents, velocities)[0].outcome()
    exact = distances((1, 3), latents.double(), velocities.double())
    assert outcome.weights.dtype == torch.float32
    assert outcome.metrics["d_j"].tolist() == pytest.approx(exact[0], rel=1e-6)
    assert outcome.metrics["d_0"].tolist() == pytest.approx(exact[1], rel=1e-6)


@pytest.mark.parametrize("nested_gradient_only", [False, True])
@pytest.mark.parametrize("reward_input", ["sample", "leap"])
def test_what_comes_out_and_which_velocities_get_gradients(nested_gradient_only, reward_input):
    latents, velocities = trajectory()
    velocities = list(velocities.clone().requires_grad_(True).unbind(0))
    for velocity in velocities:
        velocity.retain_grad()
    method = LeapAlign(nested_gradient_only=nested_gradient_only, reward_input=reward_input)
    following, end = follow(method, (1, 3), latents, velocities)
    prediction = latents[3] - TIMES[3] * velocities[3].detach()
    assert torch.equal(end.detach(), latents[5] if reward_input == "sample" else prediction)
    assert not any(value.requires_grad for value in following.outcome().metrics.values())
    cotangent = torch.randn(BATCH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end.backward(cotangent)
    torch.testing.assert_close(velocities[3].grad, -TIMES[3] * cotangent, rtol=1e-14, atol=0)
    if nested_gradient_only:
        assert velocities[1].grad is None
    else:
        torch.testing.assert_close(velocities[1].grad, (TIMES[3] - TIMES[1]) * cotangent, rtol=1e-14, atol=0)
    assert all(velocities[step].grad is None for step in (0, 2, 4))


def test_the_rewarded_leap_starts_from_the_samplers_latents_at_the_joint():
    latents, velocities = trajectory()
    method = LeapAlign(reward_input="leap")
    moved = latents.clone()
    moved[1] += 1.0  # changes x_hat_3 but not x_3
    assert torch.equal(follow(method, (1, 3), latents, velocities)[1], follow(method, (1, 3), moved, velocities)[1])


def test_the_rewarded_leap_has_the_dtype_of_the_latents():
    latents, velocities = trajectory(torch.bfloat16)
    end = follow(LeapAlign(reward_input="leap"), (1, 3), latents, velocities)[1]
    assert end.dtype == torch.bfloat16
    exact = latents[3].double() - TIMES[3] * velocities[3].double()
    torch.testing.assert_close(end.double(), exact, rtol=2**-8, atol=1e-6)


def test_settings_can_be_replaced():
    assert replace(LeapAlign(), num_leaps=3).num_leaps == 3
    with pytest.raises(ValueError, match="num_leaps"):
        replace(LeapAlign(), num_leaps=0)
