"""Weights that are stored in a format through which no gradient flows."""

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .pipelines import modules_of

FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


def check_storage(pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module]) -> None:
    """Raise ValueError if a denoiser or a decoder keeps its weights in plain float8.

    diffusers' `enable_layerwise_casting` casts them for the time of each layer's forward pass, so the backward pass
    finds float8, which torch cannot compute with. Text encoders, which have no backward pass, may be stored so.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        denoisers (dict[str, nn.Module]): its components that are trained, by name.
    """
    decoders = {name: module for name, module in modules_of(pipeline).items() if hasattr(module, "decode")}
    for name, module in {**decoders, **denoisers}.items():
        stored = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.dtype in FLOAT8})
        if stored:
            raise ValueError(
                f"The {name} stores its weights in {stored[0]} (enable_layerwise_casting), which are cast for the "
                "forward pass only: the backward pass cannot compute with them. Load it in bfloat16, or quantize it "
                "with bitsandbytes; text encoders may stay as they are."
            )
