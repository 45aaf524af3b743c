"""Which modules are trained, and LoRA adapters on them."""

import copy
import logging
import re
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, PeftType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..rollout.components import DENOISER_PREFIXES
from ..rollout.quantization import check_quantized
from ..rollout.storage import check_storage
from .wrapped import check_loadable, check_own_model

logger = logging.getLogger(__name__)

DEFAULT_RANK = 32
KEEPS_BASE_WEIGHTS = (True, False, "gaussian", "orthogonal")


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
    check_storage(pipeline, denoisers)
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
    for name, denoiser in denoisers.items():
        check_loadable(name, denoiser, full_finetuning)
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
        ValueError: if a name is not that of a module, none is found, or one is wrapped in another module.
    """
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    chosen = names if names is not None else [name for name in modules if name.startswith(DENOISER_PREFIXES)]
    unknown = [name for name in chosen if name not in modules]
    if unknown or not chosen:
        raise ValueError(
            f"{type(pipeline).__name__} has no module to train called {', '.join(unknown) or 'transformer or unet'}. "
            f"Set denoisers to some of {sorted(modules)}."
        )
    for name in chosen:
        check_own_model(name, modules[name])
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
    if peft_config is not None and not _is_lora(peft_config):
        raise TypeError(
            f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}. Pipelines load no other kind of "
            "adapter."
        )
    for name, denoiser in denoisers.items():
        loaded = list(getattr(denoiser, "peft_config", {}))
        if len(loaded) > 1 or (loaded and peft_config is not None):
            raise ValueError(
                f"The {name} already has the adapters {loaded}. Fuse or unload them to start a new one, or keep one "
                "and pass no peft_config to go on training it."
            )
        if loaded and not _is_lora(denoiser.peft_config[loaded[0]]):
            kind = type(denoiser.peft_config[loaded[0]]).__name__.removesuffix("Config")
            raise ValueError(
                f"The {name} has an adapter of the kind {kind}, which no pipeline loads from a file. Load the pipeline "
                "without it, and pass peft_config=LoraConfig(...) or leave it out for the default LoRA."
            )
        config = denoiser.peft_config[loaded[0]] if loaded else copy.deepcopy(peft_config) or default_lora(denoiser)
        _check_adapter(config)
        if loaded:
            check_active(name, denoiser)
        else:
            _add_adapter(name, denoiser, config)
        _log_adapter(name, denoiser, bool(loaded))
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


def _is_lora(config: Any) -> bool:
    """Whether it is LoRA's, not that of another method, some of which inherit from it."""
    return isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA


def _log_adapter(name: str, denoiser: nn.Module, loaded: bool) -> None:
    """Say which adapter is trained."""
    adapter = adapter_name(denoiser)
    scales = {
        layer.scaling[adapter] * layer.r[adapter] / layer.lora_alpha[adapter]
        for layer in denoiser.modules()
        if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_alpha and not layer.use_rslora[adapter]
    }
    origin = "goes on with the adapter that was there" if loaded else "starts a new adapter"
    scale = ""
    if loaded and not scales <= {1.0}:
        scale = f" It is used at a scale of {min(scales):.3g}, which its saved weights contain."
    logger.log(
        logging.WARNING if scale else logging.INFO,
        "Training of the %s %s, %r (rank %s).%s",
        *(name, origin, adapter, denoiser.peft_config[adapter].r, scale),
    )


def check_active(name: str, denoiser: nn.Module) -> None:
    """Raise ValueError if a denoiser has no adapter that acts on what it returns.

    Args:
        name (str): of the component.
        denoiser (nn.Module): the component.
    """
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if not any(adapter_name(denoiser) in layer._get_available_adapters() for layer in layers):
        raise ValueError(
            f"The adapter {adapter_name(denoiser)!r} of the {name} has no weights: nothing of its file was for it. "
            "Unload it with pipeline.unload_lora_weights() to start a new one, or load the file that belongs to it."
        )
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
