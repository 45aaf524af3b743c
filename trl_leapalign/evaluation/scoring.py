"""Scores a pipeline's images of fixed prompts with fixed noise."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor

from ..prompts.columns import CallColumns
from ..prompts.sources import split_row
from ..rewards import RewardSet, Scores
from ..rollout.calls import NO_COLUMNS, sample_images


@dataclass(frozen=True)
class ScoredBatch:
    """Some images and what the rewards say of them.

    Args:
        indices (list[int]): numbers of the images, length B.
        images (Tensor): in [0, 1], shape (B, 3, H, W), or video (B, F, 3, H, W).
        prompts (list[str]): length B.
        metadata (list[dict]): length B.
        scores (Scores): of the rewards, without graph.
    """

    indices: list[int]
    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    scores: Scores


def scored_batches(
    pipeline: DiffusionPipeline,
    rewards: RewardSet,
    rows: Sequence[dict[str, Any]],
    indices: Sequence[int],
    call_kwargs: dict[str, Any],
    *,
    prompt_column: str = "prompt",
    seed: int = 0,
    batch_size: int = 8,
    columns: CallColumns = NO_COLUMNS,
) -> Iterator[ScoredBatch]:
    """Sample and score images, batch by batch.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        rewards (RewardSet): rewards or evaluators.
        rows (Sequence[dict]): prompts and their metadata.
        indices (Sequence[int]): numbers of the images to make; image i shows row `i % len(rows)`, and its noise
            follows from `seed` and i (that of stochastic solvers from the batch).
        call_kwargs (dict[str, Any]): arguments of the pipeline's call.
        prompt_column (str): the column that holds the prompt.
        seed (int): of the noise.
        batch_size (int): images at a time.
        columns (CallColumns): the columns of the rows that go into the call.

    Yields:
        ScoredBatch: the next images, in order.
    """
    for begin in range(0, len(indices), batch_size):
        batch = list(indices[begin : begin + batch_size])
        split = [split_row(rows[index % len(rows)], prompt_column) for index in batch]
        prompts, metadata = [prompt for prompt, _ in split], [others for _, others in split]
        ends: list[Tensor] | None = [] if "latents" in rewards.inputs else None
        images = sample_images(
            pipeline, prompts, batch, call_kwargs, seed, columns=columns, metadata=metadata, ends=ends
        )
        with torch.no_grad():
            scores = rewards(images, prompts, metadata, ends[0] if ends else None)
        yield ScoredBatch(batch, images, prompts, metadata, scores)


def score_pipeline(
    pipeline: DiffusionPipeline,
    rewards: RewardSet,
    rows: Sequence[dict[str, Any]],
    call_kwargs: dict[str, Any],
    *,
    num_images: int | None = None,
    prompt_column: str = "prompt",
    seed: int = 0,
    batch_size: int = 8,
    columns: CallColumns = NO_COLUMNS,
    keep: Callable[[int, Tensor], None] | None = None,
) -> dict[str, list[float]]:
    """Score a pipeline's images of fixed prompts with fixed noise; all processes share the work.

    Args:
        pipeline (DiffusionPipeline): the pipeline, with or without adapters.
        rewards (RewardSet): rewards or evaluators.
        rows (Sequence[dict]): prompts and their metadata.
        call_kwargs (dict[str, Any]): arguments of the pipeline's call.
        num_images (int | None): images in all, the rows in turn; None is one a row.
        prompt_column (str): the column that holds the prompt.
        seed (int): of the noise.
        batch_size (int): images at a time.
        columns (CallColumns): the columns of the rows that go into the call.
        keep (Callable[[int, Tensor], None] | None): called with the number of each image and the image, (3, H, W), or
            video, (F, 3, H, W).

    Returns:
        dict[str, list[float]]: by name of the reward, the score of each image, in order; the same in all processes.
    """
    state = PartialState()
    mine = range(state.process_index, len(rows) if num_images is None else num_images, state.num_processes)
    found: list[tuple[int, list[float]]] = []
    options = {"prompt_column": prompt_column, "seed": seed, "batch_size": batch_size, "columns": columns}
    for batch in scored_batches(pipeline, rewards, rows, mine, call_kwargs, **options):
        found += zip(batch.indices, batch.scores.rewards.T.tolist(), strict=True)
        if keep is not None:
            for index, image in zip(batch.indices, batch.images, strict=True):
                keep(index, image)
    columns = zip(*(values for _, values in sorted(gather_object(found))), strict=True)
    return {name: list(column) for name, column in zip(rewards.names, columns, strict=True)}
