"""Loading a LoRA adapter into a pipeline so that one that does not fit is an error, not a warning."""

import hashlib
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError

from ..rollout.pipelines import modules_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FAILURES = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError)
"""What diffusers, peft and safetensors raise for files that are missing, broken or of another model."""


def load_adapter(pipeline: DiffusionPipeline, adapter: str | Path) -> None:
    """Load a LoRA adapter by the pipeline's own `load_lora_weights`.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        adapter (str | Path): a folder or file with the weights, or the id of a repository on the Hub.

    Raises:
        ValueError: if there is no such adapter, or it does not fit the pipeline.
    """
    name, kind = str(adapter), type(pipeline).__name__
    if not Path(adapter).exists() and not HUB_ID.fullmatch(name):
        raise ValueError(f"There is no adapter {name!r}: it is neither a file, a folder, nor the id of a repository.")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{kind} cannot load the adapter {name!r}: it has no load_lora_weights.")
    before, shapes = _adapters(pipeline), _shapes(pipeline)
    try:
        loaded = pipeline.lora_state_dict(name)
        pipeline.load_lora_weights(name)
    except FAILURES as error:
        raise ValueError(
            f"The adapter {name!r} cannot be loaded into {kind}: {error} Pass the folder that save_model wrote for "
            "this pipeline, a file of LoRA weights, or a repository on the Hub."
        ) from error
    weights = loaded[0] if isinstance(loaded, tuple) else loaded
    if _shapes(pipeline) != shapes:  # diffusers widens layers for adapters of control models
        raise ValueError(f"The adapter {name!r} does not fit {kind}: its layers are wider than the pipeline's own.")
    _check_all_used(pipeline, weights, _adapters(pipeline) - before, name)


def _adapters(pipeline: DiffusionPipeline) -> set[tuple[str, str]]:
    """Component and name of each adapter."""
    modules = modules_of(pipeline)
    return {(component, name) for component in modules for name in getattr(modules[component], "peft_config", {})}


def _shapes(pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
    """Of the parameters that are no adapter's, by the names that they have without one."""
    return {
        f"{component}.{name}".replace(".base_layer.", "."): tuple(parameter.shape)
        for component, module in modules_of(pipeline).items()
        for name, parameter in module.named_parameters()
        if "lora_" not in name
    }


def _check_all_used(pipeline: DiffusionPipeline, weights: dict, added: set[tuple[str, str]], name: str) -> None:
    """Whether each weight of the file went somewhere. Names in older formats are translated, so cannot be compared."""
    used = set()
    for component, adapter in added:
        own = get_peft_model_state_dict(modules_of(pipeline)[component], adapter_name=adapter)
        used |= {f"{component}.{key}" for key in own}
    unused = sorted(key for key in weights if re.search(r"\.lora_[AB]\.", key) and key not in used)
    if unused or not used:
        example = f" {len(unused)} of its {len(weights)} weights, such as {unused[0]}, have no place there." * bool(
            unused
        )
        raise ValueError(
            f"The adapter {name!r} does not fit {type(pipeline).__name__}.{example} It was trained for another model: "
            "pass the one that it belongs to as pipeline."
        )


def file_digest(path: Path) -> str | None:
    """SHA-256 of an adapter's files on disk; None if there are none, as for one on the Hub."""
    files = sorted(file for file in path.glob("*") if file.suffix in (".safetensors", ".bin")) if path.is_dir() else []
    files = [path] if path.is_file() else files
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest() if files else None
