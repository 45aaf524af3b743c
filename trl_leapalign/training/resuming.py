"""Which checkpoint a training goes on from, and whether it is the same training."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..leapalign_config import LeapAlignConfig
from ..media import as_text
from ..prompts.sources import PromptStream
from ..rewards import RewardSet
from ..rewards.reward_set import unwrapped
from ..rollout.pipelines import modules_of
from ..rollout.rollout_model import RolloutModel
from .checkpoints import check_whole, last_checkpoint, load_parameters, read_run

logger = logging.getLogger(__name__)

SAME = (
    *("sample_num_steps", "sample_guidance_scale", "sample_height", "sample_width", "sample_kwargs"),
    *("seed", "data_seed", "train_sampling_strategy", "samples_per_update", "draw_group_size"),
    *("full_finetuning", "base_penalty", "ema_decay", "bf16", "fp16", "reward_kwargs", "unconditional_gradient"),
    *("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("samples_per_prompt", "pairs", "near_step", "near_noise", "difference_power", "normalize_rewards"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
)
"""Settings that must stay, beside method, prompts, pipeline and rewards: they decide what is optimised, and with which
noise, or have no effect when the checkpoint's optimizer is loaded."""
LOGGED = (
    *("cache_prompt_embeddings", "prompt_cache_dir", "offload_text_encoders", "offload_rewards", "reward_device"),
    *("image_grid_steps", "image_grid_prompts", "adapter_dtype"),
    *("watch_steps", "watch_prompts", "watch_action", "watch_limits"),
    *("max_steps", "max_grad_norm", "max_sample_grad_norm", "activation_checkpointing", "tf32"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "eval_num_steps"),
)
"""Settings that may change, which is logged."""
SAMPLED = 4096


def choose_checkpoint(asked: str | bool | None, config: LeapAlignConfig) -> str | None:
    """Find the checkpoint to go on from and see that it is whole; all processes come to the same result.

    Args:
        asked (str | bool | None): a checkpoint-... folder, or True for the last whole one of `output_dir`.
        config (LeapAlignConfig): settings.

    Returns:
        str | None: its folder; None if nothing is resumed.

    Raises:
        ValueError: if there is none, or what was asked for is not whole.
    """
    if asked is None or asked is False:
        return None
    found, problem = [], None
    if config.local_process_index == 0:  # one process of each machine reads the files
        try:
            if asked is not True:
                check_whole(asked)
            found = [last_checkpoint(config.output_dir) if asked is True else str(asked)]
        except ValueError as error:
            problem = str(error)
    problems = [each for each in gather_object([problem]) if each is not None]
    if problems:
        raise ValueError(problems[0])
    names = sorted(set(gather_object(found)))
    if len(names) > 1:
        raise ValueError(f"The machines have different last checkpoints: {names}. Give the one to resume.")
    return names[0]


def describe_run(
    config: LeapAlignConfig,
    model: RolloutModel,
    rewards: RewardSet,
    prompts: PromptStream,
    weights: dict[str, str],
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """What a training is made with, to be compared when it is resumed.

    Args:
        config (LeapAlignConfig): settings.
        model (RolloutModel): what is trained.
        rewards (RewardSet): what it is trained on.
        prompts (PromptStream): the prompts.
        weights (dict[str, str]): `base_weights` of the pipeline.
        optimizer (torch.optim.Optimizer | None): one that the user made.

    Returns:
        dict[str, Any]: "same" and "logged" settings by name, fit for JSON.
    """
    method, functions = model.method, dict(zip(rewards.names, map(unwrapped, rewards.functions), strict=True))
    same = {
        "method": repr(method) if is_dataclass(method) else type(method).__qualname__,
        **{name: getattr(config, name) for name in SAME},
        "data_seed": prompts.seed,
        "draw_group_size": model.draw_group_size,
        "pipeline": type(model.pipeline).__name__,
        "pipeline_columns": model.columns.columns,
        "prompts": describe_prompts(prompts),
        "scheduler": _schedulers(model),
        "base_weights": weights,
        "adapter_scales": _adapter_scales(model),
        "rewards": {name: type(each).__name__ for name, each in functions.items()},
        "reward_weights": rewards.weights,
        "reward_threshold": rewards.thresholds,
        "reward_models": {name: fingerprint(each) for name, each in functions.items() if isinstance(each, nn.Module)},
        "optimizer": None if optimizer is None else {"class": type(optimizer).__name__, **optimizer.defaults},
    }
    logged = {
        **{name: getattr(config, name) for name in LOGGED},
        "reward_settings": {name: _settings(each) for name, each in functions.items()},
        "device": torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else config.device.type,
        "torch": torch.__version__,
    }
    return json.loads(json.dumps({"same": same, "logged": logged}, default=_plain_text))


def load_run(directory: str | Path, model: RolloutModel, run: dict[str, Any]) -> None:
    """Read the trained parameters of a whole checkpoint, if it is of the same training.

    Args:
        directory (str | Path): the checkpoint's folder.
        model (RolloutModel): what they are read into.
        run (dict[str, Any]): of `describe_run`.

    Raises:
        ValueError: if the checkpoint is of another training, or has more updates than `max_steps`.
    """
    before = read_run(directory)
    changed = _differences(before["same"], run["same"], "{}={!r}, not {!r}")
    if changed:
        raise ValueError(
            f"{directory} was saved with {'; '.join(changed)}. Resume with what it was saved with; or, to go on from "
            "its weights with other settings, load its adapter into the pipeline and start a new training."
        )
    updates, max_steps = before["updates"], run["logged"]["max_steps"]
    if updates > max_steps:
        raise ValueError(
            f"{directory} was saved after {updates} updates, but max_steps={max_steps}, so there is nothing left to "
            "train. Raise max_steps, or resume an earlier checkpoint."
        )
    load_parameters(directory, model)
    altered = _differences(before["logged"], run["logged"], "{}={!r}, now {!r}")
    if altered:
        logger.warning(
            "%s was saved with %s. Training goes on with the new settings, so it will not equal one that was never "
            "stopped: at the least it rounds otherwise, and a solver that draws noise of its own draws it for a batch.",
            *(directory, "; ".join(altered)),
        )
    if updates == max_steps:
        logger.warning("%s was saved after all %s updates: there is nothing left to train.", directory, max_steps)


def base_weights(pipeline: Any) -> dict[str, str]:
    """Fingerprints of what is not trained.

    Args:
        pipeline (DiffusionPipeline): with the trained parameters marked.

    Returns:
        dict[str, str]: by component, without those that are trained as a whole.
    """
    parts = modules_of(pipeline)
    return {name: fingerprint(parts[name]) for name in sorted(parts) if _frozen(parts[name])}


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A short text that follows from up to 4,096 values, evenly spaced, of each frozen parameter, and their places.

    Args:
        module (nn.Module): any module.

    Returns:
        str: 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in _frozen(module).items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            values = parameter.detach().reshape(-1)
            values = values[:: max(1, len(values) // SAMPLED)].cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_prompts(prompts: PromptStream) -> str:
    """What tells prompts and their order apart: how many, and a digest of the texts and numbers of all rows.

    Args:
        prompts (PromptStream): of rows, or of a function, whose name and first prompts stand for it.

    Returns:
        str: a short text.
    """
    source = prompts.source
    if callable(source):
        name = getattr(source, "__qualname__", type(source).__qualname__)
        return f"{name}() {_digest([prompts[index]['prompt'] for index in range(4)])}"
    return f"{len(source)} rows {_digest(_texts(source))}"


def _texts(rows: Sequence[dict[str, Any]]) -> Any:
    """Texts and numbers of rows; images are left out, as reading them all would take long."""
    if isinstance(rows, datasets.Dataset):
        plain = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Value)]
        return rows.select_columns(plain).with_format(None).to_dict()
    kinds = (str, int, float, bool, type(None))
    return [{name: value for name, value in row.items() if isinstance(value, kinds)} for row in rows]


def _frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """By the names that they have without an adapter."""
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name.replace(".base_layer.", "."): frozen[name] for name in sorted(frozen)}


def _schedulers(model: RolloutModel) -> dict[str, Any]:
    found = {name: part for name, part in model.pipeline.components.items() if name.endswith("scheduler")}
    return {
        name: {"class": type(part).__name__, **{key: part.config[key] for key in part.config if key[0] != "_"}}
        for name, part in found.items()
        if part is not None
    }


def _adapter_scales(model: RolloutModel) -> dict[str, dict[str, int]]:
    """Of each denoiser, how many layers have an adapter of which scale: the same weights at another are another."""
    scales = {
        name: Counter(
            str(scale)
            for layer in denoiser.modules()
            if isinstance(layer, BaseTunerLayer)
            for scale in layer.scaling.values()
        )
        for name, denoiser in model.denoisers.items()
    }
    return {name: dict(sorted(counts.items())) for name, counts in scales.items()}


def _settings(function: Any) -> dict[str, Any]:
    """Of a reward: numbers and texts among its attributes, and a digest of the code of a plain function."""
    plain = {
        name: value
        for name, value in getattr(function, "__dict__", {}).items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
    }
    code = getattr(function, "__code__", None)
    if code is None:
        return plain
    constants = [value for value in code.co_consts if isinstance(value, (bool, int, float, str))]
    return {**plain, "code": _digest([code.co_code.hex(), list(code.co_names), constants])}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain_text).encode()).hexdigest()[:16]


def _plain_text(value: Any) -> str:
    """A text of anything that is the same in the next process."""
    text = as_text(value)
    return getattr(value, "__qualname__", type(value).__qualname__) if " at 0x" in text else text


def _differences(before: dict[str, Any], now: dict[str, Any], text: str) -> list[str]:
    """What two settings differ in, as texts."""
    found = []
    for name in now:
        old, new = before.get(name), now[name]
        if old == new:
            continue
        old, new = _parts(old, new)
        found.append(text.format(name, old, new))
    return found


def _parts(old: Any, new: Any) -> tuple[Any, Any]:
    """Of settings within settings those alone that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    parts: tuple[dict, dict] = ({}, {})
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new:
            if old[key] != new[key]:
                parts[0][key], parts[1][key] = _parts(old[key], new[key])
        else:
            for part, each in zip(parts, (old, new), strict=True):
                part.update({key: each[key]} if key in each else {})
    return parts
