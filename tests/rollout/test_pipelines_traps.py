"""What pipelines do that would make gradients wrong or fail, on pipelines that do it."""

import functools
import inspect

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.hooks import apply_group_offloading
from pipeline_cases import CASES
from pipeline_cases.images_more import z_image
from pipeline_cases.laboratory import EveryStep
from pipeline_cases.laboratory import make_trainer as make_case_trainer
from rollout_cases import Case, add_lora, seeded, trained_parameters
from training_cases import make_trainer

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign.methods import DRaFT, DRaFTLV, DRTune, FlowBPBridge, FlowBPSparse, LeapAlign, Method
from trl_leapalign.rewards import VideoReward
from trl_leapalign.rollout.rollout_model import RolloutModel
from trl_leapalign.rollout.run import run_rollout


class TwoSegments(StableDiffusion3Pipeline):
    """Samples twice; the second segment starts from the first one's latents, with noise on them."""

    @torch.no_grad()
    @functools.wraps(inspect.unwrap(StableDiffusion3Pipeline.__call__))
    def __call__(self, *args, output_type="pt", generator=None, **kwargs):
        arguments = {**kwargs, "generator": generator, "return_dict": False}
        first = super().__call__(*args, **arguments, output_type="latent")[0]
        noise = torch.randn(first.shape, generator=generator, dtype=first.dtype)
        return super().__call__(*args, **arguments, output_type=output_type, latents=0.5 * first + noise)


def two_segments(dtype: torch.dtype = torch.float32) -> TwoSegments:
    parts = Case("sd3").pipeline().components
    pipeline = TwoSegments(**parts).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gradients(pipeline: DiffusionPipeline, method: Method) -> dict[str, torch.Tensor]:
    output = run_rollout(pipeline, method, method_generator=seeded(0), **Case("sd3").inputs(3))
    trained = trained_parameters(pipeline)
    found = torch.autograd.grad(output.images.square().sum(), list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def test_gradients_go_through_all_segments():
    pipeline = two_segments(torch.float64)
    leaps, solver = gradients(pipeline, EveryStep()), gradients(pipeline, DRaFT(num_last_steps=None))
    assert leaps.keys() == solver.keys() and len(leaps) > 10
    for name, gradient in leaps.items():  # Euler's solver rounds to float32
        assert (gradient - solver[name]).norm() < 1e-5 * solver[name].norm()


def test_segments_of_equally_many_steps_take_the_same_ones():
    pipeline, modes = two_segments(), []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: modes.append(torch.is_grad_enabled()))
    generator = seeded(0)
    output = run_rollout(pipeline, LeapAlign(), method_generator=generator, **Case("sd3").inputs(6))
    assert len(modes) == 12 and len(output.latents) == 2
    assert [step for step in range(6) if modes[step]] == list(output.active_steps)
    assert [step for step in range(6) if modes[6 + step]] == list(output.active_steps)
    alone = seeded(0)
    run_rollout(Case("sd3").pipeline(), LeapAlign(), method_generator=alone, **Case("sd3").inputs(6))
    assert torch.equal(generator.get_state(), alone.get_state())


class Repeated(StableDiffusion3Pipeline):
    """Samples the same once or more often, and returns the last."""

    num_loops = 1

    @torch.no_grad()
    @functools.wraps(inspect.unwrap(StableDiffusion3Pipeline.__call__))
    def __call__(self, *args, generator=None, **kwargs):
        noise = torch.randn(2, 4, 8, 8, generator=generator, dtype=self.transformer.dtype)
        for _ in range(self.num_loops):
            output = super().__call__(*args, **kwargs, latents=noise)
        return output


def test_the_first_step_of_a_later_loop_was_given_latents_that_were_not_scaled():
    """DRTune scales by 2^-60 what its solver gives the denoiser and takes it off again; not what pipelines give."""
    pipeline, first_steps = two_segments(), set()
    trained = list(trained_parameters(pipeline).values())

    def norm(method: Method, seed: int) -> float:
        output = run_rollout(pipeline, method, method_generator=seeded(seed), **Case("sd3").inputs(4))
        first_steps.add(output.active_steps[0] == 0)
        found = torch.autograd.grad(output.images.square().sum(), trained, allow_unused=True)
        return sum(each.norm().item() for each in found if each is not None)

    whole = norm(DRaFT(num_last_steps=None), 0)
    assert max(norm(DRTune(), seed) for seed in range(6)) < 10 * whole
    assert first_steps == {True, False}


@pytest.mark.parametrize(
    "method", [FlowBPSparse(num_active_steps=1), FlowBPBridge(num_active_steps=3), DRTune(), LeapAlign()]
)
def test_a_loop_after_another_has_the_gradient_that_it_has_alone(method):
    pipeline = Repeated(**Case("sd3").pipeline().components).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    trained = trained_parameters(pipeline)
    images, gradients = [], []
    for pipeline.num_loops in (1, 2):
        output = run_rollout(pipeline, method, method_generator=seeded(2), **Case("sd3").inputs(5))
        assert 0 not in output.active_steps
        images.append(output.images.detach())
        gradients.append(torch.autograd.grad(output.images.square().sum(), list(trained.values()), allow_unused=True))
    assert torch.equal(*images)
    for once, twice in zip(*gradients, strict=True):
        assert (once is None and twice is None) or (twice - once).norm() <= 1e-12 * once.norm()
    assert any(once is not None and once.any() for once in gradients[0])


def test_copies_of_several_loops_are_refused():
    pipeline = Repeated(**Case("sd3").pipeline().components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.num_loops = 2
    with pytest.raises(ValueError, match="a schedule after a sampling loop, and DRaFTLV repeats the last step of one"):
        run_rollout(pipeline, DRaFTLV(), method_generator=seeded(0), **Case("sd3").inputs(3))


def test_group_offloading_is_refused():
    pipeline = tiny_sd3()
    apply_group_offloading(pipeline.transformer, onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match=r"moves weights between devices.*transformer.*group offloading"):
        run_rollout(pipeline, LeapAlign(), **Case("sd3").inputs())


def test_lists_of_prompts_are_not_written_into():
    """The pipeline puts its chat template into the list that it is given."""
    pipeline = z_image()
    add_lora(pipeline.transformer)
    model = RolloutModel(
        pipeline,
        {"transformer": pipeline.transformer},
        LeapAlign(),
        {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 16, "guidance_scale": 1.0},
        seed=0,
        draw_group_size=1,
    )
    prompts = ["a red circle", "a cat"]
    model(prompts, [0, 1])
    assert prompts == ["a red circle", "a cat"]


def write_into_the_latents_before() -> object:
    """A callback that overwrites what the denoiser was given, which its backward pass needs."""
    given = []

    def callback(pipeline, step, timestep, tensors):
        if given:
            given.pop().zero_()
        given.append(tensors["latents"])
        return {}

    return callback


def test_a_pipeline_that_writes_into_saved_tensors_is_trained_with_copies(tmp_path):
    settings = {"full_finetuning": True, "sample_guidance_scale": 1.0, "dry_run": True, "learning_rate": 1e-4}
    kwargs = {"callback_on_step_end": write_into_the_latents_before()}
    trainer = make_trainer(tmp_path, tiny_sd3(), sample_kwargs=kwargs, **settings)
    assert trainer.rollout_model.copies_saved_tensors
    trainer.train()
    expected = make_trainer(tmp_path, tiny_sd3(), **settings)
    assert not expected.rollout_model.copies_saved_tensors
    expected.train()
    for name, value in trained_parameters(trainer.pipeline).items():
        torch.testing.assert_close(value, trained_parameters(expected.pipeline)[name], rtol=0, atol=1e-7)


def test_a_block_that_computes_something_else_again_is_refused(tmp_path):
    pipeline = tiny_flux()
    calls = []

    def drift(module, args, output):
        calls.append(module)
        return tuple(value * (1 + 0.1 * len(calls)) for value in output)

    hook = pipeline.transformer.transformer_blocks[0].register_forward_hook(drift)
    with pytest.raises(RuntimeError, match=r"Gradient checkpointing .*Set activation_checkpointing=False"):
        make_trainer(tmp_path, pipeline, activation_checkpointing=True, dry_run=True)
    hook.remove()
    make_trainer(tmp_path, pipeline, activation_checkpointing=True, dry_run=True)


def test_the_video_of_a_pipeline_for_one_prompt_at_a_time_is_one_sample(tmp_path):
    """The pipeline returns the frames without a batch axis, and of a list of prompts it takes the first alone."""
    [case] = [case for case in CASES if str(case) == "Cosmos3OmniPipeline"]
    shapes = []

    def reward(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        shapes.append(images.shape)
        return images.mean((1, 2, 3))

    trainer = make_case_trainer(case, case.build(), tmp_path, VideoReward(reward))
    trainer.train()
    model = trainer.rollout_model
    frames = case.build()(**case.inputs(), output_type="pt", return_dict=False)[0]
    assert {shape[1:] for shape in shapes} == {frames.shape[1:]}
    assert model(["a cat"], [0]).images.shape == (1, *frames.shape)
    assert model.sample(["a cat"], [0]).shape == (1, *frames.shape)
    for call in (model, model.sample):
        with pytest.raises(ValueError, match=r"Cosmos3OmniPipeline returned shape .* for 2 samples.*batch size of 1"):
            call(["a cat", "a dog"], [0, 1])
