"""Loading what was trained into a pipeline, from a folder or the Hub; what does not fit is an error, not a warning."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..rollout.pipelines import modules_of
from .saving import LORA_FILE, PEFT_PREFIX, lora_prefix

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FAILURES = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError)
"""What diffusers, peft and safetensors raise for files that are missing, broken or of another model."""


@dataclass(frozen=True)
class AdapterFiles:
    """Where an adapter, or fully fine-tuned weights, lie on this machine.

    Args:
        name (str): what was asked for.
        path (Path): the folder or file.
        weight_name (str | None): name of the file in the folder, if it was given.
        commit (str | None): commit of the repository on the Hub that it was taken from; None for local files.
    """

    name: str
    path: Path
    weight_name: str | None = None
    commit: str | None = None

    def digest(self) -> str:
        """SHA-256 of the names and contents of the weights."""
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(str(file.relative_to(self.path) if self.path.is_dir() else file.name).encode())
            with file.open("rb") as stream:
                while chunk := stream.read(2**20):
                    digest.update(chunk)
        return digest.hexdigest()

    def files(self) -> list[Path]:
        """The files of weights, in order."""
        if self.path.is_file():
            return [self.path]
        if self.weight_name is not None:
            return [self.path / self.weight_name]
        if (self.path / LORA_FILE).is_file():
            return [self.path / LORA_FILE]
        own = sorted(self.path.glob("*.safetensors"))
        return own or sorted(self.path.glob("*/*.safetensors"))


def find_adapter(
    adapter: str | Path, *, revision: str | None = None, subfolder: str | None = None, weight_name: str | None = None
) -> AdapterFiles:
    """Find an adapter on disk, or download it from the Hub.

    Args:
        adapter (str | Path): a folder or file, or the id of a repository.
        revision (str | None): branch, tag or commit of the repository; None is its main branch.
        subfolder (str | None): folder in it.
        weight_name (str | None): name of the file in the folder, where there are several.

    Returns:
        AdapterFiles: where it lies, with the commit that the revision is now.

    Raises:
        ValueError: if there is none, or a revision is given for a local folder.
    """
    name, path, commit = str(adapter), Path(adapter), None
    if not path.exists():
        if not HUB_ID.fullmatch(name):
            raise ValueError(
                f"There is no adapter {name!r}: it is neither a file, a folder, nor the id of a repository."
            )
        try:
            path = Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ValueError(f"The adapter {name!r} cannot be loaded from the Hub: {error}") from error
        commit = path.name
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is for repositories on the Hub, but {name!r} lies on disk.")
    path = path / subfolder if subfolder is not None else path
    files = AdapterFiles(name, path, weight_name, commit)
    found = files.files() if path.exists() else []
    where = "/".join(part for part in (name, subfolder, weight_name) if part)
    if not found or not all(file.is_file() for file in found):
        raise ValueError(
            f"The adapter {name!r} cannot be loaded: there are no weights in the safetensors format at "
            f"{where}. Pass the folder that save_model wrote, a file of LoRA weights, or a repository on the Hub."
        )
    return files


def load_adapter(
    pipeline: DiffusionPipeline,
    adapter: str | Path | AdapterFiles,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    weight_name: str | None = None,
) -> AdapterFiles:
    """Load what `save_model` wrote, or a LoRA that the pipeline can load, into a pipeline.

    Args:
        pipeline (DiffusionPipeline): the pipeline.
        adapter (str | Path | AdapterFiles): a folder or file, the id of a repository on the Hub, or what `find_adapter`
            found. A folder holds LoRA weights for the pipeline, or a folder for each trained component with LoRA
            weights of diffusers or of PEFT, or with all of its weights.
        revision (str | None): branch, tag or commit of the repository.
        subfolder (str | None): folder in it.
        weight_name (str | None): name of the file in the folder, where there are several.

    Returns:
        AdapterFiles: what was loaded.

    Raises:
        ValueError: if there is no such adapter, or it does not fit the pipeline.
    """
    if not isinstance(adapter, AdapterFiles):
        adapter = find_adapter(adapter, revision=revision, subfolder=subfolder, weight_name=weight_name)
    kind = type(pipeline).__name__
    components = list(_components(pipeline, adapter))
    before, shapes = _adapters(pipeline), _shapes(pipeline)
    try:
        if components:
            for module, folder in components:
                _load_component(module, folder)
            return adapter
        if not hasattr(pipeline, "load_lora_weights"):
            raise ValueError(f"{kind} has no load_lora_weights.")
        folder, file = adapter.path, adapter.files()[0]
        source = {"weight_name": file.name} if folder.is_dir() else {}
        loaded: Any = pipeline.lora_state_dict(str(folder), **source)
        pipeline.load_lora_weights(str(folder), **source)
    except FAILURES as error:
        raise ValueError(
            f"The adapter {adapter.name!r} cannot be loaded into {kind}: {error} Pass the folder that save_model wrote "
            "for this pipeline, a file of LoRA weights, or a repository on the Hub."
        ) from error
    weights = loaded[0] if isinstance(loaded, tuple) else loaded
    if _shapes(pipeline) != shapes:  # diffusers widens layers for adapters of control models
        raise ValueError(
            f"The adapter {adapter.name!r} does not fit {kind}: its layers are wider than the pipeline's own."
        )
    _check_all_used(pipeline, weights, _adapters(pipeline) - before, adapter.name)
    return adapter


def _components(pipeline: DiffusionPipeline, adapter: AdapterFiles) -> Iterator[tuple[nn.Module, Path]]:
    """The modules that a folder holds a folder for, each with that folder."""
    if adapter.path.is_file() or adapter.weight_name is not None:
        return
    modules = modules_of(pipeline)
    folders = sorted({file.parent for file in adapter.files() if file.parent != adapter.path})
    strangers = [folder.name for folder in folders if folder.name not in modules]
    if strangers:
        raise ValueError(
            f"The adapter {adapter.name!r} does not fit {type(pipeline).__name__}: it holds weights for "
            f"{', '.join(strangers)}, which the pipeline does not have. Pass the pipeline that it was trained for, or "
            "the subfolder with the adapter."
        )
    yield from ((modules[folder.name], folder) for folder in folders)


def _load_component(module: nn.Module, folder: Path) -> None:
    """Load LoRA weights of diffusers or PEFT, or all weights, into one module.

    Raises:
        ValueError: if a weight has no place in the module.
    """
    if (folder / CONFIG_NAME).is_file():
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        weights = {key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}
        name = _free_name(module)
        config = LoraConfig.from_pretrained(folder)
        inject_adapter_in_model(config, module, adapter_name=name)
        set_peft_model_state_dict(module, weights, adapter_name=name)
        module.requires_grad_(False)
        _check_component(module, weights, name, folder)
    elif (folder / LORA_FILE).is_file():
        if not isinstance(module, PeftAdapterMixin):
            raise ValueError(f"{folder.name} is a {type(module).__name__}, which cannot load LoRA weights.")
        weights, prefix = load_file(folder / LORA_FILE), f"{lora_prefix(folder.name)}."
        prefixed = all(key.startswith(prefix) for key in weights)
        before = set(getattr(module, "peft_config", {}))
        module.load_lora_adapter(folder, weight_name=LORA_FILE, prefix=prefix[:-1] if prefixed else None)
        [name] = set(module.peft_config) - before
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        _check_component(module, weights, name, folder)
    else:
        weights = {
            key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()
        }
        module.load_state_dict(weights)


def _free_name(module: nn.Module) -> str:
    taken = getattr(module, "peft_config", {})
    return next(name for name in ("default", *(f"default_{n}" for n in range(len(taken) + 1))) if name not in taken)


def _check_component(module: nn.Module, weights: dict[str, Tensor], adapter: str, folder: Path) -> None:
    used = get_peft_model_state_dict(module, adapter_name=adapter)
    wrong = sorted(weights.keys() ^ used.keys())
    wrong += [key for key in weights.keys() & used.keys() if weights[key].shape != used[key].shape]
    if wrong:
        raise ValueError(
            f"the weights of {folder.name} are those of another model: {len(wrong)} of them differ, such as {wrong[0]}."
        )


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
