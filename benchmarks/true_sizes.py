"""Pipelines at the sizes of published models with random weights, made without the memory of full precision.

Modules are built without weights and filled parameter by parameter in bfloat16, or Linear by Linear in NF4. The text
encoders are stand-ins of one layer with the real widths: what they return has the real shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from examples.tiny import VOCABULARY, frozen, tiny_tokenizer
from trl_leapalign.rewards import CLIPReward

BFLOAT16 = torch.bfloat16
BLOCK = 1_000_003  # random values that parameters are filled with again and again; prime, so that rows differ


@dataclass(frozen=True)
class TrueSize:
    """A model at its published size.

    Args:
        make_pipeline (Callable[[bool], DiffusionPipeline]): returns the pipeline, its denoiser in NF4 if True.
        pixels (int): height and width of the images.
        num_steps (int): sampling steps.
        call_kwargs (dict[str, Any]): further arguments of the pipeline's call.
    """

    make_pipeline: Callable[[bool], DiffusionPipeline]
    pixels: int
    num_steps: int
    call_kwargs: dict[str, Any] = field(default_factory=dict)


def built(make: Callable[[], nn.Module], nf4: bool = False) -> nn.Module:
    """Build a module with random weights in bfloat16, its linear layers in NF4 if asked for.

    Args:
        make (Callable[[], nn.Module]): builds it; its parameters get no memory.
        nf4 (bool): whether to make each linear layer a `bitsandbytes.nn.Linear4bit`.

    Returns:
        nn.Module: on the CPU.
    """
    with init_empty_weights(), _no_initialisation():
        module = make()
    if not _filled_in:
        return module.to(BFLOAT16)
    if nf4:
        _quantize(module)
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for name, part in [(name, part) for name, part in module.named_modules() if not _is_4bit(part)]:
        for key, parameter in part.named_parameters(recurse=False):
            filled = _filled(parameter.shape, values, ones="norm" in name and key == "weight")
            part._parameters[key] = nn.Parameter(filled)
        for key, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and key not in part._non_persistent_buffers_set:
                part._buffers[key] = buffer.to(BFLOAT16)
    return module


_filled_in = True


@contextmanager
def weightless() -> Iterator[None]:
    """Build the large modules on the meta device meanwhile, for a plan of their memory; none is quantized then."""
    global _filled_in
    _filled_in = False
    try:
        yield
    finally:
        _filled_in = True


@contextmanager
def _no_initialisation() -> Iterator[None]:
    """Leave out the random values that are thrown away."""
    with ExitStack() as stack:
        for name in ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "zeros_", "ones_", "constant_"):
            stack.enter_context(patch.object(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor))
        yield


def _filled(shape: torch.Size, values: torch.Tensor, ones: bool) -> torch.Tensor:
    filled = torch.empty(shape, dtype=BFLOAT16)
    if ones:
        return filled.fill_(1)
    flat = filled.view(-1)
    for start in range(0, flat.numel(), BLOCK):
        end = min(start + BLOCK, flat.numel())
        flat[start:end] = values[: end - start]
    return filled


def _is_4bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


def _quantize(module: nn.Module) -> None:
    """Replace linear layers by 4-bit ones with random codes: what quantizing normal values gives, without the time."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, quantize_4bit

    codes, state = quantize_4bit(torch.randn(BLOCK // 64 * 64).mul_(0.02), blocksize=64, quant_type="nf4")
    codes = codes.flatten()
    scale = state.absmax.mean()
    for part in list(module.modules()):
        for name, layer in list(part.named_children()):
            if type(layer) is not nn.Linear:
                continue
            with torch.device("meta"):
                quantized = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    compute_dtype=BFLOAT16,
                    compress_statistics=False,
                    quant_type="nf4",
                )
            size = layer.in_features * layer.out_features
            packed = codes.repeat(-(-size // 2 // len(codes)))[: size // 2].clone()
            absmax = scale.expand(size // 64).clone()
            quantized.weight = bnb.nn.Params4bit(
                packed.view(-1, 1), quant_type="nf4", compress_statistics=False, module=quantized, bnb_quantized=True
            )
            quantized.weight.quant_state = quantized.quant_state = QuantState(
                absmax, torch.Size((layer.out_features, layer.in_features)), state.code, 64, "nf4", BFLOAT16
            )
            if layer.bias is not None:
                quantized.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=BFLOAT16))
            # On a CPU with AVX512-BF16 a call without gradients would repack the weights, and the backward pass fail.
            quantized.support_avx512bf16_for_cpu = False
            setattr(part, name, quantized)
    module.is_loaded_in_4bit = True


def clip_text(width: int) -> CLIPTextConfig:
    """One layer of CLIP's text encoder, for 77 tokens."""
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        projection_dim=width,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def t5(kind: type = T5EncoderModel, config: type = T5Config, width: int = 4096) -> nn.Module:
    """One small layer of a T5 encoder that returns vectors of the real width."""
    return kind(
        config(vocab_size=len(VOCABULARY), d_model=width, d_ff=64, d_kv=16, num_heads=4, num_layers=1, pad_token_id=0)
    ).to(BFLOAT16)


def image_decoder() -> ModelMixin:
    """The autoencoder of SD3.5 and FLUX.1, which differ in two numbers."""
    return AutoencoderKL(
        sample_size=1024,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )


def sd35_medium_transformer() -> ModelMixin:
    """The transformer of Stable Diffusion 3.5 Medium, 2.2 billion parameters."""
    return SD3Transformer2DModel(
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
    )


def sd35_medium(nf4: bool = False) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 Medium."""
    return frozen(
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=built(image_decoder),
            text_encoder=CLIPTextModelWithProjection(clip_text(768)).to(BFLOAT16),
            tokenizer=tiny_tokenizer(77),
            text_encoder_2=CLIPTextModelWithProjection(clip_text(1280)).to(BFLOAT16),
            tokenizer_2=tiny_tokenizer(77),
            text_encoder_3=t5(),
            tokenizer_3=tiny_tokenizer(256),
            transformer=built(sd35_medium_transformer, nf4),
        )
    )


def flux_dev(nf4: bool = False) -> FluxPipeline:
    """FLUX.1-dev, whose transformer has 11.9 billion parameters."""
    return frozen(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=built(image_decoder),
            text_encoder=CLIPTextModel(clip_text(768)).to(BFLOAT16),
            tokenizer=tiny_tokenizer(77),
            text_encoder_2=t5(),
            tokenizer_2=tiny_tokenizer(512),
            transformer=built(lambda: FluxTransformer2DModel(guidance_embeds=True), nf4),
        )
    )


def qwen_image(nf4: bool = False) -> QwenImagePipeline:
    """Qwen-Image, whose transformer has 20.4 billion parameters."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 3584}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return frozen(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=built(AutoencoderKLQwenImage),
            text_encoder=encoder.to(BFLOAT16),
            tokenizer=tiny_tokenizer(1024),
            transformer=built(QwenImageTransformer2DModel, nf4),
        )
    )


def wan(nf4: bool = False) -> WanPipeline:
    """Wan 2.1 1.3B, in size."""
    return frozen(
        WanPipeline(
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
            ),
            vae=built(AutoencoderKLWan),
            text_encoder=t5(UMT5EncoderModel, UMT5Config),
            tokenizer=tiny_tokenizer(512),
            transformer=built(lambda: WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30), nf4),
        )
    )


def clip_huge() -> CLIPReward:
    """A reward in float32 of the size of CLIP ViT-H/14's image tower, which HPSv2.1 and PickScore have."""
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = CLIPConfig(
        text_config=clip_text(1024).to_dict(),
        vision_config={**vision, "image_size": 224, "patch_size": 14},
        projection_dim=1024,
    )
    return CLIPReward(CLIPModel(config), tiny_tokenizer(77))


TRUE_SIZES = {
    "sd3": TrueSize(sd35_medium, pixels=512, num_steps=4),
    "flux": TrueSize(flux_dev, pixels=256, num_steps=2, call_kwargs={"max_sequence_length": 32}),
    "qwen": TrueSize(qwen_image, pixels=256, num_steps=3),
    "wan": TrueSize(wan, pixels=256, num_steps=4, call_kwargs={"num_frames": 5, "max_sequence_length": 512}),
}
