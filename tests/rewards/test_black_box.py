"""BlackBox: what a reward without gradient may return, and how it is called."""

import threading

import numpy as np
import pytest
import torch

from trl_leapalign.rewards import BlackBox, RewardSet

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS, METADATA = ["a", "b", "c"], [{}, {}, {}]


@pytest.mark.parametrize(
    "answer",
    [
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([1, 0, 2]),
        torch.tensor([1.0, 0.0, 2.0], requires_grad=True),
        np.array([1.0, 0.0, 2.0], dtype=np.float16),
        np.array([1, 0, 2]),
        [1, 0.0, np.float64(2)],
        (1, 0, 2),
        [torch.tensor(1.0), False, 2],
        ([True, False, 2], {"note": ["x", "y", "z"]}),
    ],
)
def test_numbers_of_any_kind_are_rewards(answer):
    scores = RewardSet(BlackBox(lambda i, p, m: answer))(IMAGES.clone().requires_grad_(), PROMPTS, METADATA)
    assert torch.equal(scores.rewards, torch.tensor([[1.0, 0.0, 2.0]])) and not scores.rewards.requires_grad
    assert scores.details["lambda"] == (
        {"note": ["x", "y", "z"]} if isinstance(answer, tuple) and len(answer) == 2 else {}
    )


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ([1.0, None, 2.0], TypeError, "cannot be read as numbers"),
        (["1", "2", "3"], TypeError, "texts are no numbers"),
        (None, TypeError, "cannot be read as numbers"),
        (0.5, TypeError, "cannot be read as numbers"),
        ([1.0, 2.0], ValueError, r"shape \(2,\) for 3 images"),
        (np.ones((3, 1)), ValueError, r"shape \(3, 1\) for 3 images"),
    ],
)
def test_anything_else_is_refused(answer, error, message):
    with pytest.raises(error, match=message):
        RewardSet(BlackBox(lambda i, p, m: answer))(IMAGES, PROMPTS, METADATA)


def test_it_is_called_without_gradients_on_images_of_its_own():
    def careless(images, prompts, metadata):
        assert not torch.is_grad_enabled() and not images.requires_grad
        images.numpy()[:] = 0.0
        prompts.clear()
        return torch.zeros(3)

    images = IMAGES.clone().requires_grad_()
    rewards = RewardSet([BlackBox(careless), lambda i, p, m: i.mean((1, 2, 3))])
    scores = rewards(images, PROMPTS, METADATA)
    assert torch.equal(images.detach(), IMAGES) and scores.rewards.requires_grad
    assert (rewards.black_boxes, rewards.decoding) == (["careless"], "differentiable")


def test_a_model_inside_goes_to_the_device_frozen():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, images, prompts, metadata):
            return self.scale * images.mean((1, 2, 3))

    model = Model().train()
    RewardSet(BlackBox(model)).prepare(torch.device("cpu"))
    assert not model.training and not model.scale.requires_grad


def test_threads_call_at_the_same_time_and_keep_the_order():
    together = threading.Barrier(3, timeout=30)

    def slow(images, prompts, metadata):
        assert not torch.is_grad_enabled()
        together.wait()  # is passed only if three calls wait
        return [ord(prompts[0])], {"pixels": images.sum((1, 2, 3)), "answer": prompts[0]}

    rewards, report = BlackBox(slow, num_threads=3)(IMAGES, PROMPTS, METADATA)
    assert rewards.tolist() == [97, 98, 99] and report["answer"] == PROMPTS
    assert torch.equal(report["pixels"], IMAGES.sum((1, 2, 3)))


def test_failures_are_tried_again_and_said_at_the_end(monkeypatch):
    pauses, tried = [], []
    monkeypatch.setattr("time.sleep", pauses.append)

    def failing(images, prompts, metadata):
        tried.append(prompts)
        if len(tried) < 3:
            raise TimeoutError("busy")
        return [1.0] * len(images)

    assert BlackBox(failing, retries=2)(IMAGES, PROMPTS, METADATA)[0].tolist() == [1, 1, 1] and pauses == [1, 2]
    tried.clear()
    with pytest.raises(ConnectionError, match="'failing' failed 2 times on 'a', at last with TimeoutError: busy"):
        BlackBox(failing, retries=1)(IMAGES, PROMPTS, METADATA)


def test_a_reward_that_lost_its_graph_is_told_of_black_box():
    images = IMAGES.clone().requires_grad_()
    for reward in (lambda i, p, m: i.mean((1, 2, 3)).detach(), lambda i, p, m: [1.0, 2.0, 3.0]):
        with pytest.raises((TypeError, ValueError), match=r"BlackBox\(reward\)"):
            RewardSet(reward)(images, PROMPTS, METADATA)


def test_settings_are_checked():
    for settings in ({"batch_size": 0}, {"num_threads": 0}, {"retries": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BlackBox(lambda i, p, m: [], **settings)
    with pytest.raises(TypeError, match="is not"):
        BlackBox(3)
    with pytest.raises(ValueError, match="inputs='pixels'"):
        reward = BlackBox(lambda i, p, m: [])
        reward.inputs = "pixels"
        RewardSet(reward)
