"""HPSv3 against transformers' own forward pass of the whole conversation, on a checkpoint in its layout."""

import logging
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image
from reward_cases import INSTRUCTION, hpsv3, qwen_config, qwen_model, qwen_tokenizer, random_images, randomize
from safetensors.torch import save_file
from transformers import Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_leapalign.rewards import HPSv3
from trl_leapalign.rewards import hpsv3 as module
from trl_leapalign.rewards.hpsv3 import preference_head, qwen2_vl_7b, read_instruction

PROMPTS = ["a red circle", "a blue square left of a cat"]
SIZE = (24, 48)  # 3 x 6 tokens of 8 pixels; smart_resize leaves it as it is at 1152 pixels
SETTINGS = {"image_pixels": 24 * 48, "instruction": INSTRUCTION}


def byte_images():
    values = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    return values, torch.tensor(values).permute(0, 3, 1, 2) / 255


def conversation(prompt):
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * 18
        + f"<|vision_end|>the photo of {prompt} and <|Reward|> a dog<|im_end|>\n<|im_start|>assistant\n"
    )


def whole_forward(head, positions):
    """Both samples in one padded batch, with a mask, through Qwen2VLForConditionalGeneration."""
    tokenizer, model = qwen_tokenizer(), qwen_model()
    batch = tokenizer(
        [conversation(prompt) for prompt in PROMPTS], padding=True, add_special_tokens=False, return_tensors="pt"
    )
    size = {"shortest_edge": 64, "longest_edge": 64 * 1000}
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    pixels = processor([Image.fromarray(values) for values in byte_images()[0]], return_tensors="pt")
    assert pixels.image_grid_thw.tolist() == [[1, 6, 12]] * 2
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=pixels.pixel_values,
        image_grid_thw=pixels.image_grid_thw,
        position_ids=positions(batch.input_ids),
        mm_token_type_ids=(batch.input_ids == model.config.image_token_id).int(),
        output_hidden_states=True,
    )
    [rows, columns] = (batch.input_ids == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero().T
    assert rows.tolist() == [0, 1] and columns[0] != columns[1]
    x = output.hidden_states[-1][rows, columns]
    for index in (0, 3, 5):
        x = x @ head[f"{index}.weight"].T + head[f"{index}.bias"]
        x = x.relu() if index != 5 else x
    return x[:, 0]


def plain_positions(ids):
    return torch.arange(ids.shape[1]).expand(3, *ids.shape)


@torch.no_grad()
def test_scores_are_those_of_plain_positions():
    """HPSv3 was trained with positions 0, 1, 2, ..., not with Qwen2-VL's two-dimensional ones for images."""
    reward = hpsv3(**SETTINGS)
    scores = reward(byte_images()[1], PROMPTS, [{}, {}])
    head = reward.head.state_dict()
    torch.testing.assert_close(scores, whole_forward(head, plain_positions), rtol=1e-4, atol=1e-5)
    assert (scores - whole_forward(head, lambda ids: None)).abs().max() > 1e-3


@torch.no_grad()
def test_images_are_resized_to_the_area():
    reward = hpsv3(instruction=INSTRUCTION)
    patches, grid = reward.preprocess(random_images(2, 3, 20, 90))
    # 16 x 88 would be too large: 20 / sqrt(1800 / 1024) = 15.1 and 67.9 are rounded down to multiples of 8.
    assert grid == (2, 16) and patches.shape == (2 * 2 * 16, 3 * 2 * 4 * 4)


def checkpoint(old_names):
    """A checkpoint with the language head, by the names of transformers before or after 4.52."""
    weights = {name: value.clone() for name, value in qwen_model().state_dict().items()}
    if old_names:
        renamed = {}
        for name, value in weights.items():
            if name.startswith("model.visual."):
                renamed["visual." + name[len("model.visual.") :]] = value
            elif name.startswith("model.language_model."):
                renamed["model." + name[len("model.language_model.") :]] = value
            else:
                renamed[name] = value
        weights = renamed
    head = randomize(preference_head(32)).state_dict()
    return weights | {f"rm_head.{name}": value for name, value in head.items()}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "qwen2_vl_7b", qwen_config)

    def load(weights, **settings):
        save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "HPSv3.safetensors")
        settings = {"tokenizer": qwen_tokenizer(reward_token=False), "dtype": torch.float32, **SETTINGS, **settings}
        return HPSv3.from_pretrained(tmp_path, **settings)

    return load


@pytest.mark.parametrize("old_names", [True, False])
def test_checkpoints_of_both_names(load, old_names):
    weights = checkpoint(old_names)
    assert ("visual.patch_embed.proj.weight" in weights) == old_names and "lm_head.weight" in weights
    images = random_images(2, 3, 40, 33)
    expected = hpsv3(**SETTINGS)(images, PROMPTS, [{}, {}])
    assert torch.equal(load(weights)(images, PROMPTS, [{}, {}]), expected)
    assert torch.equal(load(weights, tokenizer=qwen_tokenizer())(images, PROMPTS, [{}, {}]), expected)


def test_the_model_is_in_bfloat16_and_the_head_in_float32(load):
    reward = load(checkpoint(True), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in reward.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in reward.head.parameters()} == {torch.float32}
    images = random_images(2, 3, 40, 33).requires_grad_()
    scores = reward(images, PROMPTS, [{}, {}])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, hpsv3(**SETTINGS)(images, PROMPTS, [{}, {}]), rtol=0.05, atol=0.02)
    [gradient] = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("model.norm.weight", "language_model.norm.weight"),
        ("model.layers.1.mlp.up_proj.weight", "language_model.layers.1.mlp.up_proj.weight"),
        ("model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("rm_head.3.bias", "3.bias"),
    ],
)
def test_missing_weights_are_named(load, name, named):
    with pytest.raises(ValueError, match=f"1 weights are missing, such as {named}"):
        load({key: value for key, value in checkpoint(True).items() if key != name})


@pytest.mark.parametrize(("name", "named"), [("rm_head.7.weight", "7.weight"), ("value_head.weight", "value_head")])
def test_unknown_weights_are_named(load, name, named):
    with pytest.raises(ValueError, match=f"1 weights are unexpected, such as {named}"):
        load(checkpoint(True) | {name: torch.ones(2)})


def test_a_tokenizer_of_another_size_is_refused(load):
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match=r"The tokenizer has 32 tokens, but .* has embeddings for 31"):
        load(checkpoint(True), tokenizer=tokenizer)


def test_the_published_architecture():
    """8,288,465,408 parameters with the language head, and 3,687,474 of the head."""
    with torch.device("meta"):
        model = Qwen2VLModel(qwen2_vl_7b(151_658))
    count = sum(parameter.numel() for parameter in model.parameters()) + 151_658 * 3584
    assert count == 8_288_465_408
    assert sum(parameter.numel() for parameter in preference_head(3584).parameters()) == 3_687_474
    text = model.config.text_config
    assert text.rope_parameters["mrope_section"] == [16, 24, 24] and text.rope_parameters["rope_theta"] == 1e6
    assert (text.rms_norm_eps, text.num_key_value_heads, text.hidden_act) == (1e-6, 4, "silu")
    assert (model.config.vision_config.spatial_merge_size, model.config.vision_config.temporal_patch_size) == (2, 2)


@pytest.mark.parametrize("prompt", ["a <|Reward|> cat", "<|image_pad|>"])
def test_prompts_with_special_tokens_are_refused(prompt):
    with pytest.raises(ValueError, match=r"The prompt '.*' holds <\|\w+\|>, which HPSv3 keeps for itself. Take it out"):
        hpsv3().encode_prompt(prompt)


def test_braces_in_prompts_are_prompts():
    images = random_images(2, 3, 32, 32)
    reward = hpsv3()
    assert reward(images, ["{cat}", "{0} {text_prompt}"], [{}, {}]).isfinite().all()


def test_a_tokenizer_without_the_reward_token_is_refused():
    whole = hpsv3()
    with pytest.raises(ValueError, match=r"The tokenizer has no <\|Reward\|>. Take that of Qwen"):
        HPSv3(whole.model, whole.head, qwen_tokenizer(reward_token=False), instruction=INSTRUCTION)


# The instruction


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """An installed `hpsv3` whose source file is to be written."""

    class Found:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(metadata, "distribution", lambda name: {"hpsv3": Found()}[name])
    path = tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py"
    path.parent.mkdir(parents=True)
    return path


FIRST, SECOND = "Rate {text_prompt}. \n\n".ljust(2523), "\nNow: <|Reward|>".ljust(67)


def test_the_instruction_is_read_from_the_source(distribution, caplog):
    lines = ["import does_not_exist", "OTHER = [1]", "a.b = 2", f"INSTRUCTION = {FIRST!r}"]
    lines.append(f"prompt_with_special_token = '''{SECOND}'''")
    distribution.write_text("\n".join(lines), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert read_instruction() == FIRST + SECOND
    assert not caplog.records
    whole = hpsv3()
    assert HPSv3(whole.model, whole.head, whole.tokenizer).instruction == FIRST + SECOND


def test_an_abridged_instruction_is_said(distribution, caplog):
    code = f"INSTRUCTION = {FIRST[:100]!r}\nprompt_with_special_token = {SECOND!r}\n"
    distribution.write_text(code, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert read_instruction() == FIRST[:100] + SECOND
    assert "is not that of hpsv3 1.0.0, so scores may not compare" in caplog.text


def test_another_source_is_refused(distribution):
    distribution.write_text("INSTRUCTION = 3\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"has no texts .* this is another hpsv3. Run `pip install --no-deps hpsv3==1.0"
    ):
        read_instruction()
    distribution.unlink()
    with pytest.raises(FileNotFoundError, match=r"Run `pip install --no-deps hpsv3==1\.0\.0`, or pass instruction="):
        read_instruction()


def test_without_the_distribution(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r"Run `pip install --no-deps hpsv3==1\.0\.0`, or pass instruction="):
        HPSv3.from_pretrained("MizzenAI/HPSv3")  # before anything is fetched
