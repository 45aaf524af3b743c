"""Videos by EasyAnimate, Motif and Kandinsky 6; sound by Stable Audio 3."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLMagvit,
    AutoencoderSAME,
    ClassifierFreeGuidance,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    StableAudio3DiTModel,
    StableAudio3Pipeline,
)
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from transformers import (
    CLIPTextModel,
    SiglipImageProcessorPil,
    T5Gemma2EncoderConfig,
    T5GemmaConfig,
    T5GemmaEncoderModel,
)
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

from examples.tiny import VOCABULARY, tiny_tokenizer
from examples.tiny_edit import tiny_qwen_processor, tiny_qwen_tokenizer, tiny_qwen_vl
from examples.tiny_video import tiny_wan_vae

from .parts import VIDEO, arguments, case, image, long_clip_config

GUIDED = {"negative_prompt": "a dog", "guidance_scale": 3.0}


def easy_animate() -> dict[str, Any]:
    return {
        "vae": AutoencoderKLMagvit(
            latent_channels=4,
            block_out_channels=[8, 8, 8],
            down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"],
            up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"],
            layers_per_block=1,
            norm_num_groups=4,
        ),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": tiny_qwen_tokenizer(),
        "transformer": EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=16,
            add_norm_text_encoder=True,
            text_embed_dim=32,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def motif(**settings: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(VOCABULARY) + 3, "num_key_value_heads": 2, "head_dim": 8, "dropout_rate": 0.0, **sizes}
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": tiny_wan_vae(),
        "text_encoder": T5Gemma2Encoder(
            T5Gemma2EncoderConfig(
                text_config=text,
                vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
                mm_tokens_per_image=4,
                boi_token_index=len(VOCABULARY),
                eoi_token_index=len(VOCABULARY) + 1,
                image_token_index=len(VOCABULARY) + 2,
            )
        ),
        "tokenizer": tiny_tokenizer(),
        "transformer": MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=32,
            rope_axes_dim=(4, 4, 4),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
            **settings,
        ),
        "guider": ClassifierFreeGuidance(guidance_scale=3.0),
    }


def kandinsky6() -> dict[str, Any]:
    """Videos of 5 frames, with sound in 8 latent frames."""
    return {
        "transformer": Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=32,
            in_text_dim2=32,
            time_dim=16,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 4),
            in_audio_dim=4,
            out_audio_dim=4,
            text_token_padding=True,
            ca_rope=True,
            cross_gates=True,
            fix_modulation=True,
            visual_token_type_num_embeddings=2,
        ),
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": tiny_qwen_processor(),
        "text_encoder_2": CLIPTextModel(long_clip_config()),
        "tokenizer_2": tiny_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "audio_vae": MMAudioVAE(
            mel_bins=8,
            latent_channels=4,
            hidden_channels=8,
            channel_multipliers=(1, 1),
            layers_per_block=1,
            sample_rate=320,
            n_fft=32,
            hop_length=4,
        ),
        "vocoder": MMAudioVocoder(
            num_mels=8,
            upsample_initial_channel=8,
            upsample_rates=(2, 2),
            upsample_kernel_sizes=(4, 4),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
        ),
    }


def stable_audio3() -> dict[str, Any]:
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vae = AutoencoderSAME(
        patch_size=4,
        encoder_channels=16,
        encoder_c_mults=(1,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=4,
        dim_heads=8,
        sampling_rate=80,
    )
    # Where these are near zero, as they begin, both halves of its attention are the same, and cancel.
    torch.nn.init.normal_(vae.decoder.blocks[0].new_tokens)
    return {
        "vae": vae,
        "text_encoder": T5GemmaEncoderModel(T5GemmaConfig(encoder=sizes, decoder=sizes, is_encoder_decoder=False)),
        "tokenizer": tiny_tokenizer(),
        "duration_embedder": StableAudio3DurationEmbedder(output_dim=32, fourier_dim=16),
        "transformer": StableAudio3DiTModel(
            io_channels=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
            cond_token_dim=32,
            global_cond_dim=32,
            local_add_cond_dim=5,
            timestep_features_dim=16,
            ff_mult=1.0,
            num_memory_tokens=4,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


CASES = [
    case(
        "easyanimate",
        "text to video",
        EasyAnimatePipeline,
        easy_animate,
        lambda: arguments(**GUIDED, **{**VIDEO, "num_frames": 3}),
        checkpointing="the decoder's layers keep frames for the next ones, so they cannot be run again",
    ),
    case(
        "motif",
        "text to video",
        MotifVideoPipeline,
        motif,
        lambda: arguments(**VIDEO, negative_prompt="a dog", max_sequence_length=16),
    ),
    case(
        "motif",
        "image to video",
        MotifVideoImage2VideoPipeline,
        lambda: {
            **motif(image_embed_dim=32),
            "feature_extractor": SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        },
        lambda: arguments(**VIDEO, image=image(), negative_prompt="a dog", max_sequence_length=16),
    ),
    case(
        "kandinsky 6",
        "text to video with audio",
        Kandinsky6TI2VAPipeline,
        kandinsky6,
        lambda: arguments(**GUIDED, **VIDEO, max_sequence_length=16),
    ),
    case(
        "stable audio 3",
        "audio",
        StableAudio3Pipeline,
        stable_audio3,
        lambda: arguments(**GUIDED, duration=0.5),
    ),
]
