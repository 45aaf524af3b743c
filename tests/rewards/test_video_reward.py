"""Image rewards of the frames of videos, videos in files, and sound."""

import numpy as np
import pytest
import torch
from PIL import Image
from training_cases import make_trainer, same, trained_weights

from examples.tiny import tiny_clip, tiny_tokenizer
from examples.tiny_video import tiny_wan
from trl_leapalign.evaluation import evaluate
from trl_leapalign.media import read_preview, read_samples, save_sample
from trl_leapalign.rewards import CLIPReward, RewardSet, VideoReward
from trl_leapalign.training.callbacks import SampleFiles
from trl_leapalign.training.metrics import saturated

SETTINGS = {"sample_kwargs": {"num_frames": 5, "max_sequence_length": 16}, "sample_guidance_scale": 1.0}
PROMPTS = ["a red circle", "two dogs"]
METADATA = [{"number": 3}, {"number": 5}]


def videos(*shape, seed=0):
    return torch.rand(*(shape or (2, 7, 3, 8, 8)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted(images, prompts, metadata):
    """Differs with the frame, the prompt and the row, and is not linear."""
    factors = images.new_tensor([len(p) * row["number"] for p, row in zip(prompts, metadata, strict=True)])
    rewards = factors * images.square().mean((1, 2, 3))
    return rewards, {"bright": images.mean((1, 2, 3)), "count": len(images), "total": images.sum()}


@pytest.mark.parametrize(
    ("options", "frames"),
    [({}, range(7)), ({"every": 3}, (0, 3, 6)), ({"every": 9}, (0,)), ({"num_random": 7}, range(7))],
)
@pytest.mark.parametrize("more", [{}, {"batch_size": 4, "activation_checkpointing": True}])
def test_the_mean_over_frames_and_its_gradient(options, frames, more):
    own, other = videos().requires_grad_(), videos().requires_grad_()
    rewards, details = VideoReward(weighted, **options, **more)(own, PROMPTS, METADATA)
    lengths = torch.tensor([len(PROMPTS[0]) * 3.0, len(PROMPTS[1]) * 5.0], dtype=torch.float64)
    expected = lengths * torch.stack([other[:, frame].square().mean((1, 2, 3)) for frame in frames]).mean(0)
    assert torch.allclose(rewards, expected, rtol=1e-12)
    bright = torch.stack([other[:, frame].mean((1, 2, 3)) for frame in frames]).mean(0)
    assert torch.allclose(details["bright"], bright.float(), rtol=1e-6) and details["bright"].shape == (2,)
    gradients = [torch.autograd.grad(value.sum(), x)[0] for value, x in ((rewards, own), (expected, other))]
    assert torch.allclose(*gradients, rtol=1e-12)


def test_random_frames_follow_from_what_is_scored():
    reward, content = VideoReward(weighted, num_random=3, seed=4), videos(6, 11, 3, 8, 8)
    content *= torch.linspace(0.1, 0.9, 6)[:, None, None, None, None]
    prompts = ["a cat"] * 6
    chosen = reward.choose_frames(content, prompts)
    assert chosen.shape == (6, 3) and all(len(set(row)) == 3 for row in chosen.tolist())
    assert len({tuple(row) for row in chosen.tolist()}) > 3, "they change with the video"
    assert torch.equal(VideoReward(weighted, num_random=3, seed=4).choose_frames(content, prompts), chosen)
    single = [reward.choose_frames(content[i : i + 1], ["a cat"]) for i in range(6)]
    assert torch.equal(torch.cat(single), chosen), "other samples of the batch do not matter"
    assert not torch.equal(VideoReward(weighted, num_random=3, seed=5).choose_frames(content, prompts), chosen)
    assert not torch.equal(reward.choose_frames(content, ["a dog"] * 6), chosen)
    counts = torch.zeros(11)
    for number in range(600):
        counts[VideoReward(weighted, num_random=3, seed=number).choose_frames(content[:1], ["a cat"])] += 1
    expected = 600 * 3 / 11
    assert ((counts - expected) ** 2 / expected).sum() < 29.6  # chi-square's 99.9 % quantile for 10 degrees


def test_a_built_in_reward_keeps_its_name_and_threshold():
    inner = CLIPReward(tiny_clip(), tiny_tokenizer())
    inner.threshold = 0.4
    rewards = RewardSet([VideoReward(inner, every=2), weighted])
    assert rewards.names == ["CLIPReward", "weighted"] and rewards.thresholds == [0.4, None]
    rewards.prepare(torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in inner.parameters())
    own = videos(2, 3, 3, 16, 16).float()
    expected = torch.stack([inner(own[:, frame], PROMPTS, METADATA) for frame in (0, 2)]).mean(0)
    assert torch.allclose(VideoReward(inner, every=2)(own, PROMPTS, METADATA)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every=0 must be a whole number of at least 1"),
        ({"num_random": 1.5}, ValueError, "num_random=1.5"),
        ({"every": 2, "num_random": 2}, ValueError, "choose frames in two ways"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"reward": "hpsv2"}, ValueError, "There is no built-in reward 'hpsv2'"),
        ({"reward": lambda images: images}, TypeError, "is called as reward"),
        ({"reward": VideoReward(weighted)}, TypeError, "is a VideoReward already"),
    ],
)
def test_wrong_settings(options, error, message):
    with pytest.raises(error, match=message):
        VideoReward(**{"reward": weighted, **options})


def test_wrong_inputs():
    reward = VideoReward(weighted)
    with pytest.raises(ValueError, match=r"of weighted takes videos .* \(2, 3, 8, 8\). These are images: pass"):
        reward(videos(2, 3, 8, 8), PROMPTS, METADATA)
    with pytest.raises(ValueError, match="values from"):
        reward(videos() * 2, PROMPTS, METADATA)
    with pytest.raises(ValueError, match="is detached from the images"):
        VideoReward(lambda images, prompts, metadata: images.detach().mean((1, 2, 3)))(
            videos().requires_grad_(), PROMPTS, METADATA
        )
    with pytest.raises(ValueError, match=r"is a video's. Wrap it: VideoReward\(reward\)"):
        CLIPReward(tiny_clip(), tiny_tokenizer())(videos(), PROMPTS, METADATA)


# Training and evaluation


def train(directory, steps, **more):
    reward = VideoReward(lambda images, prompts, metadata: images[:, 0].mean((1, 2)), num_random=2)
    trainer = make_trainer(
        directory, tiny_wan(), reward, prompts=PROMPTS, max_steps=steps, **{**SETTINGS, "dry_run": True, **more}
    )
    return trainer


def test_training_on_random_frames_resumes_exactly_and_writes_samples(tmp_path):
    whole = train(tmp_path / "a", 3, arguments={"image_samples_hook": SampleFiles(tmp_path / "samples", every=3)})
    whole.train()
    train(tmp_path / "b", 2, save_strategy="steps", save_steps=1).train()
    resumed = train(tmp_path / "b", 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert same(trained_weights(resumed), trained_weights(whole))
    [file] = (tmp_path / "samples").rglob("*.png")
    assert file.parent.name == "step_000003" and read_samples([file]).shape == (1, 5, 3, 16, 16)


def test_evaluation_writes_videos_and_judges_what_it_wrote(tmp_path):
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 16}
    seen = []

    def judge(images, prompts, metadata):
        seen.append(images)
        return images.mean((1, 2, 3, 4))

    options = {"images_per_prompt": 1, "batch_size": 2, "call_kwargs": {**call, "num_frames": 5}}
    evaluate(tiny_wan(), PROMPTS, judge, tmp_path, **options)
    assert torch.equal(seen[0], read_samples([tmp_path / "images" / f"0000{i}.png" for i in range(2)]))
    assert seen[0].shape == (2, 5, 3, 16, 16)


# Files


@pytest.mark.parametrize("levels", [(10, 10, 200, 200, 10), (7, 7, 7), (3,)])
def test_every_frame_of_a_video_comes_back(levels, tmp_path):
    noise = torch.randint(0, 256, (2, 3, 6, 5), generator=torch.Generator().manual_seed(1))
    video = (
        torch.stack([torch.full((3, 6, 5), level) for level in levels] + list(noise)[: len(levels) - 3]).float() / 255
    )
    save_sample(video, tmp_path / "video.png")
    assert torch.equal(read_samples([tmp_path / "video.png"])[0], video)
    assert len(list(tmp_path.iterdir())) == 1
    preview = read_preview(tmp_path / "video.png")
    assert preview.shape == (6, 15, 3) and (preview[:, :5] == levels[0]).all()
    with Image.open(tmp_path / "video.png") as picture:
        assert getattr(picture, "n_frames", 1) == len(video)


def test_images_are_written_as_before(tmp_path):
    image = videos(3, 6, 5).float()
    save_sample(image, tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as picture:
        pixels = np.array(picture)
    assert (pixels == (image * 255).round().byte().permute(1, 2, 0).numpy()).all()
    assert np.array_equal(read_preview(tmp_path / "image.png"), pixels)
    save_sample(videos(3, 8, 5).float(), tmp_path / "other.png")
    with pytest.raises(ValueError, match="differ in size"):
        read_samples([tmp_path / "image.png", tmp_path / "other.png"])
    with pytest.raises(ValueError, match=r"not shape \(2, 100\)"):
        save_sample(torch.zeros(2, 100), tmp_path / "sound.png")


def test_saturation_is_that_of_the_kind_of_output():
    assert saturated(torch.tensor([0.0, 0.5, 1.0, 0.2]).view(1, 1, 2, 2)).tolist() == [0.5]
    assert saturated(torch.tensor([-1.0, 0.0, -0.5, 1.0]).view(1, 1, 4)).tolist() == [0.5]


def test_sound_is_rewarded_as_the_pipeline_returns_it():
    sound = torch.linspace(-1, 1, 40).view(2, 2, 10).requires_grad_()
    scores = RewardSet(lambda sounds, prompts, metadata: sounds.square().mean((1, 2)))(sound, PROMPTS, METADATA)
    assert scores.rewards.shape == (1, 2)
