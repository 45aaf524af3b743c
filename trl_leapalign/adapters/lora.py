"""Which modules are trained, and LoRA adapters on them."""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..rollout.components import DENOISER_PREFIXES
from ..rollout.quantization import check_quantized

logger = logging.getLogger(__name__)

DEFAULT_RANK = 32
KEEPS_BASE_WEIGHTS = (True, False, "gaussian", "orthogonal")


@contextmanager
def restored_on_error(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Take new adapters off a pipeline and unfreeze what was not frozen, if what follows raises."""
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    bare = [module for module in modules if not getattr(module, "peft_config", None)]
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    try:
        yield
    except BaseException:
        for module in bare:
            if getattr(module, "_hf_peft_config_loaded", False):
                module.unload_lora()
            elif getattr(module, "peft_config", None):
                recurse_remove_peft_layers(module)
                del module.peft_config
        for module in modules:
            module.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise


def prepare_denoisers(
    pipeline: DiffusionPipeline,
    names: list[str] | None,
    peft_config: LoraConfig | None,
    *,
    full_finetuning: bool,
    checkpointing: bool,
) -> dict[str, nn.Module]:
    """Freeze a pipeline but for what is trained.

    Args:
        pipeline (DiffusionPipeline): the pipeline; all its modules are put in eval mode.
        names (list[str] | None): components to train; None takes those called transformer... or unet....
        peft_config (LoraConfig | None): the adapter; None is `default_lora`, or the adapter that was loaded before.
        full_finetuning (bool): train all weights instead of an adapter.
        checkpointing (bool): recompute activations of the denoisers and the decoder in the backward pass.

    Returns:
        dict[str, nn.Module]: the modules to train, by component name.

    Raises:
        TypeError: if `peft_config` is not LoRA's.
        ValueError: if there is nothing to train, or an option does not fit the modules.
    """
    denoisers = find_denoisers(pipeline, names)
    for name, denoiser in denoisers.items():
        check_quantized(name, denoiser, full_finetuning)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    frozen = parts if full_finetuning else parts.keys() - denoisers
    adapted = sorted(name for name in frozen if getattr(parts[name], "peft_config", None))
    if adapted:
        raise ValueError(
            f"The {', '.join(adapted)} has an adapter that would act in training but not be saved. Merge it with "
            "pipeline.fuse_lora() and pipeline.unload_lora_weights(), or unload it."
        )
    for module in parts.values():
        module.eval().requires_grad_(False)
    if not full_finetuning:
        attach_lora(denoisers, peft_config)
    elif peft_config is not None:
        raise ValueError("full_finetuning=True trains all weights, so peft_config would have no effect. Drop one.")
    else:
        for name, denoiser in denoisers.items():
            _train_all_weights(name, denoiser)
    if checkpointing:
        enable_checkpointing(pipeline, denoisers)
    return denoisers


def _train_all_weights(name: str, denoiser: nn.Module) -> None:
    if denoiser.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Weights in {denoiser.dtype} are too coarse for full fine-tuning: most updates would be rounded away. "
            f"Load the {name} with torch_dtype={{'{name}': torch.float32, 'default': torch.bfloat16}}, set bf16=True."
        )
    denoiser.requires_grad_(True)


def enable_checkpointing(pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module]) -> None:
    """Let denoisers and decoder compute their activations again in the backward pass.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        denoisers (dict[str, nn.Module]): its components that are trained, by name.

    Raises:
        ValueError: if one of them has no gradient checkpointing.
    """
    for name, denoiser in denoisers.items():
        if not getattr(denoiser, "_supports_gradient_checkpointing", False):
            raise ValueError(
                f"The {name} ({type(denoiser).__name__}) has no gradient checkpointing. Set "
                "activation_checkpointing=False."
            )
        denoiser.enable_gradient_checkpointing()
    for part in pipeline.components.values():
        if hasattr(part, "decode") and getattr(part, "_supports_gradient_checkpointing", False):
            part.enable_gradient_checkpointing()


def find_denoisers(pipeline: DiffusionPipeline, names: list[str] | None = None) -> dict[str, nn.Module]:
    """Find the modules to train.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        names (list[str] | None): names of components; None takes those called transformer... or unet....

    Returns:
        dict[str, nn.Module]: by component name.

    Raises:
        ValueError: if a name is not that of a module, none is found, or one is wrapped by torch.compile.
    """
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    chosen = names if names is not None else [name for name in modules if name.startswith(DENOISER_PREFIXES)]
    unknown = [name for name in chosen if name not in modules]
    if unknown or not chosen:
        raise ValueError(
            f"{type(pipeline).__name__} has no module to train called {', '.join(unknown) or 'transformer or unet'}. "
            f"Set denoisers to some of {sorted(modules)}."
        )
    compiled = [name for name in chosen if hasattr(modules[name], "_orig_mod")]
    if compiled:
        raise ValueError(
            f"torch.compile() wrapped the {compiled[0]}, so its saved weights could not be loaded again. "
            f"Compile it in place: pipeline.{compiled[0]}.compile()."
        )
    return {name: modules[name] for name in chosen}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def default_lora(denoiser: nn.Module) -> LoraConfig:
    """LoRA on the linear layers inside the blocks of a denoiser but those of norms and modulations, alpha = rank.

    Args:
        denoiser (nn.Module): the module to adapt.

    Returns:
        LoraConfig: of rank 32, with Gaussian initialisation.

    Raises:
        ValueError: if the denoiser has no such layer.
    """
    blocks = [name for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)]
    targets = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(tuple(f"{block}." for block in blocks))
        and not re.search(r"norm|modulation|_mod\b|adaln", name.lower())
    ]
    if not targets:
        raise ValueError(
            f"{type(denoiser).__name__} has no linear layers in blocks, so there is no default LoRA for it. Pass a "
            "peft_config with target_modules, or set full_finetuning=True."
        )
    return LoraConfig(
        r=DEFAULT_RANK, lora_alpha=DEFAULT_RANK, init_lora_weights="gaussian", target_modules=sorted(targets)
    )


def attach_lora(denoisers: dict[str, nn.Module], peft_config: LoraConfig | None) -> None:
    """Put a trainable adapter on each denoiser, in float32 at least, or go on with the one that it already has.

    Args:
        denoisers (dict[str, nn.Module]): frozen diffusers models.
        peft_config (LoraConfig | None): None is `default_lora`, or the adapter that was loaded before.

    Raises:
        TypeError: if the configuration is not LoRA's.
        ValueError: if it targets nothing, has dropout or what cannot be loaded again, or there are adapters besides it.
    """
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}.")
    for name, denoiser in denoisers.items():
        loaded = list(getattr(denoiser, "peft_config", {}))
        if len(loaded) > 1 or (loaded and peft_config is not None):
            raise ValueError(
                f"The {name} already has the adapters {loaded}. Fuse or unload them to start a new one, or keep one "
                "and pass no peft_config to go on training it."
            )
        config = denoiser.peft_config[loaded[0]] if loaded else copy.deepcopy(peft_config) or default_lora(denoiser)
        _check_adapter(config)
        if loaded:
            _check_active(name, denoiser)
        else:
            _add_adapter(name, denoiser, config)
        for key, parameter in denoiser.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
                parameter.requires_grad_(True)


def _add_adapter(name: str, denoiser: nn.Module, config: LoraConfig) -> None:
    if config.target_modules is None:
        config.target_modules = default_lora(denoiser).target_modules
    if not isinstance(denoiser, ModelMixin):
        raise ValueError(
            f"The {name} ({type(denoiser).__name__}) is no diffusers model, whose adapters alone are saved. Set "
            "denoisers to the components that sample."
        )
    try:
        if isinstance(denoiser, PeftAdapterMixin):
            denoiser.add_adapter(config)
        else:
            inject_adapter_in_model(config, denoiser)
    except ValueError as error:
        raise ValueError(
            f"The LoRA of peft_config does not fit the {name}: {error}. Set target_modules to names of its linear "
            "layers, or leave it out for the default."
        ) from error


def _check_active(name: str, denoiser: nn.Module) -> None:
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    for attribute, problem, remedy in (
        ("disable_adapters", "disabled", "pipeline.enable_lora()"),
        ("merged", "fused", "pipeline.unfuse_lora()"),
    ):
        if any(getattr(layer, attribute) for layer in layers):
            raise ValueError(
                f"The adapter of the {name} is {problem}, so training it would change no image. Call {remedy} first, "
                "or pipeline.unload_lora_weights() to start a new one."
            )


def _check_adapter(config: LoraConfig) -> None:
    if config.lora_dropout > 0:
        raise ValueError(
            f"lora_dropout={config.lora_dropout} would make trained images differ from sampled ones. Set it to 0."
        )
    if config.init_lora_weights not in KEEPS_BASE_WEIGHTS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, so the saved adapter would mean "
            f"something else on the pipeline that others load. Choose one of {KEEPS_BASE_WEIGHTS}."
        )
    if config.bias != "none" or config.modules_to_save or config.target_parameters:
        raise ValueError(
            f"bias={config.bias!r}, modules_to_save={config.modules_to_save} and target_parameters="
            f"{config.target_parameters} train weights that pipelines cannot load from an adapter's file. Leave them "
            "out, or set full_finetuning=True."
        )


def adapter_name(denoiser: nn.Module) -> str:
    """Name of the one adapter of a denoiser."""
    return next(iter(denoiser.peft_config))
