"""Rewards that are the cosine of a CLIP model's image and text features."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPReward(nn.Module):
    """Cosine similarity of image and prompt, such as PickScore's without its logit scale.

    The paper trains on PickScore with a threshold of 0.4, a gradient discount of 0.1 and a learning rate of 1e-5.

    Args:
        model (CLIPModel): the CLIP model, frozen here.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
    """

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_features: dict[str, Tensor] = {}

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            prompts (list[str]): length B.
            metadata (list[dict]): unused.

        Returns:
            Tensor: cosines, shape (B,), float32.
        """
        size = self.model.config.vision_config.image_size
        pixels = preprocess(images.float(), size).to(self.model.dtype)
        image_features = self.model.get_image_features(pixel_values=pixels).pooler_output.float()
        text_features = torch.stack([self._encode(prompt) for prompt in prompts])
        return F.cosine_similarity(image_features, text_features)

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        if prompt not in self.text_features:
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")
            ids = tokens.input_ids.to(self.model.device)
            self.text_features[prompt] = self.model.get_text_features(input_ids=ids).pooler_output[0].float()
        return self.text_features[prompt]


def preprocess(images: Tensor, size: int) -> Tensor:
    """CLIP's preprocessing with gradients: shortest edge to `size` by bicubic interpolation, centre crop, normalise.

    Args:
        images (Tensor): shape (B, 3, H, W) in [0, 1], float32 or float64.
        size (int): pixels of the model's square input.

    Returns:
        Tensor: shape (B, 3, size, size), normalised.
    """
    height, width = images.shape[-2:]
    shortest = min(height, width)
    resized = (int(size * height / shortest), int(size * width / shortest))
    images = F.interpolate(images, size=resized, mode="bicubic", align_corners=False, antialias=True)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std
