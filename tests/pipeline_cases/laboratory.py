"""What the matrix of pipelines is measured with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from double_precision import widen
from torch import Tensor, nn

from trl_leapalign import LeapAlignConfig, LeapAlignTrainer
from trl_leapalign.adapters.lora import attach_lora, find_denoisers
from trl_leapalign.media import by_sample
from trl_leapalign.methods import LeapAlign, Method, Schedule
from trl_leapalign.rollout.pipelines import modules_of, schedulers_of
from trl_leapalign.rollout.recompute import WRITTEN_INTO, copies_of_saved_tensors
from trl_leapalign.rollout.recorder import RolloutOutput
from trl_leapalign.rollout.run import run_rollout

from .base import PipelineCase

# What the trainer calls some arguments of a pipeline.
SETTINGS = {
    "num_inference_steps": "sample_num_steps",
    "guidance_scale": "sample_guidance_scale",
    "height": "sample_height",
    "width": "sample_width",
}


@dataclass(frozen=True)
class EveryStep(LeapAlign):
    """LeapAlign along all steps: with no discount, and Euler's solver, this is the sampler itself."""

    gradient_discount: float = 1.0

    def draw(self, schedule: Schedule, generator: torch.Generator | None) -> tuple[tuple[int, ...], ...]:
        return (schedule.levels,)


class Laboratory:
    """A pipeline of the matrix with adapters that do something, shared by the checks of its case."""

    def __init__(self, case: PipelineCase):
        self.case = case
        self.pipeline = self.build()
        self.denoisers = find_denoisers(self.pipeline)
        attach_lora(self.denoisers, None)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.05, generator=generator)

    def build(self) -> DiffusionPipeline:
        """The pipeline without adapter, its denoisers' weights scaled up so that velocities depend on the latents."""
        pipeline = self.case.build()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for denoiser in find_denoisers(pipeline).values():
                for parameter in denoiser.parameters():
                    if parameter.ndim > 1 and parameter.any():
                        parameter.mul_(1.5)
                    elif parameter.ndim > 1:  # gates that begin closed
                        parameter.normal_(std=0.1, generator=generator)
        return pipeline

    @property
    def modules(self) -> list[nn.Module]:
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": parameter
            for name, denoiser in self.denoisers.items()
            for key, parameter in denoiser.named_parameters()
            if parameter.requires_grad
        }

    @property
    def trained_names(self) -> set[str]:
        """All names of what is trained, as before an adapter came: components may share modules."""
        trained = {id(parameter) for parameter in self.trained.values()}
        return {
            f"{name}.{key}".replace(".base_layer", "")
            for name, module in modules_of(self.pipeline).items()
            for key, parameter in module.named_parameters(remove_duplicate=False)
            if id(parameter) in trained
        }

    def plain(self, pipeline: DiffusionPipeline | None = None) -> Tensor:
        torch.manual_seed(0)
        output = (pipeline or self.pipeline)(**self.case.inputs(), output_type="pt", return_dict=False)[0]
        return by_sample(output, 1, str(self.case))

    def rollout(self, method: Method) -> RolloutOutput:
        torch.manual_seed(0)
        method_generator = torch.Generator().manual_seed(0)
        return run_rollout(self.pipeline, method, method_generator=method_generator, **self.case.inputs())

    def gradients(self, method: Method, weights: Tensor) -> dict[str, Tensor]:
        """Gradient of the weighted sum of a rollout's output, by trained parameter; zeros where there is none."""
        trained = self.trained
        try:
            total = (self.rollout(method).images * weights).sum()
            found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        except RuntimeError as error:
            if WRITTEN_INTO not in str(error):
                raise
            with copies_of_saved_tensors():
                total = (self.rollout(method).images * weights).sum()
            found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(trained.items(), found, strict=True)
        }

    def slope(self, weights: Tensor, direction: dict[str, Tensor], step: float) -> tuple[float, float]:
        """Central difference of the weighted sum of the plain pipeline's output, and its error.

        The error is estimated by half of what the differences ahead and behind differ by. That bounds what a kink near
        the parameters does, such as that of a ReLU, and more than covers curvature; rounding makes them differ too.
        """
        trained = self.trained
        values = {name: parameter.detach().clone() for name, parameter in trained.items()}
        sums = []
        with torch.no_grad():
            for sign in (1, 0, -1):
                for name, parameter in trained.items():
                    parameter.copy_(values[name] + sign * step * direction[name])
                sums.append((self.plain() * weights).double().sum().item())
            for name, parameter in trained.items():
                parameter.copy_(values[name])
        ahead, here, behind = sums
        return (ahead - behind) / (2 * step), abs(ahead - 2 * here + behind) / (2 * step)

    def is_euler(self) -> bool:
        """Whether the sampler's steps are the leaps between them."""
        return all(
            type(scheduler) is FlowMatchEulerDiscreteScheduler and not scheduler.config.stochastic_sampling
            for scheduler in schedulers_of(self.pipeline)
        )


class PreciseLaboratory(Laboratory):
    """The same in float64, to be made and used inside `double_precision`."""

    def build(self) -> DiffusionPipeline:
        pipeline = super().build()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                widen(part)
        return pipeline


def make_trainer(
    case: PipelineCase, pipeline: DiffusionPipeline, directory: Path, reward: Any, **settings: Any
) -> LeapAlignTrainer:
    """A trainer whose rollouts are called as the case is."""
    arguments = case.inputs()
    prompt = arguments.pop("prompt")
    arguments.pop("generator", None)
    named = {SETTINGS[name]: arguments.pop(name) for name in SETTINGS.keys() & arguments.keys()}
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "sample_kwargs": arguments,
    }
    config = LeapAlignConfig(output_dir=str(directory), **{**defaults, **named, **settings})
    return LeapAlignTrainer(pipeline, reward, config, train_dataset=[prompt])
