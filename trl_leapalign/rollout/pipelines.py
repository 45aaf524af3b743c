"""What a pipeline consists of, and whether it can be differentiated."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel

from .components import DENOISER_PREFIXES, components_of, modules_of, pipelines_of, schedulers_of
from .quantization import keep_differentiable, load_quantized, read_quantization
from .temporary import temporary_attribute

__all__ = ["components_of", "modules_of", "pipelines_of", "schedulers_of", "temporary_attribute"]


def load_pipeline(
    pipeline: DiffusionPipeline | str | Path, device: torch.device, init_kwargs: dict[str, Any]
) -> DiffusionPipeline:
    """Load a pipeline if it is given by name, and check it.

    Args:
        pipeline (DiffusionPipeline | str | Path): a pipeline, or its Hub id or path.
        device (torch.device): where it will run; sets the default dtype, bfloat16 but on the CPU.
        init_kwargs (dict[str, Any]): arguments of `from_pretrained`; `load_in_4bit`, `load_in_8bit` and
            `quantization_config` are understood as `quantization.read_quantization` says.

    Returns:
        DiffusionPipeline: on the device it was on or, when loaded, on the CPU.

    Raises:
        TypeError: if it is not a diffusers pipeline.
        ValueError: if it cannot be differentiated, or `init_kwargs` come with a pipeline that is loaded already.
    """
    if isinstance(pipeline, (str, Path)):
        dtype = init_kwargs.get("torch_dtype", torch.float32 if device.type == "cpu" else torch.bfloat16)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        others, quantization = read_quantization({**init_kwargs, "torch_dtype": dtype})
        if quantization is None:
            pipeline = DiffusionPipeline.from_pretrained(pipeline, **others)
        else:
            pipeline = load_quantized(str(pipeline), quantization, device, others)
        for module in modules_of(pipeline).values():
            keep_differentiable(module)
    elif init_kwargs:
        raise ValueError(
            "model_init_kwargs has no effect on a pipeline that is loaded already. Leave it out, or pass the pipeline "
            "by name. To quantize what is loaded, call trl_leapalign.rollout.quantization.quantize_pipeline."
        )
    check_pipeline(pipeline)
    return pipeline


def check_pipeline(pipeline: DiffusionPipeline) -> None:
    """Say whether a pipeline can be differentiated, before anything runs.

    Args:
        pipeline (DiffusionPipeline): the pipeline to check.

    Raises:
        TypeError: if it is not a diffusers pipeline.
        ValueError: if no scheduler of it does flow matching, its weights move between devices, or it cannot return
            tensors.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(
            f"Expected a diffusers pipeline, got {type(pipeline).__name__}. Load one with "
            "DiffusionPipeline.from_pretrained(...)."
        )
    name = type(pipeline).__name__
    if not any(map(is_flow_matching, schedulers_of(pipeline))):
        found = ", ".join(type(scheduler).__name__ for scheduler in schedulers_of(pipeline)) or "no scheduler"
        raise ValueError(
            f"{name} does not sample by flow matching: it has {found}. Needed is a FlowMatch scheduler (such as "
            "FlowMatchEulerDiscreteScheduler), a multistep scheduler with prediction_type='flow_prediction' and "
            "use_flow_sigmas=True, or a TrigFlow one, and a model trained for it (FLUX, SD3.5, Qwen-Image, Wan, ...)."
        )
    moved = [
        key for key, module in modules_of(pipeline).items() if moves_weights(module) and may_carry_gradient(key, module)
    ]
    if moved:
        raise ValueError(
            f"{name} moves weights between devices during the call ({', '.join(moved)}: cpu offload, group offloading "
            "or a device_map that offloads), so the backward pass would not find them: it needs the weights of each "
            "layer where they were in the forward pass. Call pipeline.remove_all_hooks(), leave group offloading out "
            "or exclude these modules from it. Text and image encoders may be offloaded: offload_text_encoders=True "
            "does it."
        )
    if "output_type" not in inspect.signature(type(pipeline).__call__).parameters:
        raise ValueError(f"{name} cannot return tensors: its call has no output_type argument.")


def may_carry_gradient(name: str, module: nn.Module) -> bool:
    """Whether the reward's gradient may pass through a component: not through frozen encoders of prompts.

    Args:
        name (str): of the component.
        module (nn.Module): the component. Models of transformers encode texts and images before the sampling.

    Returns:
        bool: True for denoisers, decoders, control nets and whatever is trained.
    """
    return name.startswith(DENOISER_PREFIXES) or not isinstance(module, PreTrainedModel)


def moves_weights(module: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers take a module's weights off the device between its calls."""
    registries = [part._diffusers_hook for part in module.modules() if hasattr(part, "_diffusers_hook")]
    if any("group_offloading" in registry.hooks for registry in registries):
        return True
    hooks = [part._hf_hook for part in module.modules() if getattr(part, "_hf_hook", None) is not None]
    return not all(isinstance(hook, AlignDevicesHook) and not hook.offload for hook in hooks)


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler.step` integrates a flow-matching velocity.

    Args:
        scheduler (SchedulerMixin): a scheduler with its configuration.

    Returns:
        bool: True for the FlowMatch schedulers, those of other families that are set to flow matching, and TrigFlow.
    """
    if any("FlowMatch" in base.__name__ for base in type(scheduler).__mro__):
        return True
    prediction_type = scheduler.config.get("prediction_type")
    if "use_flow_sigmas" in scheduler.config:
        return prediction_type == "flow_prediction" and scheduler.config.use_flow_sigmas
    return prediction_type in ("flow_prediction", "trigflow")


def check_call_arguments(pipeline: DiffusionPipeline, names: Any) -> None:
    """Check that a pipeline's call takes some arguments.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        names (Iterable[str]): names of the arguments.

    Raises:
        TypeError: if the call does not take one of them, or it is not the caller's to set.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    known = [name for name in parameters if name not in ("self", "return_dict")]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [name for name in names if name == "return_dict" or (name not in known and not takes_any)]
    if unknown:
        raise TypeError(
            f"{type(pipeline).__name__} cannot be called with {', '.join(unknown)}. It takes: {', '.join(known)}."
        )


@contextmanager
def quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Turn a pipeline's own progress bar off for a while."""
    bar = {**getattr(pipeline, "_progress_bar_config", {}), "disable": True}
    with temporary_attribute(pipeline, "_progress_bar_config", bar):
        yield
