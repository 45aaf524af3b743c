"""Denoisers that are not the pipeline's own model, so that what is saved of them could be loaded nowhere."""

from accelerate import init_empty_weights
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def check_own_model(name: str, denoiser: nn.Module) -> None:
    """Raise ValueError if a component is a wrapper around a diffusers model.

    Args:
        name (str): of the component.
        denoiser (nn.Module): the component.
    """
    if hasattr(denoiser, "_orig_mod"):
        raise ValueError(
            f"torch.compile() wrapped the {name}, so its saved weights could not be loaded again. Compile it in place: "
            f"pipeline.{name}.compile(), or only its blocks: pipeline.{name}.compile_repeated_blocks()."
        )
    inner = [part for part in denoiser.modules() if isinstance(part, ModelMixin)]
    if isinstance(denoiser, ModelMixin) or not inner:
        return
    kind = type(denoiser)
    remedy = f"set pipeline.{name} to the {type(inner[0]).__name__} in it"
    if kind.__module__.startswith("peft."):
        remedy = (
            f"load the pipeline anew and pass its LoraConfig as peft_config, or add it with pipeline.{name}"
            ".add_adapter(lora_config)"
        )
    raise ValueError(
        f"The {name} is wrapped in a {kind.__name__}, so its saved weights would have names that no pipeline loads. "
        f"To train it, {remedy}."
    )


def check_loadable(name: str, denoiser: nn.Module, full_finetuning: bool) -> None:
    """Raise ValueError if trained weights have names that a model of the same configuration lacks.

    Args:
        name (str): of the component.
        denoiser (nn.Module): a component with its adapter.
        full_finetuning (bool): whether all weights are trained.
    """
    if not isinstance(denoiser, ModelMixin):
        return
    with init_empty_weights():
        bare = type(denoiser).from_config(denoiser.config)
    if full_finetuning:
        strange = sorted(denoiser.state_dict().keys() - bare.state_dict().keys())
    else:
        known = {key for key, _ in bare.named_modules()}
        adapted = [key for key, layer in denoiser.named_modules() if isinstance(layer, BaseTunerLayer)]
        strange = [key for key in adapted if key not in known]
    if strange:
        raise ValueError(
            f"{len(strange)} trained parts of the {name}, such as {strange[0]}, are not in a {type(denoiser).__name__} "
            "of its configuration, so the saved weights could not be loaded into it. Undo what added them, such as "
            "fuse_qkv_projections() (undone by unfuse_qkv_projections()), or leave them out of target_modules."
        )
