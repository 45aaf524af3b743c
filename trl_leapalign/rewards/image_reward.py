"""ImageReward: BLIP's vision encoder and a text encoder that attends to it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .preprocessing import normalize, resize_and_crop
from .reward_model import RewardModel, apply_head, linear_head
from .weights import check_names, find_file, load_model, load_module, load_tokenizer, read_weights

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

MEAN, STD = 0.16717362830052426, 1.0333394966054072
PROMPT_LENGTH = 35
FILE = "ImageReward.pt"


class ImageReward(RewardModel):
    """ImageReward v1.0 (https://huggingface.co/papers/2304.05977): about -2.3 to 2, zero for a middling picture.

    The score is (mlp(h) - mean) / std for the text encoder's first token h. The recommended threshold 2 is that of
    ReFL, which the same paper trains with; it scales this loss by 1e-3.

    Args:
        vision (BlipVisionModel): the vision encoder, frozen here.
        text (BlipTextModel): the text encoder with cross attention (`is_decoder=True` in its config), frozen here.
        head (nn.Module): maps (B, D) to (B, 1), such as `linear_head(D)`; frozen here.
        tokenizer (PreTrainedTokenizerBase): BERT's tokenizer.
        batch_size (int | None): images scored at a time. None is all of a batch.
        activation_checkpointing (bool): compute activations again in the backward pass rather than keep them.

    Raises:
        ValueError: if the text encoder has no cross attention, or a setting is out of range.
    """

    threshold = 2.0

    def __init__(
        self,
        vision: "BlipVisionModel",
        text: "BlipTextModel",
        head: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__(batch_size=batch_size, activation_checkpointing=activation_checkpointing)
        if not text.config.is_decoder:
            raise ValueError(
                "The text encoder has no cross attention, so it does not see the image. Build it with "
                "BlipTextConfig(is_decoder=True, encoder_hidden_size=...)."
            )
        self.vision = vision
        self.text = text
        self.head = head
        self.tokenizer = tokenizer
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = "THUDM/ImageReward",
        *,
        revision: str | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase = "bert-base-uncased",
        **settings: Any,
    ) -> "ImageReward":
        """Load the published checkpoint.

        Args:
            path_or_id (str | Path): the .pt file, its folder, or the repository of the Hub.
            revision (str | None): branch, tag or commit of the repository. None is its main branch: no commit has been
                compared with the original code yet, so none is pinned.
            tokenizer (str | Path | PreTrainedTokenizerBase): BERT's tokenizer, or where it is.
            **settings: of the constructor.

        Returns:
            ImageReward: the reward, in float32 on the CPU.

        Raises:
            FileNotFoundError: if something is neither on disk nor to be had from the Hub.
            ValueError: if the file is cut off or holds another model.
        """
        path = find_file(path_or_id, FILE, revision)
        parts = split_weights(read_weights(path), path)
        vision = load_model(transformers.BlipVisionModel, path, config=vision_config(), weights=parts["vision"])
        text = load_model(
            transformers.BlipTextModel, path, config=text_config(), weights=parts["text"], add_pooling_layer=False
        )
        head = linear_head(text.config.hidden_size)
        load_module(head, parts["head"], path)
        return cls(vision, text, head, load_tokenizer(tokenizer), **settings)

    def score(self, images: Tensor, texts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Score images of one micro-batch.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            texts (Sequence[tuple[Tensor, Tensor]]): token ids and mask, each of shape (L,).

        Returns:
            Tensor: shape (B,).
        """
        pixels = normalize(resize_and_crop(images, self.vision.config.image_size, round_margins=True))
        patches = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        ids, mask = (torch.stack(rows) for rows in zip(*texts, strict=True))
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (apply_head(self.head, states[:, 0])[:, 0] - MEAN) / STD

    def encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Tokenise a prompt; the text encoder's layers already depend on the image.

        Args:
            prompt (str): the prompt.

        Returns:
            tuple[Tensor, Tensor]: token ids and mask, each of shape (L,).
        """
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=PROMPT_LENGTH, return_tensors="pt"
        ).to(self.text.device)
        return tokens.input_ids[0], tokens.attention_mask[0]


def vision_config() -> "BlipVisionConfig":
    """Describe the ViT-L/16 of ImageReward.

    Returns:
        BlipVisionConfig: the configuration; BLIP's usual epsilon is other.
    """
    return transformers.BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def text_config() -> "BlipTextConfig":
    """Describe the BERT of ImageReward, with cross attention.

    Returns:
        BlipTextConfig: the configuration; BLIP's usual number of heads is other.
    """
    return transformers.BlipTextConfig(
        vocab_size=30524,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,
    )


PREFIXES = {"blip.visual_encoder.": "vision", "blip.text_encoder.": "text", "mlp.layers.": "head"}
UNUSED = ("blip.vision_proj.", "blip.text_proj.")
RENAMED_IN_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm([12])", r"encoder.layers.\1.layer_norm\2"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm", "post_layernorm"),
)


def split_weights(weights: dict[str, Tensor], source: str | Path) -> dict[str, dict[str, Tensor]]:
    """Split ImageReward's checkpoint into its parts, by the names of transformers.

    Args:
        weights (dict[str, Tensor]): the checkpoint.
        source (str | Path): where it comes from, for the message.

    Returns:
        dict[str, dict[str, Tensor]]: weights of "vision", "text" and "head".

    Raises:
        ValueError: if there are weights of something else.
    """
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES.values()}
    strangers = []
    for key, value in weights.items():
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is not None:
            name = key.removeprefix(prefix)
            part = PREFIXES[prefix]
            parts[part][_vision_name(name) if part == "vision" else name] = value
        elif not key.startswith(UNUSED):
            strangers.append(key)
    check_names([], strangers, source)
    return parts


def _vision_name(name: str) -> str:
    for old, new in RENAMED_IN_VISION:
        renamed, count = re.subn(rf"^{old}(?=\.|$)", new, name)
        if count:
            return renamed
    return name
