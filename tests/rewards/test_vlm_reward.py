"""Questions to vision-language models, against the models' own forward pass on what their processors prepare."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from reward_cases import random_images
from training_cases import PROMPTS as TRAINING_PROMPTS
from training_cases import make_trainer, sample
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from vlm_cases import MODELS, TEMPLATE, WORDS, vlm_image_processor, vlm_model, vlm_reward, vlm_tokenizer

from examples.tiny import tiny_flux
from trl_leapalign.rewards import RewardSet, VLMReward
from trl_leapalign.rewards.pixels import PixelValues
from trl_leapalign.rewards.vlm import fill

PROMPTS = ["a red ring", "a blue square left of two dog"]
RATING = {"1": 1, "2": 2, "3": 3, "4": 4, "5": 5}
SIZE = {"llava": (16, 16)}  # others take any multiple of 8


def byte_images(height, width, number=2):
    """Pictures that no rounding changes, as bytes and as a tensor."""
    values = np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return values, torch.tensor(values).permute(0, 3, 1, 2).double() / 255


def own_logits(model, name, picture, question):
    """Log-probabilities of the first token of the answer, of one picture, without the library."""
    tokenizer = vlm_tokenizer()
    pixels = vlm_image_processor(name)([Image.fromarray(picture)], return_tensors="pt")
    number = 16 if name == "llava" else int(pixels["image_grid_thw"][0].prod()) // 4
    text = (
        "<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * number
        + f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer(text, return_tensors="pt")
    if name != "llava":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == WORDS.index("<|image_pad|>")).int()
    pixels["pixel_values"] = pixels["pixel_values"].to(model.dtype)
    return model(**inputs, **pixels).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_yes_or_no_is_what_the_model_says_of_the_processors_pixels(name):
    """In float64, where the processor's float32 pixels leave an error of 1e-7 times what the layers make of it."""
    model = vlm_model(name).double()
    pictures, images = byte_images(*SIZE.get(name, (16, 24)))
    reward = vlm_reward(name=name, model=model)
    rewards, details = reward(images, PROMPTS, [{}, {}])
    for index, prompt in enumerate(PROMPTS):  # of different lengths, so that one is padded in the batch
        question = f"Does this picture show {prompt}? Answer with one word: yes or no."
        log_p = own_logits(model, name, pictures[index], question)
        yes, no = (log_p[[WORDS.index(w) for w in words]].exp().sum() for words in (("yes", "Yes"), ("no", "No")))
        assert rewards[index] == pytest.approx((yes.log() - no.log()).item(), abs=1e-4)
        assert details["answered"][index] == pytest.approx((yes + no).item(), rel=1e-4)
    assert (rewards[0] - rewards[1]).abs() > 1e-2


@torch.no_grad()
def test_ratings_are_expected_values():
    model = vlm_model().double()
    pictures, images = byte_images(16, 24)
    reward = vlm_reward("Is it sharp?", model=model, answers=RATING)
    rewards, details = reward(images, ["", ""], [{}, {}])  # the question has no prompt, so none is needed
    for index in range(2):
        log_p = own_logits(model, "qwen2.5-vl", pictures[index], "Is it sharp? Answer with one word: 1, 2, 3, 4 or 5.")
        p = log_p[[WORDS.index(word) for word in RATING]].exp()
        assert rewards[index] == pytest.approx((p @ torch.arange(1.0, 6.0).double() / p.sum()).item(), abs=1e-5)
        assert details["answered"][index] == pytest.approx(p.sum().item(), rel=1e-4)
    share = vlm_reward("Is it sharp?", model=model, answers={"yes": 1, "no": 0})(images, PROMPTS, [{}, {}])[0]
    odds = vlm_reward("Is it sharp?", model=model, closing=" Answer with one word: yes or no.")
    torch.testing.assert_close(share, odds(images, PROMPTS, [{}, {}])[0].sigmoid(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_finite_differences(name):
    """Through resizing too: 20 x 28 pixels are no multiple of 8.

    The models compute norms and positions in float32, whatever their weights are: 1e-6 in the reward, 1e-4 in a slope
    over 2e-2. The rest is the third derivative's.
    """
    reward = vlm_reward(name=name, model=vlm_model(name).double())
    images = (random_images(2, 3, 20, 28, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    reward(images, PROMPTS, [{}, {}])[0].sum().backward()
    direction = images.grad / images.grad.norm()
    with torch.no_grad():
        ends = [reward(images + step * direction, PROMPTS, [{}, {}])[0].sum() for step in (-1e-2, 1e-2)]
    assert ((ends[1] - ends[0]) / 2e-2).item() == pytest.approx(images.grad.norm().item(), rel=1e-2)
    assert images.grad[0].norm() > 1e-3 and images.grad[1].norm() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_and_checkpointing_change_nothing(name):
    images, model = random_images(3, 3, 16, 24, dtype=torch.float64), vlm_model(name).double()
    prompts, results = [*PROMPTS, "two red ring"], []
    for settings in ({}, {"batch_size": 1}, {"batch_size": 2, "activation_checkpointing": True}):
        leaf = images.clone().requires_grad_()
        rewards, details = vlm_reward(name=name, model=model, **settings)(leaf, prompts, [{}] * 3)
        rewards.square().sum().backward()
        results.append((rewards.detach(), details["answered"], leaf.grad))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_several_questions_with_metadata():
    model, images = vlm_model(), random_images(2, 3, 16, 16)
    rows = [{"color": "red", "count": 2}, {"color": "blue", "count": 1}]
    questions = ["Is it {color}?", "Is it {count} {prompt}?"]
    rewards, details = vlm_reward(questions, model=model)(images, PROMPTS, rows)
    for number, question in enumerate(questions):
        alone = vlm_reward(question, model=model)(images, PROMPTS, rows)[0]
        torch.testing.assert_close(details[f"question_{number}"], alone)
    torch.testing.assert_close(rewards, (details["question_0"] + details["question_1"]) / 2)
    scores = RewardSet(vlm_reward(questions, model=model))(images, PROMPTS, rows)
    assert {"rewards/VLMReward/answered", "rewards/VLMReward/question_1"} <= scores.metrics.keys()


def test_placeholders():
    assert fill("Is {prompt} {n}-fold? {} {2} {{x}}", "a", {"n": 3, "x": "y"}) == "Is a 3-fold? {} {2} {y}"
    assert fill("{prompt}", "a {n}", {"n": 3}) == "a {n}"
    with pytest.raises(ValueError, match="needs 'color', but the metadata of 'a ring' have only \\['count'\\]"):
        fill("Is it {color}?", "a ring", {"count": 1, "color": None})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(40, 64), (65, 48), (160, 33)])
def test_pixels_are_the_processors(name, size):
    """Pictures without high frequencies, which PIL resizes in two passes with rounding to 8 bits after each."""
    processor = vlm_image_processor(name)
    rows, columns = torch.linspace(0, 3, size[0])[:, None], torch.linspace(0, 4, size[1])[None]
    planes = [0.5 + 0.3 * torch.sin(rows * a + columns * b) for a, b in ((1, 0.5), (0.3, 1), (0.8, -0.7))]
    images = (torch.stack(planes)[None] * 255).round() / 255
    pil = Image.fromarray((images[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy())
    expected, actual = processor(images=[pil], return_tensors="pt"), PixelValues(processor)(images)
    assert expected.keys() == actual.keys()
    if name != "llava":
        assert torch.equal(expected["image_grid_thw"], actual["image_grid_thw"])
    levels = (expected["pixel_values"] - actual["pixel_values"]).abs().max() * max(processor.image_std) * 255
    assert levels < 1.5  # half a level, and half a level times the filter's absolute sum, twice at the edges


def test_fewer_pixels():
    processor = vlm_image_processor()
    images = random_images(1, 3, 32, 48)
    assert PixelValues(processor)(images)["image_grid_thw"].tolist() == [[1, 8, 12]]
    assert PixelValues(processor, 16 * 24)(images)["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert vlm_reward(max_pixels=16 * 24)(images, PROMPTS[:1], [{}])[0].isfinite()
    with pytest.raises(ValueError, match="max_pixels=63 does not fit Qwen2VLImageProcessorPil"):
        PixelValues(processor, 63)
    with pytest.raises(ValueError, match="max_pixels=1000 does not fit CLIPImageProcessorPil"):
        PixelValues(vlm_image_processor("llava"), 1000)


@pytest.mark.parametrize(
    "processor",
    [
        LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32]]),
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 24, "width": 24}),
        CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False),
        CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False, do_normalize=False),
        CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False, rescale_factor=1 / 127.5),
    ],
    ids=["tiles", "padded crop", "no crop", "not normalised", "rescaled"],
)
def test_processors_that_do_something_else_are_refused(processor):
    with pytest.raises(ValueError, match="cannot be made differentiable"):
        PixelValues(processor)


def test_squashing_processors_are_known():
    processor = CLIPImageProcessorPil(size={"height": 16, "width": 24}, do_center_crop=False)
    assert PixelValues(processor)(random_images(2, 3, 30, 20))["pixel_values"].shape == (2, 3, 16, 24)


def without(*left_out):
    return [word if word not in left_out else f"other{index}" for index, word in enumerate(WORDS)]


def test_bad_questions():
    with pytest.raises(ValueError, match="no single token for the answer 'no'"):
        vlm_reward(tokenizer=vlm_tokenizer(without("no", "No")))
    vlm_reward(tokenizer=vlm_tokenizer(without("no")))  # "No" is left
    with pytest.raises(ValueError, match="no single token for the answer 'rather good'"):
        vlm_reward(answers={"rather good": 1, "no": 0})
    with pytest.raises(ValueError, match="'Yes' and 'yes' share a token"):
        vlm_reward(answers={"Yes": 1, "yes": 0})
    with pytest.raises(ValueError, match="two at least, of different values"):
        vlm_reward(answers={"yes": 1})
    with pytest.raises(TypeError, match="must be a dict of texts"):
        vlm_reward(answers=["yes", "no"])
    for question, kind in (("", ValueError), ([], ValueError), (["Is it?", " "], ValueError), (3, TypeError)):
        with pytest.raises(kind, match="question="):
            vlm_reward(question)
    with pytest.raises(ValueError, match="needs tokenizer="):
        VLMReward("Is it?", vlm_model())
    with pytest.raises(ValueError, match=r"takes none of .*\['dtype'\]"):
        vlm_reward(dtype=torch.float32)


def test_bad_chat_templates():
    tokenizer = vlm_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template that can be used"):
        vlm_reward(tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("<|image_pad|>", "")
    with pytest.raises(ValueError, match="has 0 image tokens"):
        vlm_reward(tokenizer=tokenizer)


def test_bad_batches():
    reward, images = vlm_reward("Is it {color} {prompt}?"), random_images(1, 3, 16, 16)
    with pytest.raises(ValueError, match="needs 'color'"):
        reward(images, ["a ring"], [{}])
    with pytest.raises(ValueError, match="has 2 image tokens"):
        reward(images, ["a <|image_pad|>"], [{"color": "red"}])
    with pytest.raises(ValueError, match=r"prompt 0 is ''"):
        reward(images, [""], [{"color": "red"}])
    with pytest.raises(ValueError, match="which is a video's"):
        reward(images[:, None], ["a ring"], [{"color": "red"}])


@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava"])
def test_loaded_from_a_folder(tmp_path, name, caplog):
    model = vlm_model(name)
    for part in (model, vlm_tokenizer(), vlm_image_processor(name)):
        part.save_pretrained(tmp_path)
    images = random_images(2, 3, 16, 24)
    loaded = VLMReward("Does this picture show {prompt}?", tmp_path, dtype=torch.float32)
    expected = vlm_reward(name=name, model=model)(images, PROMPTS, [{}, {}])[0]
    assert torch.equal(loaded(images, PROMPTS, [{}, {}])[0], expected)
    half = VLMReward("Does this picture show {prompt}?", tmp_path)
    assert half.model.dtype == torch.bfloat16
    rewards = half(images, PROMPTS, [{}, {}])[0]
    assert rewards.dtype == torch.float32 and (rewards - expected).abs().max() < 0.3
    with pytest.raises(FileNotFoundError, match="pass model="):
        VLMReward("Is it?", "no/model")


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    for part in (vlm_model(), vlm_tokenizer(), vlm_image_processor()):
        part.save_pretrained(tmp_path)
    images = random_images(2, 3, 16, 24).requires_grad_()
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    reward = VLMReward("Is it {prompt}?", tmp_path, dtype=torch.float32, quantization_config=quantization)
    assert any(type(module).__name__ == "Linear4bit" for module in reward.modules())
    rewards = RewardSet(reward)
    rewards.prepare(torch.device("cpu"))
    scores = rewards(images, PROMPTS, [{}, {}])
    scores.rewards.sum().backward()
    assert images.grad.norm() > 0
    exact = VLMReward("Is it {prompt}?", tmp_path, dtype=torch.float32)
    leaf = images.detach().clone().requires_grad_()
    expected = exact(leaf, PROMPTS, [{}, {}])[0]
    expected.sum().backward()
    assert 0 < (scores.rewards[0] - expected).abs().max() < 1.0  # weights of 4 bits are off by some percent
    assert torch.cosine_similarity(images.grad.flatten(), leaf.grad.flatten(), dim=0) > 0.5


def test_training_raises_the_probability_of_yes(tmp_path, caplog):
    """A tiny FLUX learns to please a tiny Qwen2.5-VL, on noise that it was not trained on."""
    caplog.set_level(logging.ERROR)
    pipeline, model = tiny_flux(), vlm_model()
    tokenizer = vlm_tokenizer()

    def yes():
        images = torch.cat([sample(pipeline, seed) for seed in range(100, 108)])
        share = vlm_reward(model=model, tokenizer=tokenizer, answers={"yes": 1, "no": 0})
        with torch.no_grad():
            return share(images, ["a red circle"] * 8, [{}] * 8)[0].mean().item()

    before = yes()
    reward = vlm_reward(model=model, tokenizer=tokenizer)
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "dry_run": True}
    trainer = make_trainer(tmp_path, pipeline, reward, prompts=TRAINING_PROMPTS[:1], **settings)
    trainer.train()
    assert yes() > before + 0.05
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[-1] > rewards[0]
