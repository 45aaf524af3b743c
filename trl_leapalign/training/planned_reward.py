"""A reward of a published size, for plans of memory."""

import torch
from transformers import CLIPConfig, CLIPModel

from ..rewards.clip import CLIPReward

VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def clip_huge(activation_checkpointing: bool) -> CLIPReward:
    """A reward of CLIP ViT-H/14's size, whose prompts cost nothing."""
    text = {**TEXT, "projection_dim": 1024}
    vision = {**VISION, "image_size": 224, "patch_size": 14, "projection_dim": 1024}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    return PlannedReward(model, None, activation_checkpointing=activation_checkpointing)


class PlannedReward(CLIPReward):
    """A CLIP reward without a tokenizer."""

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return torch.empty(self.model.config.projection_dim)
