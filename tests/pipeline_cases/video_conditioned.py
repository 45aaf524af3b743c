"""Videos that begin with an image or follow a control: HunyuanVideo, LTX-2, Sana-WM; and Cosmos."""

from typing import Any

from diffusers import (
    Cosmos2TextToImagePipeline,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    CosmosVideoToWorldPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    LTX2ConditionPipeline,
    SanaWMPipeline,
    SanaWMTransformer3DModel,
)
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from examples.tiny import tiny_tokenizer
from examples.tiny_edit import tiny_qwen_tokenizer
from examples.tiny_video import tiny_wan_vae

from .image_parts import language_model
from .parts import VIDEO, arguments, case, clip_image_processor, clip_vision_config, image, video
from .video_hunyuan import hunyuan, siglip
from .video_hunyuan import inputs as hunyuan_inputs
from .video_hunyuan import transformer as hunyuan_transformer
from .video_ltx2 import inputs as ltx2_inputs
from .video_ltx2 import ltx2
from .video_others import cosmos1, cosmos2, cosmos_transformer, guided
from .video_wan import unipc

IMAGE_TOKENS = 4
HEADER = "<|end_header_id|>"
# What the prompt becomes: an image in its second word, and three headers.
LLAVA_TEMPLATE = {
    "template": f"<image> a photo of {HEADER} the {HEADER} {{}} and a b c {HEADER}",
    "crop_start": 6,
    "image_emb_start": 1,
    "image_emb_end": 1 + IMAGE_TOKENS,
    "image_emb_len": IMAGE_TOKENS,
}


def framepack() -> dict[str, Any]:
    return {
        **hunyuan(),
        "transformer": HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 4, 4),
            has_image_proj=True,
            image_proj_dim=32,
            has_clean_x_embedder=True,
        ),
        **siglip(16),
    }


def sana_wm() -> dict[str, Any]:
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": language_model(Gemma2ForCausalLM, Gemma2Config),
        "vae": ltx2()["vae"],
        "transformer": SanaWMTransformer3DModel(
            in_channels=4,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=16,
            chunk_plucker_channels=12,
            caption_channels=32,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def cosmos3() -> dict[str, Any]:
    return {
        "transformer": Cosmos3OmniTransformer(
            head_dim=16,
            hidden_size=32,
            intermediate_size=37,
            latent_channel=4,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=1,
            patch_latent_dim=16,
            vocab_size=len(tiny_qwen_tokenizer()),
            rope_axes_dim=(4, 2, 2),
        ),
        "text_tokenizer": tiny_qwen_tokenizer(),
        "vae": tiny_wan_vae(),
        "scheduler": unipc(),
        "enable_safety_checker": False,
    }


def hunyuan_image() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", HEADER]})
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    llava = LlavaConfig(
        vision_config=clip_vision_config(),
        text_config=llama,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        pad_token_id=0,
    )
    return {
        **hunyuan(),
        "text_encoder": LlavaForConditionalGeneration(llava),
        "tokenizer": tokenizer,
        "transformer": hunyuan_transformer(image_condition_type="token_replace", guidance_embeds=True),
        "image_processor": clip_image_processor(),
    }


CASES = [
    case(
        "hunyuan video framepack",
        "image to video",
        HunyuanVideoFramepackPipeline,
        framepack,
        lambda: {**hunyuan_inputs(image=image(), latent_window_size=2), "num_frames": 9},
    ),
    case(
        "sana wm",
        "image to video",
        SanaWMPipeline,
        sana_wm,
        lambda: guided(
            **VIDEO,
            image=image(),
            action="w-5",
            intrinsics=[16.0, 16.0, 8.0, 8.0],
            chi_prompt=["a photo of"],
        ),
    ),
    case(
        "cosmos 3",
        "text to video",
        Cosmos3OmniPipeline,
        cosmos3,
        lambda: arguments(**VIDEO, negative_prompt="a dog", guidance_scale=3.0),
    ),
    case(
        "hunyuan video",
        "image to video",
        HunyuanVideoImageToVideoPipeline,
        hunyuan_image,
        lambda: arguments(
            **VIDEO,
            image=image(),
            max_sequence_length=24,
            guidance_scale=3.0,
            true_cfg_scale=2.0,
            negative_prompt="a dog",
            prompt_template=LLAVA_TEMPLATE,
            image_embed_interleave=2,
        ),
    ),
    case(
        "ltx 2",
        "condition to video with audio",
        LTX2ConditionPipeline,
        ltx2,
        lambda: ltx2_inputs(conditions=[LTX2VideoCondition(video(5, 32)[:1], index=1, strength=0.7, crf=0)]),
    ),
    case(
        "cosmos predict 2",
        "text to image",
        Cosmos2TextToImagePipeline,
        lambda: {**cosmos2(), "transformer": cosmos_transformer(in_channels=4, text_embed_dim=32)},
        lambda: guided(height=16, width=16),
        unsupported="turns its output into a numpy array",
    ),
    case(
        "cosmos predict 1",
        "image to video",
        CosmosVideoToWorldPipeline,
        lambda: {**cosmos1(), "transformer": cosmos_transformer(in_channels=5, text_embed_dim=32)},
        lambda: guided(**VIDEO, image=image()),
        unsupported="does not sample by flow matching",
    ),
]
