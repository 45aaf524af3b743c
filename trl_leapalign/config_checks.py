"""Whether the settings of a training can work, each said by name with what to set instead."""

import dataclasses
import json
import os
from numbers import Real
from typing import Any

import torch

from .prompts.columns import COPIES, read_columns
from .ranges import Range, check_bool

RESERVED_SAMPLE_KWARGS = {
    "prompt": "prompts come from the dataset",
    "generator": "noise follows from seed",
    "output_type": "it is always 'pt'",
    "return_dict": "it is always False",
    **COPIES,
    "num_inference_steps": "set sample_num_steps",
    "guidance_scale": "set sample_guidance_scale",
    "height": "set sample_height",
    "width": "set sample_width",
    "latents": "every update would start from the same noise, which follows from seed",
    "sigmas": "it would override sample_num_steps; set the scheduler's shift for another schedule",
    "timesteps": "it would override sample_num_steps; set the scheduler's shift for another schedule",
}
NUMBERS = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), Range(0)),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        Range(1, whole=True),
    ),
    **dict.fromkeys(
        (
            *("sample_num_steps", "eval_num_steps", "sample_height", "sample_width", "draw_group_size"),
            "samples_per_prompt",
            *("image_grid_steps", "image_grid_prompts", "watch_steps", "watch_prompts"),
        ),
        Range(1, whole=True),
    ),
    "num_train_epochs": Range(0, excluded=True),
    "seed": Range(0, whole=True),
    "data_seed": Range(0, whole=True),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, 1, high_excluded=True)),
    **dict.fromkeys(("adam_epsilon", "warmup_steps", "eval_delay"), Range(0)),
    "dataloader_num_workers": Range(0, whole=True),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor"), Range(1, whole=True)),
    "sample_guidance_scale": Range(),
    "ema_decay": Range(0, 1, excluded=True),
    "base_penalty": Range(0, excluded=True),
    "max_sample_grad_norm": Range(0, excluded=True),
    "near_step": Range(1, whole=True),
    "near_noise": Range(0, 1, excluded=True),
    "difference_power": Range(0),
}
"""Where each numeric setting lies, unless it is None by default and left so."""
MEMORY_SWITCHES = (
    "unconditional_gradient",
    "cache_prompt_embeddings",
    "offload_text_encoders",
    "offload_rewards",
)
ADAPTER_DTYPES = ("float32", "bfloat16")
METRIC_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")

UNSUPPORTED = {
    "auto_find_batch_size": "it would change which noise belongs to which sample; set per_device_train_batch_size",
    "ignore_data_skip": "a resumed run would repeat samples",
    "torch_compile": "compile the denoiser instead, with its compile_repeated_blocks()",
    "label_smoothing_factor": "there are no labels",
    "neftune_noise_alpha": "there are no token embeddings",
    "use_liger_kernel": "it knows language models only",
    "include_num_input_tokens_seen": "there are no input tokens",
    "fp16_full_eval": "evaluation runs in the dtype of training",
    "bf16_full_eval": "evaluation runs in the dtype of training",
    "eval_accumulation_steps": "evaluation keeps rewards only",
    "batch_eval_metrics": "rewards are averaged over all samples",
    "include_for_metrics": "there is no compute_metrics; rewards are the metrics",
    "label_names": "there are no labels",
    "activation_checkpointing_kwargs": "diffusers models checkpoint each block without reentrance",
    "gradient_checkpointing_kwargs": "diffusers models checkpoint each block without reentrance",
}
"""Settings of TrainingArguments that cannot work here, and why."""


def read_settings(config: Any) -> None:
    """Turn what the command line and YAML give, such as JSON for a dict or one value for a list, into what is meant."""
    for name in ("sample_kwargs", "method_kwargs", "model_init_kwargs", "reward_kwargs", "watch_limits"):
        setattr(config, name, read_dict(name, getattr(config, name)))
    config.reward_kwargs = {name: read_dict(f"reward_kwargs[{name!r}]", v) for name, v in config.reward_kwargs.items()}
    for name in ("reward_weights", "reward_threshold"):
        value = getattr(config, name)
        if isinstance(value, Real) and not isinstance(value, bool):
            setattr(config, name, [float(value)])
    if str(config.resume_from_checkpoint).lower() in ("true", "false"):  # as the command line gives them
        config.resume_from_checkpoint = True if str(config.resume_from_checkpoint).lower() == "true" else None
    config.pipeline_columns = read_columns(config.pipeline_columns)
    if isinstance(config.denoisers, str):
        config.denoisers = [config.denoisers]


def refuse_unsupported(config: Any) -> None:
    """Raise ValueError for settings of TrainingArguments that have no meaning here."""
    defaults = {option.name: option.default for option in dataclasses.fields(config)}
    for name, reason in UNSUPPORTED.items():
        if getattr(config, name) not in (defaults[name], False, None, "no", [], {}):
            raise ValueError(f"{name}={getattr(config, name)!r} is not supported: {reason}.")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND={backend!r} (of accelerate launch or accelerate config) is not supported: "
            "it would compile the whole rollout. Set it to 'no', and compile the denoiser instead, with its "
            "compile_repeated_blocks()."
        )


def check_values(config: Any) -> None:
    """Raise ValueError for values out of their range, or that contradict each other."""
    defaults = {option.name: option.default for option in dataclasses.fields(config)}
    for name, allowed in NUMBERS.items():
        if getattr(config, name) is not None or defaults[name] is not None:
            allowed.check(name, getattr(config, name))
    for name in ("logging", "save", "eval"):
        steps = getattr(config, f"{name}_steps")
        if steps is not None and steps not in Range(0, excluded=True):
            raise ValueError(f"{name}_steps={steps!r} must be above 0 and finite. For none: {name}_strategy='no'.")
    if config.load_best_model_at_end and config.eval_strategy == "no":
        raise ValueError(
            "load_best_model_at_end=True compares evaluations, but eval_strategy='no' makes none. Set "
            "eval_strategy='steps' and eval_steps, or load_best_model_at_end=False."
        )
    if config.ema_decay is not None and str(config.optim).rpartition(".")[-1].lower().startswith("schedule_free"):
        raise ValueError(
            f"optim={config.optim!r} averages the weights itself, so ema_decay={config.ema_decay} would average them "
            "twice. Set ema_decay=None, or choose another optim."
        )
    if config.max_steps != -1:
        Range(1, whole=True).check("max_steps", config.max_steps)
    if config.pairs not in (None, "far", "near"):
        raise ValueError(f"pairs={config.pairs!r} is unknown; choose 'far' or 'near'.")
    for name in ("near_step", "near_noise"):
        if getattr(config, name) is not None and config.pairs != "near":
            raise ValueError(f"{name}={getattr(config, name)!r} is for near pairs. Set pairs='near', or leave it out.")
    if config.adapter_dtype not in ADAPTER_DTYPES:
        raise ValueError(f"adapter_dtype={config.adapter_dtype!r} is unknown; choose one of {list(ADAPTER_DTYPES)}.")
    if config.adapter_dtype != "float32" and config.full_finetuning:
        raise ValueError(
            f"adapter_dtype={config.adapter_dtype!r} is for adapters, but full_finetuning saves all weights as they "
            "are. Leave it out."
        )
    if config.watch_action not in ("warn", "stop"):
        raise ValueError(f"watch_action={config.watch_action!r} is unknown; choose 'warn' or 'stop'.")
    if config.watch_action != "warn" and config.watch_steps is None:
        raise ValueError(f"watch_action={config.watch_action!r} has no effect without watch_steps. Set watch_steps.")
    if config.watch_limits and config.watch_steps is None:
        raise ValueError(f"watch_limits={config.watch_limits} have no effect without watch_steps. Set watch_steps.")
    for name in ("full_finetuning", "dry_run", "normalize_rewards", *MEMORY_SWITCHES):
        check_bool(name, getattr(config, name))
    if config.reward_device is not None:
        try:
            torch.device(config.reward_device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"reward_device={config.reward_device!r} is no device, such as 'cuda:1'.") from error
    if not isinstance(config.prompt_column, str):
        raise ValueError(f"prompt_column={config.prompt_column!r} must be the name of a column.")
    for name, reason in RESERVED_SAMPLE_KWARGS.items():
        if name in config.sample_kwargs:
            raise ValueError(f"sample_kwargs cannot set {name!r}: {reason}.")
    for name, value in config.sample_kwargs.items():
        scale = value.get("scale", 1) if isinstance(value, dict) and name.endswith("attention_kwargs") else 1
        if scale != 1 and not config.full_finetuning:
            raise ValueError(
                f"sample_kwargs={{{name!r}: {value}}} trains the adapter at scale {scale}, but what is saved would "
                "act at scale 1. Leave it out; choose lora_alpha in peft_config, or for an adapter that was "
                "loaded call pipeline.set_adapters(name, scale), which the saved weights then contain."
            )


def check_training(config: Any) -> None:
    """Raise ValueError for settings that cannot work together, once the devices are known."""
    if config.remove_unused_columns:
        raise ValueError("remove_unused_columns=True would drop the metadata of the prompts. Leave it False.")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(config, name) == "epoch":
            raise ValueError(f"{name}='epoch' is not supported, since prompts are an endless stream. Use 'steps'.")
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={config.train_sampling_strategy!r} groups tokens; use 'random' or 'sequential'."
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(config.accelerator_config, name):
            raise ValueError(f"accelerator_config.{name} is not supported: prompts are not tensors. Leave it out.")
    if config.base_penalty is not None and config.full_finetuning:
        raise ValueError(
            f"base_penalty={config.base_penalty} compares with the model without its adapter, but full_finetuning "
            "changes the base itself. Set base_penalty=None, or train a LoRA."
        )
    if config.fp16 and config.device.type == "cpu":
        raise ValueError("fp16=True needs a GPU: the CPU has no float16 training. Set bf16=True, or neither.")
    if config.save_strategy == "best" and config.eval_strategy == "no":
        raise ValueError("save_strategy='best' never saves without evaluations. Set eval_strategy='steps'.")
    if config.load_best_model_at_end and config.save_only_model:
        raise ValueError(
            "load_best_model_at_end needs whole checkpoints, which save_only_model leaves out. Drop one of them."
        )
    samples = config.samples_per_update
    if config.draw_group_size is not None and (
        config.draw_group_size % config.per_device_train_batch_size or samples % config.draw_group_size
    ):
        raise ValueError(
            f"draw_group_size={config.draw_group_size} must be a multiple of per_device_train_batch_size="
            f"{config.per_device_train_batch_size} that divides the {samples} samples of an update."
        )


def read_dict(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not a JSON object: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict, got {value!r}.")
    return dict(value)
