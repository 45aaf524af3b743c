"""Pipelines and rewards of given sizes with random weights. The text encoders are short: they run once a step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from examples.tiny import VOCABULARY, tiny_clip, tiny_tokenizer
from trl_leapalign.rewards import CLIPReward


@dataclass(frozen=True)
class Size:
    """What a step is measured on.

    Args:
        make_pipeline (Callable[[], DiffusionPipeline]): returns the pipeline.
        make_reward (Callable[[], CLIPReward]): returns the reward.
        pixels (int): height and width of the images.
        batch_size (int): images a step.
        checkpointing (bool): whether activations are computed again in the backward pass.
    """

    make_pipeline: Callable[[], DiffusionPipeline]
    make_reward: Callable[[], CLIPReward]
    pixels: int
    batch_size: int
    checkpointing: bool
    prompt: str = "a photo of a red circle left of a dog"


def clip_text(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        projection_dim=width,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(VOCABULARY), d_model=width, d_ff=width, d_kv=64, num_heads=4, num_layers=1, pad_token_id=0
        )
    )


def vae(channels: tuple[int, ...], layers_per_block: int, groups: int = 32) -> AutoencoderKL:
    count = len(channels)
    return AutoencoderKL(
        sample_size=1024,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        layers_per_block=layers_per_block,
        latent_channels=16,
        norm_num_groups=groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )


def flux(layers: int, single_layers: int, heads: int, head_width: int, text: tuple[int, int], decoder: AutoencoderKL):
    """A FluxPipeline of some size, frozen, in eval mode."""
    joint, pooled = text
    quarter = head_width // 16
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=decoder,
        text_encoder=CLIPTextModel(clip_text(pooled)),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=t5(joint),
        tokenizer_2=tiny_tokenizer(512),
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=head_width,
            num_attention_heads=heads,
            joint_attention_dim=joint,
            pooled_projection_dim=pooled,
            axes_dims_rope=(2 * quarter, 7 * quarter, 7 * quarter),
            guidance_embeds=True,
        ),
    )
    return frozen(pipeline)


def frozen(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def small_flux() -> FluxPipeline:
    torch.manual_seed(0)
    return flux(3, 6, 8, 64, (256, 64), vae((16, 32, 64, 64), 1, groups=8))


def flux_dev() -> FluxPipeline:
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16), torch.device("cuda"):
        return flux(19, 38, 24, 128, (4096, 768), vae((128, 256, 512, 512), 2))


def sd35_medium() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16), torch.device("cuda"):
        pipeline = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae((128, 256, 512, 512), 2),
            text_encoder=CLIPTextModelWithProjection(clip_text(768)),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(clip_text(1280)),
            tokenizer_2=tiny_tokenizer(),
            text_encoder_3=t5(4096),
            tokenizer_3=tiny_tokenizer(256),
            transformer=SD3Transformer2DModel(
                sample_size=128,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=24,
                attention_head_dim=64,
                num_attention_heads=24,
                caption_projection_dim=1536,
                joint_attention_dim=4096,
                pooled_projection_dim=2048,
                pos_embed_max_size=384,
                dual_attention_layers=tuple(range(13)),
                qk_norm="rms_norm",
            ),
        )
    return frozen(pipeline)


class default_dtype:
    """Builds modules in another dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *arguments: object) -> None:
        torch.set_default_dtype(self.before)


def small_reward() -> CLIPReward:
    return CLIPReward(tiny_clip(), tiny_tokenizer())


def clip_huge() -> CLIPReward:
    """A reward of CLIP ViT-H/14's size, which HPSv2.1 and PickScore have."""
    torch.manual_seed(0)
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = CLIPConfig(
        text_config=clip_text(1024).to_dict(),
        vision_config={**vision, "image_size": 224, "patch_size": 14},
        projection_dim=1024,
    )
    return CLIPReward(CLIPModel(config), tiny_tokenizer())


SIZES = {
    "cpu": Size(small_flux, small_reward, pixels=256, batch_size=1, checkpointing=False),
    "flux": Size(flux_dev, clip_huge, pixels=720, batch_size=1, checkpointing=True),
    "sd3": Size(sd35_medium, clip_huge, pixels=512, batch_size=4, checkpointing=False),
}
