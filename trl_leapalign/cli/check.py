"""Whether a pipeline can be trained, found out on it, and what to set."""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ..adapters.lora import enable_checkpointing, trained_parameters
from ..adapters.saving import loading_lines, save_trained
from ..leapalign_config import LeapAlignConfig
from ..leapalign_trainer import LeapAlignTrainer
from ..markdown import escape
from ..methods import DRaFT, Method, Plan, Schedule, Trajectory
from ..methods.flow import TRIGFLOW
from ..prompts.columns import takes_images
from ..prompts.sources import PromptSource
from ..rollout.pipelines import is_flow_matching, load_pipeline, modules_of, quiet, schedulers_of
from ..training.dry_run import DryRun

logger = logging.getLogger(__name__)

PROMPTS = ("a photo of a cat", "two red squares left of a dog")
# What a training needs, but a trial does not.
NOT_TRIED = {
    "dry_run": False,
    "activation_checkpointing": False,
    "base_penalty": None,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": None,
    "reward_weights": None,
    "reward_threshold": None,
    "reward_device": None,
    "reward_kwargs": None,
    "normalize_rewards": False,
    "samples_per_prompt": None,
    "pairs": None,
    "near_step": None,
    "near_noise": None,
    "difference_power": None,
    "offload_rewards": False,
    "train_prompts": None,
    "eval_prompts": None,
    "eval_strategy": "no",
    "eval_on_start": False,
    "metric_for_best_model": None,
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "report_to": "none",
    "image_grid_steps": None,
    "watch_steps": None,
    "watch_limits": None,
    "watch_action": "warn",
    "push_to_hub": False,
    "model_init_kwargs": None,
}


@dataclass(frozen=True)
class DenoiserCheck:
    """What was found of a component that is trained.

    Args:
        kind (str): name of its class.
        calls_per_step (float): of its forward pass, for each step of the scheduler.
        num_parameters (int): trained parameters.
        num_reached (int): those of them that the gradient reaches.
        grad_norm (float): norm of its gradient.
    """

    kind: str
    calls_per_step: float
    num_parameters: int
    num_reached: int
    grad_norm: float


@dataclass(frozen=True)
class PipelineCheck:
    """What a pipeline consists of, and whether it can be trained.

    Args:
        name (str): name of its class.
        problem (str | None): why it cannot be trained; None if it can.
        out_of_memory (bool): whether the problem is the memory of this machine, not the pipeline.
        schedulers (tuple[str, ...]): each with what it does.
        interpolant (str): the path of the noise times that was seen.
        num_steps (int): steps of the pipeline's last sampling loop.
        active_steps (tuple[int, ...]): those that ran with gradients.
        denoisers (dict[str, DenoiserCheck]): by component name.
        output (str): shape and kind of the output.
        images (tuple[str, ...]): arguments of the call that take images.
        identical (bool | None): whether the rollout's output is that of a plain call bit for bit.
        checkpointing (str): whether gradient checkpointing keeps output and gradients.
        lora (str): how the adapter that is saved is loaded.
        settings (tuple[str, ...]): what to set.
    """

    name: str
    problem: str | None = None
    out_of_memory: bool = False
    schedulers: tuple[str, ...] = ()
    interpolant: str = ""
    num_steps: int = 0
    active_steps: tuple[int, ...] = ()
    denoisers: dict[str, DenoiserCheck] = field(default_factory=dict)
    output: str = ""
    images: tuple[str, ...] = ()
    identical: bool | None = None
    checkpointing: str = ""
    lora: str = ""
    settings: tuple[str, ...] = ()

    @property
    def trainable(self) -> bool:
        return self.problem is None

    def markdown(self) -> str:
        """The report as a table, and what to set."""
        rows = {"scheduler": "; ".join(self.schedulers)}
        if self.num_steps:
            active = ", ".join(map(str, self.active_steps))
            rows["steps"] = f"{self.num_steps} ({self.interpolant}), with gradients {active}"
        for name, found in self.denoisers.items():
            rows[name] = (
                f"{found.kind}, {found.calls_per_step:.3g} calls a step; gradients reach "
                f"{found.num_reached} of {found.num_parameters} trained parameters, norm {found.grad_norm:.3g}"
            )
        rows |= {"output": self.output, "gradient checkpointing": self.checkpointing, "LoRA": self.lora}
        rows["takes images as"] = ", ".join(self.images)
        if self.identical is not None:
            rows["same output as a plain call"] = "yes, bit for bit" if self.identical else "no"
        lines = [f"# {escape(self.name)}", "", "| | |", "| --- | --- |"]
        lines += [f"| {escape(name)} | {escape(value)} |" for name, value in rows.items() if value]
        verdict = "It can be trained." if self.trainable else f"It cannot be trained: {self.problem}"
        if self.out_of_memory:
            verdict = (
                "Whether it can be trained is not known, since the memory of this machine was not enough: set "
                "activation_checkpointing=True, a smaller sample_height and sample_width, or use a larger GPU. "
                f"({self.problem})"
            )
        lines += ["", verdict]
        if self.settings:
            lines += ["", "Set:", "", *(f"- {setting}" for setting in self.settings)]
        return "\n".join(lines) + "\n"


def check(
    pipeline: DiffusionPipeline | str | Path, config: LeapAlignConfig | None = None, prompts: PromptSource = PROMPTS
) -> PipelineCheck:
    """Try a pipeline out as training would run it: one rollout of two samples and its gradient, on no real reward.

    Args:
        pipeline (DiffusionPipeline | str | Path): a pipeline, which gets an adapter, or its Hub id or path.
        config (LeapAlignConfig | None): the settings that training will have.
        prompts (PromptSource): prompts, with the columns that the pipeline's call needs.

    Returns:
        PipelineCheck: what was found, with `problem` for what stops training.
    """
    found = PipelineCheck(str(pipeline) if isinstance(pipeline, (str, Path)) else type(pipeline).__name__)
    config = config or LeapAlignConfig()
    try:
        if not isinstance(pipeline, DiffusionPipeline):
            pipeline = load_pipeline(pipeline, config.device, config.model_init_kwargs)
        images = tuple(takes_images(pipeline))
        found = replace(found, name=type(pipeline).__name__, schedulers=_schedulers(pipeline), images=images)
        with tempfile.TemporaryDirectory() as folder:
            return _try(found, pipeline, config, prompts, Path(folder))
    except Exception as error:  # whatever stops it is the answer
        logger.debug("What stopped the check of %s:", found.name, exc_info=True)
        problem = f"{type(error).__name__}: {error}"
        return replace(found, problem=problem, out_of_memory=isinstance(error, (torch.OutOfMemoryError, MemoryError)))


def _try(
    found: PipelineCheck,
    pipeline: DiffusionPipeline,
    config: LeapAlignConfig,
    prompts: PromptSource,
    folder: Path,
) -> PipelineCheck:
    config = replace(config, output_dir=str(folder), **NOT_TRIED)
    trainer = LeapAlignTrainer(pipeline, brightness, config, train_dataset=prompts)
    model, sampler = trainer.rollout_model, Watched(DRaFT(num_last_steps=1))
    with quiet(pipeline), trainer.accelerator.autocast():
        run = trainer.dry_run()
        with sampler.counting(trainer.denoisers):
            rollout = model.rollout(sampler, **run.batch)
        images = model.sample(**run.batch)
        schedule, calls = sampler.last_loop
        found = replace(
            found,
            interpolant="TrigFlow" if schedule.interpolant is TRIGFLOW else "rectified flow",
            num_steps=schedule.num_steps,
            active_steps=run.output.active_steps,
            denoisers={
                name: _denoiser(name, module, calls[name] / schedule.num_steps, run)
                for name, module in trainer.denoisers.items()
            },
            output=_output(images),
            identical=torch.equal(rollout.images, images),
            lora=_saved_lora(trainer, folder),
            checkpointing=_checkpointing(trainer, run),
        )
    return replace(found, settings=_settings_of(found, run, trainer))


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """A reward of any output: its mean, in which later columns or moments count more."""
    return (images * torch.linspace(0.5, 1.0, images.shape[-1], device=images.device)).flatten(1).mean(1)


class Watched(Method[Plan]):
    """A method that takes note of the sampling loops that it plans, and of the denoisers' calls in each.

    Args:
        method (Method[Plan]): does the work.
    """

    def __init__(self, method: Method):
        self.method = method
        self.loops: list[tuple[Schedule, Counter[str]]] = []

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> Plan:
        self.loops.append((schedule, Counter()))
        return self.method.plan(schedule, generator)

    def follow(self, plan: Plan, schedule: Schedule) -> Trajectory:
        return self.method.follow(plan, schedule)

    @contextmanager
    def counting(self, denoisers: dict[str, nn.Module]) -> Iterator[None]:
        """Count the calls of these modules for a while."""

        def count(name: str) -> None:
            if self.loops:
                self.loops[-1][1][name] += 1

        hooks = [each.register_forward_pre_hook(lambda *_, name=name: count(name)) for name, each in denoisers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def last_loop(self) -> tuple[Schedule, Counter[str]]:
        """The last one with calls; of several in step with each other, the one that was planned last."""
        return [loop for loop in self.loops if loop[1]][-1]


def _schedulers(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    known = []
    for scheduler in schedulers_of(pipeline):
        traits = ["flow matching" if is_flow_matching(scheduler) else "no flow matching"]
        for option in ("solver_order", "shift", "flow_shift"):
            if option in scheduler.config:
                traits.append(f"{option} {scheduler.config[option]}")
        traits += [name for name in ("use_dynamic_shifting", "stochastic_sampling") if scheduler.config.get(name)]
        known.append(f"{type(scheduler).__name__} ({', '.join(traits)})")
    return tuple(known)


def _denoiser(name: str, module: nn.Module, calls_per_step: float, run: DryRun) -> DenoiserCheck:
    gradients = run.gradients[name]
    norms = [gradient.float().norm() for gradient in gradients.values()]
    norm = torch.stack(norms).norm().item() if norms else 0.0
    count = len(trained_parameters(module))
    return DenoiserCheck(type(module).__name__, calls_per_step, count, len(gradients), norm)


def _output(images: Tensor) -> str:
    kind = {3: "audio", 4: "images", 5: "video"}.get(images.ndim, "of an unknown kind")
    own = "images" if images.ndim == 4 and images.shape[1] == 3 else kind
    return f"{tuple(images.shape)} {images.dtype}, {own}, from {images.min().item():.3g} to {images.max().item():.3g}"


def _saved_lora(trainer: LeapAlignTrainer, folder: Path) -> str:
    if trainer.args.full_finetuning:
        return ""
    save_trained(trainer.pipeline, trainer.denoisers, folder, False)
    return f"loaded with {'; '.join(loading_lines(trainer.pipeline, trainer.denoisers, 'FOLDER'))}"


def _checkpointing(trainer: LeapAlignTrainer, run: DryRun) -> str:
    """What a trainer with activation_checkpointing=True would say."""
    model = trainer.rollout_model
    modules = [module for module in modules_of(trainer.pipeline).values() if isinstance(module, ModelMixin)]
    before = [module for module in modules if module.is_gradient_checkpointing]
    try:
        enable_checkpointing(trainer.pipeline, trainer.denoisers)
        model.with_backward(lambda: model.check_checkpointing(**run.batch))
    except (RuntimeError, ValueError) as error:
        return f"not possible: {error}"
    finally:
        for module in modules:
            if module not in before:
                module.disable_gradient_checkpointing()
    return "keeps the output and the gradients"


def _settings_of(found: PipelineCheck, run: DryRun, trainer: LeapAlignTrainer) -> tuple[str, ...]:
    """What follows for the settings of a training."""
    settings = []
    if found.checkpointing.startswith("keeps"):
        settings.append("activation_checkpointing=True if memory is short")
    elif found.checkpointing:
        settings.append("activation_checkpointing=False")
    if run.output.images.ndim == 5:
        settings.append('VideoReward("hpsv2.1") of trl_leapalign.rewards, for a reward of images')
    if run.output.images.ndim not in (4, 5):
        settings.append("a reward function of your own: the built-in ones take images")
    calls = sum(each.calls_per_step for each in found.denoisers.values())
    if calls > 1:
        settings.append(
            f"a guidance with one call of the denoiser a step, if the model has one: {calls:.3g} calls, as here, make "
            "as many graphs"
        )
    if run.output.num_calls > 1:
        settings.append("any batch size: each sample gets a call of its own, because of the columns")
    if trainer.columns.columns:
        settings.append(f"pipeline_columns={trainer.columns.columns}")
    return tuple(settings)
