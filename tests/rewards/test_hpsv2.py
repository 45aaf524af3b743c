"""HPSv2 against open_clip's model written out in plain torch, on a checkpoint in its layout."""

import logging
import math
import sys
import types

import pytest
import torch
from reward_cases import SIDE, clip_config, random_images
from transformers import CLIPModel

from examples.tiny import VOCABULARY, tiny_tokenizer
from trl_leapalign.rewards import HPSv2, hpsv2, load_reward
from trl_leapalign.rewards.hpsv2 import clean_text, vit_h_14
from trl_leapalign.rewards.preprocessing import normalize

PROMPTS = ["a red circle", "a blue square left of a cat"]
PATCH, VISION, TEXT, SHARED, HEADS = 4, 32, 24, 24, 4


def block_shapes(prefix, width, inner):
    return {
        f"{prefix}.ln_1.weight": (width,),
        f"{prefix}.ln_1.bias": (width,),
        f"{prefix}.attn.in_proj_weight": (3 * width, width),
        f"{prefix}.attn.in_proj_bias": (3 * width,),
        f"{prefix}.attn.out_proj.weight": (width, width),
        f"{prefix}.attn.out_proj.bias": (width,),
        f"{prefix}.ln_2.weight": (width,),
        f"{prefix}.ln_2.bias": (width,),
        f"{prefix}.mlp.c_fc.weight": (inner, width),
        f"{prefix}.mlp.c_fc.bias": (inner,),
        f"{prefix}.mlp.c_proj.weight": (width, inner),
        f"{prefix}.mlp.c_proj.bias": (width,),
    }


def checkpoint():
    """Random weights by the names and shapes of open_clip's CLIP."""
    shapes = {
        "positional_embedding": (8, TEXT),
        "text_projection": (TEXT, SHARED),
        "logit_scale": (),
        "visual.class_embedding": (VISION,),
        "visual.positional_embedding": (1 + (SIDE // PATCH) ** 2, VISION),
        "visual.proj": (VISION, SHARED),
        "visual.conv1.weight": (VISION, 3, PATCH, PATCH),
        **{f"visual.ln_{which}.{kind}": (VISION,) for which in ("pre", "post") for kind in ("weight", "bias")},
        "token_embedding.weight": (len(VOCABULARY), TEXT),
        "ln_final.weight": (TEXT,),
        "ln_final.bias": (TEXT,),
    }
    for number in range(2):
        shapes |= block_shapes(f"visual.transformer.resblocks.{number}", VISION, 40)
        shapes |= block_shapes(f"transformer.resblocks.{number}", TEXT, 36)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layer_norm(x, weights, name):
    deviation = x - x.mean(-1, keepdim=True)
    return (
        deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def attention(x, weights, name, causal):
    length, width = x.shape
    joint = x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"]
    q, k, v = (joint[:, part * width : (part + 1) * width] for part in range(3))
    size = width // HEADS
    heads = []
    for head in range(HEADS):
        columns = slice(head * size, (head + 1) * size)
        logits = q[:, columns] @ k[:, columns].T / math.sqrt(size)
        if causal:
            logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        heads.append(logits.softmax(-1) @ v[:, columns])
    return torch.cat(heads, 1) @ weights[f"{name}.out_proj.weight"].T + weights[f"{name}.out_proj.bias"]


def block(x, weights, name, causal):
    x = x + attention(layer_norm(x, weights, f"{name}.ln_1"), weights, f"{name}.attn", causal)
    hidden = layer_norm(x, weights, f"{name}.ln_2") @ weights[f"{name}.mlp.c_fc.weight"].T
    hidden = hidden + weights[f"{name}.mlp.c_fc.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + hidden @ weights[f"{name}.mlp.c_proj.weight"].T + weights[f"{name}.mlp.c_proj.bias"]


def image_vector(pixels, weights):
    tokens = [weights["visual.class_embedding"]]
    for top in range(0, SIDE, PATCH):
        for left in range(0, SIDE, PATCH):
            patch = pixels[:, top : top + PATCH, left : left + PATCH]
            tokens.append((weights["visual.conv1.weight"] * patch).sum((1, 2, 3)))
    x = layer_norm(torch.stack(tokens) + weights["visual.positional_embedding"], weights, "visual.ln_pre")
    for number in range(2):
        x = block(x, weights, f"visual.transformer.resblocks.{number}", causal=False)
    return layer_norm(x[0], weights, "visual.ln_post") @ weights["visual.proj"]


def text_vector(ids, weights):
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"][: len(ids)]
    for number in range(2):
        x = block(x, weights, f"transformer.resblocks.{number}", causal=True)
    return layer_norm(x[-1], weights, "ln_final") @ weights["text_projection"]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(hpsv2, "vit_h_14", lambda: clip_config("gelu"))
    torch.save({"epoch": 1, "state_dict": checkpoint()}, tmp_path / "HPS_v2.1_compressed.pt")
    return tmp_path / "HPS_v2.1_compressed.pt"


def test_scores_and_gradients_are_those_of_open_clip(path):
    reward = HPSv2.from_pretrained(path, tokenizer=tiny_tokenizer()).double()
    weights = {name: value.double() for name, value in checkpoint().items()}
    images = random_images(2, 3, SIDE, SIDE, dtype=torch.float64).requires_grad_()
    scores = reward(images, PROMPTS, [{}, {}])
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        ids = tiny_tokenizer()(prompt).input_ids[:7]  # 8 positions, the last for the end
        a, b = image_vector(normalize(image), weights), text_vector([*ids, 3] if ids[-1] != 3 else ids, weights)
        expected.append((a @ b) / (a.norm() * b.norm()))
    expected = torch.stack(expected)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(value.sum(), images)[0] for value in (scores, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_half_precision_checkpoints_become_float32(path):
    halves = {name: value.half() for name, value in checkpoint().items()}
    torch.save({"state_dict": halves}, path)
    model = HPSv2.from_pretrained(path.parent, tokenizer=tiny_tokenizer()).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.visual_projection.weight, halves["visual.proj"].float().T)
    assert model.logit_scale.item() == halves["logit_scale"].item()  # which no score depends on


def test_the_file_of_the_version_is_taken(path):
    path.rename(path.with_name("HPS_v2_compressed.pt"))
    reward = HPSv2.from_pretrained(path.parent, version="2.0", tokenizer=tiny_tokenizer())
    assert (reward.version, reward.threshold) == ("2.0", None)
    with pytest.raises(
        FileNotFoundError, match=r"The folder .* has no HPS_v2\.1_compressed\.pt\. Pass the path of the"
    ):
        HPSv2.from_pretrained(path.parent, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "count", "named"),
    [
        ("visual.class_embedding", 1, "vision_model.embeddings.class_embedding"),
        ("visual.ln_pre.bias", 1, "vision_model.pre_layrnorm.bias"),
        ("text_projection", 1, "text_projection.weight"),
        ("visual.transformer.resblocks.1.mlp.c_fc.weight", 1, "vision_model.encoder.layers.1.mlp.fc1.weight"),
        ("transformer.resblocks.0.attn.in_proj_bias", 3, "text_model.encoder.layers.0.self_attn.k_proj.bias, text_mod"),
        ("logit_scale", 1, "logit_scale"),
    ],
)
def test_missing_weights_are_named(path, name, count, named):
    torch.save({"state_dict": {key: value for key, value in checkpoint().items() if key != name}}, path)
    with pytest.raises(ValueError, match=f"{count} weights are missing, such as {named}"):
        HPSv2.from_pretrained(path, tokenizer=tiny_tokenizer())


def test_unknown_and_misshapen_weights_are_named(path):
    torch.save({"state_dict": checkpoint() | {"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(32)}}, path)
    with pytest.raises(ValueError, match=r"1 weights are unexpected, such as visual\.transformer\.resblocks\.0\.ls_1"):
        HPSv2.from_pretrained(path, tokenizer=tiny_tokenizer())
    torch.save({"state_dict": checkpoint() | {"visual.proj": torch.ones(32, 20)}}, path)
    with pytest.raises(
        ValueError, match=r"visual_projection.weight has shape \(20, 32\), but the model's has \(24, 32"
    ):
        HPSv2.from_pretrained(path, tokenizer=tiny_tokenizer())


def test_the_published_architecture():
    """986,109,441 parameters, as in the published file."""
    with torch.device("meta"):
        model = CLIPModel(vit_h_14())
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    assert model.vision_model.encoder.layers[0].self_attn.head_dim == 80
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A  Red\n\tCIRCLE ", "a red circle"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("&lt;b&gt;", "<b>"),
        ("a&nbsp;b", "a b"),
        ("", ""),
    ],
)
def test_text_is_cleaned(text, expected):
    assert clean_text(text) == expected


def test_prompts_are_cleaned_before_they_are_read(path):
    reward = HPSv2.from_pretrained(path, tokenizer=tiny_tokenizer())
    images = random_images(2, 3, SIDE, SIDE)[:1].expand(2, -1, -1, -1)
    clean, same = reward(images, ["a red circle", " A &#82;ed\nCircle"], [{}, {}])
    assert clean == same


def test_ftfy_is_used_if_it_is_there(monkeypatch, caplog):
    ftfy = types.ModuleType("ftfy")
    ftfy.fix_text = lambda text: text.replace("\u2019", "'")
    ftfy.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "ftfy", ftfy)
    with caplog.at_level(logging.WARNING):
        assert clean_text("a dog\u2019s") == "a dog's"
    assert not caplog.records


def test_the_lack_of_ftfy_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(hpsv2.importlib.util, "find_spec", lambda name: None)
    hpsv2._warn_of_ftfy.cache_clear()
    with caplog.at_level(logging.WARNING):
        clean_text("plain")
        assert not caplog.records
        assert clean_text("a dog\u2019s") == clean_text("a dog\u2019s") == "a dog\u2019s"
    assert [record.message.partition(".")[0] for record in caplog.records] == [
        "A prompt has characters beyond ASCII, and ftfy is not installed"
    ]


@pytest.mark.parametrize(("name", "version"), [("HPS_v2_compressed.pt", "2.1"), ("HPS_v2.1_compressed.pt", "2.0")])
def test_the_file_of_the_other_version_is_refused(path, name, version):
    """Both hold the same architecture, so that nothing else would tell them apart."""
    other = path.rename(path.with_name(name))
    with pytest.raises(ValueError, match=rf"{name} is the file of HPSv2.*, but version='{version}' is asked for"):
        load_reward(f"hpsv{version}", path_or_id=other, tokenizer=tiny_tokenizer())
    own = path.rename(path.with_name("mine.pt")) if path.exists() else other.rename(path.with_name("mine.pt"))
    assert load_reward(f"hpsv{version}", path_or_id=own, tokenizer=tiny_tokenizer()).version == version
