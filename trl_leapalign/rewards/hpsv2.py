"""HPSv2: human preference score, a CLIP ViT-H/14 in the format of open_clip."""

import functools
import html
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from .clip import CLIPReward
from .preprocessing import normalize, resize_and_pad
from .weights import find_file, load_model, load_tokenizer, read_weights

logger = logging.getLogger(__name__)

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
THRESHOLDS = {"2.0": None, "2.1": 0.55}


class HPSv2(CLIPReward):
    """Human preference score v2.0 or v2.1 (https://huggingface.co/papers/2306.09341): a bare cosine.

    The LeapAlign paper trains on v2.1 with a threshold of 0.55, a gradient discount of 0.3 and a learning rate of 1e-5.
    Good pictures get about 0.28 (v2.0) or 0.31 (v2.1): the threshold is never reached. Scores of the versions do not
    compare. The whole picture is seen, with black bars if it is not square.

    Args:
        model (CLIPModel): the model, frozen here; its activation must be "gelu".
        tokenizer (PreTrainedTokenizerBase): CLIP's tokenizer.
        version (str): "2.0" or "2.1", which decides on the recommended threshold alone.
        batch_size (int | None): images scored at a time. None is all of a batch.
        activation_checkpointing (bool): compute activations again in the backward pass rather than keep them.

    Raises:
        TypeError: if the model is no CLIPModel.
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        version: str = "2.1",
        batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__(model, tokenizer, batch_size=batch_size, activation_checkpointing=activation_checkpointing)
        _check_version(version)
        activations = {model.config.vision_config.hidden_act, model.config.text_config.hidden_act}
        if activations != {"gelu"}:
            raise ValueError(f"The model's activation is {sorted(activations)}, but HPSv2 is trained with 'gelu'.")
        self.version = version
        self.threshold = THRESHOLDS[version]

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = "xswu/HPSv2",
        *,
        version: str = "2.1",
        revision: str | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **settings: Any,
    ) -> "HPSv2":
        """Load the published checkpoint; the CLIP model it was made from is not needed.

        Args:
            path_or_id (str | Path): the .pt file, its folder, or the repository of the Hub.
            version (str): "2.0" or "2.1".
            revision (str | None): branch, tag or commit of the repository. None is its main branch: no commit has been
                compared with the original code yet, so none is pinned.
            tokenizer (str | Path | PreTrainedTokenizerBase): CLIP's tokenizer, or where it is.
            **settings: of the constructor.

        Returns:
            HPSv2: the reward, in float32 on the CPU.

        Raises:
            FileNotFoundError: if something is neither on disk nor to be had from the Hub.
            ValueError: if the file is cut off, holds another model, or has the name of the other version.
        """
        _check_version(version)
        path = find_file(path_or_id, FILES[version], revision)
        named = re.search(r"hps_?v2(\.\d)?", path.name.lower())
        if named and (named[1] or ".0") != version[1:]:
            raise ValueError(
                f"{path.name} is the file of HPSv2{named[1] or '.0'}, but version={version!r} is asked for. Pass "
                f"{FILES[version]}, or load the reward as version='2{named[1] or '.0'}'."
            )
        weights = read_weights(path)
        weights = from_open_clip(weights.get("state_dict", weights))
        model = load_model(CLIPModel, path, config=vit_h_14(), weights=weights)
        return cls(model, load_tokenizer(tokenizer), version=version, **settings)

    def preprocess(self, images: Tensor) -> Tensor:
        """Turn images into the model's pixels, with gradients: longest edge resized, the other padded with black.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1], float32 or float64.

        Returns:
            Tensor: shape (B, 3, size, size), normalised.
        """
        return normalize(resize_and_pad(images, self.model.config.vision_config.image_size))

    def encode_prompt(self, prompt: str) -> Tensor:
        """Compute the text features of a prompt, cleaned as open_clip does.

        Args:
            prompt (str): the prompt.

        Returns:
            Tensor: shape (D,).
        """
        return super().encode_prompt(clean_text(prompt))


def vit_h_14() -> CLIPConfig:
    """Describe CLIP ViT-H/14 as LAION trained it.

    Returns:
        CLIPConfig: the configuration.
    """
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    shared = {"hidden_act": "gelu", "projection_dim": 1024}
    return CLIPConfig(
        vision_config={"image_size": 224, "patch_size": 14, **vision, **shared},
        text_config={"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, **text, **shared},
        projection_dim=1024,
    )


def clean_text(text: str) -> str:
    """Clean a prompt as open_clip does: broken characters (if ftfy is installed), entities, spaces, lower case.

    Args:
        text (str): the prompt.

    Returns:
        str: the cleaned prompt.
    """
    if importlib.util.find_spec("ftfy") is not None:
        import ftfy

        text = ftfy.fix_text(text)
    elif not text.isascii():
        _warn_of_ftfy()
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


@functools.cache
def _warn_of_ftfy() -> None:
    logger.warning(
        "A prompt has characters beyond ASCII, and ftfy is not installed. HPSv2 was trained on prompts that ftfy had "
        "cleaned: with curly quotes, ligatures or broken encodings the score would be slightly other. pip install ftfy."
    )


def _check_version(version: Any) -> None:
    if version not in FILES:
        raise ValueError(f"version={version!r} of HPSv2 is unknown; choose one of {sorted(FILES)}.")


RENAMED = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = ("visual.proj", "text_projection")
RENAMED_IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of open_clip's CLIP to those of transformers' CLIPModel.

    Args:
        weights (dict[str, Tensor]): by open_clip's names.

    Returns:
        dict[str, Tensor]: by transformers' names; unknown ones keep theirs.
    """
    return {name: value for key, tensor in weights.items() for name, value in _renamed(key, tensor)}


def _renamed(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = BLOCK.fullmatch(key)
    if block is None:
        yield RENAMED.get(key, key), tensor.T.contiguous() if key in TRANSPOSED else tensor
        return
    visual, number, module, kind = block.groups()
    layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
    if module == "attn.in_proj":
        for name, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{layer}.self_attn.{name}_proj.{kind}", part.contiguous()
    elif module in RENAMED_IN_BLOCK:
        yield f"{layer}.{RENAMED_IN_BLOCK[module]}.{kind}", tensor
    else:
        yield key, tensor
