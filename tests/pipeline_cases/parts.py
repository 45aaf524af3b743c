"""Parts and arguments that tiny pipelines of several families share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPVisionConfig

from examples.tiny import frozen, tiny_clip_config
from trl_leapalign.rollout.pipelines import modules_of

from .base import PipelineCase

# Sizes of a tiny video.
VIDEO = {"height": 16, "width": 16, "num_frames": 5}


def case(
    family: str,
    task: str,
    pipeline_class: type[DiffusionPipeline],
    components: Callable[[], dict[str, Any]],
    inputs: Callable[[], dict[str, Any]],
    **more: Any,
) -> PipelineCase:
    """A case whose pipeline is made of the components, with seeded weights.

    Weights that begin as zeros get values, so that every part of a denoiser takes part.
    """

    def build() -> DiffusionPipeline:
        torch.manual_seed(0)
        pipeline = frozen(pipeline_class(**components()))
        for module in modules_of(pipeline).values():
            for parameter in module.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
        return pipeline

    return PipelineCase(family, task, build, inputs, name=pipeline_class.__name__, **more)


def arguments(**more: Any) -> dict[str, Any]:
    """Arguments that nearly all pipelines take."""
    return {
        "prompt": "a red circle",
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(1),
        **more,
    }


def image(size: int = 16, seed: int = 0) -> Image.Image:
    """A noisy image, red on the left and blue on the right."""
    pixels = np.random.default_rng(seed).integers(0, 80, (size, size, 3), dtype=np.uint8)
    pixels[:, : size // 2, 0] += 150
    pixels[:, size // 2 :, 2] += 150
    return Image.fromarray(pixels)


def mask(size: int = 16) -> Image.Image:
    """A mask of the left half."""
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[:, : size // 2] = 255
    return Image.fromarray(pixels)


def video(num_frames: int = 5, size: int = 16) -> list[Image.Image]:
    """Noisy frames."""
    return [image(size, seed) for seed in range(num_frames)]


def clip_vision_config(image_size: int = 16) -> CLIPVisionConfig:
    """Configuration of a CLIP image encoder of width 32."""
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        image_size=image_size,
        patch_size=8,
    )


def clip_image_processor(image_size: int = 16) -> CLIPImageProcessorPil:
    """What scales images for a CLIP image encoder."""
    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=image_size)


def long_clip_config() -> CLIPTextConfig:
    """Of a CLIP that takes 77 tokens."""
    config = tiny_clip_config()
    config.max_position_embeddings = 77
    return config
