import math
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from trl_leapalign.rewards import RewardSet, check_finite
from trl_leapalign.training.losses import reward_loss

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CALL = (["a", "b", "c"], [{}, {}, {}])


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def contrast(images, prompts, metadata):
    return images.var((1, 2, 3)), {"peak": images.amax((1, 2, 3)), "text": "x", "number": 3}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, images, prompts, metadata):
        return self.layer(images.mean((2, 3)))[:, 0]


def test_scores_of_several_rewards():
    images = IMAGES.clone().requires_grad_()
    scores = RewardSet([brightness, contrast], weights=[2, -1])(images, *CALL)
    rows = torch.stack([IMAGES.mean((1, 2, 3)), IMAGES.var((1, 2, 3))])
    assert scores.rewards.shape == (2, 3) and torch.equal(scores.rewards, rows)
    torch.testing.assert_close(scores.total, 2 * rows[0] - rows[1], rtol=1e-6, atol=0)
    assert scores.rewards.requires_grad and not scores.total.requires_grad
    contrasts = {f"rewards/contrast{name}" for name in ("", "/peak", "/number")}
    assert set(scores.metrics) == {"rewards/brightness", *contrasts}
    assert torch.equal(scores.metrics["rewards/contrast"], rows[1])
    assert torch.equal(scores.metrics["rewards/contrast/peak"], IMAGES.amax((1, 2, 3)))
    assert scores.metrics["rewards/contrast/number"] == 3
    assert not any(value.requires_grad for value in scores.metrics.values())
    assert scores.details["brightness"] == {} and scores.details["contrast"]["text"] == "x"


def test_scores_of_one_reward():
    scores = RewardSet(contrast)(IMAGES, *CALL)
    assert set(scores.metrics) == {"rewards/contrast/peak", "rewards/contrast/number"}
    assert torch.equal(scores.total, IMAGES.var((1, 2, 3)))


def test_what_is_reported_keeps_no_graph():
    def reward(images, prompts, metadata):
        values = images.mean((1, 2, 3))
        return values, {"value": values * 2, "map": images * 2}

    scores = RewardSet(reward)(IMAGES.clone().requires_grad_(), *CALL)
    assert set(scores.metrics) == {"rewards/reward/value"}  # a map has no one number a sample
    assert not any(value.requires_grad for value in (*scores.metrics.values(), *scores.details["reward"].values()))


def test_the_gradient_of_the_images_is_the_rewards():
    images = IMAGES.double().requires_grad_()
    scores = RewardSet([brightness, contrast])(images, *CALL)
    [gradient] = torch.autograd.grad(scores.rewards.sum(), images)
    mean = images.detach().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, 1 / 48 + 2 * (images.detach() - mean) / 47, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_rewards_are_float32_at_least(dtype, expected):
    assert RewardSet(lambda i, p, m: brightness(i, p, m).to(dtype))(IMAGES, *CALL).rewards.dtype == expected


def test_names_are_unique():
    functions = [brightness, brightness, contrast, lambda *_: 0, lambda *_: 0, Model(), max]
    assert RewardSet(functions).names == [
        *("brightness_0", "brightness_1", "contrast", "lambda_3", "lambda_4", "Model", "max"),
    ]


def test_defaults_of_weights_and_thresholds():
    rewards = RewardSet((brightness, contrast))
    assert (rewards.weights, rewards.thresholds) == ([1.0, 1.0], [None, None])


def test_modules_are_frozen():
    model = Model()
    RewardSet([model, brightness]).prepare(torch.device("cpu"))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda i, p, m: i.mean((1, 2, 3)).detach(), ValueError, "'lambda' is detached from the images"),
        (lambda i, p, m: i.mean(), ValueError, r"shape \(\) for 3 images"),
        (lambda i, p, m: i.mean((2, 3)), ValueError, r"shape \(3, 3\) for 3 images"),
        (lambda i, p, m: i.mean((1, 2, 3))[:2], ValueError, r"shape \(2,\) for 3 images"),
        (lambda i, p, m: i.mean((1, 2, 3)).tolist(), TypeError, "returned a list"),
        (lambda i, p, m: None, TypeError, "returned a NoneType"),
        (lambda i, p, m: torch.tensor(i.mean((1, 2, 3)).numpy()), ValueError, "'lambda' turns tensors into NumPy"),
        (lambda i, p, m: (i.mean((1, 2, 3)).tolist(), {}), TypeError, "returned a list"),
        (lambda i, p, m: (i.mean((1, 2, 3)), None), TypeError, "returned a NoneType beside its rewards"),
        (lambda i, p, m: torch.ones(3, dtype=torch.int64), TypeError, "torch.int64, which has no gradient"),
    ],
)
def test_broken_rewards_are_refused(function, error, message):
    with pytest.raises(error, match=message):
        RewardSet(function)(IMAGES.clone().requires_grad_(), *CALL)


class TakesFour:
    def __call__(self, images, prompts, metadata, step):
        return images.mean((1, 2, 3))


class TakesOne(nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (Model, r"Model is a class. Pass an instance of it: Model\(...\)"),
        (lambda images: images, r"'lambda' is called as reward\(images, prompts, metadata\), but takes \(images\)"),
        (TakesFour(), r"'TakesFour' is called as .*metadata, step\)"),
        (TakesOne(), r"'TakesOne' is called as .*takes \(images\)"),
        (3, "A reward must be callable"),
    ],
)
def test_what_cannot_be_called_as_a_reward_is_refused(function, message):
    with pytest.raises(TypeError, match=message):
        RewardSet([brightness, function])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weights": {"brightness": 1.0, "contrast": 2.0}}, TypeError, "reward_weights=.* must be a list of numbers"),
        ({"weights": 2.0}, TypeError, "reward_weights=2.0 must be a list"),
        ({"weights": [1.0, "2"]}, ValueError, r"reward_weights\[1\]='2' must be a finite number"),
        ({"weights": [1.0, None]}, ValueError, r"reward_weights\[1\]=None must be a finite number"),
        ({"weights": [math.nan, 1.0]}, ValueError, r"reward_weights\[0\]=nan"),
        ({"weights": [0.0, 0.0]}, ValueError, "are all zero, so nothing would be learnt"),
        ({"thresholds": [None, math.inf]}, ValueError, r"reward_threshold\[1\]=inf must be a finite number"),
        ({"thresholds": [True, None]}, ValueError, r"reward_threshold\[0\]=True"),
        ({"thresholds": "ab"}, TypeError, "reward_threshold='ab' must be a list"),
    ],
)
def test_weights_and_thresholds_are_finite_numbers(settings, error, message):
    with pytest.raises(error, match=message):
        RewardSet([brightness, contrast], **settings)


def test_a_reward_that_changes_the_images_is_refused():
    def in_place(images, prompts, metadata):
        return images.mul_(2).mean((1, 2, 3))

    for images in (IMAGES.clone(), IMAGES.clone().requires_grad_() * 1.0):
        with pytest.raises(ValueError, match="'in_place' changes the images in place"):
            RewardSet([in_place, brightness])(images, *CALL)
    with torch.inference_mode():  # which counts no versions
        RewardSet(brightness)(IMAGES.clone(), *CALL)


def test_a_reward_cannot_change_the_prompts_of_the_next():
    def careless(images, prompts, metadata):
        prompts.pop()
        metadata[0]["seen"] = True
        return brightness(images, prompts, metadata)

    def careful(images, prompts, metadata):
        assert (prompts, metadata) == (["a", "b", "c"], [{}, {}, {}])
        return brightness(images, prompts, metadata)

    prompts, metadata = ["a", "b", "c"], [{}, {}, {}]
    RewardSet([careless, careful])(IMAGES, prompts, metadata)
    assert (prompts, metadata) == (["a", "b", "c"], [{}, {}, {}])


def test_rewards_that_are_not_finite_are_named_with_their_prompt():
    scores = RewardSet([brightness, lambda i, p, m: brightness(i, p, m) / torch.tensor([1, 0, 1])])(IMAGES, *CALL)
    with pytest.raises(ValueError, match="1 of 6 rewards are not finite, such as 'lambda' of 'b': inf"):
        check_finite(scores, ["brightness", "lambda"], CALL[0])


def test_without_a_graph_rewards_need_none():
    with torch.no_grad():
        assert RewardSet(brightness)(IMAGES, *CALL).rewards.shape == (1, 3)


# The loss


def generate(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_loss_is_the_formula():
    rewards, weights = generate(3, 4).requires_grad_(), generate(4, seed=1).abs()
    coefficients, thresholds = [0.5, 2.0, 1.5], [0.1, None, -0.3]
    loss = reward_loss(rewards, weights, coefficients, thresholds)
    expected, gradient = 0.0, torch.zeros(3, 4, dtype=torch.float64)
    for m in range(3):
        for b in range(4):
            value, w = rewards[m, b].item(), weights[b].item()
            if thresholds[m] is None:
                expected += w * coefficients[m] * -value / 4
                gradient[m, b] = -w * coefficients[m] / 4
            elif value < thresholds[m]:
                expected += w * coefficients[m] * (thresholds[m] - value) / 4
                gradient[m, b] = -w * coefficients[m] / 4
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    [actual] = torch.autograd.grad(loss, rewards)
    torch.testing.assert_close(actual, gradient, rtol=1e-14, atol=0)
    assert (gradient == 0).any() and (gradient != 0).any()


def test_rewards_above_their_threshold_have_neither_loss_nor_gradient():
    rewards = torch.tensor([[0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    loss = reward_loss(rewards, torch.tensor([1.0, 1.0], dtype=torch.float64), [1.0], [0.4])
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, rewards)[0].tolist() == [[0.0, 0.0]]


def test_nan_is_not_hidden_by_a_threshold():
    rewards = torch.tensor([[math.nan, 1.0]])
    assert reward_loss(rewards, torch.ones(2), [1.0], [0.5]).isnan()
    assert reward_loss(rewards, torch.ones(2), [1.0], [None]).isnan()


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        reward_loss(torch.zeros(2, 3), torch.ones(3), [1.0], [None, None])


def test_numpy_numbers_are_logged():
    def reward(images, prompts, metadata):
        extra = {"scalar": np.float32(0.25), "whole": np.int64(3), "yes": np.bool_(True), "word": np.str_("x")}
        return images.mean((1, 2, 3)), {**extra, "each": np.arange(len(images)), "map": np.zeros((2, 5))}

    metrics = RewardSet(reward)(torch.rand(3, 3, 4, 4), ["a"] * 3, [{}] * 3).metrics
    assert {name.rpartition("/")[2]: value.tolist() for name, value in metrics.items()} == {
        "scalar": 0.25,
        "whole": 3.0,
        "yes": 1.0,
        "each": [0.0, 1.0, 2.0],
    }


def test_nothing_in_the_details_keeps_its_graph():
    Pair = namedtuple("Pair", "left right")

    def reward(images, prompts, metadata):
        values = images.mean((1, 2, 3))
        deep = {"a": [values, (values, {"b": values})], "pair": Pair(values, 3), 5: {"x"}}
        return values, {"deep": deep, "kept": Kept(values), "text": "x"}

    details = RewardSet(reward)(torch.rand(2, 3, 4, 4, requires_grad=True), ["a"] * 2, [{}] * 2).details["reward"]
    deep = details["deep"]
    tensors = [deep["a"][0], deep["a"][1][0], deep["a"][1][1]["b"], deep["pair"].left, details["kept"]["values"]]
    assert len(tensors) == 5 and not any(tensor.requires_grad for tensor in tensors)
    assert deep["pair"].right == 3 and deep[5] == {"x"} and details["text"] == "x"


@dataclass
class Kept:
    values: torch.Tensor
