"""What a trainer that could not be made leaves behind: nothing."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from torch import nn

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def random_state_restored_on_error() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back if what follows raises; also a decorator."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except BaseException:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(cuda)
        raise


@contextmanager
def restored_on_error(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Leave a pipeline as it was if what follows raises.

    New adapters are taken off; what required gradients, the dtype of adapters that were there, the mode of modules and
    gradient checkpointing are put back, and gradients are dropped that were not there.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
    """
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    bare = [module for module in modules if not getattr(module, "peft_config", None)]
    parameters = [
        (parameter, parameter.requires_grad, parameter.dtype, parameter.grad is None)
        for module in modules
        for parameter in module.parameters()
    ]
    modes = [(part, part.training) for part in parts]
    flags = [(part, name, vars(part)[name]) for part in parts for name in CHECKPOINTING if name in vars(part)]
    try:
        yield
    except BaseException:
        for module in bare:
            _remove_adapters(module)
        for module in modules:
            module.requires_grad_(False)
        for parameter, trained, dtype, without_gradient in parameters:
            if parameter.dtype != dtype and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(trained)
            if without_gradient:
                parameter.grad = None
        for part, mode in modes:
            part.training = mode
        for part, name, value in flags:
            setattr(part, name, value)
        raise


def _remove_adapters(module: nn.Module) -> None:
    if getattr(module, "_hf_peft_config_loaded", False):
        module.unload_lora()
    elif getattr(module, "peft_config", None):
        recurse_remove_peft_layers(module)
        del module.peft_config
