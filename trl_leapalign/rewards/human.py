"""A person's votes as a reward without gradient."""

import json
import logging
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..media import as_text
from ..ranges import Range
from .callables import check_inputs
from .votes import Pair, VoteFolder

logger = logging.getLogger(__name__)


class HumanReward:
    """Waits for people to say which of two pictures of a prompt they like better. It carries no gradient.

    The pictures of one prompt in a batch, each from its own noise, are shown in pairs by `trl-leapalign vote FOLDER`,
    and training pauses until all pairs of the batch have a vote. The reward of a picture is the share of its pairs that
    it wins, where no difference is half a win. If each meets all others, that orders them as the strengths of a
    Bradley-Terry model do.

    On several processes the samples of a group may lie in different ones; the folder must be one that all of them see.

    Pairs are known by their pictures. So training and the page can be stopped and resumed at any time: what was voted
    on is not asked again.

    Args:
        folder (str | Path): of pictures and votes; see `VoteFolder`.
        neighbours (int | None): with how many of those after it in its group each picture is compared, in a ring. In a
            group of 4, 1 takes 4 votes and None, all with all, 6.
        timeout (float | None): seconds to wait for the votes on a batch. None waits as long as it takes; in training on
            several processes, `ddp_timeout` of the config limits it too.
        poll_seconds (float): between two looks at the votes.

    Raises:
        ValueError: if the folder is a file or a setting is out of range.
    """

    differentiable = False

    def __init__(
        self,
        folder: str | Path,
        *,
        neighbours: int | None = None,
        timeout: float | None = None,
        poll_seconds: float = 0.5,
    ):
        if neighbours is not None:
            Range(1, whole=True).check("neighbours", neighbours)
        if timeout is not None:
            Range(0, excluded=True).check("timeout", timeout)
        Range(0, excluded=True).check("poll_seconds", poll_seconds)
        self.folder = VoteFolder(folder)
        self.neighbours, self.timeout, self.poll_seconds = neighbours, timeout, poll_seconds

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Ask for votes, and wait for them.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1]; shown in 8 bits.
            prompts (list[str]): length B; pictures of the same prompt and metadata are compared.
            metadata (list[dict]): length B.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: from 0 to 1, without graph, shape (B,), float32; and "comparisons", how
                many votes each picture has, shape (B,).

        Raises:
            ValueError: if a prompt has a single picture, or the shape or range of the images is wrong.
            TimeoutError: if votes are missing after `timeout` seconds.
        """
        check_inputs(images, prompts, metadata, type(self).__name__, reads_prompts=False)
        rows = [json.dumps(row, default=as_text, sort_keys=True) for row in metadata]
        names = [self.folder.add_picture(image) for image in images.detach()]
        samples, start = _of_all_processes(list(zip(prompts, rows, names, strict=True)))
        meetings = self._meetings([sample[:2] for sample in samples])
        names = [name for *_, name in samples]
        pairs = {}
        for first, second in meetings:
            if names[first] != names[second]:
                pairs[first, second] = Pair(samples[first][0], *sorted((names[first], names[second])))
        if start == 0:
            self.folder.ask(list(pairs.values()))
        votes = self._wait({pair.id for pair in pairs.values()}, tell=start == 0)
        wins, comparisons = torch.zeros(len(samples)), torch.zeros(len(samples))
        for meeting in meetings:
            winner = votes[pairs[meeting].id] if meeting in pairs else None  # equal pictures differ in nothing
            for index in meeting:
                wins[index] += 0.5 if winner is None else float(names[index] == winner)
                comparisons[index] += 1
        own = slice(start, start + len(images))
        return (wins / comparisons)[own].to(images.device), {"comparisons": comparisons[own].to(images.device)}

    def _meetings(self, keys: list[tuple[str, str]]) -> list[tuple[int, int]]:
        """Which pictures are compared, by their places, from their prompts and metadata."""
        groups = defaultdict(list)
        for index, key in enumerate(keys):
            groups[key].append(index)
        meetings = set()
        for (prompt, _), group in groups.items():
            if len(group) < 2:
                raise ValueError(
                    f"A vote compares two pictures of a prompt, but the batch has a single one of {prompt!r}. Train "
                    "with samples_per_prompt=2 or more."
                )
            for step in range(1, 1 + min(self.neighbours or len(group), len(group) - 1)):
                for place, index in enumerate(group):
                    meetings.add(tuple(sorted((index, group[(place + step) % len(group)]))))
        return sorted(meetings)

    def _wait(self, ids: set[str], tell: bool) -> dict[str, str | None]:
        start = time.monotonic()
        while missing := ids - (votes := self.folder.votes()).keys():
            if self.timeout is not None and time.monotonic() - start > self.timeout:
                raise TimeoutError(
                    f"{len(missing)} of {len(ids)} votes are missing after {self.timeout:g} seconds. Vote with "
                    f"`trl-leapalign vote {self.folder.path}`, and resume training."
                )
            if tell:
                tell = False
                logger.warning("Waiting for %d votes: `trl-leapalign vote %s`.", len(missing), self.folder.path)
            time.sleep(self.poll_seconds)
        return votes


def _of_all_processes(samples: list[Any]) -> tuple[list[Any], int]:
    """The samples of all processes, which score at the same time, and the place of this process's first."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return samples, 0
    parts: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, samples)
    return [sample for part in parts for sample in part], sum(map(len, parts[: torch.distributed.get_rank()]))
