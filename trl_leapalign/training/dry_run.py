"""One rollout, its rewards and their gradient before training: whatever cannot work is found out here."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.lora import DENOISER_PREFIXES, trained_parameters
from ..prompts.columns import takes_images
from ..rewards import RewardSet, Scores, check_finite
from ..rollout.pipelines import components_of
from ..rollout.recompute import gradients_of
from ..rollout.recorder import RolloutOutput
from ..rollout.rollout_model import RolloutModel, end_latents, for_copies
from .guards import no_gradients_added
from .sharding import whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DryRun:
    """What one rollout and its backward pass gave.

    Args:
        output (RolloutOutput): the rollout, with graph.
        scores (Scores): of its images.
        gradients (dict[str, dict[str, Tensor]]): of the rewards' sum, by component and by name of the parameter;
            without those that it does not reach. The sum of the end latents stands for a reward without gradient.
        batch (dict[str, list]): "prompts", "metadata" and "indices" of its samples.
    """

    output: RolloutOutput
    scores: Scores
    gradients: dict[str, dict[str, Tensor]]
    batch: dict[str, list]


@torch.enable_grad()
def dry_run(
    model: RolloutModel,
    rewards: RewardSet,
    batch: dict[str, list],
    *,
    checkpointing: bool = False,
    may_underflow: bool = False,
) -> DryRun:
    """Run one rollout and its rewards, and differentiate: whatever cannot work is found out before training.

    Args:
        model (RolloutModel): what will be trained.
        rewards (RewardSet): what it will be trained on.
        batch (dict[str, list]): "prompts", "metadata" and "indices" of the samples.
        checkpointing (bool): whether activations are recomputed, and so must be what they were.
        may_underflow (bool): whether zeros may come from float16, which training scales the loss for.

    Returns:
        DryRun: images, scores and gradients.

    Raises:
        ValueError: if the pipeline or the reward cannot be trained with.
        RuntimeError: if no gradient reaches the denoisers, or recomputed activations differ.
    """

    def run() -> DryRun:
        with _missing_images_named(model):
            if checkpointing:
                model.check_checkpointing(**batch)
            output = model(**batch)
        prompts, metadata = for_copies(output.images, batch["prompts"], batch["metadata"])
        asking = rewards.asking_for_latents
        latents = end_latents(output, type(model.pipeline).__name__, asking) if asking else None
        with no_gradients_added(model):
            scores = rewards(output.images, prompts, metadata, latents)
        check_finite(scores, rewards.names, prompts)
        check_thresholds(scores.rewards, rewards.names, rewards.thresholds)
        denoisers = dict(model.denoisers.items())
        gradients = check_gradients(
            output.images, scores.rewards, rewards.names, denoisers, may_underflow, latents, rewards.differentiable
        )
        return DryRun(output, scores, gradients, batch)

    return model.with_backward(run)


@contextmanager
def _missing_images_named(model: RolloutModel) -> Iterator[None]:
    """Say which images a pipeline was called without, if it fails as it does for None."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        given = model.call_kwargs.keys() | model.columns.columns.keys()
        missing = [name for name in takes_images(model.pipeline) if name not in given]
        if not any(clue in str(error) for clue in ("None", *missing)) or not missing or not _is_foreign(error):
            raise
        optional = getattr(model.pipeline, "_optional_components", [])
        absent = [name for name, part in components_of(model.pipeline).items() if part is None and name not in optional]
        if absent and "None" in str(error):
            raise ValueError(
                f"{type(model.pipeline).__name__} failed with {type(error).__name__}: {error}. Its "
                f"{', '.join(absent)} is None. Load the whole pipeline, or set what is missing."
            ) from error
        raise ValueError(
            f"{type(model.pipeline).__name__} failed with {type(error).__name__}: {error}. It was called without "
            f"{', '.join(missing)}, which it takes images as. If it needs one, give the prompts a column called so, or "
            "name the column in pipeline_columns={argument: column}."
        ) from error


def _is_foreign(error: Exception) -> bool:
    """Whether an error was raised outside of this library."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return not trace.tb_frame.f_globals.get("__name__", "").startswith(__package__.partition(".")[0])


def check_gradients(
    images: Tensor,
    rewards: Tensor,
    names: list[str],
    denoisers: dict[str, nn.Module],
    may_underflow: bool,
    latents: Tensor | None = None,
    differentiable: Sequence[bool] = (),
) -> dict[str, dict[str, Tensor]]:
    """Differentiate the rewards of a rollout with respect to what is trained.

    Args:
        images (Tensor): the rollout's, with graph, shape (B, ...).
        rewards (Tensor): of these images, with graph, shape (M, B).
        names (list[str]): of the rewards, length M.
        denoisers (dict[str, nn.Module]): what is trained, by component name.
        may_underflow (bool): whether zeros may come from float16, which training scales the loss for.
        latents (Tensor | None): what the sampling ended with, with graph, shape (B, ...), where a reward needs it.
        differentiable (Sequence[bool]): which rewards have a gradient, length M; () is all. The sum of the latents
            stands for one that has none.

    Returns:
        dict[str, dict[str, Tensor]]: by component and name of the parameter, the gradients that there are.

    Raises:
        ValueError: if a reward does not depend on the images, or its gradient is zero or not finite.
        RuntimeError: if no gradient reaches a component.
    """
    ends = [end for end in (images, latents) if end is not None and end.requires_grad]
    slopes = [torch.zeros_like(end) for end in ends]
    for name, row, has_gradient in zip(names, rewards, differentiable or [True] * len(names), strict=True):
        if not has_gradient:
            slopes[-1] = slopes[-1] + 1.0
            continue
        found = torch.autograd.grad(row.sum(), ends, retain_graph=True, allow_unused=True)
        if all(slope is None for slope in found):
            raise ValueError(
                f"The reward {name!r} does not depend on the images, so there is nothing to learn from. Compute it "
                "from them with torch operations."
            )
        # The latents' slope through the images is that of the images.
        used = next(index for index, slope in enumerate(found) if slope is not None)
        slopes[used] = slopes[used] + found[used]
    trained = {name: trained_parameters(denoiser) for name, denoiser in denoisers.items()}
    parameters = [parameter for own in trained.values() for parameter in own.values()]
    gradients = gradients_of(ends, parameters, slopes)
    found = {id(p): gradient for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    if not found:
        raise RuntimeError(
            f"No gradient of the reward reaches the trained parameters of {list(denoisers)}. Name the components that "
            "sample with denoisers=[...]."
        )
    for name, own in trained.items():
        _check_reached(name, len(own), [key for key, parameter in own.items() if id(parameter) not in found])
    if not all(whole(gradient.isfinite().all()) for gradient in (*slopes, *found.values())):
        raise ValueError("The gradient of the reward is not finite on the untrained pipeline's images.")
    if not may_underflow and not any(whole(gradient.any()) for gradient in found.values()):
        where = "already at the images: is the reward constant or rounded"
        if any(slope.any() for slope in slopes):
            where = (
                "at the trained parameters: are all pixels saturated, is the adapter's scale 0, or are there so few "
                "frames that an image-to-video pipeline has only the one that it was given"
            )
        raise ValueError(
            f"The gradient of the reward is exactly zero, {where}? Nothing would be learnt. If that is so for the "
            "first prompts alone, set dry_run=False."
        )
    return {
        name: {key: found[id(parameter)] for key, parameter in own.items() if id(parameter) in found}
        for name, own in trained.items()
    }


def _check_reached(name: str, count: int, missing: list[str]) -> None:
    """A denoiser may rest in some rollouts, such as one of two transformers that share the steps."""
    if len(missing) == count and not name.startswith(DENOISER_PREFIXES):
        raise RuntimeError(f"No gradient of the reward reaches the {name}. Leave it out of denoisers.")
    if missing:
        logger.warning(
            "No gradient of the reward reaches %d of %d trained parameters of the %s in the dry run, such as %s. What "
            "takes no part in the sampling is not trained: undo what bypasses it, such as fuse_qkv_projections().",
            *(len(missing), count, name, missing[0]),
        )


def check_thresholds(rewards: Tensor, names: list[str], thresholds: Sequence[float | None]) -> None:
    """Warn if all rewards are above their threshold before training, where they have no loss.

    Args:
        rewards (Tensor): of the untrained pipeline's images, shape (M, B).
        names (list[str]): of the rewards, length M.
        thresholds (Sequence[float | None]): of the rewards, length M.
    """
    for name, row, threshold in zip(names, rewards, thresholds, strict=True):
        if threshold is not None and (row >= threshold).all():
            logger.warning(
                "The rewards %r of the untrained pipeline, %s, are above their threshold of %s, where they have no "
                "loss. The threshold is probably not on the scale of this reward.",
                *(name, row.tolist(), threshold),
            )
