"""An image reward as a reward of videos."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ranges import Range
from .builtin import load_named
from .callables import RewardFunction, check_callable, check_inputs, check_rewards, name_of
from .reward_model import RewardModel, at_least_float32

BRIGHTNESS_LEVELS = 256


class VideoReward(RewardModel):
    """Mean of an image reward over frames of a video: all of them, every n-th one or some at random.

    Random frames follow from the seed, the prompt and the video's mean brightness in 256 levels. So they differ from
    sample to sample and from update to update, and are the same after a resume and on any number of processes.

    Args:
        reward (RewardFunction | str): called as `reward(images, prompts, metadata)` with frames (N, 3, H, W), and the
            prompt and metadata of the video of each; or the name of a built-in reward.
        every (int | None): score the first frame and every so many after it. None and no `num_random` is all.
        num_random (int | None): score so many different frames of each video, or all if it has no more.
        seed (int): of the random frames.
        batch_size (int | None): frames scored at a time. None is all; a built-in reward has a `batch_size` too.
        activation_checkpointing (bool): keep no activations of the scoring, and compute them again in the backward
            pass, `batch_size` frames at a time.

    Raises:
        TypeError: if the reward cannot be called with images, prompts and metadata.
        ValueError: if a setting is out of range, both kinds of frames are asked for, or the reward's name is unknown.
    """

    def __init__(
        self,
        reward: RewardFunction | str,
        *,
        every: int | None = None,
        num_random: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__(batch_size=batch_size, activation_checkpointing=activation_checkpointing)
        for name, value in (("every", every), ("num_random", num_random)):
            if value is not None:
                Range(1, whole=True).check(name, value)
        Range(0, whole=True).check("seed", seed)
        if every is not None and num_random is not None:
            raise ValueError(f"every={every} and num_random={num_random} choose frames in two ways. Set one of them.")
        if isinstance(reward, VideoReward):
            raise TypeError("The reward is a VideoReward already. Pass an image reward.")
        if not isinstance(reward, str):
            check_callable(reward)
        self.__name__ = name_of(reward)
        self.reward = load_named(reward)
        self.differentiable = getattr(self.reward, "differentiable", True)
        self.threshold = self.reward.threshold if isinstance(self.reward, RewardModel) else None
        self.every, self.num_random, self.seed = every, num_random, seed

    def forward(
        self, videos: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Score videos.

        Args:
            videos (Tensor): shape (B, F, 3, H, W) in [0, 1].
            prompts (list[str]): length B.
            metadata (list[dict]): length B, handed to the reward.

        Returns:
            tuple[Tensor, dict]: mean over the frames with the videos' graph, shape (B,); and what the reward returned
            beside its rewards, with tensors of one value a frame averaged likewise.

        Raises:
            TypeError: if the videos are no floating tensor, or the prompts no list of strings.
            ValueError: if the shape, the range or the number of prompts is wrong.
        """
        check_inputs(videos, prompts, metadata, f"VideoReward of {self.__name__}", reads_prompts=False, video=True)
        chosen = self.choose_frames(videos, prompts).to(videos.device)
        count = chosen.shape[1]
        rows = torch.arange(len(videos), device=videos.device)[:, None]
        frames = videos[rows, chosen].flatten(0, 1)
        texts = [(prompt, row) for prompt, row in zip(prompts, metadata, strict=True) for _ in range(count)]
        size = self.batch_size or len(frames)
        parts = [self._rated(frames[i : i + size], texts[i : i + size]) for i in range(0, len(frames), size)]
        rewards = torch.cat([rewards for rewards, _ in parts])
        details = _join([extra for _, extra in parts], [len(rewards) for rewards, _ in parts], count)
        return rewards.unflatten(0, (-1, count)).mean(1), details

    def choose_frames(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """Choose the frames that are scored.

        Args:
            videos (Tensor): shape (B, F, 3, H, W).
            prompts (list[str]): length B.

        Returns:
            Tensor: numbers of frames, ascending, shape (B, K), on the CPU.
        """
        length = videos.shape[1]
        if self.num_random is None or self.num_random >= length:
            return torch.arange(0, length, self.every or 1).expand(len(videos), -1)
        levels = (videos.detach().float().mean((1, 2, 3, 4)) * BRIGHTNESS_LEVELS).round().tolist()
        rows = []
        for prompt, level in zip(prompts, levels, strict=True):
            key = hashlib.sha256(f"{self.seed} {int(level)} {prompt}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
            rows.append(torch.randperm(length, generator=generator)[: self.num_random].sort().values)
        return torch.stack(rows)

    def _rated(self, frames: Tensor, texts: list[tuple[str, dict[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._call, frames, texts, use_reentrant=False)
        return self._call(frames, texts)

    def _call(self, frames: Tensor, texts: list[tuple[str, dict[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
        result = self.reward(frames, [prompt for prompt, _ in texts], [dict(row) for _, row in texts])
        rewards, extra = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        check_rewards(rewards, frames, self.__name__)
        return at_least_float32(rewards), extra


def _join(extras: list[dict[str, Any]], sizes: list[int], count: int) -> dict[str, Any]:
    """Details of all frames as those of videos: of tensors with a value a frame the means, of others the last."""
    joined = {}
    for key, value in extras[-1].items():
        values = [extra.get(key) for extra in extras]
        by_frame = all(
            isinstance(each, Tensor) and each.shape == (size,) for each, size in zip(values, sizes, strict=True)
        )
        joined[key] = torch.cat(values).detach().float().unflatten(0, (-1, count)).mean(1) if by_frame else value
    return joined
