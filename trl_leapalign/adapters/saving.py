"""Saving the trained weights so that anyone can load them, read back and compared."""

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..markdown import literal
from .lora import DENOISER_PREFIXES, adapter_name

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_PREFIX = "base_model.model."


def lora_state_dict(
    denoiser: nn.Module, state: dict[str, Tensor] | None = None, dtype: str | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Read an adapter so that it means the same everywhere: alpha equals the rank, the scale is in lora_B.

    Args:
        denoiser (nn.Module): a diffusers model with one adapter.
        state (dict[str, Tensor] | None): its gathered trained weights, where they are sharded.
        dtype (str | None): of the weights, "float32" or "bfloat16"; the scale is applied before. None keeps that of the
            adapter.

    Returns:
        tuple[dict[str, Tensor], dict]: weights by name, on the CPU, and the PEFT configuration that fits them.
    """
    adapter = adapter_name(denoiser)
    weights = {}
    for key, value in get_peft_model_state_dict(denoiser, state, adapter_name=adapter).items():
        layer, _, kind = key.rpartition(".lora_")
        if kind.startswith(("B.", "embedding_B")):
            value = value * denoiser.get_submodule(layer).scaling[adapter]
        weights[key] = value.detach().to("cpu", getattr(torch, dtype) if dtype else value.dtype).contiguous()
    config = denoiser.peft_config[adapter].to_dict()
    config.update(lora_alpha=config["r"], alpha_pattern=dict(config["rank_pattern"]), use_rslora=False)
    return weights, {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def save_trained(
    pipeline: DiffusionPipeline,
    denoisers: dict[str, nn.Module],
    directory: str | Path,
    full_finetuning: bool,
    states: dict[str, dict[str, Tensor] | None] | None = None,
    adapter_dtype: str | None = None,
) -> None:
    """Save the trained weights in the format that diffusers loads, read them back and compare.

    LoRA is written by the pipeline's own `save_lora_weights` or, if it takes none for these denoisers, into one folder
    for each, to be loaded as `loading_lines` says; all weights by `save_pretrained` into one folder a denoiser.

    Args:
        pipeline (DiffusionPipeline): the pipeline that the denoisers belong to.
        denoisers (dict[str, nn.Module]): unwrapped modules by component name.
        directory (str | Path): the folder to write into.
        full_finetuning (bool): whether all weights were trained.
        states (dict[str, dict[str, Tensor] | None] | None): by component, the gathered trained weights of those that
            are sharded.
        adapter_dtype (str | None): of an adapter's file, "float32" or "bfloat16", half as large and with 8 of 24 bits
            of precision. None keeps that of the adapter.

    Raises:
        RuntimeError: if what is read back differs from what was trained.
    """
    directory, states = Path(directory), states or {}
    if full_finetuning:
        for name, denoiser in denoisers.items():
            denoiser = _plain_copy(denoiser, states.get(name))
            denoiser.save_pretrained(directory / name)
            _compare(_SavedTensors(directory / name), denoiser.state_dict(), directory / name)
        return
    adapters = {
        name: lora_state_dict(denoiser, states.get(name), adapter_dtype) for name, denoiser in denoisers.items()
    }
    if saved_by_pipeline(pipeline, denoisers):
        _save_with_pipeline(pipeline, adapters, directory)
    else:
        _save_for_modules(denoisers, adapters, directory)
        logger.warning(
            "%s cannot save LoRA weights for its %s. Load them with: %s",
            *(type(pipeline).__name__, ", ".join(denoisers)),
            "; ".join(loading_lines(pipeline, denoisers, str(directory))),
        )


def _plain_copy(denoiser: nn.Module, state: dict[str, Tensor] | None) -> nn.Module:
    """The denoiser or, if it is sharded, one of its original class that holds the gathered weights."""
    if state is None:
        return denoiser
    original = type(denoiser).__bases__[-1]  # fully_shard() put a class of its own in front
    with torch.device("meta"):
        copy = original.from_config(denoiser.config)
    copy.load_state_dict(state, assign=True)
    return copy


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
        return [f'pipeline.load_lora_weights({literal(source)}, weight_name="{LORA_FILE}")']
    own = [name for name, denoiser in denoisers.items() if isinstance(denoiser, PeftAdapterMixin)]
    written = literal(source)
    return [
        *(["from peft import PeftModel"] if len(own) < len(denoisers) else []),
        *(
            f'pipeline.{name}.load_lora_adapter({written}, subfolder="{name}", weight_name="{LORA_FILE}", '
            f'prefix="{lora_prefix(name)}")'
            if name in own
            else f'PeftModel.from_pretrained(pipeline.{name}, {written}, subfolder="{name}")'
            for name in denoisers
        ),
    ]


def lora_prefix(name: str) -> str:
    """What the keys of a component's LoRA weights begin with: of a second transformer too, that of the first.

    So each folder is also one that the pipeline's own `load_lora_weights` and other tools read.
    """
    return next((prefix for prefix in DENOISER_PREFIXES if name.startswith(prefix)), name)


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
    _order_metadata(directory / LORA_FILE)
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
            prefix = lora_prefix(name)
            weights = {f"{prefix}.{key}": value for key, value in weights.items()}
            config = {f"{prefix}.{key}": value for key, value in config.items()}
            metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, default=list)}
        else:
            file = folder / SAFETENSORS_WEIGHTS_NAME
            weights = {f"{PEFT_PREFIX}{key}": value for key, value in weights.items()}
            metadata = {"format": "pt"}
            LoraConfig(**config).save_pretrained(folder)
        save_file(weights, file, metadata=metadata)
        _order_metadata(file)
        _compare(load_file(file), weights, file)


def _order_metadata(file: Path) -> None:
    """Sort a file's metadata, which safetensors writes in any order, so that equal weights are equal files."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            stream.seek(8)
            stream.write(text.ljust(size))


class _SavedTensors(Mapping):
    """The tensors of a folder's safetensors files, read one at a time when they are asked for."""

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _compare(saved: Mapping[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    wrong = list(saved.keys() ^ expected.keys())
    wrong += [key for key in saved.keys() & expected.keys() if not torch.equal(saved[key], expected[key].cpu())]
    wrong += [key for key, value in saved.items() if not value.numel()]
    if wrong:
        raise RuntimeError(
            f"{where} does not hold the weights that were trained: {len(wrong)} tensors are missing, surplus or "
            f"different, such as {sorted(wrong)[:3]}. The disk may be full, or another process wrote there."
        )
