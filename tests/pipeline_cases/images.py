"""Text to image with encoders of text alone."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FluxPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)
from transformers import GlmConfig, GlmModel, UMT5Config, UMT5EncoderModel

from examples.tiny import VOCABULARY, frozen, tiny_flux, tiny_sd3, tiny_t5, tiny_tokenizer, tiny_vae

from .base import PipelineCase
from .image_parts import euler, inputs, language_model, tiny_dc, tiny_gemma2


def flux() -> FluxPipeline:
    return tiny_flux()


def sd3() -> StableDiffusion3Pipeline:
    return tiny_sd3()


def sd3_pag() -> StableDiffusion3PAGPipeline:
    parts = {name: part for name, part in tiny_sd3().components.items() if name != "image_encoder"}
    parts.pop("feature_extractor")
    return frozen(StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.0"]))


def chroma() -> ChromaPipeline:
    torch.manual_seed(0)
    return frozen(
        ChromaPipeline(
            scheduler=euler(),
            vae=tiny_vae(latent_channels=4),
            text_encoder=tiny_t5(),
            tokenizer=tiny_tokenizer(),
            transformer=ChromaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=16,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
        )
    )


def aura_flow() -> AuraFlowPipeline:
    torch.manual_seed(0)
    return frozen(
        AuraFlowPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=UMT5EncoderModel(
                UMT5Config(
                    vocab_size=len(VOCABULARY), d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=2, pad_token_id=0
                )
            ),
            vae=tiny_vae(latent_channels=4),
            transformer=AuraFlowTransformer2DModel(
                sample_size=8,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=32,
                caption_projection_dim=32,
                pos_embed_max_size=64,
            ),
            scheduler=euler(),
        )
    )


def sana_parts(**settings) -> dict:
    torch.manual_seed(0)
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_gemma2(),
        "vae": tiny_dc(),
        "transformer": SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=8,
            **settings,
        ),
    }


def flow_dpm() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def sana() -> SanaPipeline:
    return frozen(SanaPipeline(**sana_parts(), scheduler=flow_dpm()))


def sana_pag() -> SanaPAGPipeline:
    return frozen(SanaPAGPipeline(**sana_parts(), scheduler=euler()))


def sana_sprint() -> SanaSprintPipeline:
    parts = sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return frozen(SanaSprintPipeline(**parts, scheduler=SCMScheduler()))


def lumina() -> LuminaPipeline:
    torch.manual_seed(0)
    return frozen(
        LuminaPipeline(
            transformer=LuminaNextDiT2DModel(
                sample_size=4,
                hidden_size=32,
                num_layers=2,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                learn_sigma=True,
                cross_attention_dim=32,
            ),
            scheduler=euler(),
            vae=tiny_vae(latent_channels=4),
            text_encoder=tiny_gemma2(),
            tokenizer=tiny_tokenizer(),
        )
    )


def lumina2() -> Lumina2Pipeline:
    torch.manual_seed(0)
    return frozen(
        Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(
                sample_size=4,
                in_channels=4,
                hidden_size=32,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(4, 4, 8),
                axes_lens=(64, 16, 16),
                cap_feat_dim=32,
            ),
            scheduler=euler(),
            vae=tiny_vae(latent_channels=4),
            text_encoder=tiny_gemma2(),
            tokenizer=tiny_tokenizer(),
        )
    )


def cogview4() -> CogView4Pipeline:
    torch.manual_seed(0)
    return frozen(
        CogView4Pipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=language_model(GlmModel, GlmConfig),
            vae=tiny_vae(latent_channels=4),
            transformer=CogView4Transformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                text_embed_dim=32,
                time_embed_dim=16,
                condition_dim=4,
                pos_embed_max_size=16,
                sample_size=8,
                rope_axes_dim=(16, 16),
            ),
            scheduler=euler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
        )
    )


TEXT = "text to image"
SANA = {"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 16}
CHROMA = "its single blocks leave out the attention mask when they are checkpointed"
PAG = "the attention processors are put back before the backward pass runs them again"
CASES = [
    PipelineCase("flux", TEXT, flux, lambda: inputs(guidance_scale=3.5), fast=True),
    PipelineCase("sd3", TEXT, sd3, lambda: inputs(guidance_scale=4.0), fast=True),
    PipelineCase("sd3", TEXT, sd3_pag, lambda: inputs(guidance_scale=4.0, pag_scale=2.0), checkpointing=PAG),
    PipelineCase(
        "chroma", TEXT, chroma, lambda: inputs(guidance_scale=3.0, negative_prompt="a dog"), checkpointing=CHROMA
    ),
    PipelineCase("auraflow", TEXT, aura_flow, lambda: inputs(guidance_scale=3.0, max_sequence_length=16)),
    PipelineCase("sana", TEXT, sana, lambda: inputs(**SANA, num_inference_steps=3)),
    PipelineCase(
        "sana",
        TEXT,
        sana_pag,
        lambda: inputs(**SANA, pag_scale=2.0),
        checkpointing=PAG,
    ),
    PipelineCase("sana", TEXT, sana_sprint, lambda: inputs(**SANA), fast=True),
    PipelineCase("lumina", TEXT, lumina, lambda: inputs(height=64, width=64), checkpointing="the model has none"),
    PipelineCase("lumina", TEXT, lumina2, lambda: inputs(height=64, width=64, max_sequence_length=16)),
    PipelineCase("cogview", TEXT, cogview4, lambda: inputs(guidance_scale=3.0, max_sequence_length=16)),
]
