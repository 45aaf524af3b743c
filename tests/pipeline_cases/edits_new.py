"""Edits, inpainting and control with the families that diffusers took in last."""

from types import ModuleType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    Flux2KleinInpaintPipeline,
    FluxKontextInpaintPipeline,
    JoyImageEditPipeline,
    JoyImageEditTransformer3DModel,
    Kandinsky5I2IPipeline,
    LongCatImageEditPipeline,
    QwenImageLayeredPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
)
from diffusers.pipelines.joyimage.image_processor import BUCKETS
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from transformers import Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

from examples.tiny import frozen, tiny_vae
from examples.tiny_edit import ImageTextProcessor, tiny_qwen_processor, tiny_qwen_tokenizer, tiny_qwen_transformer

from .base import PipelineCase
from .edits_flux import SIZE, flux, flux_inputs, later
from .edits_others import guided, z_image
from .edits_qwen import qwen
from .image_parts import euler
from .images_more import KLEIN, klein_parts
from .images_vlm import kandinsky5_parts, longcat, tiny_qwen3_vl
from .parts import arguments, case, image, mask


def seeing_qwen3_vl() -> Qwen3VLForConditionalGeneration:
    """That finds the places of images in a prompt."""
    model = tiny_qwen3_vl(Qwen3VLForConditionalGeneration)
    model.config.image_token_id = tiny_qwen_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    return model


def joy() -> JoyImageEditPipeline:
    torch.manual_seed(0)
    images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=32 * 32, max_pixels=32 * 32)
    pipeline = frozen(
        JoyImageEditPipeline(
            vae=AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.0] * 4,
                latents_std=[1.0] * 4,
                scale_factor_spatial=4,
            ),
            text_encoder=seeing_qwen3_vl(),
            tokenizer=tiny_qwen_tokenizer(),
            transformer=JoyImageEditTransformer3DModel(
                in_channels=4,
                hidden_size=32,
                num_attention_heads=2,
                text_dim=32,
                mlp_width_ratio=2.0,
                num_layers=2,
                rope_dim_list=[4, 6, 6],
            ),
            scheduler=euler(),
            processor=ImageTextProcessor(images, tiny_qwen_tokenizer()),
        )
    )
    BUCKETS.setdefault(32, [(32, 32)])  # beside that of 1024
    pipeline.vae_image_processor.register_to_config(basesize=32)
    return pipeline


def make_small_images(module: ModuleType) -> None:
    """Let a pipeline that scales every image to about a million pixels, which takes too long, make tiny ones."""
    module.calculate_dimensions = lambda area, ratio: (32, 32)


def longcat_edit() -> dict[str, Any]:
    make_small_images(pipeline_longcat_image_edit)
    return longcat()


def z_image_control() -> dict[str, Any]:
    return {
        **z_image(),
        "controlnet": ZImageControlNetModel(
            control_layers_places=[0], control_in_dim=4, dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2
        ),
    }


def layered() -> dict[str, Any]:
    make_small_images(pipeline_qwenimage_layered)
    return qwen(
        transformer=tiny_qwen_transformer(use_additional_t_cond=True, use_layer3d_rope=True),
        processor=tiny_qwen_processor(),
    )


def vae_of_factor_8() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL.from_config({**tiny_vae(latent_channels=4).config, "block_out_channels": (4,) * 4, **blocks})


def kandinsky_edit() -> Kandinsky5I2IPipeline:
    parts = {**kandinsky5_parts(visual_cond=True), "vae": vae_of_factor_8()}
    pipeline = frozen(Kandinsky5I2IPipeline(**parts))
    pipeline.resolutions = [(32, 32)]
    return pipeline


EDIT = "edit"
CASES = [
    PipelineCase("joyimage", EDIT, joy, lambda: arguments(image=image(32), guidance_scale=3.0)),
    case(
        "flux2",
        "inpaint",
        Flux2KleinInpaintPipeline,
        klein_parts,
        lambda: later(arguments(image=image(), mask_image=mask(), guidance_scale=3.0, **KLEIN, **SIZE)),
    ),
    case("longcat", EDIT, LongCatImageEditPipeline, longcat_edit, lambda: arguments(image=image(), guidance_scale=3.0)),
    case(
        "z image",
        "control",
        ZImageControlNetPipeline,
        z_image_control,
        lambda: guided(control_image=image(), **SIZE),
    ),
    case(
        "qwen image",
        EDIT,
        QwenImageLayeredPipeline,
        layered,
        lambda: arguments(image=image(), layers=1, true_cfg_scale=2.0, negative_prompt="a dog"),
    ),
    PipelineCase(
        "kandinsky 5",
        EDIT,
        kandinsky_edit,
        lambda: guided(image=image(32), height=32, width=32, negative_prompt="a dog"),
    ),
    case(
        "flux",
        "inpaint",
        FluxKontextInpaintPipeline,
        flux,
        lambda: later(flux_inputs(image=image(), mask_image=mask(), max_area=16 * 16, _auto_resize=False)),
    ),
]
