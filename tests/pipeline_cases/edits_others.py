"""Edits and control with Sana, Chroma, CogView4 and Z-Image."""

from typing import Any

from diffusers import (
    ChromaImg2ImgPipeline,
    CogView4ControlPipeline,
    CogView4Transformer2DModel,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaSprintImg2ImgPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageTransformer2DModel,
)

from examples.tiny import tiny_vae

from .edits_flux import SIZE, later, parts_of
from .image_parts import chat_tokenizer, euler, tiny_qwen3
from .images import CHROMA, chroma, cogview4, sana, sana_sprint
from .parts import arguments, case, image, mask

SANA = {
    "height": 32,
    "width": 32,
    "use_resolution_binning": False,
    "max_sequence_length": 16,
    "complex_human_instruction": None,
}
SANA_WIDTH = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 32,
    "sample_size": 8,
}


def sana_controlled() -> dict[str, Any]:
    controlnet = SanaControlNetModel(in_channels=4, out_channels=4, **SANA_WIDTH)
    return parts_of(sana(), controlnet=controlnet, scheduler=euler())


def cogview4_control() -> dict[str, Any]:
    parts = parts_of(cogview4())
    config = {**parts["transformer"].config, "in_channels": 8}
    return {**parts, "transformer": CogView4Transformer2DModel.from_config(config)}


def z_image() -> dict[str, Any]:
    return {
        "scheduler": euler(),
        "vae": tiny_vae(latent_channels=4),
        "text_encoder": tiny_qwen3().model,
        "tokenizer": chat_tokenizer(),
        "transformer": ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 64, 64],
        ),
    }


def guided(**more: Any) -> dict[str, Any]:
    return arguments(guidance_scale=3.0, max_sequence_length=16, **more)


CASES = [
    case(
        "sana",
        "control",
        SanaControlNetPipeline,
        sana_controlled,
        lambda: arguments(**SANA, guidance_scale=3.0, control_image=image(32)),
    ),
    case(
        "sana",
        "image to image",
        SanaSprintImg2ImgPipeline,
        lambda: parts_of(sana_sprint()),
        lambda: later(arguments(**SANA, image=image(32), intermediate_timesteps=None)),
    ),
    case(
        "chroma",
        "image to image",
        ChromaImg2ImgPipeline,
        lambda: parts_of(chroma()),
        lambda: later(guided(**SIZE, image=image(), negative_prompt="a dog")),
        checkpointing=CHROMA,
    ),
    case(
        "cogview",
        "control",
        CogView4ControlPipeline,
        cogview4_control,
        lambda: guided(**SIZE, control_image=image()),
    ),
    case(
        "z image",
        "image to image",
        ZImageImg2ImgPipeline,
        z_image,
        lambda: later(guided(**SIZE, image=image())),
    ),
    case(
        "z image",
        "inpaint",
        ZImageInpaintPipeline,
        z_image,
        lambda: later(guided(**SIZE, image=image(), mask_image=mask())),
    ),
]
