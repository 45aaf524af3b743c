"""The module that is trained: it owns the denoisers, and its forward is the rollout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..media import by_sample, check_shapes
from ..methods import DRaFT, Method
from ..methods.near import NearPairs
from ..prompts.columns import CallColumns
from ..prompts.seeds import Purpose, make_generator
from .base_penalty import distances_to_base
from .calls import NO_COLUMNS, batch_calls, sample_images, solver_noise
from .decoders import checkpointed_decoders
from .guidance import detached_unconditional_calls
from .hooks import check_repeatable
from .pipelines import modules_of, quiet
from .recompute import WRITTEN_INTO, check_checkpointing, copies_of_saved_tensors
from .recorder import RolloutOutput
from .run import run_rollout

T = TypeVar("T")


class RolloutModel(nn.Module):
    """Makes one forward call of a batch's rollout, so that DDP synchronises gradients however often the denoiser runs.

    Args:
        pipeline (DiffusionPipeline): the pipeline that is run; not a part of the module.
        denoisers (dict[str, nn.Module]): its components that are trained.
        method (Method): how the reward's gradient reaches them.
        call_kwargs (dict[str, Any]): arguments of the pipeline's call that are the same for every batch.
        seed (int): of noise and step choices.
        draw_group_size (int): consecutive samples that share one choice of steps.
        base_penalty (bool): whether to measure the distance to the base model, whose adapters are off.
        columns (CallColumns): the columns of the metadata that go into the call.
        unconditional_gradient (bool): whether the unconditional call of guidance has a gradient.
        decoding (str): "differentiable", or "plain" for images without graph, or "none" for latents in their place.
        near (NearGroups | None): how the samples of a group stay close; None gives each sample noise of its own.

    Raises:
        ValueError: if a denoiser cannot be called a second time for `base_penalty`.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoisers: dict[str, nn.Module],
        method: Method,
        call_kwargs: dict[str, Any],
        seed: int,
        draw_group_size: int,
        base_penalty: bool = False,
        columns: CallColumns = NO_COLUMNS,
        decoding: str = "differentiable",
        near: "NearGroups | None" = None,
        unconditional_gradient: bool = True,
    ):
        super().__init__()
        if base_penalty:
            check_repeatable(denoisers.items())
        self.denoisers = nn.ModuleDict(denoisers)
        self.pipeline = pipeline
        self.method = method
        self.call_kwargs = call_kwargs
        self.seed = seed
        self.draw_group_size = draw_group_size
        self.base_penalty = base_penalty
        self.columns = columns
        self.decoding = decoding
        self.near = near
        self.unconditional_gradient = unconditional_gradient
        self.copies_saved_tensors = False
        self.apply_checkpoint: Callable[..., Any] | None = None  # other than torch's, while it is checked
        self.eval()

    @property
    def checkpointing(self) -> bool:
        """Whether the denoisers compute their activations again in the backward pass; then the decoder does so too."""
        return any(getattr(denoiser, "is_gradient_checkpointing", False) for denoiser in self.denoisers.values())

    def train(self, mode: bool = True) -> "RolloutModel":
        """Stay in eval mode: what is trained is what is sampled."""
        return super().train(False)

    def forward(
        self, prompts: list[str], indices: list[int], metadata: Sequence[Mapping[str, Any]] = ()
    ) -> RolloutOutput:
        """Run the pipeline on some prompts, in one call or, where columns ask for it, one a sample.

        Args:
            prompts (list[str]): length B.
            indices (list[int]): number of each sample in the run, which its noise follows from.
            metadata (Sequence[Mapping[str, Any]]): the prompts' other columns, length B; unused without `columns`.

        Returns:
            RolloutOutput: images with graph, weights, active steps and metrics, with `base_penalty` the distance.

        Raises:
            ValueError: if samples differ in size or number, or a row lacks what goes into the call.
        """
        return self.rollout(self.method, prompts, indices, metadata, self.near)

    def rollout(
        self,
        method: Method,
        prompts: list[str],
        indices: list[int],
        metadata: Sequence[Mapping[str, Any]] = (),
        near: "NearGroups | None" = None,
    ) -> RolloutOutput:
        """Run the pipeline with the graph of any method; other arguments are those of `forward` and the class."""
        noise = indices if near is None else [index - index % near.size for index in indices]
        calls = batch_calls(self.call_kwargs, self.columns, prompts, metadata, self.seed, Purpose.NOISE, noise)
        outputs, rest = [], list(indices)
        for shared, kwargs in calls:
            own, rest = rest[: len(shared)], rest[len(shared) :]
            followed = method if near is None else near.around(method, self.seed, own)
            outputs.append(self._call(followed, shared, kwargs))
        return outputs[0] if len(outputs) == 1 else _join(outputs)

    def _call(self, method: Method, indices: list[int], call_kwargs: dict[str, Any]) -> RolloutOutput:
        compared = self.denoisers.values() if self.base_penalty else ()
        detached = () if self.unconditional_gradient else self.denoisers.values()
        with (
            solver_noise(self.seed, Purpose.NOISE, indices[0]),
            copies_of_saved_tensors() if self.copies_saved_tensors else nullcontext(),
            checkpointed_decoders(self.pipeline, self.apply_checkpoint) if self.checkpointing else nullcontext(),
            distances_to_base(compared, len(indices)) as distances,
            detached_unconditional_calls(detached) as unconditional,
        ):
            output = run_rollout(
                self.pipeline,
                method,
                method_generator=make_generator(self.seed, Purpose.STEPS, indices[0] // self.draw_group_size),
                differentiate_output=self.decoding == "differentiable",
                **({"output_type": "latent"} if self.decoding == "none" else {}),
                **call_kwargs,
            )
        if detached and not unconditional:
            raise ValueError(
                f"unconditional_gradient=False has no effect: {type(self.pipeline).__name__} makes no unconditional "
                "call of its own with these settings. Guidance is off (FLUX and Qwen-Image need true_cfg_scale and a "
                "negative_prompt in sample_kwargs), or both predictions come from one call. Leave it True."
            )
        copies = max(len(output.weights) // len(indices), 1)
        by_sample(output.images, copies * len(indices), type(self.pipeline).__name__)  # some take one prompt of several
        return replace(output, penalty=torch.stack(distances).mean(0)) if distances else output

    def sample(self, prompts: list[str], indices: list[int], metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Call the pipeline itself, for the images of `forward` with a method that rewards the sampler's own."""
        given: dict[str, Any] = {"columns": self.columns, "metadata": metadata, "purpose": Purpose.NOISE}
        with quiet(self.pipeline):
            return sample_images(self.pipeline, prompts, indices, self.call_kwargs, self.seed, **given)

    def check_checkpointing(
        self, prompts: list[str], indices: list[int], metadata: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Raise RuntimeError if recomputed activations are not those of before; arguments as for `forward`."""
        check_checkpointing(
            modules_of(self.pipeline).values(),
            lambda: self.sample(prompts, indices, metadata),
            lambda apply: self._checked_rollout(apply, prompts, indices, metadata),
            [parameter for parameter in self.parameters() if parameter.requires_grad],
        )

    def _checked_rollout(self, apply: Callable[..., Any], *batch: Any) -> Tensor:
        decoding, self.decoding = self.decoding, "differentiable"  # the plain call that it is compared with decodes too
        self.apply_checkpoint = apply
        try:
            return self.rollout(DRaFT(num_last_steps=1), *batch).images
        finally:
            self.apply_checkpoint, self.decoding = None, decoding

    def with_backward(self, run: Callable[[], T]) -> T:
        """Run something with a backward pass; again with copies if the pipeline wrote into what that needs.

        Args:
            run (Callable[[], T]): makes rollouts and differentiates them.

        Returns:
            T: what it returns.
        """
        try:
            return run()
        except RuntimeError as error:
            if self.copies_saved_tensors or WRITTEN_INTO not in str(error):
                raise
        self.copies_saved_tensors = True
        return run()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let sharded denoisers accumulate gradients without reducing them; called by Accelerate."""
        sharded: list[Any] = [part for part in self.denoisers.values() if hasattr(part, "set_requires_gradient_sync")]
        for part in sharded:
            part.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for part in sharded:
                part.set_requires_gradient_sync(True)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Called by Trainer; the trainer has enabled it already, with what diffusers calls it."""


@dataclass(frozen=True)
class NearGroups:
    """How the samples of a group stay close: the noise of the first up to a step, new noise of their own there.

    Args:
        size (int): samples of a group.
        step (int): s of `NearPairs`.
        strength (float): rho of `NearPairs`.
    """

    size: int
    step: int
    strength: float

    def around(self, method: Method, seed: int, indices: list[int]) -> NearPairs:
        """Return a method whose samples part; the first of a group keeps its latents."""

        def draw(latents: Tensor) -> list[Tensor | None]:
            dtype = torch.promote_types(latents.dtype, torch.float32)
            return [
                randn_tensor(latents[:1].shape, make_generator(seed, Purpose.PARTING, index), latents.device, dtype)
                if index % self.size
                else None
                for index in indices
            ]

        return NearPairs(method, self.step, self.strength, draw)


def end_latents(output: RolloutOutput, pipeline: str, names: Sequence[str]) -> Tensor:
    """Return what the sampling ended with, one a sample.

    Args:
        output (RolloutOutput): of a batch.
        pipeline (str): its class, for the message.
        names (Sequence[str]): of the rewards that need it, for the message.

    Returns:
        Tensor: with graph, shape (B, ...), as the pipeline packs it.

    Raises:
        ValueError: if there are several sampling loops, so that it is not one tensor.
    """
    if len(output.latents) != output.num_calls:
        raise ValueError(
            f"{pipeline} samples {len(output.latents) // output.num_calls} streams of latents, but the reward "
            f"{names[0]!r} is to be learnt from one: it has no gradient, or asks for latents. Use a differentiable "
            "reward of the images with this pipeline."
        )
    return output.latents[0] if output.num_calls == 1 else _in_order(list(output.latents))


def for_copies(images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[list[str], list[dict]]:
    """Prompts and metadata of each image; a method's copies come after the samples, in their order."""
    copies = len(images) // len(prompts)
    return prompts * copies, metadata * copies


def _join(outputs: list[RolloutOutput]) -> RolloutOutput:
    """Put the rollouts of single samples together as one of a batch."""
    check_shapes([output.images[0] for output in outputs])
    loops = zip(*(output.latents for output in outputs), strict=True)
    penalties = [output.penalty for output in outputs if output.penalty is not None]
    return RolloutOutput(
        images=_in_order([output.images for output in outputs]),
        weights=_in_order([output.weights for output in outputs]),
        active_steps=outputs[0].active_steps,
        metrics={key: _in_order([output.metrics[key] for output in outputs]) for key in outputs[0].metrics},
        latents=tuple(latents for loop in loops for latents in loop),
        penalty=torch.cat(penalties) if penalties else None,
        num_calls=len(outputs),
    )


def _in_order(parts: list[Tensor]) -> Tensor:
    """Join what belongs to one sample each, whose copies lie one after another, copy-major."""
    return torch.stack(parts, dim=1).flatten(0, 1)
