"""Text to image with the families that diffusers took in last."""

from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage21,
    AutoencoderTiny,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    DreamLitePipeline,
    DreamLiteUNetModel,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5GemmaModuleConfig,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from examples.tiny import VOCABULARY, frozen, tiny_t5, tiny_tokenizer, tiny_vae
from examples.tiny_edit import tiny_qwen_processor, tiny_qwen_tokenizer

from .base import PipelineCase
from .image_parts import euler, inputs, language_model, shifted_euler, tiny_flux2_vae
from .images_vlm import PARTS_OF_A_MESSAGE, tiny_qwen3_vl
from .parts import case


def prx() -> dict[str, Any]:
    return {
        "transformer": PRXTransformer2DModel(
            in_channels=4, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]
        ),
        "scheduler": euler(),
        "text_encoder": language_model(T5GemmaEncoder, T5GemmaModuleConfig, dropout_rate=0.0),
        "tokenizer": tiny_tokenizer(),
        "vae": tiny_vae(latent_channels=4),
    }


def omnigen() -> OmniGenPipeline:
    """Without torchvision, which it asks for to read images."""
    torch.manual_seed(0)
    components = {
        "transformer": OmniGenTransformer2DModel(
            in_channels=4,
            patch_size=8,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=37,
            num_layers=2,
            pad_token_id=0,
            vocab_size=len(VOCABULARY),
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=4,
            time_step_dim=16,
        ),
        "scheduler": euler(shift=1.0, invert_sigmas=True, num_train_timesteps=1),
        "vae": tiny_vae(latent_channels=4),
        "tokenizer": tiny_tokenizer(),
    }
    processor = processor_omnigen.OmniGenMultiModalProcessor
    with (
        mock.patch.object(processor_omnigen, "transforms", create=True),
        mock.patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", processor, create=True),
    ):
        return frozen(OmniGenPipeline(**components))


def qwen21() -> dict[str, Any]:
    processor = tiny_qwen_processor()
    processor.chat_template = processor.tokenizer.chat_template
    return {
        "scheduler": shifted_euler(),
        "vae": AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=4,
            dim_mult=[1] * 5,
            num_res_blocks=0,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "text_encoder": tiny_qwen3_vl(Qwen3VLForConditionalGeneration),
        "processor": processor,
        "transformer": QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    }


def glm_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(1024)
    tokenizer.chat_template = PARTS_OF_A_MESSAGE
    marks = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks.values())})
    for name, mark in marks.items():
        setattr(tokenizer, name, mark)
    return tokenizer


class TinyPreviewProcessor(GlmImageProcessor):
    """GLM-Image's processor with previews, which the language model draws first, of one token instead of 256."""

    def _get_target_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        token_height, token_width, *_ = super()._get_target_shape(height, width)
        return token_height, token_width, 1, 1


def glm_vae() -> AutoencoderKL:
    vae = tiny_vae(latent_channels=4)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return vae


def glm() -> dict[str, Any]:
    tokenizer = glm_tokenizer()
    width = {"hidden_size": 32, "intermediate_size": 37}
    return {
        "tokenizer": tiny_tokenizer(),
        "processor": TinyPreviewProcessor(GlmImageImageProcessorPil(), tokenizer, tokenizer.chat_template),
        "text_encoder": tiny_t5(),
        "vision_language_encoder": GlmImageForConditionalGeneration(
            GlmImageConfig(
                text_config={
                    **width,
                    "vocab_size": len(tokenizer),
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "pad_token_id": 0,
                    "eos_token_id": None,
                    "vision_vocab_size": 8,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
                },
                vision_config={**width, "depth": 1, "num_heads": 2, "image_size": 32},
                vq_config={"embed_dim": 8, "num_embeddings": 8, "latent_channels": 32},
                image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
            )
        ),
        "vae": glm_vae(),
        "transformer": GlmImageTransformer2DModel(
            patch_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=8,
        ),
        "scheduler": euler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    }


def dreamlite() -> dict[str, Any]:
    return {
        "text_encoder": tiny_qwen3_vl(Qwen3VLForConditionalGeneration),
        "tokenizer": tiny_qwen_tokenizer(),
        "processor": tiny_qwen_processor(),
        "vae": AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "unet": DreamLiteUNetModel(
            block_out_channels=(8, 16),
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=2,
            cross_attention_dim=16,
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj_rms",
            attention_head_dim=2,
            use_linear_projection=True,
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
            ff_mult=2,
        ),
        "scheduler": shifted_euler(),
    }


def bria_fibo2() -> dict[str, Any]:
    return {
        "transformer": BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=96,
            injection_layer_ids=(0, 1),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=4,
            gist_min_text_len=8,
            gist_max_text_len=64,
            axes_dims=(4, 6, 6),
            axes_lens=(64, 16, 16),
        ),
        "scheduler": shifted_euler(),
        "vae": tiny_flux2_vae(),
        "text_encoder": tiny_qwen3_vl(Qwen3VLModel, num_layers=36),
        "processor": tiny_qwen_processor(),
    }


TEXT = "text to image"
SIZE = {"height": 32, "width": 32}
CASES = [
    case("prx", TEXT, PRXPipeline, prx, lambda: inputs(guidance_scale=3.0, use_resolution_binning=False)),
    PipelineCase("omnigen", TEXT, omnigen, lambda: inputs(**SIZE)),
    case(
        "qwen image",
        TEXT,
        QwenImage21Pipeline,
        qwen21,
        lambda: inputs(**SIZE, true_cfg_scale=2.0, negative_prompt="a dog"),
    ),
    case("glm", TEXT, GlmImagePipeline, glm, lambda: inputs(**SIZE, guidance_scale=3.0, max_sequence_length=16)),
    case("dreamlite", TEXT, DreamLitePipeline, dreamlite, lambda: inputs(guidance_scale=3.0)),
    case("bria", TEXT, BriaFibo2Pipeline, bria_fibo2, lambda: inputs(guidance_scale=3.0, negative_prompt="a dog")),
]
