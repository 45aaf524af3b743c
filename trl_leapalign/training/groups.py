"""Groups of samples that share a prompt: how rewards without gradient get one, and what must fit together."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..leapalign_config import LeapAlignConfig
from ..methods import Method
from ..methods.flow import connect
from ..rewards import RewardSet
from ..rollout.rollout_model import NearGroups
from .differences import directions, group_scales

logger = logging.getLogger(__name__)

SAMPLES_PER_PROMPT = 4
"""Where a reward has no gradient and the user does not say."""
FLAT_UPDATES = 10
"""Updates in a row without a difference after which a warning comes."""


@dataclass(frozen=True)
class Groups:
    """How the samples of a group are compared.

    Args:
        size (int): G, consecutive samples that share a prompt.
        near_step (int | None): the step before which they are one, or None for samples with noise of their own.
        near_noise (float): rho, the share of new noise at that step.
        power (float): p of the pairs' distance.
        normalize (bool): whether each reward is divided by its standard deviation within the group.
        gathers (bool): whether a group lies in several processes.
        compares (bool): whether anything depends on the other samples of a group.
    """

    size: int
    near_step: int | None = None
    near_noise: float = 0.7
    power: float = 1.0
    normalize: bool = False
    gathers: bool = False
    compares: bool = False

    @classmethod
    def of(cls, config: LeapAlignConfig, rewards: RewardSet, method: Method) -> "Groups":
        """Settle how samples are grouped.

        Args:
            config (LeapAlignConfig): settings; those that are None are chosen for the rewards.
            rewards (RewardSet): what is trained on.
            method (Method): how gradients reach the denoiser.

        Returns:
            Groups: checked.

        Raises:
            ValueError: if settings, rewards, method and batch do not fit together.
        """
        black_boxes = rewards.black_boxes
        size = config.samples_per_prompt or (SAMPLES_PER_PROMPT if black_boxes else 1)
        if black_boxes and not method.ends_sampling:
            raise ValueError(
                f"The reward {black_boxes[0]!r} has no gradient, so the samples of a prompt are compared at the end of "
                f"the sampling, x_T, which {type(method).__name__} does not reward: it rewards a prediction or several "
                "images of one sample. Choose LeapAlign, DRaFT or a FlowBP method."
            )
        if black_boxes and size == 1:
            raise ValueError(
                f"The reward {black_boxes[0]!r} has no gradient, so several samples of each prompt are compared, but "
                "samples_per_prompt=1. Set it to 2 or more, such as 4."
            )
        given = [name for name in ("pairs", "difference_power") if getattr(config, name) is not None]
        if given and not black_boxes:
            raise ValueError(
                f"{given[0]}={getattr(config, given[0])!r} has no effect, since all rewards are differentiable. Leave "
                "it out, or pass BlackBox(reward) if that is meant to have no gradient."
            )
        if config.normalize_rewards and size == 1:
            raise ValueError(
                "normalize_rewards=True needs several samples of each prompt, but samples_per_prompt=1. Set it to 2 or "
                "more."
            )
        batch, together = config.per_device_train_batch_size, config.per_device_train_batch_size * config.world_size
        compares = bool(black_boxes) or config.normalize_rewards
        if compares and together % size:
            raise ValueError(
                f"samples_per_prompt={size} must divide the {together} samples that are rewarded at a time "
                f"(per_device_train_batch_size={batch} on {config.world_size} processes), since they are compared with "
                "each other; samples that are accumulated later cannot be. Change one of the two."
            )
        if config.samples_per_update % size:
            raise ValueError(
                f"samples_per_prompt={size} must divide the {config.samples_per_update} samples of an update."
            )
        return cls(
            size=size,
            near_step=(config.near_step or 1) if config.pairs == "near" else None,
            near_noise=0.7 if config.near_noise is None else config.near_noise,
            power=1.0 if config.difference_power is None else config.difference_power,
            normalize=config.normalize_rewards,
            gathers=batch % size != 0 and compares,
            compares=compares,
        )

    @property
    def near(self) -> NearGroups | None:
        """How samples stay close in a rollout, or None."""
        return None if self.near_step is None else NearGroups(self.size, self.near_step, self.near_noise)

    def with_gradients(self, rewards: Tensor, latents: Tensor | None, reward_set: RewardSet) -> "Compared":
        """Give each reward without gradient the one that comparing the samples of its group suggests.

        A reward r of end latents x gets the value r and the gradient g of `differences.directions`. What is compared is
        min(r, lambda) where it has a threshold: above that, samples are equally good.

        Args:
            rewards (Tensor): shape (M, B).
            latents (Tensor | None): x, shape (B, ...), with graph; None where all rewards are differentiable.
            reward_set (RewardSet): says which rewards have no gradient, and their thresholds.

        Returns:
            Compared: rewards and what was found.
        """
        own = rewards.shape[1]
        everything, ends, first = self._whole_groups(rewards, latents)
        mine = slice(first, first + own)
        rows, scales, teaching, metrics = [], [], [], {}
        for index, name in enumerate(reward_set.names):
            row, whole, threshold = rewards[index], everything[index], reward_set.thresholds[index]
            teaches = torch.ones_like(row, dtype=torch.bool)
            if not reward_set.differentiable[index]:
                compared = whole if threshold is None else whole.clamp(max=threshold)
                found = directions(ends, compared, self.size, self.power, shared=self.near_step is not None)
                path = (found.gradients[mine] * latents.to(found.gradients.dtype)).flatten(1).sum(1)
                row = connect(row, path)
                teaches = found.differing[mine] > 0
                label = f"rewards/{name}/differing_pairs" if len(reward_set.names) > 1 else "differing_pairs"
                metrics[label] = found.differing[mine]
            rows.append(row)
            scales.append(group_scales(whole, self.size)[mine] if self.normalize else torch.ones_like(row.detach()))
            teaching.append(teaches & (scales[-1] > 0))
        return Compared(torch.stack(rows), torch.stack(scales), torch.stack(teaching), metrics)

    def _whole_groups(self, rewards: Tensor, latents: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """Rewards and end latents of all samples that belong to groups of this process, and where its own begin."""
        rewards, latents = rewards.detach(), None if latents is None else latents.detach()
        if not self.gathers:
            return rewards, latents, 0
        parts = gather_object([(rewards.cpu(), None if latents is None else latents.cpu())])
        rank = torch.distributed.get_rank()
        everything = torch.cat([part for part, _ in parts], dim=1).to(rewards.device)
        if latents is not None:
            latents = torch.cat([part for _, part in parts]).to(latents.device)
        return everything, latents, sum(part.shape[1] for part, _ in parts[:rank])

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise ValueError if the samples of a group do not share their prompt."""
        if self.gathers or not self.compares:
            return
        if len(prompts) % self.size:
            raise ValueError(f"A batch of {len(prompts)} samples does not consist of groups of {self.size}.")
        for start in range(0, len(prompts), self.size):
            if len(set(prompts[start : start + self.size])) > 1:
                raise ValueError(
                    f"Samples {start} to {start + self.size - 1} of a batch should share a prompt, but theirs are "
                    f"{prompts[start : start + self.size]}. Keep the order of the training samples as it is."
                )


@dataclass(frozen=True)
class Compared:
    """The rewards of a batch, all with a gradient.

    Args:
        rewards (Tensor): shape (M, B), with graph.
        scales (Tensor): what each reward's loss is multiplied by, shape (M, B).
        teaching (Tensor): whether a reward has something to say of a sample, shape (M, B), bool.
        metrics (dict[str, Tensor]): values to log, shape (B,).
    """

    rewards: Tensor
    scales: Tensor
    teaching: Tensor
    metrics: dict[str, Tensor]


class FlatUpdates:
    """Counts updates in which no pair of samples differed, and warns of many in a row.

    Args:
        names (list[str]): of the rewards without gradient.
        report (Callable[..., Any]): logs a warning.
    """

    def __init__(self, names: list[str], report: Callable[..., Any] = logger.warning):
        self.names, self.report = names, report
        self.count = self.in_a_row = 0

    def add(self, learns: bool) -> None:
        """Take note of an update."""
        if not self.names:
            return
        self.count += not learns
        self.in_a_row = 0 if learns else self.in_a_row + 1
        if self.in_a_row and self.in_a_row % FLAT_UPDATES == 0:
            self.report(
                "For %d updates in a row no two samples of a prompt differed in their reward %s, so nothing was learnt "
                "from it. Take prompts that are neither always right nor always wrong, more samples_per_prompt, or a "
                "reward of more steps.",
                *(self.in_a_row, ", ".join(self.names)),
            )

    def pop(self) -> dict[str, float]:
        """Return the updates without a difference since the last time."""
        count, self.count = self.count, 0
        return {"flat_updates": float(count)} if self.names else {}
