"""Rewards that are the cosine of a CLIP model's image and text features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from .preprocessing import normalize, resize_and_crop
from .reward_model import RewardModel, at_least_float32
from .weights import load_model, load_tokenizer

SCALES = ("cosine", "reference")


class CLIPReward(RewardModel):
    """Cosine similarity of image and prompt in the feature space of any CLIP model.

    Args:
        model (CLIPModel): the CLIP model, frozen here.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        scale (str): "cosine" for the bare cosine in [-1, 1]; "reference" for the model's own logits, which are the
            cosine times exp(logit_scale), 100 for published models.
        batch_size (int | None): images scored at a time. None is all of a batch.
        activation_checkpointing (bool): compute activations again in the backward pass rather than keep them.

    Raises:
        TypeError: if the model is no CLIPModel.
        ValueError: if a setting is out of range.
    """

    model_id: ClassVar[str | None] = None
    tokenizer_id: ClassVar[str | None] = None
    interpolation: ClassVar[str] = "bicubic"
    round_margins: ClassVar[bool] = False

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        scale: str = "cosine",
        batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__(batch_size=batch_size, activation_checkpointing=activation_checkpointing)
        check_clip(model)
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is unknown; choose one of {SCALES}.")
        self.model = model
        self.tokenizer = tokenizer
        self.scale = scale
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> "CLIPReward":
        """Load a model in transformers' format from the Hub or a folder.

        Args:
            path_or_id (str | Path | None): repository of the Hub or folder. None is the reward's own, `model_id`.
            revision (str | None): branch, tag or commit of the repository. None is its main branch: no commit has been
                compared with the original code yet, so none is pinned.
            tokenizer (str | Path | PreTrainedTokenizerBase | None): the tokenizer, or where it is. None is the
                reward's own, `tokenizer_id`, or that of the model.
            **settings: of the constructor.

        Returns:
            CLIPReward: the reward, in float32 on the CPU.

        Raises:
            FileNotFoundError: if something is neither on disk nor to be had from the Hub.
            ValueError: if the weights are not those of a CLIP model, or there is no default.
        """
        source = path_or_id or cls.model_id
        if source is None:
            raise ValueError(f"{cls.__name__} has no model of its own. Pass path_or_id.")
        model = load_model(CLIPModel, source, revision=revision)
        own = tokenizer or cls.tokenizer_id
        return cls(model, load_tokenizer(own) if own else load_tokenizer(source, revision), **settings)

    def preprocess(self, images: Tensor) -> Tensor:
        """Turn images into the model's pixels, with gradients.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1], float32 or float64.

        Returns:
            Tensor: shape (B, 3, size, size), normalised.
        """
        size = self.model.config.vision_config.image_size
        return normalize(resize_and_crop(images, size, self.interpolation, self.round_margins))

    def image_features(self, images: Tensor) -> Tensor:
        """Compute what the model sees in images, not normalised.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1], float32 or float64.

        Returns:
            Tensor: shape (B, D).
        """
        return image_features(self.model, self.preprocess(images))

    def score(self, images: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """Compare images with encoded prompts.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            texts (Sequence[Tensor]): features, each of shape (D,).

        Returns:
            Tensor: shape (B,).
        """
        cosines = F.cosine_similarity(self.image_features(images), torch.stack(list(texts)))
        return cosines if self.scale == "cosine" else cosines * self.model.logit_scale.exp()

    def encode_prompt(self, prompt: str) -> Tensor:
        """Compute the text features of a prompt.

        Args:
            prompt (str): the prompt.

        Returns:
            Tensor: shape (D,).
        """
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt").input_ids
        return at_least_float32(self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output[0])


class PickScore(CLIPReward):
    """PickScore v1 (https://huggingface.co/papers/2305.01569): a CLIP ViT-H/14 trained on choices between pictures.

    The LeapAlign paper trains on the bare cosine with a threshold of 0.4, a gradient discount of 0.1 and a learning
    rate of 1e-5. Scores are about 0.18 to 0.23, or 18 to 23 with scale="reference". Takes the arguments of
    `CLIPReward`.
    """

    model_id = "yuvalkirstain/PickScore_v1"
    tokenizer_id = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    @property
    def threshold(self) -> float:
        """The paper's lambda, on the scale in use."""
        return 0.4 * (1.0 if self.scale == "cosine" else self.model.logit_scale.exp().item())


class CLIPScore(CLIPReward):
    """CLIPScore with CLIP ViT-L/14: how well image and prompt agree.

    Images are resized by bilinear interpolation, as in the code that reward fine-tuning papers compare with. Cosines
    are about 0.22 to 0.33. It is not the score of Hessel et al., 2.5 max(0, cosine) with ViT-B/32. There is no
    recommended threshold. Takes the arguments of `CLIPReward`.
    """

    model_id = "openai/clip-vit-large-patch14"
    tokenizer_id = "openai/clip-vit-large-patch14"
    interpolation = "bilinear"
    round_margins = True


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Compute projected image features, which are not normalised.

    Args:
        model (CLIPModel): the model.
        pixels (Tensor): normalised, shape (B, 3, size, size).

    Returns:
        Tensor: shape (B, D), float32 or float64.
    """
    return at_least_float32(model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output)


def check_clip(model: Any) -> None:
    """Raise TypeError unless a model is a CLIPModel."""
    if not isinstance(model, CLIPModel):
        raise TypeError(
            f"model must be a transformers.CLIPModel, got {type(model).__name__}. To load one by its path or id, call "
            "from_pretrained."
        )
