"""Tiny built-in rewards of real classes with random weights, and images to score."""

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from examples.tiny import VOCABULARY, tiny_tokenizer
from trl_leapalign.rewards import AestheticScore, CLIPReward, CLIPScore, HPSv2, HPSv3, ImageReward, PickScore
from trl_leapalign.rewards.hpsv3 import preference_head
from trl_leapalign.rewards.reward_model import linear_head

PROMPTS = ["a red circle", "a blue square left of a cat", "two dogs"]
INSTRUCTION = "the photo of {text_prompt} and <|Reward|> a dog"
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SIDE = 16
"""Pixels of the square input of the tiny CLIP and BLIP models."""


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight a size at which it matters; transformers' own starting values make all scores alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.data = 0.1 * noise + ("norm" in name.lower() and name.endswith("weight"))
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return module.eval()


def clip_config(hidden_act: str) -> CLIPConfig:
    shared = {"hidden_act": hidden_act, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 24}
    return CLIPConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 40, "image_size": SIDE, "patch_size": 4, **shared},
        text_config={
            **shared,
            **{"hidden_size": 24, "intermediate_size": 36, "vocab_size": len(VOCABULARY)},
            **{"max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
        },
        projection_dim=24,
    )


def clip_model(hidden_act: str = "quick_gelu") -> CLIPModel:
    model = randomize(CLIPModel(clip_config(hidden_act)))
    model.logit_scale.data.fill_(4.5)
    return model


def blip_configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    vision = BlipVisionConfig(
        **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": SIDE, "patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    )
    text = BlipTextConfig(
        **{"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"vocab_size": len(VOCABULARY), "encoder_hidden_size": 32, "max_position_embeddings": 40},
        **{"hidden_act": "gelu", "layer_norm_eps": 1e-12, "is_decoder": True},
    )
    return vision, text


def image_reward(**settings) -> ImageReward:
    vision, text = blip_configs()
    encoder = randomize(BlipTextModel(text, add_pooling_layer=False))
    head = randomize(linear_head(24))
    return ImageReward(randomize(BlipVisionModel(vision)), encoder, head, tiny_tokenizer(), **settings)


def qwen_tokenizer(reward_token: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    extra = [*QWEN_TOKENS, "<|Reward|>"] if reward_token else QWEN_TOKENS
    tokenizer.add_tokens([AddedToken(token, special=True) for token in extra], special_tokens=True)
    return tokenizer


def qwen_config(vocabulary: int) -> Qwen2VLConfig:
    tokenizer = qwen_tokenizer()
    text = {
        **{"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    special = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    return Qwen2VLConfig(text_config=text, vision_config=vision, **special)


def qwen_model() -> Qwen2VLForConditionalGeneration:
    return randomize(Qwen2VLForConditionalGeneration(qwen_config(len(qwen_tokenizer()))))


def hpsv3(**settings) -> HPSv3:
    settings = {"instruction": INSTRUCTION, "image_pixels": 32 * 32, **settings}
    return HPSv3(qwen_model().model, randomize(preference_head(32)), qwen_tokenizer(), **settings)


CASES = {
    "clip": lambda **settings: CLIPReward(clip_model(), tiny_tokenizer(), **settings),
    "pickscore": lambda **settings: PickScore(clip_model("gelu"), tiny_tokenizer(), **settings),
    "clipscore": lambda **settings: CLIPScore(clip_model(), tiny_tokenizer(), **settings),
    "hpsv2": lambda **settings: HPSv2(clip_model("gelu"), tiny_tokenizer(), **settings),
    "aesthetic": lambda **settings: AestheticScore(clip_model(), randomize(linear_head(24)), **settings),
    "imagereward": image_reward,
    "hpsv3": hpsv3,
}
