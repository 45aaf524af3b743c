"""What every built-in reward keeps: the contract, gradients, precision, memory settings, errors."""

import copy

import pytest
import torch
from double_precision import double_precision
from reward_cases import CASES, INSTRUCTION, PROMPTS, SIDE, clip_model, hpsv3, image_reward, random_images
from transformers import BlipTextConfig, BlipTextModel

from examples.tiny import tiny_tokenizer
from trl_leapalign.rewards import (
    AestheticScore,
    CLIPReward,
    HPSv2,
    ImageReward,
    PickScore,
    RewardModel,
    RewardSet,
)

ROWS = [{}, {}, {}]


@pytest.fixture(scope="module")
def rewards():
    return {name: build() for name, build in CASES.items()}


@pytest.fixture(params=CASES)
def reward(request, rewards):
    return rewards[request.param]


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (24, 40), (5, 7), (300, 200)])
def test_every_shape_has_a_score_and_a_gradient(reward, size):
    images = random_images(3, 3, *size).requires_grad_()
    scores = reward(images, PROMPTS, ROWS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()
    [gradient] = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 1e-6).all()  # of each image
    assert not any(parameter.requires_grad for parameter in reward.parameters()) and not reward.training


def test_batches_equal_singles(reward):
    reward = copy.deepcopy(reward).double()
    images = random_images(3, 3, 40, 24, dtype=torch.float64)
    together = reward(images, PROMPTS, ROWS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1], [{}]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together.std() > 1e-3
    assert not torch.allclose(reward(images.flip(0), PROMPTS, ROWS), together, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "left"),
    [("clip", 1), ("pickscore", 1), ("clipscore", 2), ("aesthetic", 2), ("imagereward", 2)],
)
def test_what_is_seen_of_a_wide_image(name, left, rewards):
    """The centre; of odd margins, torchvision's references leave out other columns than transformers'."""
    images = random_images(3, 3, SIDE, SIDE + 3)
    inside = rewards[name](images[..., left : left + SIDE], PROMPTS, ROWS)
    assert torch.equal(rewards[name](images, PROMPTS, ROWS), inside)
    assert not torch.allclose(rewards[name](images[..., 3 - left :][..., :SIDE], PROMPTS, ROWS), inside, atol=1e-4)


def test_hpsv2_sees_the_whole_image_between_black_bars(rewards):
    images = random_images(3, 3, SIDE, SIDE - 7)
    framed = torch.zeros(3, 3, SIDE, SIDE)
    framed[..., 3:12] = images
    assert torch.equal(rewards["hpsv2"](images, PROMPTS, ROWS), rewards["hpsv2"](framed, PROMPTS, ROWS))


def test_the_prompt_matters_except_for_aesthetics(reward):
    images = random_images(1, 3, 16, 16).expand(3, -1, -1, -1)
    scores = reward(images, PROMPTS, ROWS)
    assert (scores.std() < 1e-6) == isinstance(reward, AestheticScore)


def test_a_score_depends_on_its_own_image_alone(reward):
    images = random_images(3, 3, 24, 24).requires_grad_()
    [gradient] = torch.autograd.grad(reward(images, PROMPTS, ROWS)[1], images)
    assert gradient[1].any() and not gradient[0].any() and not gradient[2].any()


def test_gradient_is_the_slope_of_the_score(reward):
    """Through the whole reward in float64, by central differences."""
    reward, step = copy.deepcopy(reward).double(), 1e-5
    images = random_images(1, 3, 20, 28, dtype=torch.float64).mul(0.9).add(0.05).requires_grad_()
    scores = reward(images, PROMPTS[:1], [{}])
    assert scores.dtype == torch.float64
    with double_precision():  # Qwen2-VL normalises in float32 otherwise
        [gradient] = torch.autograd.grad(reward(images, PROMPTS[:1], [{}]).sum(), images)
    direction = random_images(1, 3, 20, 28, seed=1, dtype=torch.float64) - 0.5
    with double_precision():
        ahead, behind = (reward(images.detach() + sign * step * direction, PROMPTS[:1], [{}]) for sign in (1, -1))
    slope = (ahead - behind).item() / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_scores_of_bfloat16_images_are_those_of_their_values(reward):
    images = random_images(3, 3, 24, 40).bfloat16()
    scores = reward(images, PROMPTS, ROWS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reward(images.float(), PROMPTS, ROWS))


def smooth_images(seed):
    coarse = random_images(3, 3, 6, 6, seed=seed)
    return torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic").clamp(0, 1)


def test_rounding_images_to_bfloat16_costs_no_more_than_saving_them(reward):
    """Below 0.5 it is finer than 8 bits, above it is as coarse; cosines of large images move by less than 1e-4."""
    differences = {"bfloat16": [], "8 bits": []}
    for seed in range(4):
        for images in (random_images(3, 3, 256, 256, seed=seed), smooth_images(seed)):
            score = reward(images, PROMPTS, ROWS)
            differences["bfloat16"].append(reward(images.bfloat16(), PROMPTS, ROWS) - score)
            differences["8 bits"].append(reward((images * 255).round() / 255, PROMPTS, ROWS) - score)
    rms = {name: torch.cat(each).square().mean().sqrt() for name, each in differences.items()}
    assert 0 < rms["bfloat16"] < rms["8 bits"]
    if not isinstance(reward, ImageReward):  # whose scores spread five times as far
        assert torch.cat(differences["bfloat16"]).abs().max() < 1e-4


def test_models_in_bfloat16_score_in_float32(reward):
    half = copy.deepcopy(reward).to(torch.bfloat16)
    images = random_images(3, 3, 24, 40).requires_grad_()
    scores = half(images, PROMPTS, ROWS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(images, PROMPTS, ROWS), rtol=0.05, atol=0.05)
    assert torch.autograd.grad(scores.sum(), images)[0].isfinite().all()


def test_autocast_changes_nothing(reward):
    images = random_images(3, 3, 24, 40)
    expected = reward(images, PROMPTS, ROWS)
    reward._encoded_prompts.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert (reward(images, PROMPTS, ROWS) - expected).abs().max() < 1e-6
        rounded = reward(images.bfloat16(), PROMPTS, ROWS)
    reward._encoded_prompts.clear()
    assert (rounded - reward(images.bfloat16().float(), PROMPTS, ROWS)).abs().max() < 1e-6


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"batch_size": 1, "activation_checkpointing": True}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_memory_settings_change_neither_scores_nor_gradients(name, rewards, settings):
    images = random_images(3, 3, 24, 20, dtype=torch.float64).requires_grad_()
    results = []
    for reward in (copy.deepcopy(rewards[name]).double(), CASES[name](**settings).double()):
        scores = reward(images, PROMPTS, ROWS)
        results.append((scores.detach(), *torch.autograd.grad(scores.sum(), images)))
    (scores, gradient), (small_scores, small_gradient) = results
    torch.testing.assert_close(small_scores, scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["imagereward", "hpsv3"])
def test_checkpointing_keeps_no_activations(name):
    def kept(**settings):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        reward = CASES[name](**settings)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            reward(random_images(3, 3, 24, 20).requires_grad_(), PROMPTS, ROWS)
        return sum(sizes)

    plain, checkpointed = kept(), kept(activation_checkpointing=True, batch_size=1)
    assert checkpointed < plain / 20


def test_micro_batches_are_of_the_size_that_was_set():
    reward = CASES["clip"](batch_size=2)
    sizes = []
    reward.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    reward(random_images(3, 3, 16, 16), PROMPTS, ROWS)
    assert sizes == [2, 1]


def test_prompts_are_encoded_once_and_without_a_graph(reward):
    calls = []
    encode = type(reward).encode_prompt
    reward._encoded_prompts.clear()
    reward.encode_prompt = lambda prompt: (calls.append((prompt, torch.is_grad_enabled())), encode(reward, prompt))[1]
    images = random_images(3, 3, 16, 16)
    for _ in range(2):
        reward(images.requires_grad_(), ["two dogs", "a red circle", "two dogs"], ROWS)
    del reward.encode_prompt
    assert calls == [("two dogs", False), ("a red circle", False)]


class Weighted(RewardModel):
    """A subclass that multiplies pixels by what it made of the prompt."""

    def encode_prompt(self, prompt):
        return torch.full((), float(len(prompt)))

    def score(self, images, texts):
        return (images * texts[0]).mean((1, 2, 3))


def test_prompts_that_were_encoded_in_inference_mode_serve_in_training():
    reward = Weighted()
    images = random_images(1, 3, 4, 4)
    with torch.inference_mode():
        reward(images, ["abc"], [{}])
    [gradient] = torch.autograd.grad(reward(images.requires_grad_(), ["abc"], [{}]), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 3 / 48))


def test_prompts_are_encoded_anew_for_another_dtype():
    reward = CASES["clip"]()
    images = random_images(1, 3, 16, 16, dtype=torch.float64)
    single = reward(images, PROMPTS[:1], [{}])
    double = reward.double()(images, PROMPTS[:1], [{}])
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    fresh = CASES["clip"]().double()(images, PROMPTS[:1], [{}])
    assert torch.equal(double, fresh)


IMAGES = random_images(3, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES * 1.01 + 0.01, ValueError, r"takes images in \[0, 1\], but got values from 0\.0.* to 1\.0"),
        (IMAGES - 0.1, ValueError, r"images in \[0, 1\].*become images / 2 \+ 0.5"),
        (IMAGES * 255, ValueError, r"images / 255"),
        (IMAGES.log(), ValueError, "takes images"),
        (IMAGES / 0, ValueError, "takes images"),
        (torch.where(IMAGES > 0.5, torch.nan, IMAGES), ValueError, "values from nan to nan.*NaN comes from a decoder"),
        (IMAGES[0], ValueError, r"of shape \(B, 3, H, W\), but got \(3, 8, 8\)\.$"),
        (IMAGES[:, :1], ValueError, r"but got \(3, 1, 8, 8\)"),
        (random_images(3, 4, 8, 8), ValueError, r"but got \(3, 4, 8, 8\)\. If the fourth .* pass images\[:, :3\]"),
        (random_images(2, 8, 9, 3), ValueError, r"but got \(2, 8, 9, 3\)\. The channels come second: pass images.perm"),
        (IMAGES[:, None], ValueError, "is a video's. Wrap it: VideoReward"),
        (IMAGES[:0], ValueError, r"got no pixels: the shape of the images is \(0, 3, 8, 8\)"),
        (IMAGES[..., :0], ValueError, "got no pixels"),
        ((IMAGES * 255).to(torch.uint8), TypeError, r"got torch.uint8. Pass images.float\(\) / 255"),
        (IMAGES.numpy(), TypeError, "but got ndarray"),
        ([IMAGES[0]], TypeError, "but got list"),
    ],
)
def test_images_that_cannot_be_scored(rewards, images, error, message):
    with pytest.raises(error, match=message):
        rewards["clip"](images, PROMPTS, ROWS)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "CLIPReward got 0 prompts for 3 images"),
        (PROMPTS[:2], ValueError, "got 2 prompts for 3 images. Pass one prompt an image"),
        ("a red circle", TypeError, r"takes a list of prompts, one an image, but got 'a red circle'. Pass \[prompt\]"),
        (None, TypeError, "but got None"),
        (["a", None, "b"], TypeError, "takes prompts that are strings, but got None"),
        ([["a"], ["b"], ["c"]], TypeError, r"strings, but got \['a'\]"),
    ],
)
def test_prompts_that_cannot_be_scored(rewards, prompts, error, message):
    with pytest.raises(error, match=message):
        rewards["clip"](IMAGES, prompts, ROWS)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_empty_prompts_are_refused_where_they_are_read(reward, empty):
    prompts = ["a cat", empty, "a dog"]
    if isinstance(reward, AestheticScore):
        assert reward(IMAGES, prompts, ROWS).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"compares images with prompts, but prompt 1 is"):
            reward(IMAGES, prompts, ROWS)


def test_every_reward_checks_its_images(reward):
    with pytest.raises(ValueError, match=f"{type(reward).__name__} takes images in"):
        reward(IMAGES * 2 - 1, PROMPTS, ROWS)


def test_rounding_beyond_the_range_is_let_through(rewards):
    for value, outside in ((-9e-4, -1.1e-3), (1.0009, 1.0011)):
        images = IMAGES.clone()
        images[1, 2, 3, 4] = value
        assert rewards["clip"](images, PROMPTS, ROWS).isfinite().all()
        images[1, 2, 3, 4] = outside
        with pytest.raises(ValueError, match="takes images in"):
            rewards["clip"](images, PROMPTS, ROWS)


def test_settings_that_are_refused():
    for settings, message in [
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"activation_checkpointing": "yes"}, "activation_checkpointing='yes' must be True or False"),
        ({"scale": "logits"}, r"scale='logits' is unknown; choose one of \('cosine', 'reference'\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            PickScore(clip_model(), tiny_tokenizer(), **settings)
    with pytest.raises(ValueError, match=r"version='2.2' of HPSv2 is unknown; choose one of \['2.0', '2.1'\]"):
        HPSv2(clip_model("gelu"), tiny_tokenizer(), version="2.2")
    with pytest.raises(ValueError, match=r"activation is \['quick_gelu'\], but HPSv2 is trained with 'gelu'"):
        HPSv2(clip_model(), tiny_tokenizer())


def test_models_of_another_kind_are_refused():
    for build in (lambda model: CLIPReward(model, tiny_tokenizer()), lambda model: AestheticScore(model, model)):
        with pytest.raises(TypeError, match=r"must be a transformers\.CLIPModel, got CLIPVisionModel"):
            build(clip_model().vision_model)
    blind = BlipTextModel(
        BlipTextConfig(num_hidden_layers=1, hidden_size=24, is_decoder=False), add_pooling_layer=False
    )
    whole = image_reward()
    with pytest.raises(ValueError, match="The text encoder has no cross attention, so it does not see the image"):
        ImageReward(whole.vision, blind, whole.head, whole.tokenizer)
    with pytest.raises(ValueError, match=r"has 0 times <\|Reward\|>; it must be once"):
        hpsv3(instruction="rate {text_prompt}")
    with pytest.raises(ValueError, match=r"has 2 times \{text_prompt\}"):
        hpsv3(instruction=INSTRUCTION + "{text_prompt}")


def test_recommended_thresholds(rewards):
    thresholds = {name: reward.threshold for name, reward in rewards.items()}
    assert thresholds == {
        **{"clip": None, "clipscore": None, "aesthetic": None, "imagereward": 2.0},
        **{"pickscore": 0.4, "hpsv2": 0.55, "hpsv3": 13.5},
    }
    assert HPSv2(clip_model("gelu"), tiny_tokenizer(), version="2.0").threshold is None
    scaled = PickScore(clip_model(), tiny_tokenizer(), scale="reference")
    assert scaled.threshold == pytest.approx(0.4 * 2.718281828459045**4.5, rel=1e-6)


def test_rewards_bring_their_thresholds_where_none_are_set(rewards):
    functions = [rewards["pickscore"], lambda i, p, m: i.mean((1, 2, 3)), rewards["hpsv3"]]
    assert RewardSet(functions).thresholds == [0.4, None, 13.5]
    assert RewardSet(functions, thresholds=[None, 1.0, 2.0]).thresholds == [None, 1.0, 2.0]
    assert RewardSet(rewards["pickscore"], thresholds=[None]).thresholds == [None]
