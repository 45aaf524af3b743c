"""From mmdet's Mask2Former checkpoint, which GenEval uses, to the transformers model of the same architecture."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from ...rewards.weights import read_weights
from .metadata import CLASS_NAMES

CHECKPOINT_URL = (
    "https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth"
)
# Parameters of the transformers model that inference does not use, and that mmdet does not have.
UNUSED = (
    "model.pixel_level_module.encoder.swin.layernorm.weight",
    "model.pixel_level_module.encoder.swin.layernorm.bias",
    "criterion.empty_weight",
)

_ENCODER = "model.pixel_level_module.encoder"
_DECODER = "model.pixel_level_module.decoder"
_TRANSFORMER = "model.transformer_module"
_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)"
_PIXEL_LAYER = r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)"
_QUERY_LAYER = r"panoptic_head\.transformer_decoder\.layers\.(\d+)"

# mmdet 2 called the parts of a layer by their numbers.
_LEGACY = (
    (rf"({_PIXEL_LAYER})\.attentions\.0\.", r"\1.self_attn."),
    (rf"({_QUERY_LAYER})\.attentions\.0\.", r"\1.cross_attn."),
    (rf"({_QUERY_LAYER})\.attentions\.1\.", r"\1.self_attn."),
    (rf"({_PIXEL_LAYER}|{_QUERY_LAYER})\.ffns\.0\.", r"\1.ffn."),
)
# Names that are all there is to change.
_RENAMED = (
    (r"backbone\.patch_embed\.projection", rf"{_ENCODER}.swin.embeddings.patch_embeddings.projection"),
    (r"backbone\.patch_embed\.norm", rf"{_ENCODER}.swin.embeddings.norm"),
    (rf"{_BLOCK}\.norm1", rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.layernorm_before"),
    (rf"{_BLOCK}\.norm2", rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.layernorm_after"),
    (rf"{_BLOCK}\.attn\.w_msa", rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.attention.relative_position_bias"),
    (rf"{_BLOCK}\.attn\.w_msa\.proj", rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.attention.o_proj"),
    (rf"{_BLOCK}\.ffn\.layers\.0\.0", rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.mlp.fc1"),
    (rf"{_BLOCK}\.ffn\.layers\.1", rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.mlp.fc2"),
    *((rf"backbone\.norm{index}", rf"{_ENCODER}.hidden_states_norms.stage{index + 1}") for index in range(4)),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv", rf"{_DECODER}.input_projections.\1.0"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn", rf"{_DECODER}.input_projections.\1.1"),
    (rf"{_PIXEL_LAYER}\.self_attn\.(\w+)", rf"{_DECODER}.encoder.layers.\1.self_attn.\2"),
    (rf"{_PIXEL_LAYER}\.norms\.0", rf"{_DECODER}.encoder.layers.\1.self_attn_layer_norm"),
    (rf"{_PIXEL_LAYER}\.norms\.1", rf"{_DECODER}.encoder.layers.\1.final_layer_norm"),
    (rf"{_PIXEL_LAYER}\.ffn\.layers\.0\.0", rf"{_DECODER}.encoder.layers.\1.fc1"),
    (rf"{_PIXEL_LAYER}\.ffn\.layers\.1", rf"{_DECODER}.encoder.layers.\1.fc2"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv", rf"{_DECODER}.adapter_1.0"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn", rf"{_DECODER}.adapter_1.1"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv", rf"{_DECODER}.layer_1.0"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn", rf"{_DECODER}.layer_1.1"),
    (r"panoptic_head\.pixel_decoder\.mask_feature", rf"{_DECODER}.mask_projection"),
    (rf"{_QUERY_LAYER}\.cross_attn\.attn", rf"{_TRANSFORMER}.decoder.layers.\1.cross_attn"),
    (rf"{_QUERY_LAYER}\.(cross|self)_attn\.attn\.out_proj", rf"{_TRANSFORMER}.decoder.layers.\1.\2_attn.out_proj"),
    (rf"{_QUERY_LAYER}\.norms\.0", rf"{_TRANSFORMER}.decoder.layers.\1.cross_attn_layer_norm"),
    (rf"{_QUERY_LAYER}\.norms\.1", rf"{_TRANSFORMER}.decoder.layers.\1.self_attn_layer_norm"),
    (rf"{_QUERY_LAYER}\.norms\.2", rf"{_TRANSFORMER}.decoder.layers.\1.final_layer_norm"),
    (rf"{_QUERY_LAYER}\.ffn\.layers\.0\.0", rf"{_TRANSFORMER}.decoder.layers.\1.fc1"),
    (rf"{_QUERY_LAYER}\.ffn\.layers\.1", rf"{_TRANSFORMER}.decoder.layers.\1.fc2"),
    (r"panoptic_head\.transformer_decoder\.post_norm", rf"{_TRANSFORMER}.decoder.layernorm"),
    (r"panoptic_head\.query_embed", rf"{_TRANSFORMER}.queries_embedder"),
    (r"panoptic_head\.query_feat", rf"{_TRANSFORMER}.queries_features"),
    (r"panoptic_head\.level_embed", rf"{_TRANSFORMER}.level_embed"),
    (r"panoptic_head\.cls_embed", "class_predictor"),
    *(
        (rf"panoptic_head\.mask_embed\.{2 * index}", rf"{_TRANSFORMER}.decoder.mask_predictor.mask_embedder.{index}.0")
        for index in range(3)
    ),
)


def mmdet_config() -> Mask2FormerConfig:
    """The architecture of GenEval's detector: Swin-S, 100 queries, the 80 classes of COCO."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=stages
        ),
        id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: index for index, name in enumerate(CLASS_NAMES)},
    )


def load_mmdet_checkpoint(
    path: str | Path, config: Mask2FormerConfig | None = None
) -> Mask2FormerForUniversalSegmentation:
    """Read an mmdet checkpoint into the transformers model; nothing but tensors and plain values is unpickled.

    Args:
        path (str | Path): of the .pth file, in the names of mmdet 3 or 2.
        config (Mask2FormerConfig | None): its architecture; None is GenEval's.

    Returns:
        Mask2FormerForUniversalSegmentation: in eval mode, float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds other things, or the weights of another architecture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no mmdet checkpoint {str(path)!r}. Download {CHECKPOINT_URL} once and pass the path of the file."
        )
    checkpoint = read_weights(Path(path))
    model = Mask2FormerForUniversalSegmentation(config or mmdet_config())
    load_mmdet_weights(model, checkpoint.get("state_dict", checkpoint))
    return model.eval()


def load_mmdet_weights(model: Mask2FormerForUniversalSegmentation, state: Mapping[str, Tensor]) -> None:
    """Load mmdet's weights: each must have a place, and each of the model's parameters gets a value.

    Args:
        model (Mask2FormerForUniversalSegmentation): of the same architecture; changed in place.
        state (Mapping[str, Tensor]): mmdet's state dict.

    Raises:
        ValueError: if keys or shapes do not match; the message names them.
    """
    weights = convert_mmdet_state(state)
    for name, index in model.named_buffers():
        if name.endswith(".relative_position_index") and not torch.equal(weights.pop(name, index).flatten(), index):
            raise ValueError(f"The mmdet checkpoint counts the positions in {name} in another order than transformers.")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in UNUSED}
    _refuse("has no weights for", expected.keys() - weights.keys())
    _refuse("has weights that the model has no place for:", weights.keys() - expected.keys())
    _refuse(
        "has weights of another shape for", {name for name in expected if expected[name].shape != weights[name].shape}
    )
    model.load_state_dict(weights, strict=False)


def _refuse(problem: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(
            f"The mmdet checkpoint {problem} {', '.join(names[:5])}{more}. It must be a Mask2Former of the same "
            f"architecture; GenEval's is {CHECKPOINT_URL}"
        )


def convert_mmdet_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give mmdet's weights the names and the layout of transformers.

    Args:
        state (Mapping[str, Tensor]): mmdet's state dict, in the names of mmdet 3 or 2.

    Returns:
        dict[str, Tensor]: weights by the names of `Mask2FormerForUniversalSegmentation`, and the index buffers of
            Swin, which transformers does not save.

    Raises:
        ValueError: if a key is unknown, or two become one.
    """
    converted: dict[str, Tensor] = {}
    unknown, doubled = [], []
    for key, tensor in state.items():
        parts = _convert(key, tensor)
        unknown += [] if parts else [key]
        doubled += [key for name in parts if name in converted]
        converted.update(parts)
    _refuse("has keys that are not known:", unknown)
    _refuse("has several keys for the same weights:", doubled)
    return converted


def _convert(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """One entry of mmdet's state dict in transformers' names; nothing if it is unknown."""
    for pattern, replacement in _LEGACY:
        key = re.sub(f"^{pattern}", replacement, key)
    stem, _, leaf = key.rpartition(".")
    if key == "panoptic_head.pixel_decoder.level_encoding.weight":
        return {f"{_DECODER}.level_embed": tensor}
    if match := re.fullmatch(rf"{_BLOCK}\.attn\.w_msa\.qkv", stem):
        block = match.expand(rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.attention")
        return {f"{block}.{name}_proj.{leaf}": part for name, part in zip("qkv", tensor.chunk(3), strict=True)}
    if match := re.fullmatch(rf"{_QUERY_LAYER}\.self_attn\.attn\.in_proj_(weight|bias)", key):
        layer = match.expand(rf"{_TRANSFORMER}.decoder.layers.\1.self_attn")
        return {f"{layer}.{name}_proj.{match[2]}": part for name, part in zip("qkv", tensor.chunk(3), strict=True)}
    if match := re.fullmatch(r"backbone\.stages\.(\d+)\.(downsample\.(?:reduction|norm))", stem):
        return {match.expand(rf"{_ENCODER}.swin.encoder.layers.\1.\2.{leaf}"): _patch_order(tensor)}
    for pattern, replacement in _RENAMED:
        if match := re.fullmatch(pattern, stem):
            return {f"{match.expand(replacement)}.{leaf}": tensor}
    return {}


def _patch_order(tensor: Tensor) -> Tensor:
    """Reorder the inputs of Swin's patch merging, which are the last dimension.

    mmdet takes them from `unfold`: channel by channel, the four pixels row by row. transformers takes pixel by pixel,
    column by column, all channels of each.
    """
    pixels = tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]
    return pixels.transpose(-1, -2).flatten(-2)
