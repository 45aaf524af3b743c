"""UnifiedReward: reading scores from answers, and a tiny real Qwen2.5-VL that learns to answer."""

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from training_cases import make_trainer
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_leapalign.evaluation import UnifiedReward
from trl_leapalign.evaluation.unified_reward import ALIGNMENT_PROMPT, IMAGE_QUALITY_PROMPT, parse_score
from trl_leapalign.media import to_pil

NAN = math.nan
ANSWERS = [
    ("Final Score: 4", 4.0),
    ("Final Score: 4.25", 4.25),
    ("Final Score: 2.694700002670288", 2.694700002670288),
    ("ring (object): 5\nred (colour): 1\nFinal Score: 3\n", 3.0),
    ("final score:1", 1.0),
    ("FINAL SCORE : 5", 5.0),
    ("**Final Score:** 4.5", 4.5),
    ("**Final Score**: 4", 4.0),
    ("### Final Score: `3.5`", 3.5),
    ("_Final Score_: 2", 2.0),
    ("Final Score:\n\n4", 4.0),
    ("Final Score: [4]", 4.0),
    ("Final Score (1-5): 2.5", 2.5),
    ("Final Score (1 to 5): 2.5", 2.5),
    ("Final Score = 3", 3.0),
    ("Final Score: 4/5", 4.0),
    ("Final Score: 4 out of 5", 4.0),
    ("So the Final Score: 4.", 4.0),
    ("Final Score: 2\nFinal Score: 5", 2.0),
    ("Final Score: <score> means a number. Final Score: 3", 3.0),
    ("Final Score: 45", 45.0),
    ("Final Score: 0.9", 0.9),
    ("Final Score: 10", 10.0),
    ("Final Score: -3", NAN),
    ("Final Score: 3-4", NAN),
    ("Final Score: 1 to 5", NAN),
    ("Final Score: 1\u20135", NAN),
    ("Final Score: 4,5", NAN),
    ("Final Score: 4.5.1", NAN),
    ("Final Score: four", NAN),
    ("Score: 4", NAN),
    ("Semifinal Score: 4", NAN),
    ("The final score is 4", NAN),
    ("", NAN),
]


@pytest.mark.parametrize("answer, score", ANSWERS)
def test_final_scores(answer, score):
    assert parse_score(answer) == pytest.approx(score, nan_ok=True, rel=0)


def test_scores_of_three_axes():
    answer = (
        "Alignment Score (1-5): 3.2000000476837160\n**Coherence Score (1-5):** 2.694700002670288\n"
        "style score (1 \u2013 5) : 5\n"
    )
    assert [parse_score(answer, name) for name in ("alignment", "coherence", "style")] == [
        3.200000047683716,
        2.694700002670288,
        5.0,
    ]
    assert math.isnan(parse_score(answer))
    assert parse_score("Style Score (1-5): 9", "style") == 9.0
    assert math.isnan(parse_score("Final Score: 4", "style"))


SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
WORDS = [
    *SPECIAL,
    *"system user assistant You are a helpful . Final Style Score : 1 2 3 4 5 red blue ring Rate".split(),
]


def tiny_tokenizer(words=WORDS):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[word for word in words if word in SPECIAL[2:]],
    )


def tiny_qwen():
    ids = tiny_tokenizer().convert_tokens_to_ids
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
        )
    ).eval()


def tiny_reward(model=None, **settings):
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112)
    settings = {"prompt": "Rate {prompt}", "max_new_tokens": 8} | settings
    return UnifiedReward(model or tiny_qwen(), tiny_tokenizer(), processor, **settings)


RED, BLUE = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.9])
ASKED = "<|im_start|> system You are a helpful assistant . <|im_end|> <|im_start|> user <|vision_start|>"
IMAGES = torch.stack([color.view(3, 1, 1).expand(3, 56, 84) for color in (RED, BLUE, BLUE)])
PROMPTS = ["a red ring", "a red ring", "a blue ring"]
SAID = ["Final Score : 4", "Final Score : 2", "Style Score : 5"]


def patches(image, grid):
    """Qwen's patches of an image (3, H, W) of the right size: 2 x 2 neighbours together, each frame twice."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = (image.permute(1, 2, 0).double().mul(255).round().numpy() / 255 - mean) / std
    rows = []
    for top in range(0, grid[0], 2):
        for left in range(0, grid[1], 2):
            for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                patch = pixels[14 * y : 14 * y + 14, 14 * x : 14 * x + 14].transpose(2, 0, 1)
                rows.append(np.repeat(patch[:, None], 2, axis=1).ravel())
    return torch.tensor(np.array(rows), dtype=torch.float32)


def asked_by_hand(image, prompt):
    """Token ids and image inputs of a question, without the library."""
    grid = image.shape[1] // 14, image.shape[2] // 14
    words = [*ASKED.split(), *["<|image_pad|>"] * (grid[0] * grid[1] // 4), "<|vision_end|>", "Rate", *prompt.split()]
    words += ["<|im_end|>", "<|im_start|>", "assistant"]
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    return ids, {"pixel_values": patches(image, grid), "image_grid_thw": torch.tensor([[1, *grid]])}


def trained_qwen():
    """A model that has learnt `SAID` for the three images, from inputs made by hand."""
    model = tiny_qwen().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        losses = []
        for image, prompt, text in zip(IMAGES, PROMPTS, SAID, strict=True):
            ids, pixels = asked_by_hand(image, prompt)
            answer = torch.tensor([[WORDS.index(word) for word in (*text.split(), "<|im_end|>")]])
            labels = torch.cat([torch.full_like(ids, -100), answer], 1)
            ids = torch.cat([ids, answer], 1)
            kinds = (ids == WORDS.index("<|image_pad|>")).int()
            losses.append(model(input_ids=ids, labels=labels, mm_token_type_ids=kinds, **pixels).loss)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, "The tiny model has not learnt its answers."
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    return trained_qwen()


def test_scores_are_what_the_model_answers(trained, caplog):
    reward = tiny_reward(trained)
    with caplog.at_level(logging.WARNING):
        scores, details = reward(IMAGES, PROMPTS, [{}] * 3)
        reward(IMAGES[2:], PROMPTS[2:], [{}])
    assert details["answer"] == SAID
    assert scores.dtype == torch.float32 and scores[:2].tolist() == [4, 2] and scores[2].isnan()
    assert details["unparsed"].tolist() == [0, 0, 1]
    assert details["style"][2] == 5 and details["style"][:2].isnan().all()
    assert details["alignment"].isnan().all() and details["coherence"].shape == (3,)
    [record] = [record for record in caplog.records if "unified_reward" in record.name]
    assert "1 of 3 answers have no final score" in record.message and "Style Score : 5" in record.message
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_answers_without_a_score_can_count_as_a_number(trained):
    scores, details = tiny_reward(trained, unparsed_score=1.0)(IMAGES, PROMPTS, [{}] * 3)
    assert scores.tolist() == [4, 2, 1] and details["unparsed"].tolist() == [0, 0, 1]


def test_it_trains(trained, tmp_path):
    """Without gradient, on a model that has never seen such images: whatever it says, training goes on."""
    reward = tiny_reward(trained, unparsed_score=1.0)
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "samples_per_prompt": 2}
    trainer = make_trainer(tmp_path, None, reward, prompts=["a red ring"], **settings)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 2 and all(1 <= value <= 5 for value in rewards)


def test_another_score_can_count(trained, caplog):
    scores, details = tiny_reward(trained, score="style")(IMAGES[2:], PROMPTS[2:], [{}])
    assert scores.tolist() == [5] and details["unparsed"].tolist() == [0]
    assert not [record for record in caplog.records if "unified_reward" in record.name]


def test_decoding_is_greedy_whatever_the_model_prefers():
    """An untrained model repeats itself, so sampling or a penalty would change its answer."""
    model = tiny_qwen()
    ids, pixels = asked_by_hand(IMAGES[0], PROMPTS[0])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(8):
            kinds = (ids == WORDS.index("<|image_pad|>")).int()
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    expected = [WORDS[token] for token in ids[0, start:] if WORDS[token] not in SPECIAL]
    assert len(set(expected)) < len(expected) and WORDS.index("<|im_end|>") not in ids[0, start:]
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2, top_k=5)
    assert tiny_reward(model).answer(to_pil(IMAGES[:1])[0], PROMPTS[0]).split() == expected


@pytest.mark.parametrize("size", [(56, 84), (112, 28)])
def test_inputs_equal_those_made_by_hand(size):
    """Token by token and patch by patch, also which tokens are the image's: positions depend on it."""
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    found = tiny_reward()._inputs(to_pil(image[None])[0], "a blue ring")
    ids, pixels = asked_by_hand(image, "a blue ring")
    assert torch.equal(found["input_ids"], ids) and torch.equal(found["image_grid_thw"], pixels["image_grid_thw"])
    assert torch.equal(found["mm_token_type_ids"], (ids == WORDS.index("<|image_pad|>")).int())
    assert found["attention_mask"].all()
    torch.testing.assert_close(found["pixel_values"], pixels["pixel_values"], rtol=1e-4, atol=1e-5)


def test_images_are_squashed_when_asked(trained):
    image = torch.rand(1, 3, 70, 112, generator=torch.Generator().manual_seed(0))
    picture = to_pil(image)[0]
    squashed = tiny_reward(trained, image_size=(56, 84))._inputs(picture, "a ring")
    assert squashed["image_grid_thw"].tolist() == [[1, 4, 6]]
    expected = np.array(picture.resize((84, 56), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    torch.testing.assert_close(squashed["pixel_values"], patches(torch.tensor(expected), (4, 6)), rtol=1e-4, atol=1e-5)
    assert tiny_reward(trained)._inputs(picture, "a ring")["image_grid_thw"].tolist() == [[1, 4, 8]]


def test_prompts_are_asked_as_they_are():
    reward = tiny_reward(prompt="Rate {prompt} . {score} {prompt}")
    found = reward._inputs(to_pil(IMAGES[:1])[0], "a {red} ring")["input_ids"][0].tolist()
    text = reward.tokenizer.decode(found)
    assert text.count("red") == 2 and text.count("ring") == 2
    assert "{prompt}" in ALIGNMENT_PROMPT and "Final Score:" in ALIGNMENT_PROMPT
    assert "Final Score:" in IMAGE_QUALITY_PROMPT


def test_from_pretrained(trained, tmp_path):
    reward = tiny_reward(trained)
    for part in (reward.model, reward.tokenizer, reward.image_processor):
        part.save_pretrained(tmp_path)
    loaded = UnifiedReward.from_pretrained(tmp_path, dtype=torch.float32, prompt="Rate {prompt}", max_new_tokens=8)
    assert type(loaded.model) is Qwen2_5_VLForConditionalGeneration and loaded.model.dtype == torch.float32
    scores, _ = loaded(IMAGES[:2], PROMPTS[:2], [{}] * 2)
    assert scores.tolist() == [4, 2]
    with pytest.raises(FileNotFoundError, match=r"Cannot find 'CodeGoat24/UnifiedReward-qwen-7b'.*source='FOLDER'"):
        UnifiedReward.from_pretrained("CodeGoat24/UnifiedReward-qwen-7b")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": " "}, "prompt=' '"),
        ({"score": "beauty"}, "score='beauty' is unknown"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_reward(**settings)


def test_models_of_another_kind_are_refused():
    other = tiny_tokenizer([word for word in WORDS if word != "<|image_pad|>"])
    with pytest.raises(ValueError, match=r"do not mark images by <\|image_pad\|>"):
        UnifiedReward(tiny_qwen(), other, Qwen2VLImageProcessorPil())
    with pytest.raises(ValueError, match="UnifiedReward got 1 prompts for 2 images"):
        tiny_reward()(IMAGES[:2], ["a"], [{}] * 2)


def test_the_conversation_is_that_of_the_chat_template():
    reward = tiny_reward()
    plain = reward._chat("Rate red ring.")
    reward.tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "<|im_end|>{% endfor %}{{ '<|im_start|>assistant ' if add_generation_prompt }}"
    )
    assert reward._chat("Rate red ring.") == (
        "<|im_start|>user <|vision_start|><|image_pad|><|vision_end|>Rate red ring.<|im_end|><|im_start|>assistant "
    )
    assert plain != reward._chat("Rate red ring.")
    assert reward._chat("<|image_pad|>").count("<|image_pad|>") == 1
