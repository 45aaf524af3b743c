"""Texts that are read and compared, by a reader of colours, and by PaddleOCR's models where they are installed."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from trl_leapalign.rewards import OCRReward, RewardSet
from trl_leapalign.rewards import ocr as module
from trl_leapalign.rewards.ocr import edit_similarity, exact_match, levenshtein

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0)}


def color_reader(image: np.ndarray) -> str:
    """Names the colour that is nearest to each quarter of the image, from left to right."""
    assert image.dtype == np.uint8 and image.shape[2] == 3
    columns = [part.reshape(-1, 3).mean(0) for part in np.array_split(image, 2, axis=1)]
    return " ".join(min(COLORS, key=lambda name: np.abs(column - COLORS[name]).sum()) for column in columns)


def striped(*names, height=4):
    """An image with a stripe of each colour, shape (1, 3, height, 8)."""
    stripes = [torch.tensor(COLORS[name]).view(3, 1, 1).expand(3, height, 4) / 255 for name in names]
    return torch.cat(stripes, dim=-1)[None]


def test_distances():
    words = ["", "a", "ab", "kitten", "sitting", "Open", "opne"]
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "ab") == 2 and levenshtein("ab", "ba") == 2
    for first in words:
        for second in words:
            distance = levenshtein(first, second)
            assert distance == levenshtein(second, first) and (distance == 0) == (first == second)
            assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))
            for third in words:
                assert distance <= levenshtein(first, third) + levenshtein(third, second)


@pytest.mark.parametrize(
    ("text", "wanted", "similarity", "exact"),
    [
        ("OPEN", "open", 1.0, 1.0),
        ("o p\ne n", "Open", 1.0, 1.0),
        ("we are open now", "Open", 1.0, 0.0),
        ("opne", "open", 0.5, 0.0),
        ("", "open", 0.0, 0.0),
        ("something else entirely", "open", 0.0, 0.0),
        ("ope", "open", 0.75, 0.0),
    ],
)
def test_scores(text, wanted, similarity, exact):
    assert edit_similarity(text, wanted) == similarity
    assert exact_match(text, wanted) == exact


def test_rewards_of_images():
    images = torch.cat([striped("red", "blue"), striped("blue", "blue"), striped("green", "red")])
    prompts = ['a sign that says "red blue"', "a sign \u201cRed blue\u201d at night", "a sign"]
    reward = OCRReward(color_reader)
    assert reward.differentiable is False
    rewards, details = reward(images, prompts, [{}, {}, {"text": "green red"}])
    # "blueblue" becomes "redblue" by 3 replacements and 1 deletion, of 7 characters
    torch.testing.assert_close(rewards, torch.tensor([1.0, 1 - 4 / 7, 1.0]))
    assert details["text"] == ["red blue", "blue blue", "green red"] and rewards.dtype == torch.float32
    exact = OCRReward(color_reader, score="exact", text_column="sign")
    assert exact(images, prompts, [{"sign": "blue blue"}] * 3)[0].tolist() == [0, 1, 0]
    scores = RewardSet(reward)(images, prompts, [{}, {}, {"text": "green red"}])
    assert scores.details["OCRReward"]["text"][2] == "green red"


def test_what_cannot_be_read():
    image = striped("red", "blue")
    with pytest.raises(ValueError, match=r"'a sign' asks for no text. .* column 'text'"):
        OCRReward(color_reader)(image, ["a sign"], [{}])
    with pytest.raises(ValueError, match="asks for no text"):
        OCRReward(color_reader)(image, ["a sign"], [{"text": " "}])
    with pytest.raises(TypeError, match="must return the text in an image, but returned None"):
        OCRReward(lambda image: None)(image, ['"a"'], [{}])
    with pytest.raises(ValueError, match="score='levenshtein' is unknown"):
        OCRReward(color_reader, score="levenshtein")
    with pytest.raises(TypeError, match="reader must be called"):
        OCRReward("rapidocr")


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"rapidocr and onnxruntime: pip install \"trl-leapalign\[ocr\]\""):
        OCRReward()


def test_real_models_read_a_sign():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    pictures = []
    for text in ("HELLO World", "Goodbye", ""):
        picture = Image.new("RGB", (320, 96), "white")
        ImageDraw.Draw(picture).text((20, 25), text, fill="red", font=ImageFont.load_default(40))
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    rewards, details = OCRReward()(torch.stack(pictures), ['a sign "Hello World"'] * 3, [{}] * 3)
    assert rewards[0] == 1 and rewards[1] < 0.5 and rewards[2] == 0
    assert details["text"][0].casefold() == "hello world" and details["text"][2] == ""
