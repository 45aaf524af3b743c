"""What cannot be rolled out is an error that says why, and the pipeline stays as it was."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, UniPCMultistepScheduler
from rollout_cases import Case, seeded, trained_parameters

from examples.tiny import tiny_flux
from trl_leapalign.methods import LeapAlign
from trl_leapalign.rollout.recorder import RolloutOutput
from trl_leapalign.rollout.run import run_rollout


def rollout(pipeline: DiffusionPipeline, inputs: dict[str, Any], **settings: Any) -> RolloutOutput:
    return run_rollout(pipeline, LeapAlign(**settings), method_generator=seeded(0), **inputs)


def test_something_else_than_a_pipeline_is_refused():
    with pytest.raises(TypeError, match="diffusers pipeline, got FluxTransformer2DModel"):
        run_rollout(tiny_flux().transformer, LeapAlign())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_of_noise_prediction_is_refused_by_name(scheduler):
    pipeline = tiny_flux()
    pipeline.scheduler = scheduler()
    with pytest.raises(
        ValueError, match=rf"FluxPipeline does not sample by flow matching: it has {scheduler.__name__}"
    ):
        rollout(pipeline, Case("flux").inputs())


@pytest.mark.parametrize("settings", [{}, {"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}], ids=str)
def test_a_multistep_scheduler_needs_both_flow_settings(settings):
    pipeline = tiny_flux()
    pipeline.scheduler = UniPCMultistepScheduler(**settings)
    with pytest.raises(ValueError, match=r"UniPCMultistepScheduler.*use_flow_sigmas=True"):
        rollout(pipeline, Case("flux").inputs())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 5, "seed": 0}, TypeError, "cannot be called with steps, seed. It takes: prompt"),
        ({"return_dict": True}, TypeError, "cannot be called with return_dict"),
        ({"output_type": "pil"}, ValueError, "output_type='pil' is not differentiable"),
        ({"output_type": "np"}, ValueError, "output_type='np' is not differentiable"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_runs(arguments, error, message):
    pipeline = tiny_flux()
    calls = []
    pipeline.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(module))
    with pytest.raises(error, match=message):
        rollout(pipeline, {**Case("flux").inputs(), **arguments})
    assert not calls


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        rollout(tiny_flux(), Case("flux").inputs())


def test_weights_that_move_between_devices_are_refused():
    pipeline = tiny_flux()
    add_hook_to_module(pipeline.transformer, ModelHook())
    with pytest.raises(ValueError, match=r"transformer.*remove_all_hooks"):
        rollout(pipeline, Case("flux").inputs())


@pytest.mark.parametrize("num_steps", [1, 2])
def test_too_few_steps_are_refused(num_steps):
    pipeline = tiny_flux()
    with pytest.raises(ValueError, match="more sampling steps"):
        rollout(pipeline, Case("flux").inputs(num_steps), num_leaps=num_steps + 1)
    assert type(pipeline.scheduler).step is type(tiny_flux().scheduler).step


def test_a_pipeline_that_is_interrupted_is_an_error():
    def stop(pipeline, index, timestep, tensors):
        pipeline._interrupt = True
        return {}

    with pytest.raises(ValueError, match="FluxPipeline stopped after 1 of 5 steps"):
        rollout(Case("flux").pipeline(), {**Case("flux").inputs(), "callback_on_step_end": stop})


def test_a_discount_of_zero_is_refused_in_float16():
    case = Case("flux", dtype=torch.float16)
    pipeline = case.pipeline()
    with pytest.raises(ValueError, match="cannot be represented in float16"):
        rollout(pipeline, case.inputs(), gradient_discount=0.0)
    rollout(pipeline, case.inputs(), gradient_discount=0.3).images.float().mean().backward()
    assert all(torch.isfinite(value.grad).all() for value in trained_parameters(pipeline).values())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (None, {}, r"method must be an instance of a method, such as LeapAlign\(\), but got None"),
        ("leapalign", {}, "but got 'leapalign'"),
        (LeapAlign, {}, "but got <class"),
        (LeapAlign(), {"generator": 3}, "^generator=3 is no torch.Generator"),
        (LeapAlign(), {"generator": [seeded(1), 3]}, "^generator=3"),
        (LeapAlign(), {"method_generator": 3}, "method_generator=3 is no torch.Generator. Make one"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(method, options, message):
    with pytest.raises(TypeError, match=message):
        run_rollout(tiny_flux(), method, **{**Case("flux").inputs(), **options})


def test_latents_that_are_detached_between_the_steps_are_an_error():
    def detach(pipeline, index, timestep, tensors):
        return {"latents": tensors["latents"].detach()}

    inputs = {**Case("flux").inputs(3), "callback_on_step_end": detach}
    with pytest.raises(RuntimeError, match=r"detached the latents before step 1, .*callback_on_step_end"):
        rollout(Case("flux").pipeline(), inputs, num_leaps=3)
    assert rollout(Case("flux", trained="nothing").pipeline(), inputs, num_leaps=3).weights.shape == (2,)


@pytest.mark.parametrize("within", [False, True])
def test_a_pipeline_makes_one_rollout_at_a_time(within):
    pipeline, inputs = Case("flux").pipeline(), Case("flux").inputs(2)
    caught = []

    def again(pipe, index, timestep, tensors):
        try:
            rollout(pipe, Case("flux").inputs(2))
        except RuntimeError as error:
            caught.append(str(error))
            if not within:
                raise
        return {}

    expected = rollout(pipeline, Case("flux").inputs(2)).images
    scheduler_class = type(pipeline.scheduler)
    if within:
        assert torch.equal(rollout(pipeline, {**inputs, "callback_on_step_end": again}).images, expected)
    else:
        with pytest.raises(RuntimeError, match=r"already in a rollout. Run one at a time"):
            rollout(pipeline, {**inputs, "callback_on_step_end": again})
    assert "already in a rollout" in caught[0] and type(pipeline.scheduler) is scheduler_class
    assert torch.equal(rollout(pipeline, Case("flux").inputs(2)).images, expected)
