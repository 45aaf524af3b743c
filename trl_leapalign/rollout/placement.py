"""What of a pipeline lies on the device while it is trained: denoisers and decoder, and encoders while they encode."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload, remove_hook_from_module
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from .components import modules_of
from .pipelines import moves_weights
from .quantization import num_bytes

logger = logging.getLogger(__name__)


class EncoderOffload:
    """Keeps text and image encoders on the CPU and takes each to the device for the time of its call.

    They are on the device one after another, and all off it again when a denoiser is called. No gradient goes through
    them, so that nothing in the backward pass misses them.

    Args:
        pipeline (DiffusionPipeline): its frozen models of transformers are encoders, but those that are trained.
        denoisers (Iterable[nn.Module]): the modules that are trained.
        device (torch.device): where encoders run.

    Raises:
        ValueError: if the pipeline has no such models.
    """

    def __init__(self, pipeline: DiffusionPipeline, denoisers: Iterable[nn.Module], device: torch.device):
        denoisers = list(denoisers)
        self.encoders = {
            name: module
            for name, module in modules_of(pipeline).items()
            if isinstance(module, PreTrainedModel)
            and not any(module is denoiser for denoiser in denoisers)
            and (not moves_weights(module) or _comes_and_goes(module))
        }
        if not self.encoders:
            raise ValueError(
                f"{type(pipeline).__name__} has no encoders to offload, or they are offloaded already. Leave "
                "offload_text_encoders out."
            )
        self.device = device
        self.hooks: list[Any] = []
        for module in self.encoders.values():
            remove_hook_from_module(module)  # of a trainer before
            previous = self.hooks[-1] if self.hooks else None
            self.hooks.append(cpu_offload_with_hook(module, device, prev_module_hook=previous)[1])
        self.handles = [denoiser.register_forward_pre_hook(lambda *_: self.rest()) for denoiser in denoisers]
        self.rest()

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes that are not on the device while a pipeline samples, by encoder."""
        return {name: num_bytes(module) for name, module in self.encoders.items()}

    def rest(self) -> None:
        """Move the encoders that are on the device back to the CPU; those whose hooks were taken off stay there."""
        hooked = [hook for hook in self.hooks if getattr(hook.model, "_hf_hook", None) is hook.hook]
        used = [hook for hook in hooked if next(hook.model.parameters()).device.type != "cpu"]
        for hook in used:
            hook.offload()
        if used:
            clear_device_cache()

    def remove(self) -> None:
        """Take the hooks off; the encoders stay on the CPU."""
        self.rest()
        for handle in self.handles:
            handle.remove()
        for module in self.encoders.values():
            remove_hook_from_module(module)


def place(
    pipeline: DiffusionPipeline,
    denoisers: dict[str, nn.Module],
    device: torch.device,
    offload_encoders: bool = False,
) -> EncoderOffload | None:
    """Put the parts of a pipeline where they are needed in training.

    Parts that hooks move, of accelerate, diffusers' group offloading or a device map, are left to these.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        denoisers (dict[str, nn.Module]): its components that are trained, by name.
        device (torch.device): where it is trained.
        offload_encoders (bool): keep text and image encoders on the CPU but while they encode.

    Returns:
        EncoderOffload | None: what moves the encoders.

    Raises:
        ValueError: if a device map holds a denoiser on another device, or there are no encoders to offload.
    """
    encoders = EncoderOffload(pipeline, denoisers.values(), device) if offload_encoders else None
    resting = list(encoders.encoders.values()) if encoders is not None else []
    mapped = getattr(pipeline, "hf_device_map", None) is not None
    for name, module in modules_of(pipeline).items():
        here = {parameter.device for parameter in module.parameters()} <= {_indexed(device)}
        if here or moves_weights(module) or any(module is other for other in resting):
            continue
        if not mapped:
            module.to(device)
        elif name in denoisers:
            raise ValueError(
                f"The device map holds the {name} on {next(module.parameters()).device}, but this process trains on "
                f"{device}. Load the pipeline without device_map, or with device_map={str(device)!r}."
            )
    if encoders is not None:
        sizes = {name: f"{size / 2**30:.2f} GiB" for name, size in encoders.num_bytes.items()}
        logger.info("Encoders that are on the CPU but while they encode: %s.", sizes)
    return encoders


def _comes_and_goes(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_hf_hook", None), CpuOffload)


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
