"""SanaSprint, which samples with SCMScheduler: TrigFlow times, and an output made of the step's second result."""

import math

import pytest
import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from double_precision import double_precision, widen
from rollout_cases import ChosenSteps, enliven, seeded
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from examples.tiny import tiny_tokenizer
from trl_leapalign.methods import LeapAlign
from trl_leapalign.rollout.run import run_rollout

STEPS = {2: (1.57080, 1.3, 0.0), 4: (1.57080, 1.17810, 0.78540, 0.39270, 0.0)}
SIGMA_DATA = 0.5


def tiny_sana_sprint() -> SanaSprintPipeline:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    pipeline = SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text_config),
        scheduler=SCMScheduler(),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=8,
            guidance_embeds=True,
            qk_norm="rms_norm_across_heads",
        ),
    )
    for part in (pipeline.text_encoder, pipeline.vae):
        part.eval().requires_grad_(False)
    pipeline.transformer.eval()
    enliven(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs(num_steps: int):
    return {
        "prompt": ["a red circle", "two dogs"],
        "num_inference_steps": num_steps,
        "intermediate_timesteps": 1.3 if num_steps == 2 else None,
        "height": 32,
        "width": 32,
        "generator": seeded(1),
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "max_sequence_length": 16,
    }


@pytest.mark.parametrize("num_steps", [2, 4])
def test_images_are_those_of_the_pipeline(num_steps):
    pipeline = tiny_sana_sprint()
    expected = pipeline(**inputs(num_steps), output_type="pt").images
    output = run_rollout(pipeline, LeapAlign(), method_generator=seeded(0), **inputs(num_steps))
    assert torch.equal(output.images, expected)
    output.images.sum().backward()
    assert any(value.grad is not None and value.grad.abs().max() > 0 for value in pipeline.transformer.parameters())


def formula(pipeline: SanaSprintPipeline, num_steps: int, method: ChosenSteps) -> Tensor:
    """The clean latents with LeapAlign's graph: leaps rotate (data, noise) by the angle between two times."""
    calls: list[tuple[Tensor, dict]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0].clone(), dict(kwargs))), with_kwargs=True
    )
    end = SIGMA_DATA * pipeline(**inputs(num_steps), output_type="latent").images
    hook.remove()
    times = STEPS[num_steps]
    assert torch.allclose(pipeline.scheduler.timesteps, torch.tensor(times), atol=1e-5)

    def ratio(step: int) -> tuple[Tensor, Tensor]:
        share = calls[step][1]["timestep"].view(-1, 1, 1, 1)
        return share, torch.sqrt(share**2 + (1 - share) ** 2)

    def velocity(step: int, latents: Tensor) -> Tensor:
        share, norm = ratio(step)
        scaled = latents / SIGMA_DATA * norm
        predicted = pipeline.transformer(scaled, **calls[step][1])[0]
        mixed = (1 - 2 * share) * scaled + (1 - 2 * share + 2 * share**2) * predicted
        return SIGMA_DATA * mixed / norm

    real = [SIGMA_DATA * latents / ratio(step)[1] for step, (latents, _) in enumerate(calls)] + [end]
    joint, alpha = real[method.steps[0]], method.gradient_discount
    for here, there in zip(method.steps, (*method.steps[1:], num_steps), strict=True):
        v = velocity(here, alpha * joint + (1 - alpha) * joint.detach())
        data = math.cos(times[here]) * joint - math.sin(times[here]) * v
        noise = math.sin(times[here]) * joint + math.cos(times[here]) * v
        leaped = math.cos(times[there]) * data + math.sin(times[there]) * noise
        joint = leaped + (real[there] - leaped).detach()
    return joint


def gradient(pipeline: SanaSprintPipeline, output: Tensor) -> Tensor:
    pipeline.transformer.zero_grad()
    (output * torch.randn(output.shape, generator=seeded(4))).sum().backward()
    return torch.cat([value.grad.flatten() for value in pipeline.transformer.parameters() if value.grad is not None])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_steps", "steps"), [(2, (0, 1)), (2, (1,)), (4, (0, 2)), (4, (1, 2, 3))])
def test_gradients_are_the_formulas(num_steps, steps, alpha):
    """In float64: the pipeline itself would cast the velocity to float32."""
    method = ChosenSteps(steps=steps, num_leaps=len(steps), gradient_discount=alpha)
    with double_precision():
        pipeline = tiny_sana_sprint()
        widen(pipeline.transformer)
        widen(pipeline.text_encoder)
        expected = gradient(pipeline, formula(pipeline, num_steps, method))
        output = run_rollout(pipeline, method, **inputs(num_steps), output_type="latent")
        got = gradient(pipeline, SIGMA_DATA * output.images)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-6  # the schedule's times are float32
