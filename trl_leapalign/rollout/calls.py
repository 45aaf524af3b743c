"""Plain calls of a pipeline on numbered prompts: which noise each gets, and what a batch's call is."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..media import by_sample, check_shapes
from ..methods.base import Method, Outcome, Plan, Schedule, Trajectory
from ..prompts.columns import CallColumns
from ..prompts.seeds import Purpose, cuda_devices, derive_seed, make_generator, seeded_torch
from .run import run_rollout

NO_COLUMNS = CallColumns()


class NoGradients(Method):
    """Samples as the pipeline does, with no step active."""

    has_gradients = False

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> Plan:
        return Plan(())

    def follow(self, plan: Plan, schedule: Schedule) -> Trajectory:
        return _Unchanged()


class _Unchanged(Trajectory):
    def enter(self, step: int, latents: Tensor) -> Tensor:
        self.end = latents
        return latents

    def leave(self, step: int, latents: Tensor, velocity: Tensor) -> None:
        pass

    def outcome(self) -> Outcome:
        return Outcome(weights=self.end.new_ones(len(self.end), dtype=torch.float32))


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    indices: list[int],
    call_kwargs: dict[str, Any],
    seed: int,
    independent: bool = False,
    columns: CallColumns = NO_COLUMNS,
    metadata: Sequence[Mapping[str, Any]] = (),
    purpose: Purpose = Purpose.EVALUATION,
    ends: list[Tensor] | None = None,
) -> Tensor:
    """Sample an image for each prompt without gradients, with noise that is kept apart from that of training.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        prompts (list[str]): length B.
        indices (list[int]): number of each image, which its noise follows from, length B; noise that the solver draws
            itself follows from the first of a call alone.
        call_kwargs (dict[str, Any]): arguments of the pipeline's call that are the same for every batch.
        seed (int): of the noise.
        independent (bool): whether an image must not depend on the others of its batch.
        columns (CallColumns): the columns of `metadata` that go into the call.
        metadata (Sequence[Mapping[str, Any]]): the prompts' other columns, length B; unused without `columns`.
        purpose (Purpose): what the images are for; NOISE gives those of training.
        ends (list[Tensor] | None): takes what the sampling ended with, shape (B, ...), as one more entry.

    Returns:
        Tensor: images in [0, 1], shape (B, 3, H, W), or video (B, F, 3, H, W).

    Raises:
        ValueError: if images must be independent, but the solver draws noise of its own for a batch of several; if
            they differ in size or number, or a row lacks what goes into the call.
    """
    images: list[Tensor] = []
    latents: list[Tensor] = []
    for own, kwargs in batch_calls(call_kwargs, columns, prompts, metadata, seed, purpose, indices):
        with solver_noise(seed, purpose, own[0]):
            before = _random_states()
            output = _with_end(pipeline, kwargs, latents) if ends is not None else _plain(pipeline, kwargs)
            images.append(by_sample(output, len(own), type(pipeline).__name__))
            drawn = any(not torch.equal(*pair) for pair in zip(before, _random_states(), strict=True))
        if independent and drawn and len(own) > 1:
            raise ValueError(
                f"The solver of {type(pipeline).__name__} draws noise of its own, which follows from the batch when "
                f"{len(own)} images are sampled at a time. Set batch_size=1."
            )
    check_shapes([each[0] for each in images])
    if ends is not None:
        ends.append(torch.cat(latents))
    return torch.cat(images) if len(images) > 1 else images[0]


def _plain(pipeline: DiffusionPipeline, kwargs: dict[str, Any]) -> Any:
    return pipeline(output_type="pt", return_dict=False, **kwargs)[0]


def _with_end(pipeline: DiffusionPipeline, kwargs: dict[str, Any], latents: list[Tensor]) -> Any:
    """The same images, by a rollout without gradients, which sees what the sampling ends with."""
    output = run_rollout(pipeline, NoGradients(), differentiate_output=False, **kwargs)
    if len(output.latents) != 1:
        raise ValueError(
            f"{type(pipeline).__name__} samples {len(output.latents)} streams of latents, but a reward asks for one. "
            "Use a reward of the images with this pipeline."
        )
    latents.append(output.latents[0].detach())
    return output.images


def batch_calls(
    call_kwargs: dict[str, Any],
    columns: CallColumns,
    prompts: list[str],
    metadata: Sequence[Mapping[str, Any]],
    seed: int,
    purpose: Purpose,
    indices: list[int],
) -> list[tuple[list[int], dict[str, Any]]]:
    """Divide a batch into calls of the pipeline: one, unless columns make it one a sample.

    Args:
        call_kwargs (dict[str, Any]): arguments that are the same for every batch.
        columns (CallColumns): the columns of `metadata` that go into the call.
        prompts (list[str]): length B.
        metadata (Sequence[Mapping[str, Any]]): rows of the batch; unused without `columns`.
        seed (int): of the run.
        purpose (Purpose): what the batch is for.
        indices (list[int]): number of each sample, which its noise follows from, length B.

    Returns:
        list[tuple[list[int], dict]]: of each call, the numbers of its samples and its arguments.
    """
    parts = columns.calls(metadata) if columns.columns else [(slice(0, len(prompts)), {})]
    return [
        (indices[part], {**_call_kwargs(call_kwargs, prompts[part], seed, purpose, indices[part]), **from_columns})
        for part, from_columns in parts
    ]


def _random_states() -> list[Tensor]:
    """Of the generators that `solver_noise` seeds."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda_devices())]


def _call_kwargs(
    call_kwargs: dict[str, Any], prompts: list[str], seed: int, purpose: Purpose, indices: list[int]
) -> dict[str, Any]:
    """Arguments of a call, by the pipeline's names.

    Texts are repeated for each sample, since not every pipeline does it for those beside the prompt; lists are copied,
    since some pipelines write into them; and a single sample comes with one prompt and one generator, since some take
    no lists.
    """
    generators = [make_generator(seed, purpose, index) for index in indices]
    shared = {name: copy.copy(value) for name, value in call_kwargs.items()}
    if len(prompts) == 1:
        return {"prompt": prompts[0], "generator": generators[0], **shared}
    texts = {name: text for name, text in shared.items() if "prompt" in name and isinstance(text, str)}
    repeated = {name: [text] * len(prompts) for name, text in texts.items()}
    return {"prompt": list(prompts), "generator": generators, **shared, **repeated}


@contextmanager
def solver_noise(seed: int, purpose: Purpose, index: int) -> Iterator[None]:
    """Seed torch's global random states of all devices, which some solvers draw from, and put them back.

    Args:
        seed (int): of the run.
        purpose (Purpose): what the batch is for.
        index (int): number of its first sample.
    """
    with seeded_torch(derive_seed(seed, Purpose.SOLVER, purpose, index)):
        yield
