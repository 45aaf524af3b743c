"""The trained weights: which modules are trained, LoRA adapters on them, saving them so that anyone can load them."""

import copy
import inspect
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
DEFAULT_RANK = 32
KEEPS_BASE_WEIGHTS = (True, False, "gaussian", "orthogonal")
DENOISER_PREFIXES = ("transformer", "unet")


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


def lora_state_dict(denoiser: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """Read an adapter so that it means the same everywhere: alpha equals the rank, the scale is in lora_B.

    Args:
        denoiser (nn.Module): a diffusers model with one adapter.

    Returns:
        tuple[dict[str, Tensor], dict]: weights by name, on the CPU, and the PEFT configuration that fits them.
    """
    adapter = adapter_name(denoiser)
    weights = {}
    for key, value in get_peft_model_state_dict(denoiser, adapter_name=adapter).items():
        layer, _, kind = key.rpartition(".lora_")
        if kind.startswith(("B.", "embedding_B")):
            value = value * denoiser.get_submodule(layer).scaling[adapter]
        weights[key] = value.detach().cpu().contiguous()
    config = denoiser.peft_config[adapter].to_dict()
    config.update(lora_alpha=config["r"], alpha_pattern=dict(config["rank_pattern"]), use_rslora=False)
    return weights, config


def save_trained(
    pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module], directory: str | Path, full_finetuning: bool
) -> None:
    """Save the trained weights in the format that diffusers loads, read them back and compare.

    LoRA is written by the pipeline's own `save_lora_weights` or, if it takes none for these denoisers, into one folder
    for each, to be loaded as `loading_lines` says; all weights by `save_pretrained` into one folder a denoiser.

    Args:
        pipeline (DiffusionPipeline): the pipeline that the denoisers belong to.
        denoisers (dict[str, nn.Module]): unwrapped modules by component name.
        directory (str | Path): the folder to write into.
        full_finetuning (bool): whether all weights were trained.

    Raises:
        RuntimeError: if what is read back differs from what was trained.
    """
    directory = Path(directory)
    if full_finetuning:
        for name, denoiser in denoisers.items():
            denoiser.save_pretrained(directory / name)
            files = sorted((directory / name).glob("*.safetensors"))
            saved = {key: value for file in files for key, value in load_file(file).items()}
            _compare(saved, denoiser.state_dict(), directory / name)
        return
    adapters = {name: lora_state_dict(denoiser) for name, denoiser in denoisers.items()}
    if saved_by_pipeline(pipeline, denoisers):
        _save_with_pipeline(pipeline, adapters, directory)
    else:
        _save_for_modules(denoisers, adapters, directory)
        logger.warning(
            "%s cannot save LoRA weights for its %s. Load them with: %s",
            *(type(pipeline).__name__, ", ".join(denoisers)),
            "; ".join(loading_lines(pipeline, denoisers, str(directory))),
        )


def loading_lines(pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module], source: str) -> list[str]:
    """Write down how to load adapters that `save_trained` saved.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        denoisers (dict[str, nn.Module]): its components that have adapters, by name.
        source (str): the folder, or the repository that it was pushed to.

    Returns:
        list[str]: lines of Python, in which the pipeline is called so.
    """
    if saved_by_pipeline(pipeline, denoisers):
        return [f'pipeline.load_lora_weights("{source}")']
    own = [name for name, denoiser in denoisers.items() if isinstance(denoiser, PeftAdapterMixin)]
    return [
        *(["from peft import PeftModel"] if len(own) < len(denoisers) else []),
        *(
            f'pipeline.{name}.load_lora_adapter("{source}", subfolder="{name}", prefix=None, use_safetensors=True)'
            if name in own
            else f'PeftModel.from_pretrained(pipeline.{name}, "{source}", subfolder="{name}")'
            for name in denoisers
        ),
    ]


def saved_by_pipeline(pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module]) -> bool:
    """Whether a pipeline's own `save_lora_weights` takes the adapters of these components."""
    parameters = inspect.signature(getattr(pipeline, "save_lora_weights", lambda: None)).parameters
    return all(f"{name}_lora_layers" in parameters for name in denoisers)


def _save_with_pipeline(
    pipeline: DiffusionPipeline, adapters: dict[str, tuple[dict[str, Tensor], dict]], directory: Path
) -> None:
    arguments, expected = {}, {}
    for name, (weights, config) in adapters.items():
        arguments |= {f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": config}
        expected |= {f"{name}.{key}": value for key, value in weights.items()}
    pipeline.save_lora_weights(directory, **arguments)
    _compare(load_file(directory / LORA_FILE), expected, directory / LORA_FILE)


def _save_for_modules(
    denoisers: dict[str, nn.Module], adapters: dict[str, tuple[dict[str, Tensor], dict]], directory: Path
) -> None:
    """Save each adapter on its own, for pipelines that cannot save them together: as diffusers does, else as PEFT."""
    for name, (weights, config) in adapters.items():
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(denoisers[name], PeftAdapterMixin):
            file = folder / LORA_FILE
            metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, default=list)}
        else:
            file = folder / SAFETENSORS_WEIGHTS_NAME
            weights = {f"base_model.model.{key}": value for key, value in weights.items()}
            metadata = {"format": "pt"}
            LoraConfig(**config).save_pretrained(folder)
        save_file(weights, file, metadata=metadata)
        _compare(load_file(file), weights, file)


def _compare(saved: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    wrong = list(saved.keys() ^ expected.keys())
    wrong += [key for key in saved.keys() & expected.keys() if not torch.equal(saved[key], expected[key].cpu())]
    if wrong:
        raise RuntimeError(
            f"{where} does not hold the weights that were trained: {len(wrong)} tensors are missing, surplus or "
            f"different, such as {sorted(wrong)[:3]}. The disk may be full, or another process wrote there."
        )
