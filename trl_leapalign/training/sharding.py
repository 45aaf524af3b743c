"""FSDP2: each process keeps a part of the denoisers' weights, gradients and optimizer, and gathers a block to run."""

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def shard_trainer(trainer: Any) -> bool:
    """Shard the denoisers of a trainer if Accelerate or TrainingArguments ask for FSDP.

    Args:
        trainer (LeapAlignTrainer): made, but without an optimizer.

    Returns:
        bool: whether the denoisers are sharded.

    Raises:
        ValueError: for DeepSpeed, FSDP1, or an optimizer that was made before.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed is not supported. Shard the weights with FSDP2: fsdp=True, or fsdp_version: 2.")
    if not trainer.is_fsdp_enabled:
        return False
    state = trainer.accelerator.state
    if state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("FSDP1 cannot run a pipeline. Set fsdp_version: 2 in Accelerate's configuration.")
    if state.fsdp_plugin.activation_checkpointing:
        raise ValueError("FSDP's activation_checkpointing is not supported. Set that of the training arguments.")
    if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("FSDP's CPU offload is not supported. Set fsdp_offload_params: false, or use more processes.")
    alone = [name for name in ("image_grid_steps", "watch_steps") if getattr(trainer.args, name) is not None]
    if alone:
        raise ValueError(
            f"{' and '.join(alone)} sample on single processes, while FSDP needs all of them for each call. Leave them "
            "out, and look at evaluations."
        )
    if trainer.optimizer is not None:
        raise ValueError("FSDP replaces the parameters of the optimizer that was passed. Choose one with config.optim.")
    shard(trainer.rollout_model.denoisers, trainer.accelerator)
    # From here Accelerate and Trainer see weights that need no wrap, like those sharded when they were loaded.
    state.distributed_type = PartialState().distributed_type
    trainer.is_fsdp_enabled = False
    trainer.is_distributed_loading_by_transformers = True
    return True


def shard(denoisers: nn.ModuleDict, accelerator: Accelerator) -> None:
    """Shard each block of each denoiser, then the rest of it.

    With mixed precision in bfloat16, trained weights stay in their own dtype, and blocks are gathered in bfloat16.

    Args:
        denoisers (nn.ModuleDict): with the adapters that they will have.
        accelerator (Accelerator): with FSDP's plugin.
    """
    plugin = accelerator.state.fsdp_plugin
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    full = all(parameter.requires_grad for parameter in denoisers.parameters())
    low = torch.bfloat16 if full and accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(low, torch.float32 if low is not None else None, cast_forward_inputs=False)
    for denoiser in denoisers.values():
        ignored = {parameter for parameter in denoiser.parameters() if not parameter.is_floating_point()}
        options = {"mesh": mesh, "mp_policy": policy, "offload_policy": plugin.cpu_offload, "ignored_params": ignored}
        for blocks in [module for module in denoiser.modules() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                if any(True for _ in block.parameters()) and _is_outermost(denoiser, blocks):
                    fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **options)
        fully_shard(denoiser, **options)


def _is_outermost(denoiser: nn.Module, blocks: nn.ModuleList) -> bool:
    [name] = [key for key, module in denoiser.named_modules() if module is blocks]
    parents = [".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 1)]
    return not any(isinstance(denoiser.get_submodule(parent), nn.ModuleList) for parent in parents)


def whole(value: Any) -> Any:
    """Gather a sharded tensor from all processes, which must all call this; anything else stays as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered_state(denoiser: nn.Module) -> dict[str, Tensor] | None:
    """The trained weights of a sharded denoiser by name, on the CPU; None if it is not sharded. Collective."""
    if not isinstance(denoiser, FSDPModule):
        return None
    frozen = {name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad}
    state = {name: value for name, value in denoiser.state_dict().items() if name not in frozen}
    return {name: whole(value).detach().cpu().contiguous() for name, value in state.items()}


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """Take this process's part of a whole tensor, as another one is sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of the optimizer of sharded weights, on the first process's CPU. Collective."""
    return get_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), options=OPTIONS)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put the whole state that `optimizer_state` returned into the optimizer of sharded weights."""
    set_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), state, options=OPTIONS)
