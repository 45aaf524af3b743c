"""PickScore, CLIPScore and the aesthetic score: scales, loading, and the aesthetic head as one affine map."""

import math

import pytest
import torch
import torch.nn.functional as F
from reward_cases import CASES, SIDE, clip_model, random_images, randomize

from examples.tiny import tiny_tokenizer
from trl_leapalign.rewards import AestheticScore, CLIPReward, CLIPScore, PickScore, aesthetic
from trl_leapalign.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from trl_leapalign.rewards.reward_model import linear_head

PROMPTS = ["a red circle", "two dogs"]


def pixels_of(images, mode="bicubic"):
    """Shortest edge to 16 and the centre, for 32 x 48 images."""
    resized = F.interpolate(images, (16, 24), mode=mode, antialias=True)[..., 4:20]
    mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (resized - mean) / std


@pytest.mark.parametrize(
    ("reward_class", "activation", "mode"),
    [(CLIPReward, "quick_gelu", "bicubic"), (PickScore, "gelu", "bicubic"), (CLIPScore, "quick_gelu", "bilinear")],
)
@torch.no_grad()
def test_scores_are_the_logits_of_the_model(reward_class, activation, mode):
    model = clip_model(activation).double()
    images = random_images(2, 3, 32, 48, dtype=torch.float64)
    logits = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        ids = torch.tensor([tiny_tokenizer()(prompt).input_ids])
        logits.append(model(input_ids=ids, pixel_values=pixels_of(image[None], mode)).logits_per_image[0, 0])
    logits = torch.stack(logits)
    reference = reward_class(model, tiny_tokenizer(), scale="reference")(images, PROMPTS, [{}, {}])
    cosine = reward_class(model, tiny_tokenizer())(images, PROMPTS, [{}, {}])
    torch.testing.assert_close(reference, logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cosine, logits / math.exp(4.5), rtol=1e-9, atol=1e-9)


def test_bilinear_and_bicubic_differ():
    images = random_images(2, 3, 32, 48)
    scores = [kind(clip_model(), tiny_tokenizer())(images, PROMPTS, [{}, {}]) for kind in (CLIPReward, CLIPScore)]
    assert (scores[0] - scores[1]).abs().max() > 1e-4


def test_long_prompts_are_cut():
    reward = CASES["clip"]()
    image = random_images(1, 3, SIDE, SIDE)
    long, longer = (reward(image, ["cat " * count], [{}]) for count in (6, 30))
    assert long == longer  # both fill the 8 positions


@pytest.fixture
def folder(tmp_path):
    clip_model().save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    head = {f"layers.{name}": value for name, value in randomize(linear_head(24)).state_dict().items()}
    torch.save(head, tmp_path / "head.pth")
    return tmp_path


@pytest.mark.parametrize(("kind", "name"), [(CLIPReward, "clip"), (CLIPScore, "clipscore")])
def test_folders_are_loaded(folder, kind, name):
    images = random_images(2, 3, 20, 30)
    expected = CASES[name]()(images, PROMPTS, [{}, {}])
    loaded = kind.from_pretrained(folder / "clip", tokenizer=folder / "clip", scale="reference", batch_size=1)
    assert (loaded.scale, loaded.batch_size) == ("reference", 1)
    torch.testing.assert_close(loaded(images, PROMPTS, [{}, {}]), expected * math.exp(4.5), rtol=1e-5, atol=1e-6)


def test_a_model_brings_its_tokenizer(folder):
    loaded = CLIPReward.from_pretrained(folder / "clip")
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(ValueError, match=r"CLIPReward has no model of its own. Pass path_or_id"):
        CLIPReward.from_pretrained()


def test_folders_are_loaded_strictly(folder):
    model = clip_model()
    weights = model.state_dict()
    del weights["visual_projection.weight"]
    model.save_pretrained(folder / "clip", state_dict=weights)
    with pytest.raises(ValueError, match=r"1 weights are missing, such as visual_projection\.weight"):
        CLIPReward.from_pretrained(folder / "clip")


# The aesthetic score


def affine(head, width):
    """The head without activations as w e + b."""
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for index in (0, 2, 4, 6, 7):
        weight = head[f"layers.{index}.weight"].double() @ weight
        bias = head[f"layers.{index}.weight"].double() @ bias + head[f"layers.{index}.bias"].double()
    return weight[0], bias[0]


def test_the_aesthetic_score_is_affine_in_the_normalised_features(folder):
    head = torch.load(folder / "head.pth", weights_only=True)
    reward = AestheticScore.from_pretrained(folder / "clip", head=folder / "head.pth", sha256=None).double()
    images = random_images(2, 3, 32, 48, dtype=torch.float64)
    weight, bias = affine(head, 24)
    with torch.no_grad():
        features = clip_model().double().get_image_features(pixel_values=pixels_of(images)).pooler_output
    expected = features @ weight / features.norm(dim=1) + bias
    scores = reward(images, PROMPTS, [{}, {}])
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    assert (scores - bias).abs().max() <= weight.norm()
    assert torch.equal(scores, reward(images, ["", "x"], [{}, {}]))


def test_the_head_must_be_the_published_one(folder):
    with pytest.raises(ValueError, match=r"has the SHA-256 digest \w{64}, not 21dd590f\w+: it is cut off or another"):
        AestheticScore.from_pretrained(folder / "clip", head=folder / "head.pth")


def test_a_head_of_another_shape_is_refused(folder):
    torch.save({f"layers.{name}": value for name, value in linear_head(20).state_dict().items()}, folder / "head.pth")
    with pytest.raises(ValueError, match=r"head.pth cannot be read as the weights of this model: Error"):
        AestheticScore.from_pretrained(folder / "clip", head=folder / "head.pth", sha256=None)
    torch.save({"layers.0.weight": torch.ones(1024, 24)}, folder / "head.pth")
    with pytest.raises(ValueError, match=r"9 weights are missing, such as 0.bias"):
        AestheticScore.from_pretrained(folder / "clip", head=folder / "head.pth", sha256=None)


def test_without_a_network_the_error_says_where_the_head_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    message = r"HF_HUB_OFFLINE is set. Fetch https://github.com/christophschuhmann/.* pass its path: head='FOLDER/sac\+"
    with pytest.raises(FileNotFoundError, match=message):
        AestheticScore.from_pretrained()
    monkeypatch.setattr(aesthetic.constants, "HF_HUB_OFFLINE", False)

    def refuse(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match="GitHub does not give it"):
        AestheticScore.from_pretrained()
    with pytest.raises(FileNotFoundError, match=r"There is no file /nowhere/head\.pth\. Fetch https://"):
        AestheticScore.from_pretrained(head="/nowhere/head.pth")
