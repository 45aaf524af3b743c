"""Tiny vision-language models of real classes, with random weights, their tokenizer and image processors."""

import torch
from reward_cases import randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_leapalign.rewards import VLMReward

SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
WORDS = [
    *SPECIAL,
    *"user assistant Does this picture show a red blue ring circle square left of two sharp dog".split(),
    *"Is it Answer with one word or yes no Yes No 1 2 3 4 5 : , . ?".split(),
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template like Qwen's."""


def vlm_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=[word for word in words if word in SPECIAL[2:]], **special
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def special_ids() -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: WORDS.index(f"<|{name}|>") for key, name in names.items()}


def text_config(**settings) -> dict:
    return {
        **{"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 256},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        **{"bos_token_id": None, "eos_token_id": 3, "pad_token_id": 1},
        **settings,
    }


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text_config(), vision_config=vision, **special_ids())
    )


def qwen2_5_vl() -> PreTrainedModel:
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
        **{"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text_config(), vision_config=vision, **special_ids())
    )


def qwen3_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
        **{"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text_config(head_dim=8, rope_parameters=rope), vision_config=vision, **special_ids())
    )


def llava() -> PreTrainedModel:
    text = text_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    vision = CLIPVisionConfig(
        **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": 16, "patch_size": 4},
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_id=special_ids()["image_token_id"]
        )
    )


MODELS = {"qwen2-vl": qwen2_vl, "qwen2.5-vl": qwen2_5_vl, "qwen3-vl": qwen3_vl, "llava": llava}


def vlm_model(name: str = "qwen2.5-vl", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return randomize(MODELS[name](), seed)


def vlm_image_processor(name: str = "qwen2.5-vl", **settings):
    if name == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    own = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if name == "qwen3-vl" else {}
    limits = {"size": {"shortest_edge": 8 * 8, "longest_edge": 32 * 64}}
    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, **{**limits, **own, **settings})


def vlm_reward(question="Does this picture show {prompt}?", name: str = "qwen2.5-vl", **settings) -> VLMReward:
    settings = {"tokenizer": vlm_tokenizer(), "image_processor": vlm_image_processor(name), **settings}
    return VLMReward(question, settings.pop("model", None) or vlm_model(name), **settings)
