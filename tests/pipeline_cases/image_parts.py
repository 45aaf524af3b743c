"""Parts that several tiny image pipelines have in common."""

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from transformers import (
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples.tiny import VOCABULARY, tiny_tokenizer

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def inputs(**arguments: Any) -> dict[str, Any]:
    """Arguments of a call: a small image in two steps, and what a pipeline takes beside."""
    generator = torch.Generator().manual_seed(1)
    size = {"height": 16, "width": 16}
    return {"prompt": "a red circle", "num_inference_steps": 2, "generator": generator, **size, **arguments}


def euler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})


def shifted_euler() -> FlowMatchEulerDiscreteScheduler:
    return euler(use_dynamic_shifting=True)


def chat_tokenizer(max_length: int = 16) -> PreTrainedTokenizerFast:
    """A tokenizer with the plainest template of a chat."""
    tokenizer = tiny_tokenizer(max_length)
    tokenizer.chat_template = CHAT
    return tokenizer


def language_model(model: type[PreTrainedModel], config: type, **settings: Any) -> PreTrainedModel:
    """A decoder-only language model of width 32."""
    return model(
        config(
            **{
                "vocab_size": len(VOCABULARY),
                "hidden_size": 32,
                "intermediate_size": 37,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "pad_token_id": 0,
                "bos_token_id": 2,
                "eos_token_id": 3,
                **settings,
            }
        )
    )


def tiny_gemma2() -> Gemma2Model:
    return language_model(Gemma2Model, Gemma2Config)


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    return language_model(LlamaForCausalLM, LlamaConfig, **settings)


def tiny_qwen3(**settings: Any) -> Qwen3ForCausalLM:
    return language_model(Qwen3ForCausalLM, Qwen3Config, **settings)


def tiny_dc() -> AutoencoderDC:
    """A deep-compression autoencoder that divides height and width by two."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )


def tiny_flux2_vae() -> AutoencoderKLFlux2:
    """A VAE with four channels that halves height and width; its latents are packed by patches of two."""
    return AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
