"""Decoding with checkpointed blocks: the same images and gradients, with fewer tensors kept."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderOobleck,
    AutoencoderTiny,
)
from training_cases import make_trainer

from examples.tiny import tiny_flux, tiny_vae
from examples.tiny_video import tiny_wan, tiny_wan_vae
from trl_leapalign.rollout.decoders import checkpointed_decoders, smallest_blocks

HALVES = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
STATISTICS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def flux2() -> AutoencoderKLFlux2:
    down, up = HALVES
    return AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=16,
    )


def sana() -> AutoencoderDC:
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
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def qwen_image() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], **STATISTICS
    )


def hunyuan_image() -> AutoencoderKLHunyuanImage:
    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
    )


def hunyuan_video() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def hunyuan_video15() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def ltx() -> AutoencoderKLLTXVideo:
    widths = (8, 8, 8, 8)
    return AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        decoder_inject_noise=(True, False, False, False, False),
        patch_size=2,
    )


def mochi() -> AutoencoderKLMochi:
    widths = (32,) * 4
    return AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=(1,) * 5,
    )


def cogvideo() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )


def oobleck() -> AutoencoderOobleck:
    return AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=2,
    )


def tiny_decoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )


DECODERS = {
    "AutoencoderKL": (lambda: tiny_vae(4), (4, 8, 8)),
    "Flux2": (flux2, (4, 8, 8)),
    "Wan": (tiny_wan_vae, (4, 3, 4, 4)),
    "QwenImage": (qwen_image, (4, 1, 8, 8)),
    "DC": (sana, (4, 4, 4)),
    "HunyuanImage": (hunyuan_image, (4, 8, 8)),
    "HunyuanVideo": (hunyuan_video, (4, 2, 4, 4)),
    "HunyuanVideo15": (hunyuan_video15, (4, 2, 4, 4)),
    "LTX": (ltx, (4, 2, 4, 4)),
    "Mochi": (mochi, (4, 2, 4, 4)),
    "CogVideoX": (cogvideo, (4, 3, 4, 4)),
    "Oobleck": (oobleck, (4, 8)),
    "Tiny": (tiny_decoder, (4, 8, 8)),
}


def decoded(decoder, latents, pipeline=None):
    """Image, gradient of the latents and bytes that the forward pass keeps, each storage once."""
    latents = latents.clone().requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if pipeline is None:
            image = decoder.decode(latents, return_dict=False)[0]
        else:
            with checkpointed_decoders(pipeline):
                image = decoder.decode(latents, return_dict=False)[0]
    inner = torch.linspace(0.5, 1.0, image.shape[-1], dtype=image.dtype)
    [gradient] = torch.autograd.grad((image.square() * inner).sum(), latents)
    return image.detach(), gradient, sum(size for pointer, size in kept.items() if pointer not in weights)


def pipeline_of(monkeypatch, decoder):
    monkeypatch.setattr("trl_leapalign.rollout.decoders.modules_of", lambda pipeline: {"vae": pipeline.vae})
    return SimpleNamespace(vae=decoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", DECODERS)
def test_images_and_gradients_are_the_same_and_less_is_kept(name, dtype, monkeypatch):
    make, shape = DECODERS[name]
    torch.manual_seed(0)
    decoder = make().to(dtype).eval().requires_grad_(False)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    image, gradient, kept = decoded(decoder, latents)
    again, same_gradient, kept_less = decoded(decoder, latents, pipeline_of(monkeypatch, decoder))
    assert torch.equal(image, again) and gradient.any()
    assert torch.equal(gradient, same_gradient)
    assert kept_less < 0.7 * kept


@pytest.mark.parametrize(
    "name", [name for name, (make, _) in DECODERS.items() if make()._supports_gradient_checkpointing]
)
def test_with_checkpointing_of_their_own_the_peak_is_lower_still(name, monkeypatch):
    make, shape = DECODERS[name]
    torch.manual_seed(0)
    decoder = make().eval().requires_grad_(False)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    image, gradient, kept = decoded(decoder, latents)
    decoder.enable_gradient_checkpointing()
    again, same_gradient, kept_less = decoded(decoder, latents, pipeline_of(monkeypatch, decoder))
    assert torch.equal(image, again) and torch.equal(gradient, same_gradient)
    assert kept_less < 0.7 * kept


def test_slicing_and_tiling_pass_through(monkeypatch):
    torch.manual_seed(0)
    decoder = tiny_wan_vae().eval().requires_grad_(False)
    latents = torch.randn(2, 4, 2, 12, 12, generator=torch.Generator().manual_seed(1))
    plain = decoder.decode(latents, return_dict=False)[0]
    decoder.enable_slicing()
    decoder.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
    )
    image, gradient, _ = decoded(decoder, latents)
    again, same_gradient, _ = decoded(decoder, latents, pipeline_of(monkeypatch, decoder))
    assert not torch.equal(image, plain)  # tiles are blended
    assert torch.equal(image, again) and torch.equal(gradient, same_gradient)


def test_blocks_do_not_lie_in_one_another_and_are_left_as_they_were():
    decoder = tiny_wan_vae()
    blocks = smallest_blocks(decoder)
    assert {"WanResidualBlock", "WanAttentionBlock"} <= {type(block).__name__ for block in blocks}
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not any(id(block) in inside for block in blocks)
    pipeline = tiny_wan()
    with checkpointed_decoders(pipeline):
        assert all("forward" in vars(block) for block in smallest_blocks(pipeline.vae))
    assert not any("forward" in vars(block) for block in smallest_blocks(pipeline.vae))


def test_the_trainer_checkpoints_the_decoder_with_the_denoiser(tmp_path, monkeypatch):
    applied = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "trl_leapalign.rollout.decoders.checkpoint",
        lambda function, *args, **kwargs: applied.append(function.name) or checkpoint(function, *args, **kwargs),
    )
    make_trainer(tmp_path, tiny_flux(), max_steps=1).train()
    assert not applied
    make_trainer(tmp_path, tiny_flux(), max_steps=1, activation_checkpointing=True).train()
    assert "ResnetBlock2D" in applied


def test_a_decoder_whose_blocks_change_is_refused(tmp_path):
    pipeline = tiny_flux()
    [*_, block] = [part for part in pipeline.vae.decoder.modules() if type(part).__name__ == "ResnetBlock2D"]
    calls = []
    block.conv2.register_forward_hook(
        lambda module, args, output: output * (1 + len(calls)) if calls.append(1) or torch.is_grad_enabled() else output
    )
    with pytest.raises(RuntimeError, match=r"Block2D returns something else.*activation_checkpointing=False"):
        make_trainer(tmp_path, pipeline, activation_checkpointing=True, dry_run=True)
