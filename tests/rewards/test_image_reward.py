"""ImageReward against its formula written out in plain torch, on a checkpoint in its layout."""

import math

import pytest
import torch
from reward_cases import SIDE, blip_configs, image_reward, random_images
from transformers import BlipTextModel, BlipVisionModel

from examples.tiny import VOCABULARY, tiny_tokenizer
from trl_leapalign.rewards import ImageReward
from trl_leapalign.rewards import image_reward as module
from trl_leapalign.rewards.preprocessing import normalize

PROMPTS = ["a red circle", "a blue square left of a cat"]
PATCH, VISION, TEXT = 4, 32, 24


def linear(prefix, outputs, inputs):
    return {f"{prefix}.weight": (outputs, inputs), f"{prefix}.bias": (outputs,)}


def norm(prefix, width):
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}


def checkpoint():
    """Random weights by the names and shapes of ImageReward.pt, at toy size."""
    eye, bert = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{eye}.cls_token": (1, 1, VISION),
        f"{eye}.pos_embed": (1, 1 + (SIDE // PATCH) ** 2, VISION),
        f"{eye}.patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        f"{eye}.patch_embed.proj.bias": (VISION,),
        **norm(f"{eye}.norm", VISION),
        f"{bert}.embeddings.word_embeddings.weight": (len(VOCABULARY), TEXT),
        f"{bert}.embeddings.position_embeddings.weight": (40, TEXT),
        **norm(f"{bert}.embeddings.LayerNorm", TEXT),
    }
    for number in range(2):
        layer = f"{eye}.blocks.{number}"
        shapes |= norm(f"{layer}.norm1", VISION) | norm(f"{layer}.norm2", VISION)
        shapes |= linear(f"{layer}.attn.qkv", 3 * VISION, VISION) | linear(f"{layer}.attn.proj", VISION, VISION)
        shapes |= linear(f"{layer}.mlp.fc1", 40, VISION) | linear(f"{layer}.mlp.fc2", VISION, 40)
        layer = f"{bert}.encoder.layer.{number}"
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            shapes |= linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            shapes |= linear(f"{layer}.{kind}.self.key", TEXT, width)
            shapes |= linear(f"{layer}.{kind}.self.value", TEXT, width)
            shapes |= linear(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        shapes |= linear(f"{layer}.intermediate.dense", 36, TEXT) | linear(f"{layer}.output.dense", TEXT, 36)
        shapes |= norm(f"{layer}.output.LayerNorm", TEXT)
    shapes |= linear("blip.vision_proj", 8, VISION) | linear("blip.text_proj", 8, TEXT)
    for index, outputs, inputs in ((0, 1024, TEXT), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        shapes |= linear(f"mlp.layers.{index}", outputs, inputs)
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {f"{bert}.embeddings.position_ids": torch.arange(40)[None]}


class Formula:
    """The model in plain torch, one image and one prompt at a time."""

    def __init__(self):
        self.weights = {name: value.double() for name, value in checkpoint().items()}

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name, epsilon):
        deviation = x - x.mean(-1, keepdim=True)
        scaled = deviation / (deviation.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, q, k, v, heads):
        parts = []
        for q_head, k_head, v_head in zip(*(x.chunk(heads, 1) for x in (q, k, v)), strict=True):
            parts.append((q_head @ k_head.T / math.sqrt(q_head.shape[1])).softmax(-1) @ v_head)
        return torch.cat(parts, 1)

    def gelu(self, x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def see(self, pixels):
        eye = "blip.visual_encoder"
        tokens = [self.weights[f"{eye}.cls_token"][0, 0]]
        for top in range(0, SIDE, PATCH):
            for left in range(0, SIDE, PATCH):
                patch = pixels[:, top : top + PATCH, left : left + PATCH]
                projected = (self.weights[f"{eye}.patch_embed.proj.weight"] * patch).sum((1, 2, 3))
                tokens.append(projected + self.weights[f"{eye}.patch_embed.proj.bias"])
        x = torch.stack(tokens) + self.weights[f"{eye}.pos_embed"][0]
        for number in range(2):
            layer = f"{eye}.blocks.{number}"
            q, k, v = self.linear(self.norm(x, f"{layer}.norm1", 1e-6), f"{layer}.attn.qkv").chunk(3, 1)
            x = x + self.linear(self.attend(q, k, v, 4), f"{layer}.attn.proj")
            hidden = self.gelu(self.linear(self.norm(x, f"{layer}.norm2", 1e-6), f"{layer}.mlp.fc1"))
            x = x + self.linear(hidden, f"{layer}.mlp.fc2")
        return self.norm(x, f"{eye}.norm", 1e-6)

    def read(self, ids, patches):
        bert = "blip.text_encoder"
        words = self.weights[f"{bert}.embeddings.word_embeddings.weight"][ids]
        places = self.weights[f"{bert}.embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(words + places, f"{bert}.embeddings.LayerNorm", 1e-12)
        for number in range(2):
            layer = f"{bert}.encoder.layer.{number}"
            for kind in ("attention", "crossattention"):
                name = f"{layer}.{kind}"
                source = x if kind == "attention" else patches
                q = self.linear(x, f"{name}.self.query")
                k, v = (self.linear(source, f"{name}.self.{part}") for part in ("key", "value"))
                attended = self.linear(self.attend(q, k, v, 3), f"{name}.output.dense")
                x = self.norm(x + attended, f"{name}.output.LayerNorm", 1e-12)
            hidden = self.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
        return x

    def score(self, pixels, ids):
        x = self.read(ids, self.see(pixels))[0]
        for index in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{index}")
        return (x[0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def path(tmp_path, monkeypatch):
    vision, text = blip_configs()
    monkeypatch.setattr(module, "vision_config", lambda: vision)
    monkeypatch.setattr(module, "text_config", lambda: text)
    torch.save(checkpoint(), tmp_path / "ImageReward.pt")
    return tmp_path / "ImageReward.pt"


def test_scores_and_gradients_are_the_formula(path):
    reward = ImageReward.from_pretrained(path, tokenizer=tiny_tokenizer()).double()
    images = random_images(2, 3, SIDE, SIDE, dtype=torch.float64).requires_grad_()
    scores, formula = reward(images, PROMPTS, [{}, {}]), Formula()
    ids = [tiny_tokenizer()(prompt).input_ids for prompt in PROMPTS]  # without padding, which must not matter
    expected = torch.stack([formula.score(normalize(image), row) for image, row in zip(images, ids, strict=True)])
    assert (expected[0] - expected[1]).abs() > 0.01
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(value.sum(), images)[0] for value in (scores, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_the_folder_serves_too(path):
    scores = [
        ImageReward.from_pretrained(place, tokenizer=tiny_tokenizer())(random_images(1, 3, 20, 18), PROMPTS[:1], [{}])
        for place in (path, path.parent, str(path.parent))
    ]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("blip.visual_encoder.cls_token", "embeddings.class_embedding"),
        ("blip.visual_encoder.norm.bias", "post_layernorm.bias"),
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", r"encoder.layers.1.self_attn.qkv.bias"),
        ("blip.text_encoder.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", "encoder.layer.1.crossattention.self.key"),
        ("mlp.layers.7.bias", "7.bias"),
    ],
)
def test_missing_weights_are_named(path, name, named):
    torch.save({key: value for key, value in checkpoint().items() if key != name}, path)
    with pytest.raises(ValueError, match=f"1 weights are missing, such as {named}"):
        ImageReward.from_pretrained(path, tokenizer=tiny_tokenizer())


def test_buffers_and_projections_are_not_needed(path):
    unused = ("blip.vision_proj", "blip.text_proj", "blip.text_encoder.embeddings.position_ids")
    torch.save({key: value for key, value in checkpoint().items() if not key.startswith(unused)}, path)
    ImageReward.from_pretrained(path, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("name", ["blip.text_encoder.pooler.dense.weight", "blip.visual_encoder.head.weight", "queue"])
def test_unknown_weights_are_named(path, name):
    torch.save(checkpoint() | {name: torch.ones(2)}, path)
    last = name.removeprefix("blip.text_encoder.").removeprefix("blip.visual_encoder.")
    with pytest.raises(ValueError, match=f"1 weights are unexpected, such as {last}"):
        ImageReward.from_pretrained(path, tokenizer=tiny_tokenizer())


def test_prompts_are_35_tokens():
    reward = image_reward()
    ids, mask = reward.encode_prompt("a red circle")
    assert ids.shape == mask.shape == (35,)
    assert ids[:5].tolist() == tiny_tokenizer()("a red circle").input_ids and mask.sum() == 5
    ids, mask = reward.encode_prompt("cat " * 60)
    assert ids.shape == (35,) and mask.all() and ids[-1] == tiny_tokenizer().eos_token_id


def test_the_published_architecture():
    """Counts that add up to the published file's size."""
    with torch.device("meta"):
        vision = BlipVisionModel(module.vision_config())
        text = BlipTextModel(module.text_config(), add_pooling_layer=False)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (vision, text)]
    assert counts == [303_301_632, 141_977_088]
    assert text.encoder.layer[0].crossattention.self.key.weight.shape == (768, 1024)
    assert text.encoder.layer[0].attention.self.num_attention_heads == 12
    assert (vision.post_layernorm.eps, text.embeddings.LayerNorm.eps) == (1e-6, 1e-12)
