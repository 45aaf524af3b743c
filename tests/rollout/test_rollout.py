import copy
import functools
import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    UniPCMultistepScheduler,
)
from rollout_cases import Case, seeded, snapshot, trained_parameters
from torch import Tensor, nn

from trl_leapalign.media import by_sample
from trl_leapalign.methods import LeapAlign
from trl_leapalign.rollout.recorder import RolloutOutput
from trl_leapalign.rollout.run import run_rollout


def plain(pipeline: DiffusionPipeline, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    return pipeline(**inputs, output_type="pt", return_dict=False)[0]


def rollout(pipeline: DiffusionPipeline, inputs: dict[str, Any], seed: int = 0, **settings: Any) -> RolloutOutput:
    torch.manual_seed(0)
    return run_rollout(pipeline, LeapAlign(**settings), method_generator=seeded(seed), **inputs)


def check_identity(case: Case, precision: Any = None, num_steps: int = 5, **settings: Any) -> RolloutOutput:
    """Image, random states and dtype are a plain call's, and all trained parameters get finite gradients."""
    pipeline, inputs, rollout_inputs = case.pipeline(), case.inputs(num_steps), case.inputs(num_steps)
    with precision or nullcontext():
        expected = plain(pipeline, inputs)
        expected_state = torch.get_rng_state()
        output = rollout(pipeline, rollout_inputs, **settings)
    assert output.images.dtype == expected.dtype
    assert torch.equal(output.images, expected)
    assert torch.equal(torch.get_rng_state(), expected_state)
    assert torch.equal(rollout_inputs["generator"].get_state(), inputs["generator"].get_state())
    assert expected.std() > 0.01
    output.images.float().square().mean().backward()
    gradients = [value.grad for value in trained_parameters(pipeline).values() if value.grad is not None]
    assert len(gradients) > 5
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    return output


IDENTITY_SOLVERS = [
    *[("flux", name) for name in ("euler", "stochastic_euler", "unipc", "dpm", "lcm")],
    *[("sd3", name) for name in ("euler", "stochastic_euler", "inverted_euler", "unipc", "dpm", "heun", "lcm")],
]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("family", "solver"), IDENTITY_SOLVERS)
def test_images_are_those_of_the_pipeline(family, solver, guided):
    check_identity(Case(family, solver, guided=guided))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_precision_and_checkpointing_keep_the_image(family, dtype, trained, checkpointing):
    check_identity(Case(family, trained=trained, dtype=dtype, checkpointing=checkpointing))


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_autocast_keeps_the_image(family, trained):
    check_identity(Case(family, trained=trained), precision=torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("family", "solver"), [("flux", "euler"), ("flux", "lcm"), ("sd3", "euler"), ("sd3", "heun"), ("sd3", "lcm")]
)
def test_image_to_image_keeps_the_image(family, solver, guided):
    check_identity(Case(family, solver, guided=guided, from_image=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_discount": 0.0},
        {"num_leaps": 1},
        {"num_leaps": 5},
        {"step_choice": "fixed_distance"},
        {"similarity": "none"},
        {"nested_gradient_only": True},
    ],
    ids=str,
)
def test_every_setting_that_rewards_the_sample_keeps_the_image(settings):
    check_identity(Case("flux", "unipc"), **settings)


def test_one_generator_a_sample_keeps_the_image():
    pipeline, inputs = Case("sd3").pipeline(), Case("sd3").inputs()
    generators = [[seeded(1), seeded(2)] for _ in range(2)]
    expected = plain(pipeline, {**inputs, "generator": generators[0]})
    output = rollout(pipeline, {**inputs, "generator": generators[1]})
    assert torch.equal(output.images, expected)
    pipeline.to(torch.float64)
    expected = plain(pipeline, {**inputs, "generator": [seeded(1), seeded(2)]})
    alone = plain(pipeline, {**inputs, "prompt": inputs["prompt"][1:], "generator": [seeded(2)]})
    torch.testing.assert_close(alone, expected[1:], rtol=0, atol=1e-6)  # the solver rounds to float32


def test_dropout_is_off_in_training_mode():
    pipeline, inputs = Case("flux").pipeline(), Case("flux").inputs()
    expected = plain(pipeline, inputs)
    pipeline.transformer.train()
    assert not torch.equal(plain(pipeline, Case("flux").inputs()), expected), "the adapter of this test drops out"
    output = rollout(pipeline, Case("flux").inputs())
    assert torch.equal(output.images, expected)
    assert all(module.training for module in pipeline.transformer.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_gradients_do_not_depend_on_the_callers_mode(context):
    pipeline = Case("flux").pipeline()
    with context():
        before = torch.is_grad_enabled()
        output = rollout(pipeline, Case("flux").inputs())
        assert torch.is_grad_enabled() == before
    assert output.images.requires_grad


def denoiser_modes(pipeline: DiffusionPipeline, call) -> list[bool]:
    """Gradient mode of every denoiser call."""
    modes: list[bool] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: modes.append(torch.is_grad_enabled()))
    call()
    hook.remove()
    return modes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "case",
    [
        Case("flux", guided=True),
        Case("flux", trained="full", from_image=True),
        Case("sd3", "unipc", guided=True, checkpointing=True),
        Case("sd3", "heun"),
        Case("sd3", from_image=True),
    ],
    ids=str,
)
def test_only_the_active_steps_run_with_gradients(case, seed):
    pipeline = case.pipeline()
    outputs: list[RolloutOutput] = []
    plain_calls = len(denoiser_modes(pipeline, lambda: plain(pipeline, case.inputs())))
    modes = denoiser_modes(pipeline, lambda: outputs.append(rollout(pipeline, case.inputs(), seed)))
    assert len(modes) == plain_calls
    calls_per_step = 2 if case.family == "flux" and case.guided else 1
    active = {step for step in range(len(modes) // calls_per_step) if modes[step * calls_per_step]}
    assert active == set(outputs[0].active_steps)
    assert len(active) == 2
    assert modes == [index // calls_per_step in active for index in range(len(modes))]


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_only_trained_parameters_get_gradients(trained):
    pipeline = Case("sd3", trained=trained).pipeline()
    rollout(pipeline, Case("sd3").inputs()).images.mean().backward()
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    with_gradient = {id(value) for module in modules for value in module.parameters() if value.grad is not None}
    assert with_gradient
    assert with_gradient <= {id(value) for value in trained_parameters(pipeline).values()}


def test_the_graph_holds_the_active_steps_alone():
    """Parameters' graph leaves are reached through as many denoiser calls as there are active steps."""
    pipeline = Case("flux", trained="full").pipeline()
    output = rollout(pipeline, Case("flux").inputs(), num_leaps=3)
    seen, stack, leaf_uses = set(), [output.images.grad_fn], 0
    bias = pipeline.transformer.proj_out.bias
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for child, _ in node.next_functions:
            leaf_uses += getattr(child, "variable", None) is bias
            stack.append(child)
    assert leaf_uses == 3


class Interrupted(Exception):
    pass


def interrupt_at(step: int):
    def callback(pipeline, index, timestep, tensors):
        if index == step:
            raise Interrupted
        return {}

    return callback


def trained_in_part(case: Case) -> DiffusionPipeline:
    """A pipeline with mixed training flags and a progress bar, after a plain call."""
    pipeline = case.pipeline()
    pipeline.set_progress_bar_config(leave=False, disable=True)
    pipeline.transformer.train()
    pipeline.vae.decoder.train()
    plain(pipeline, case.inputs())
    return pipeline


@pytest.mark.parametrize("case", [Case("flux", "unipc"), Case("sd3", "heun"), Case("flux", from_image=True)], ids=str)
def test_a_rollout_leaves_the_pipeline_as_a_plain_call_does(case):
    pipeline = trained_in_part(case)
    before = snapshot(pipeline)
    rollout(pipeline, case.inputs())
    after = snapshot(pipeline)
    assert after.pop("attributes").keys() == before.pop("attributes").keys()
    assert after == before
    pipeline.transformer.eval()
    pipeline.vae.eval()
    assert torch.equal(plain(pipeline, case.inputs()), plain(case.pipeline(), case.inputs()))


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_an_exception_in_the_middle_leaves_nothing_behind(family, step):
    case = Case(family, "unipc")
    pipeline = trained_in_part(case)
    before = snapshot(pipeline)
    with pytest.raises(Interrupted):
        rollout(pipeline, {**case.inputs(), "callback_on_step_end": interrupt_at(step)})
    after = snapshot(pipeline)
    assert after.pop("attributes").keys() == before.pop("attributes").keys()
    assert after == before
    pipeline.transformer.eval()
    pipeline.vae.eval()
    assert torch.equal(plain(pipeline, case.inputs()), plain(case.pipeline(), case.inputs()))
    assert rollout(pipeline, case.inputs()).images.requires_grad


def test_other_pipelines_of_the_process_are_left_alone():
    case = Case("flux")
    pipeline, other = case.pipeline(), case.pipeline()
    original = type(other.scheduler)

    def look(running, index, timestep, tensors):
        assert "step" in vars(running.scheduler) and type(running.scheduler) is original
        assert "step" not in vars(other.scheduler)
        assert plain(other, case.inputs()).grad_fn is None
        return {}

    output = rollout(pipeline, {**case.inputs(), "callback_on_step_end": look})
    assert type(pipeline.scheduler) is original
    assert output.images.requires_grad


class SampledByACopy(FluxPipeline):
    """Deep-copies its scheduler for the call, as audio-video pipelines do."""

    @torch.no_grad()
    @functools.wraps(inspect.unwrap(FluxPipeline.__call__))
    def __call__(self, *args, **kwargs):
        kept = self.scheduler
        self.scheduler = self.used = copy.deepcopy(kept)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.scheduler = kept


def test_copies_of_the_scheduler_are_followed_and_put_back():
    case = Case("flux", "unipc")
    source = case.pipeline()
    pipeline = SampledByACopy(**source.components)
    pipeline.set_progress_bar_config(disable=True)
    output = rollout(pipeline, case.inputs())
    assert torch.equal(output.images, plain(source, case.inputs()))
    assert output.images.requires_grad
    assert type(pipeline.used) is UniPCMultistepScheduler
    assert pipeline.used is not pipeline.scheduler


class StartsLaterWithoutSayingSo(StableDiffusion3Img2ImgPipeline):
    """Enters its schedule in the middle without set_begin_index, as WanVideoToVideo does."""

    def get_timesteps(self, num_inference_steps, strength, device):
        start = num_inference_steps - round(num_inference_steps * strength)
        return self.scheduler.timesteps[start * self.scheduler.order :], num_inference_steps - start


@pytest.mark.parametrize("solver", ["euler", "lcm"])
@pytest.mark.parametrize("seed", range(3))
def test_a_pipeline_that_starts_later_without_saying_so(solver, seed):
    case = Case("sd3", solver, from_image=True)
    source = case.pipeline()
    components = {name: part for name, part in source.components.items() if part is not None}
    pipeline = StartsLaterWithoutSayingSo(**components)
    pipeline.set_progress_bar_config(disable=True)
    expected = plain(pipeline, case.inputs())
    expected_state = torch.get_rng_state()
    assert torch.equal(expected, plain(source, case.inputs()))
    said = rollout(source, case.inputs(), seed)
    said.images.sum().backward()
    gradients = {name: value.grad.clone() for name, value in trained_parameters(source).items()}
    source.transformer.zero_grad()
    outputs: list[RolloutOutput] = []
    modes = denoiser_modes(pipeline, lambda: outputs.append(rollout(pipeline, case.inputs(), seed)))
    assert torch.equal(torch.get_rng_state(), expected_state)
    assert torch.equal(outputs[0].images, expected)
    assert outputs[0].active_steps == said.active_steps
    assert modes[-3:] == [step in said.active_steps for step in range(3)]
    outputs[0].images.sum().backward()
    assert all(torch.equal(value.grad, gradients[name]) for name, value in trained_parameters(pipeline).items())
    for name, value in said.metrics.items():
        assert torch.equal(outputs[0].metrics[name], value)


class TwoLoops(StartsLaterWithoutSayingSo):
    """Runs two loops that begin at different steps, neither of which says so."""

    @torch.no_grad()
    @functools.wraps(inspect.unwrap(StableDiffusion3Img2ImgPipeline.__call__))
    def __call__(self, *args, strength=0.6, **kwargs):
        super().__call__(*args, strength=strength, **kwargs)
        return super().__call__(*args, strength=1.0, **kwargs)


def test_loops_that_begin_at_different_steps_are_refused():
    case = Case("sd3", from_image=True)
    components = {name: part for name, part in case.pipeline().components.items() if part is not None}
    pipeline = TwoLoops(**components)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"TwoLoops runs several sampling loops.*set_begin_index"):
        rollout(pipeline, case.inputs())


class DecoratedHelpers(FluxPipeline):
    """Has helpers of its own without gradient, one of them between denoiser and output."""

    @staticmethod
    @torch.no_grad()
    def _unpack_latents(latents, height, width, vae_scale_factor):
        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor)

    @torch.inference_mode()
    def check_inputs(self, *args, **kwargs):
        return super().check_inputs(*args, **kwargs)


def test_helpers_without_gradient_record_it_for_the_time_of_the_run():
    case = Case("flux")
    pipeline = DecoratedHelpers(**case.pipeline().components)
    output = rollout(pipeline, case.inputs())
    assert output.images.requires_grad
    assert torch.equal(output.images, plain(case.pipeline(), case.inputs()))
    assert not {"_unpack_latents", "check_inputs", "_progress_bar_config"} & vars(pipeline).keys()
    assert not plain(pipeline, case.inputs()).requires_grad


def test_no_method_generator_draws_fresh_steps_and_leaves_the_global_one_alone():
    case = Case("sd3")
    pipeline = case.pipeline()
    drawn = set()
    for _ in range(8):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        drawn.add(run_rollout(pipeline, LeapAlign(), **case.inputs(6)).active_steps)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(drawn) > 1


def test_latents_are_returned_on_request():
    case = Case("sd3")
    pipeline = case.pipeline()
    torch.manual_seed(0)
    expected = pipeline(**case.inputs(), output_type="latent", return_dict=False)[0]
    output = rollout(pipeline, {**case.inputs(), "output_type": "latent"})
    assert torch.equal(output.images, expected)
    assert output.weights.shape == (2,)


def test_a_pipeline_without_trained_parameters_runs_without_graph():
    pipeline = Case("flux", trained="nothing").pipeline()
    output = rollout(pipeline, Case("flux").inputs())
    assert torch.equal(output.images, plain(pipeline, Case("flux").inputs()))
    assert not output.images.requires_grad


class ListsItsSamples(FluxPipeline):
    """Returns a list of tensors, one a sample, as pipelines that divide an image into layers do."""

    @torch.no_grad()
    @functools.wraps(inspect.unwrap(FluxPipeline.__call__))
    def __call__(self, *args, **kwargs):
        [images] = inspect.unwrap(FluxPipeline.__call__)(self, *args, **kwargs)
        return (list(images),)


def test_a_list_of_samples_is_joined():
    source = Case("flux").pipeline()
    pipeline = ListsItsSamples(**source.components)
    pipeline.set_progress_bar_config(disable=True)
    output = rollout(pipeline, Case("flux").inputs())
    assert output.images.requires_grad
    assert torch.equal(output.images, plain(source, Case("flux").inputs()))


class ReadsAFlagItNeverSets(AutoencoderKL):
    def decode(self, *args, **kwargs):
        assert not (torch.is_grad_enabled() and self.gradient_checkpointing)
        return super().decode(*args, **kwargs)


def test_a_model_may_lack_the_flag_of_gradient_checkpointing():
    pipeline = Case("flux").pipeline()
    expected = plain(pipeline, Case("flux").inputs())
    pipeline.vae.__class__ = ReadsAFlagItNeverSets
    output = rollout(pipeline, Case("flux").inputs())
    assert torch.equal(output.images, expected)
    assert output.images.requires_grad
    assert not hasattr(pipeline.vae, "gradient_checkpointing")


class Detaching(FluxPipeline):
    @staticmethod
    def _unpack_latents(latents, height, width, vae_scale_factor):
        return FluxPipeline._unpack_latents(latents.detach(), height, width, vae_scale_factor)


def test_an_output_that_lost_its_gradient_is_an_error():
    pipeline = Detaching(**Case("flux").pipeline().components)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="Detaching carries no gradient"):
        rollout(pipeline, Case("flux").inputs())
    with pytest.raises(RuntimeError, match="carries no gradient"):
        frozen = Case("flux", trained="nothing").pipeline()
        frozen.text_encoder.requires_grad_(True)
        rollout(frozen, Case("flux").inputs())


def test_the_samples_that_a_pipeline_returned_are_counted():
    image, video = torch.zeros(3, 4, 4), torch.zeros(5, 3, 4, 4)
    assert by_sample([image, image + 1], 2, "P").shape == (2, 3, 4, 4)
    assert by_sample(video, 1, "P").shape == (1, 5, 3, 4, 4) and by_sample(video, 5, "P") is video
    assert by_sample("path", 1, "P") == "path"
    for output, what in (([image, image], "a list of 2"), (video[None].expand(2, -1, -1, -1, -1), r"shape \(2, 5, 3")):
        with pytest.raises(ValueError, match=f"P returned {what}.* for 1 samples. Set a batch size of 1"):
            by_sample(output, 1, "P")
    with pytest.raises(ValueError, match="size"):
        by_sample([image, image[:, 1:]], 2, "P")
