"""CLIPReward against a plain formula and other batches."""

import copy

import pytest
import torch
import torch.nn.functional as F

from examples.tiny import tiny_clip, tiny_tokenizer
from trl_leapalign.rewards import CLIPReward
from trl_leapalign.rewards.preprocessing import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop

PROMPTS = ["a red circle", "a blue square left of a cat"]


@pytest.fixture
def reward() -> CLIPReward:
    return CLIPReward(tiny_clip(), tiny_tokenizer())


def test_score_is_the_cosine_of_projected_features(reward):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = reward(images, PROMPTS, [{}, {}])
    pixels = (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([reward.tokenizer(prompt).input_ids])
        with torch.no_grad():
            output = reward.model(input_ids=ids, pixel_values=pixels[index : index + 1])
        cosine = output.logits_per_image / reward.model.logit_scale.exp()
        torch.testing.assert_close(scores[index], cosine[0, 0], rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_images_and_not_the_model(reward):
    images = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reward(images, PROMPTS, [{}, {}]).sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in reward.parameters())


def test_batch_equals_singles(reward):
    reward = copy.deepcopy(reward).double()
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = reward(images, PROMPTS, [{}, {}])
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1], [{}]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 48), (10, 12), (33, 70)])
def test_preprocess_keeps_the_centre(size):
    images = torch.rand(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixels = normalize(resize_and_crop(images, 16))
    assert pixels.shape == (1, 3, 16, 16)
    scale = 16 / min(size)
    resized = F.interpolate(images, size=(int(size[0] * scale), int(size[1] * scale)), mode="bicubic", antialias=True)
    top, left = ((edge - 16) // 2 for edge in resized.shape[2:])
    expected = resized[..., top : top + 16, left : left + 16]
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(pixels * std + mean, expected)
