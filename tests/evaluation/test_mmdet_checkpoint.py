"""The converter from mmdet: names, layout, strictness, files."""

import runpy
import sys

import pytest
import torch
from geneval_cases import tiny_config, tiny_mask2former
from torch import nn
from transformers import Mask2FormerForUniversalSegmentation

from trl_leapalign.evaluation.geneval import mmdet_checkpoint
from trl_leapalign.evaluation.geneval.convert_mask2former import main
from trl_leapalign.evaluation.geneval.metadata import CLASS_NAMES
from trl_leapalign.evaluation.geneval.mmdet_checkpoint import (
    UNUSED,
    load_mmdet_checkpoint,
    load_mmdet_weights,
    mmdet_config,
)


def mmdet_state(model):
    """The state dict that mmdet would have for a transformers model, module by module."""
    state = {}

    def put(name, module):
        state.update({f"{name}.{key}": tensor.clone() for key, tensor in module.state_dict().items()})

    def put_attention(name, q, k, v):
        for kind in ("weight", "bias"):
            separator = "_" if name.endswith("in_proj") else "."
            state[f"{name}{separator}{kind}"] = torch.cat([getattr(part, kind) for part in (q, k, v)]).detach()

    encoder = model.model.pixel_level_module.encoder
    put("backbone.patch_embed.projection", encoder.swin.embeddings.patch_embeddings.projection)
    put("backbone.patch_embed.norm", encoder.swin.embeddings.norm)
    for i, stage in enumerate(encoder.swin.encoder.layers):
        put(f"backbone.norm{i}", encoder.hidden_states_norms[f"stage{i + 1}"])
        for j, block in enumerate(stage.blocks):
            name, window = f"backbone.stages.{i}.blocks.{j}", tiny_config().backbone_config.window_size
            put(f"{name}.norm1", block.layernorm_before)
            put(f"{name}.norm2", block.layernorm_after)
            put_attention(
                f"{name}.attn.w_msa.qkv", block.attention.q_proj, block.attention.k_proj, block.attention.v_proj
            )
            put(f"{name}.attn.w_msa.proj", block.attention.o_proj)
            put(f"{name}.attn.w_msa", block.attention.relative_position_bias)
            state[f"{name}.attn.w_msa.relative_position_index"] = position_index(window)
            put(f"{name}.ffn.layers.0.0", block.mlp.fc1)
            put(f"{name}.ffn.layers.1", block.mlp.fc2)
        if i < 3:
            for key, tensor in stage.downsample.state_dict().items():
                state[f"backbone.stages.{i}.downsample.{key}"] = unfold_order(tensor)
    put_pixel_decoder(put, model.model.pixel_level_module.decoder)
    state["panoptic_head.pixel_decoder.level_encoding.weight"] = model.model.pixel_level_module.decoder.level_embed
    transformer = model.model.transformer_module
    for i, layer in enumerate(transformer.decoder.layers):
        name = f"panoptic_head.transformer_decoder.layers.{i}"
        put(f"{name}.cross_attn.attn", layer.cross_attn)
        own = layer.self_attn
        put_attention(f"{name}.self_attn.attn.in_proj", own.q_proj, own.k_proj, own.v_proj)
        put(f"{name}.self_attn.attn.out_proj", own.out_proj)
        put(f"{name}.ffn.layers.0.0", layer.fc1)
        put(f"{name}.ffn.layers.1", layer.fc2)
        norms = layer.cross_attn_layer_norm, layer.self_attn_layer_norm, layer.final_layer_norm
        for number, norm in enumerate(norms):
            put(f"{name}.norms.{number}", norm)
    put("panoptic_head.transformer_decoder.post_norm", transformer.decoder.layernorm)
    put("panoptic_head.query_embed", transformer.queries_embedder)
    put("panoptic_head.query_feat", transformer.queries_features)
    put("panoptic_head.level_embed", transformer.level_embed)
    put("panoptic_head.cls_embed", model.class_predictor)
    linears = [m for m in transformer.decoder.mask_predictor.mask_embedder.modules() if isinstance(m, nn.Linear)]
    for number, linear in zip((0, 2, 4), linears, strict=True):
        put(f"panoptic_head.mask_embed.{number}", linear)
    return state


def put_pixel_decoder(put, decoder):
    head = "panoptic_head.pixel_decoder"
    for i, (convolution, norm) in enumerate(decoder.input_projections):
        put(f"{head}.input_convs.{i}.conv", convolution)
        put(f"{head}.input_convs.{i}.gn", norm)
    for i, layer in enumerate(decoder.encoder.layers):
        put(f"{head}.encoder.layers.{i}.self_attn", layer.self_attn)
        put(f"{head}.encoder.layers.{i}.norms.0", layer.self_attn_layer_norm)
        put(f"{head}.encoder.layers.{i}.norms.1", layer.final_layer_norm)
        put(f"{head}.encoder.layers.{i}.ffn.layers.0.0", layer.fc1)
        put(f"{head}.encoder.layers.{i}.ffn.layers.1", layer.fc2)
    for name, parts in (("lateral_convs", decoder.adapter_1), ("output_convs", decoder.layer_1)):
        put(f"{head}.{name}.0.conv", parts[0])
        put(f"{head}.{name}.0.gn", parts[1])
    put(f"{head}.mask_feature", decoder.mask_projection)


def position_index(window):
    """For each pair of a window's pixels, the number of their offset: rows first, the largest offset last."""
    pixels = [(y, x) for y in range(window) for x in range(window)]
    return torch.tensor(
        [[(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in pixels] for a, b in pixels]
    )


def unfold_order(tensor):
    """From transformers' order (pixel by pixel, column by column) to that of `nn.Unfold` (channel by channel)."""
    channels = tensor.shape[-1] // 4
    order = [(2 * x + y) * channels + c for c in range(channels) for y in range(2) for x in range(2)]
    return tensor[..., order].clone()


def legacy_names(state):
    """mmdet 2's names of the same weights."""
    renamed = {}
    for key, tensor in state.items():
        if "pixel_decoder.encoder" in key:
            key = key.replace(".self_attn.", ".attentions.0.").replace(".ffn.", ".ffns.0.")
        if "transformer_decoder.layers" in key:
            key = key.replace(".cross_attn.", ".attentions.0.").replace(".self_attn.", ".attentions.1.")
            key = key.replace(".ffn.", ".ffns.0.")
        renamed[key] = tensor
    return renamed


@pytest.fixture(scope="module")
def source():
    return tiny_mask2former(seed=1)


@pytest.fixture
def state(source):
    return mmdet_state(source)


@pytest.mark.parametrize("names", [dict, legacy_names])
def test_converted_weights_give_the_same_model(names, source, state):
    model = tiny_mask2former(seed=2)
    load_mmdet_weights(model, names(state))
    expected = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert name in UNUSED or torch.equal(tensor, expected[name]), name
    assert set(UNUSED) < set(expected)
    pixels = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = model.eval()(pixel_values=pixels), source(pixel_values=pixels)
    assert torch.equal(found.class_queries_logits, wanted.class_queries_logits)
    assert torch.equal(found.masks_queries_logits, wanted.masks_queries_logits)


def test_legacy_names_differ(state):
    changed = set(legacy_names(state)) - set(state)
    assert any("attentions.1.attn.in_proj_weight" in key for key in changed) and len(changed) > 20


def test_patch_merging_equals_mmdets_unfold(state):
    """mmdet merges patches by `nn.Unfold`, norm and projection."""
    generator = torch.Generator().manual_seed(0)
    prefix = "backbone.stages.1.downsample"
    for part in ("norm.weight", "norm.bias", "reduction.weight"):
        state[f"{prefix}.{part}"] = torch.randn(state[f"{prefix}.{part}"].shape, generator=generator)
    model = tiny_mask2former()
    load_mmdet_weights(model, state)
    picture = torch.randn(2, 16, 6, 8, generator=generator)
    merged = nn.Unfold(kernel_size=2, stride=2)(picture).transpose(1, 2)
    merged = nn.functional.layer_norm(merged, (64,), state[f"{prefix}.norm.weight"], state[f"{prefix}.norm.bias"])
    expected = merged @ state[f"{prefix}.reduction.weight"].T
    module = model.model.pixel_level_module.encoder.swin.encoder.layers[1].downsample
    found = module(picture.flatten(2).transpose(1, 2), (6, 8))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_key_must_be_there_and_have_a_place(state):
    model = tiny_mask2former()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needed = [key for key in state if not key.endswith("relative_position_index")]
    for key in needed[::9] + needed[-1:]:
        with pytest.raises(ValueError, match="no weights for"):
            load_mmdet_weights(model, {name: tensor for name, tensor in state.items() if name != key})
    with pytest.raises(ValueError, match=r"not known: backbone.norm4.weight, panoptic_head.cls_embed2.weight"):
        extra = {"panoptic_head.cls_embed2.weight": torch.ones(1), "backbone.norm4.weight": torch.ones(1)}
        load_mmdet_weights(model, state | extra)
    with pytest.raises(ValueError, match=r"no place for: .*decoder.layers.7.final_layer_norm.bias"):
        load_mmdet_weights(model, state | {"panoptic_head.transformer_decoder.layers.7.norms.2.bias": torch.ones(32)})
    with pytest.raises(ValueError, match=r"another shape for class_predictor.weight"):
        load_mmdet_weights(model, state | {"panoptic_head.cls_embed.weight": torch.ones(3, 32)})
    with pytest.raises(ValueError, match=r"several keys .*attentions.0.attn.in_proj_weight"):
        load_mmdet_weights(
            model,
            state | {"panoptic_head.transformer_decoder.layers.0.attentions.0.attn.in_proj_weight": torch.ones(1)},
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_positions_in_another_order_are_refused(state):
    key = "backbone.stages.0.blocks.1.attn.w_msa.relative_position_index"
    load_mmdet_weights(tiny_mask2former(), {name: tensor for name, tensor in state.items() if name != key})
    with pytest.raises(ValueError, match=r"blocks.1.*in another order"):
        load_mmdet_weights(tiny_mask2former(), state | {key: state[key].T.contiguous()})


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_becomes_a_folder(wrapped, source, state, tmp_path, monkeypatch):
    monkeypatch.setattr(mmdet_checkpoint, "mmdet_config", tiny_config)
    path, folder = tmp_path / "detector.pth", tmp_path / "detector"
    torch.save({"state_dict": state, "meta": {"epoch": 50, "CLASSES": ("person",)}} if wrapped else state, path)
    main([str(path), str(folder)])
    loaded = Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    for name, tensor in loaded.state_dict().items():
        assert name in UNUSED or torch.equal(tensor, source.state_dict()[name]), name


def test_the_command_names_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "none.pth"), str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trl_leapalign.evaluation.geneval.convert_mask2former")
    with pytest.raises(FileNotFoundError, match=r"none.pth.*https://download"):
        runpy.run_module("trl_leapalign.evaluation.geneval.convert_mask2former", run_name="__main__")


class Surprise:
    def __reduce__(self):
        return print, ("code was run",)


def test_nothing_but_weights_is_unpickled(tmp_path, capsys):
    for content, message in (({"state_dict": {}, "meta": Surprise()}, "only tensors are read"), ([1], "holds a list")):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=message):
            load_mmdet_checkpoint(tmp_path / "bad.pth", tiny_config())
    assert capsys.readouterr().out == ""


def test_the_full_architecture():
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(mmdet_config())
    assert 68.6e6 < sum(parameter.numel() for parameter in model.parameters()) < 68.8e6
    assert len(model.model.transformer_module.decoder.layers) == 9
    assert len(model.model.pixel_level_module.decoder.encoder.layers) == 6
    assert model.config.num_queries == 100
    assert [model.config.id2label[index] for index in range(80)] == list(CLASS_NAMES)
