"""Whether a training fits a card, told from a pipeline's configs: no weights are loaded or downloaded."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from ..adapters.lora import prepare_denoisers
from ..leapalign_config import LeapAlignConfig
from ..rollout.components import components_of
from ..training.memory_plan import GIB, SHAPED_STEPS, held, plan_memory
from ..training.memory_report import advice_for
from ..training.planned_reward import clip_huge

CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
BYTES_4BIT, BYTES_NESTED, BYTES_8BIT = 0.5625, 0.516, 1.01
LARGE_ENCODER = 2 * GIB


def check_memory(
    pipeline: DiffusionPipeline | str | Path, config: LeapAlignConfig, memory: float, quantization: dict[str, Any]
) -> tuple[str, bool]:
    """Plan a training with a reward of CLIP ViT-H/14's size in float32, such as "hpsv2.1" or "pickscore".

    Args:
        pipeline (DiffusionPipeline | str | Path): a pipeline, a folder with configs, or a Hub id, of which the configs
            alone are downloaded.
        config (LeapAlignConfig): the settings of the training.
        memory (float): of the card, in GiB.
        quantization (dict[str, Any]): `load_in_4bit`, `load_in_8bit` or `use_bnb_nested_quant`, if True.

    Returns:
        tuple[str, bool]: the plan as a table, and whether it fits.

    Raises:
        FileNotFoundError: if a config is missing.
        ValueError: if the pipeline cannot run on shapes.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        pipeline = pipeline_from_configs(pipeline, torch.float32 if config.full_finetuning else torch.bfloat16)
    with torch.device("meta"):
        names = prepare_denoisers(
            pipeline,
            config.denoisers,
            None,
            full_finetuning=config.full_finetuning,
            checkpointing=config.activation_checkpointing,
        )
        reward = clip_huge(config.activation_checkpointing)
    call = {**config.call_kwargs(), "num_inference_steps": SHAPED_STEPS, "output_type": "pt", "return_dict": False}
    prompts = ["a photo of a cat"] * config.per_device_train_batch_size
    encoders = [name for name in components_of(pipeline) if "encoder" in name]
    plan = plan_memory(
        pipeline,
        list(names),
        [reward],
        lambda twin: twin(prompts if len(prompts) > 1 else prompts[0], **call)[0],
        method=config.build_method(),
        num_steps=config.sample_num_steps,
        optimizer=config.optim,
        average=config.ema_decay is not None,
        autocast=torch.bfloat16 if config.bf16 else None,
        away=encoders if config.offload_text_encoders else (),
        weights=_quantized(pipeline, list(names), quantization),
        device="cuda",
    )
    advice = advice_for(plan, config, bool(quantization))
    head = f"# Memory of {type(pipeline).__name__}\n\nWith a reward of CLIP ViT-H/14's size in float32.\n\n"
    return head + plan.markdown(memory, advice), plan.peak <= memory


def pipeline_from_configs(source: str | Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Build a pipeline whose modules are on the meta device.

    Args:
        source (str | Path): a folder with configs, or a Hub id.
        dtype (torch.dtype): of its denoisers; the other parts are in bfloat16.

    Raises:
        FileNotFoundError: if there is no model_index.json.
    """
    folder = Path(source)
    if not folder.exists():
        folder = Path(snapshot_download(str(source), allow_patterns=CONFIG_FILES))
    index_file = folder / "model_index.json"
    if not index_file.exists():
        raise FileNotFoundError(f"There is no {index_file}, so {source} is no folder of a diffusers pipeline.")
    index = json.loads(index_file.read_text(encoding="utf-8"))
    parts = {name: value for name, value in index.items() if not name.startswith("_")}
    built = {
        name: _component(folder, name, *value, dtype) if isinstance(value, list) else value
        for name, value in parts.items()
    }
    return getattr(diffusers, index["_class_name"])(**built)


def _component(folder: Path, name: str, library: str | None, kind: str | None, dtype: torch.dtype) -> Any:
    if library is None:
        return None
    found = getattr(importlib.import_module(library), kind)
    dtype = dtype if name.startswith(("transformer", "unet")) else torch.bfloat16
    if issubclass(found, ModelMixin):
        settings = found.load_config(folder, subfolder=name)
        return _made(lambda: found.from_config(settings), dtype)
    if issubclass(found, PreTrainedModel):
        settings = found.config_class.from_pretrained(folder / name)
        return _made(lambda: found(settings), dtype)
    return found.from_pretrained(folder, subfolder=name)


def _made(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def _quantized(pipeline: DiffusionPipeline, denoisers: list[str], options: dict[str, Any]) -> dict[str, float]:
    """GiB of the components that quantization acts on: denoisers, and encoders of two GiB or more."""
    if not options:
        return {}
    each = BYTES_8BIT if options.get("load_in_8bit") else BYTES_4BIT
    each = BYTES_NESTED if options.get("use_bnb_nested_quant") else each
    sizes = {}
    for name, part in components_of(pipeline).items():
        if name in denoisers or (isinstance(part, nn.Module) and "encoder" in name and held(part) >= LARGE_ENCODER):
            frozen = {id(p): p for p in part.parameters() if not p.requires_grad}
            linear = [m.weight for m in part.modules() if isinstance(m, nn.Linear) and id(m.weight) in frozen]
            packed = sum(weight.numel() * (each - weight.element_size()) for weight in linear)
            sizes[name] = (sum(p.numel() * p.element_size() for p in frozen.values()) + packed) / GIB
    return sizes
