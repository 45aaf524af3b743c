"""Video pipelines of HunyuanVideo."""

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from examples.tiny import VOCABULARY, tiny_t5, tiny_tokenizer
from examples.tiny_edit import tiny_qwen_tokenizer, tiny_qwen_vl

from .parts import VIDEO, arguments, case, image, long_clip_config


def transformer(in_channels: int = 4, **settings: Any) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 4),
        **settings,
    )


def hunyuan(in_channels: int = 4) -> dict[str, Any]:
    llama = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "text_encoder": LlamaModel(llama),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": CLIPTextModel(long_clip_config()),
        "tokenizer_2": tiny_tokenizer(),
        "transformer": transformer(in_channels),
    }


def inputs(**more: Any) -> dict[str, Any]:
    template = {"template": "a photo of {}", "crop_start": 4}
    return arguments(**VIDEO, max_sequence_length=16, guidance_scale=3.0, prompt_template=template, **more)


def hunyuan15(task_type: str) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        ),
        "text_encoder": tiny_qwen_vl().model.language_model,
        "tokenizer": tiny_qwen_tokenizer(),
        "text_encoder_2": tiny_t5(),
        "tokenizer_2": tiny_tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=3.0),
        "transformer": HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=32,
            image_embed_dim=32,
            rope_axes_dim=(4, 4, 4),
            target_size=16,
            task_type=task_type,
        ),
    }


def siglip(image_size: int = 216) -> dict[str, Any]:
    return {
        "image_encoder": SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=image_size,
                patch_size=8,
            )
        ),
        "feature_extractor": SiglipImageProcessorPil(size={"height": image_size, "width": image_size}),
    }


CASES = [
    case("hunyuan video", "text to video", HunyuanVideoPipeline, hunyuan, inputs),
    case(
        "hunyuan video",
        "image to video",
        HunyuanSkyreelsImageToVideoPipeline,
        lambda: hunyuan(in_channels=8),
        lambda: inputs(image=image(), true_cfg_scale=2.0, negative_prompt="a dog"),
    ),
    case(
        "hunyuan video 1.5",
        "text to video",
        HunyuanVideo15Pipeline,
        lambda: hunyuan15("t2v"),
        lambda: arguments(**VIDEO, negative_prompt="a dog"),
    ),
    case(
        "hunyuan video 1.5",
        "image to video",
        HunyuanVideo15ImageToVideoPipeline,
        lambda: {**hunyuan15("i2v"), **siglip()},
        lambda: arguments(num_frames=5, image=image(), negative_prompt="a dog"),
    ),
]
