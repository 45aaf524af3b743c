"""What a training will need of a device's memory, found out from shapes before anything of that size is made.

The pipeline's call runs on modules without memory, which tells what denoisers and decoder are given. Their forward and
backward passes and the reward's then run once more on shapes, as an update runs them, and all tensors are counted while
they live.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..adapters.lora import trained_parameters
from ..methods import Method, Schedule
from ..methods.flow import RECTIFIED
from ..rewards.reward_model import RewardModel
from ..rollout.components import components_of
from ..rollout.decoders import checkpointed_decoders, decoders_of
from ..rollout.pipelines import quiet
from ..rollout.shapes import ShapedCall, pipeline_without_memory, shaped_calls, shapes_mode, without_memory
from .live_bytes import LiveBytes

logger = logging.getLogger(__name__)

GIB = 2**30
SHAPED_STEPS = 2
BYTES_OF_STATE = {"8bit": 2.05, "4bit": 1.1, "sgd": 0.0, "adafactor": 0.1, "lion": 4.0}
"""Bytes of an optimizer's state for each trained parameter, by what its name contains; AdamW's two moments else."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a training needs, in GiB.

    Args:
        weights (dict[str, float]): weights that stay on the device, by component.
        trained (float): trained weights, beside those if they are adapters.
        gradients (float): of the trained weights.
        optimizer (float): the optimizer's state.
        average (float): the moving average of the trained weights.
        num_kept (int): denoiser calls with gradients, whose activations are kept until the backward pass.
        kept (float): activations of all these calls.
        decoder (float): activations of the decoder.
        reward (float): activations of the reward.
        working (float): what is needed beside them where the most is needed.
        phase (str): where that is.
        activations_peak (float): most memory of activations and gradients together.
        device_overhead (float): what the device's library takes.
    """

    weights: dict[str, float]
    trained: float
    gradients: float
    optimizer: float
    average: float
    num_kept: int
    kept: float
    decoder: float
    reward: float
    working: float
    phase: str
    activations_peak: float
    device_overhead: float = 0.0

    @property
    def fixed(self) -> float:
        """Weights, adapters and their average."""
        return sum(self.weights.values()) + self.trained + self.average

    @property
    def first_update(self) -> float:
        """Most memory of the first update, which begins without the optimizer's state."""
        return self.device_overhead + self.fixed + max(self.activations_peak, self.gradients + self.optimizer)

    @property
    def peak(self) -> float:
        """Most memory of the later updates."""
        return self.device_overhead + self.fixed + self.optimizer + max(self.activations_peak, self.gradients)

    def rows(self) -> dict[str, float]:
        """What the peak consists of, in GiB."""
        rows = {f"weights: {name}": size for name, size in self.weights.items()}
        rows |= {"trained weights": self.trained, "average of the trained weights": self.average}
        rows["optimizer's state"] = self.optimizer
        rows[f"kept activations of {self.num_kept} denoiser calls"] = self.kept
        rows |= {"kept activations of the decoder": self.decoder, "kept activations of the reward": self.reward}
        rows[f"at the peak ({self.phase}): gradients and working memory, less what is freed"] = self.working
        if self.device_overhead:
            rows["the device's library"] = self.device_overhead
        return {name: size for name, size in rows.items() if size}

    def markdown(self, memory: float | None = None, advice: Sequence[str] = ()) -> str:
        """The plan as a table.

        Args:
            memory (float | None): of the card, in GiB.
            advice (Sequence[str]): what to switch on if it does not fit.
        """
        lines = ["| | GiB |", "| --- | ---: |"]
        lines += [f"| {name} | {size:.2f} |" for name, size in self.rows().items()]
        lines.append(f"| **peak** | **{self.peak:.2f}** |")
        if memory is not None:
            fits = self.peak <= memory
            lines += ["", f"{'Fits into' if fits else 'Does not fit into'} {memory:g} GiB."]
            if not fits and advice:
                lines += ["", "To save memory:", "", *(f"- {each}" for each in advice)]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Activations:
    """What an update keeps and needs beside weights and optimizer, in bytes.

    Args:
        num_kept (int): denoiser calls with gradients.
        kept (int): by these calls.
        decoder (int): kept by the decoder.
        reward (int): kept by the reward.
        peaks (dict[str, int]): most memory in each phase, gradients included.
    """

    num_kept: int
    kept: int
    decoder: int
    reward: int
    peaks: dict[str, int]


def plan_memory(
    pipeline: DiffusionPipeline,
    denoisers: Sequence[str],
    rewards: Sequence[Any],
    sample: Callable[[DiffusionPipeline], Any],
    *,
    method: Method,
    num_steps: int,
    optimizer: str = "adamw_torch",
    average: bool = False,
    autocast: torch.dtype | None = None,
    away: Sequence[str] = (),
    weights: dict[str, float] | None = None,
    device: str = "cpu",
) -> MemoryPlan:
    """Plan the memory of a training.

    Args:
        pipeline (DiffusionPipeline): with adapters, or all weights of the denoisers set to be trained; with memory or
            without. It is left as it is.
        denoisers (Sequence[str]): names of the components that are trained.
        rewards (Sequence[Any]): reward functions; what is no module is counted as nothing.
        sample (Callable[[DiffusionPipeline], Any]): calls a pipeline as training does, with few steps.
        method (Method): of the training.
        num_steps (int): sampling steps of a rollout.
        optimizer (str): name of the optimizer, as in `config.optim`.
        average (bool): whether the weights are averaged.
        autocast (torch.dtype | None): of mixed precision.
        away (Sequence[str]): components that are not on the device in an update, such as text encoders.
        weights (dict[str, float] | None): GiB of components' weights, to replace those of the modules.
        device (str): "cuda" counts half a GiB for CUDA itself.

    Returns:
        MemoryPlan: by part.

    Raises:
        ValueError: if the pipeline's call, or an update, cannot run on shapes.
    """
    trained = [p for name in denoisers for p in trained_parameters(getattr(pipeline, name)).values()]
    modules = {name: part for name, part in components_of(pipeline).items() if isinstance(part, nn.Module)}
    sizes = {name: held(part) / GIB for name, part in modules.items() if name not in away}
    sizes |= {f"reward {type(each).__name__}": held(each) / GIB for each in rewards if isinstance(each, nn.Module)}
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    for name in denoisers:
        sizes[name] -= sum(p.numel() * p.element_size() for p in trained_parameters(modules[name]).values()) / GIB
    sizes |= {name: size for name, size in (weights or {}).items() if name in sizes}
    try:
        found = _activations(pipeline, denoisers, rewards, sample, method, num_steps, autocast)
    except Exception as error:  # whatever looks at values
        raise ValueError(
            f"An update of {type(pipeline).__name__} cannot run on shapes alone ({type(error).__name__}: {error}), so "
            "its memory cannot be planned."
        ) from error
    phase, peak = max(found.peaks.items(), key=lambda item: item[1])
    return MemoryPlan(
        weights=sizes,
        trained=trained_bytes / GIB,
        gradients=trained_bytes / GIB,
        optimizer=sum(p.numel() for p in trained) * state_bytes(optimizer) / GIB,
        average=trained_bytes / GIB if average else 0.0,
        num_kept=found.num_kept,
        kept=found.kept / GIB,
        decoder=found.decoder / GIB,
        reward=found.reward / GIB,
        working=(max(peak, trained_bytes) - found.kept - found.decoder - found.reward) / GIB,
        phase=phase,
        activations_peak=peak / GIB,
        device_overhead=0.5 if device == "cuda" else 0.0,
    )


def state_bytes(optimizer: str) -> float:
    """Bytes of an optimizer's state for each trained parameter in float32.

    Args:
        optimizer (str): its name, as in `config.optim`.
    """
    name = str(getattr(optimizer, "value", optimizer)).lower()
    if "paged" in name:
        return 0.0
    return next((size for part, size in BYTES_OF_STATE.items() if part in name), 8.0)


def held(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, with the scales of quantized ones."""
    total = 0
    for tensor in {id(each): each for each in [*module.parameters(), *module.buffers()]}.values():
        total += tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            absmax = getattr(part, "absmax", None)
            total += absmax.numel() * absmax.element_size() if absmax is not None else 0
    return total


def _activations(
    pipeline: DiffusionPipeline,
    denoisers: Sequence[str],
    rewards: Sequence[Any],
    sample: Callable[[DiffusionPipeline], Any],
    method: Method,
    num_steps: int,
    autocast: torch.dtype | None,
) -> Activations:
    """Run an update on shapes."""
    mode = shapes_mode()
    twin = pipeline_without_memory(pipeline, mode)
    with quiet(twin), shaped_calls(twin, mode) as calls, torch.no_grad():
        images = sample(twin)
    per_step = [call for call in calls if call.component in denoisers and call.method == "forward"]
    largest = max(per_step, key=lambda call: sum(leaf.numel() for leaf in _tensors(call)))
    schedule = Schedule(tuple(1 - step / num_steps for step in range(num_steps + 1)), RECTIFIED)
    plan = method.plan(schedule, torch.Generator().manual_seed(0))
    count = round(len(plan.active_steps) * len(per_step) / SHAPED_STEPS) or 1
    decodes = [call for call in calls if call.component in decoders_of(twin) and call.method == "decode"]
    models = [without_memory(each, mode) for each in rewards if isinstance(each, nn.Module)]
    checkpointing = any(getattr(getattr(twin, name), "is_gradient_checkpointing", False) for name in denoisers)
    decoding = checkpointed_decoders(twin) if checkpointing else nullcontext()
    with mode, decoding, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        return _Simulation(twin, models).run(largest, count, decodes, images)


class _Simulation:
    """An update on modules without memory, with the tensors counted."""

    def __init__(self, pipeline: DiffusionPipeline, rewards: Sequence[nn.Module]):
        self.pipeline = pipeline
        self.rewards = rewards
        self.bytes = LiveBytes()
        self.peaks: dict[str, int] = {}

    def run(self, call: ShapedCall, count: int, decodes: Sequence[ShapedCall], images: Any) -> Activations:
        with torch.enable_grad(), self.bytes:
            outputs = [self._apply(call) for _ in range(count)]
            kept = self._phase("sampling")
            decoded = [self._apply(each) for each in decodes]
            decoder = self._phase("decoding") - kept
            scores = [self._score(model, images) for model in self.rewards]
            reward = self._phase("reward") - kept - decoder
            while scores:
                self._backward(scores.pop())
            self._phase("backward pass of the reward")
            while decoded:
                self._backward(decoded.pop())
            self._phase("backward pass of the decoder")
            while outputs:
                self._backward(outputs.pop())
            self._phase("backward pass of the denoiser")
        return Activations(count, kept, decoder, reward, self.peaks)

    def _phase(self, name: str) -> int:
        self.peaks[name] = self.bytes.peak
        self.bytes.restart_peak()
        return self.bytes.live

    def _apply(self, call: ShapedCall) -> Any:
        """Call a component on inputs of which the first needs a gradient, as latents do."""
        args, kwargs = tree_map(_leaf, (call.args, call.kwargs))
        first = _floating(args, kwargs)[0]
        first.requires_grad_()
        return getattr(getattr(self.pipeline, call.component), call.method)(*args, **kwargs)

    def _score(self, model: nn.Module, images: Any) -> Any:
        """Rewards of the decoded images; built-in ones without the checks, which look at values."""
        pixels = torch.empty(images.shape, dtype=torch.promote_types(images.dtype, torch.float32), requires_grad=True)
        prompts = [""] * len(images)
        with torch.autocast("cpu", enabled=False):
            if not isinstance(model, RewardModel):
                return model(pixels, prompts, [{}] * len(images))
            size = model.batch_size or len(images)
            texts = [model._encoded(prompt) for prompt in prompts]
            return [
                model._score(pixels[start : start + size], texts[start : start + size])
                for start in range(0, len(images), size)
            ]

    def _backward(self, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.backward(torch.ones_like(leaf))


def _tensors(call: ShapedCall) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def _leaf(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _floating(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
