"""Text to image with encoders that read images too."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    QwenImagePipeline,
)
from transformers import (
    ByT5Tokenizer,
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from examples.tiny import VOCABULARY, frozen, tiny_clip_config, tiny_tokenizer, tiny_vae
from examples.tiny_edit import (
    tiny_qwen_processor,
    tiny_qwen_tokenizer,
    tiny_qwen_transformer,
    tiny_qwen_vae,
    tiny_qwen_vl,
)

from .base import PipelineCase
from .image_parts import euler, inputs, shifted_euler, tiny_flux2_vae
from .parts import case

PARTS_OF_A_MESSAGE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{% endif %} {% endfor %}"
)
TEXT_SIDE = {
    "vocab_size": len(VOCABULARY) + 6,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def messages_tokenizer(max_length: int = 1024) -> PreTrainedTokenizerFast:
    """A tokenizer for chats whose messages are lists of parts."""
    tokenizer = tiny_tokenizer(max_length)
    tokenizer.chat_template = PARTS_OF_A_MESSAGE
    return tokenizer


def tiny_qwen3_vl(model: type[PreTrainedModel], num_layers: int = 2) -> PreTrainedModel:
    """A Qwen3-VL of width 32."""
    return model(
        Qwen3VLConfig(
            text_config={
                **TEXT_SIDE,
                "num_hidden_layers": num_layers,
                "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e6},
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 37,
                "num_heads": 2,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        )
    )


def tiny_mistral3(model: type[PreTrainedModel]) -> PreTrainedModel:
    """A Mistral 3 of width 32."""
    return model(
        Mistral3Config(
            text_config={"model_type": "mistral", **TEXT_SIDE},
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 37,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        )
    )


def qwen_image() -> dict[str, Any]:
    return {
        "scheduler": shifted_euler(),
        "vae": tiny_qwen_vae(),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": tiny_qwen_tokenizer(),
        "transformer": tiny_qwen_transformer(),
    }


def kandinsky5_parts(**settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    clip = tiny_clip_config()
    clip.max_position_embeddings = 77
    return {
        "transformer": Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=32,
            in_text_dim2=32,
            time_dim=16,
            model_dim=32,
            ff_dim=37,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            **settings,
        ),
        "vae": tiny_vae(latent_channels=4),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": tiny_qwen_processor(),
        "text_encoder_2": CLIPTextModel(clip),
        "tokenizer_2": tiny_tokenizer(),
        "scheduler": euler(),
    }


def kandinsky5() -> Kandinsky5T2IPipeline:
    pipeline = frozen(Kandinsky5T2IPipeline(**kandinsky5_parts()))
    pipeline.resolutions = [(32, 32)]
    return pipeline


def longcat() -> dict[str, Any]:
    return {
        "scheduler": shifted_euler(),
        "vae": tiny_vae(latent_channels=16),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": tiny_qwen_tokenizer(),
        "text_processor": tiny_qwen_processor(),
        "transformer": LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
    }


def krea2() -> dict[str, Any]:
    return {
        "scheduler": shifted_euler(),
        "vae": tiny_qwen_vae(),
        "text_encoder": tiny_qwen3_vl(Qwen3VLModel),
        "tokenizer": tiny_qwen_tokenizer(),
        "transformer": Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=37,
            timestep_embed_dim=16,
            text_hidden_dim=32,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=37,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        "text_encoder_select_layers": (1, 2),
    }


def ernie() -> dict[str, Any]:
    return {
        "transformer": ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=37,
            in_channels=16,
            out_channels=16,
            text_in_dim=32,
            rope_axes_dim=(4, 6, 6),
        ),
        "vae": tiny_flux2_vae(),
        "text_encoder": tiny_mistral3(Mistral3Model),
        "tokenizer": tiny_tokenizer(),
        "scheduler": euler(),
    }


def flux2() -> dict[str, Any]:
    return {
        "scheduler": shifted_euler(),
        "vae": tiny_flux2_vae(),
        "text_encoder": tiny_mistral3(Mistral3ForConditionalGeneration),
        "tokenizer": messages_tokenizer(),
        "transformer": Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=96,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
    }


def hunyuan() -> dict[str, Any]:
    tokenizer_2 = ByT5Tokenizer()
    return {
        "scheduler": euler(),
        "vae": AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=16,
            scaling_factor=0.5,
        ),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": tiny_qwen_tokenizer(),
        "text_encoder_2": T5EncoderModel(
            T5Config(vocab_size=len(tokenizer_2), d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=1)
        ),
        "tokenizer_2": tokenizer_2,
        "transformer": HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=32,
            rope_axes_dim=(4, 4),
        ),
    }


def ideogram() -> dict[str, Any]:
    def transformer() -> Ideogram4Transformer2DModel:
        return Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=37,
            adaln_dim=16,
            llm_features_dim=32 * 13,
            mrope_section=(4, 2, 2),
        )

    return {
        "scheduler": euler(),
        "vae": tiny_flux2_vae(),
        "text_encoder": tiny_qwen3_vl(Qwen3VLModel, num_layers=36),
        "tokenizer": messages_tokenizer(),
        "transformer": transformer(),
        "unconditional_transformer": transformer(),
    }


def nucleus() -> dict[str, Any]:
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
        moe_enabled=True,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=[2.0, 2.0],
    )
    for name, parameter in transformer.named_parameters():
        if "experts" in name:  # which the class leaves uninitialised
            torch.nn.init.normal_(parameter, std=0.1)
    return {
        "transformer": transformer,
        "scheduler": shifted_euler(),
        "vae": tiny_qwen_vae(),
        "text_encoder": tiny_qwen3_vl(Qwen3VLForConditionalGeneration),
        "processor": messages_tokenizer(),
    }


TEXT = "text to image"
SHORT = {"max_sequence_length": 16}
MASK = "it checkpoints blocks with arguments that are passed by name, which fails"
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "a dog"}
CASES = [
    case(
        "qwen image",
        TEXT,
        QwenImagePipeline,
        qwen_image,
        lambda: inputs(true_cfg_scale=2.0, negative_prompt="a dog", **SHORT),
        fast=True,
    ),
    PipelineCase(
        "kandinsky 5",
        TEXT,
        kandinsky5,
        lambda: inputs(height=32, width=32, **GUIDED, **SHORT),
    ),
    case("longcat", TEXT, LongCatImagePipeline, longcat, lambda: inputs(**GUIDED, enable_prompt_rewrite=False)),
    case("krea", TEXT, Krea2Pipeline, krea2, lambda: inputs(**GUIDED, **SHORT)),
    case("ernie", TEXT, ErnieImagePipeline, ernie, lambda: inputs(**GUIDED, use_pe=False)),
    case("flux2", TEXT, Flux2Pipeline, flux2, lambda: inputs(text_encoder_out_layers=(0, 1, 2), **SHORT)),
    case(
        "hunyuan image",
        TEXT,
        HunyuanImagePipeline,
        hunyuan,
        lambda: inputs(negative_prompt="a dog"),
        checkpointing=MASK,
    ),
    case("ideogram", TEXT, Ideogram4Pipeline, ideogram, lambda: inputs(guidance_schedule=[3.0, 3.0], **SHORT)),
    case("nucleus", TEXT, NucleusMoEImagePipeline, nucleus, lambda: inputs(**GUIDED, **SHORT, return_index=-1)),
]
