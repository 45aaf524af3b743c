"""What a result depends on, as short texts that are equal only if it is the same: weights, configurations, callables.

Finished work is used again only if all of this is unchanged. What cannot be identified is not used again.
"""

import enum
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..rollout.pipelines import components_of, pipelines_of

ATOMS = (type(None), bool, int, float, str)
CHUNK = 2**24


class Unidentifiable(ValueError):
    """Something has no identity that could be compared later, such as an open connection."""


def identify(value: Any) -> str:
    """Return a text that follows from a value's class, code, settings and tensors.

    Args:
        value (Any): settings, tensors, modules, tokenizers, functions with what they enclose, or instances of these.

    Returns:
        str: hexadecimal, the same in every process.

    Raises:
        Unidentifiable: if it holds something that cannot be compared.
    """
    return _sha(json.dumps(_describe(value, ())))


def identify_pipeline(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Identify what a pipeline's images follow from beside the call's arguments.

    Args:
        pipeline (DiffusionPipeline): the pipeline with its adapters.

    Returns:
        dict[str, str]: by component, and for the pipeline's own class and settings, a text as of `identify`: weights
            and buffers byte by byte, configurations, schedulers, tokenizers, and each adapter with its scale and
            whether it is active, merged or disabled.

    Raises:
        Unidentifiable: if weights are not in memory, as with sequential offloading.
    """
    found = {}
    for number, part in enumerate(pipelines_of(pipeline)):
        prefix = f"{number}." if number else ""
        own = {
            name: value for name, value in part.config.items() if isinstance(value, ATOMS) and not name.startswith("_")
        }
        found[f"{prefix}pipeline"] = identify([_name(type(part)), own])
        for name, component in sorted(components_of(part).items()):
            if not isinstance(component, (*ATOMS, DiffusionPipeline)):
                found[prefix + name] = identify(component)
    return found


def identify_source(source: str | Path) -> str:
    """Identify the files of a pipeline that is given by name, without loading it.

    Args:
        source (str | Path): a folder, or the id of a repository on the Hub.

    Returns:
        str: from the names, sizes and times of a folder's files, or the commit of the repository.

    Raises:
        Unidentifiable: if the Hub cannot be asked and nothing is cached.
    """
    if Path(source).exists():
        return identify_files(source)
    try:
        return Path(hf_hub_download(str(source), "model_index.json")).parent.name
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise Unidentifiable(f"{source} has no commit that could be found: {error}") from error


def identify_files(path: str | Path) -> str:
    """Identify a file, or the files of a folder, by their names, sizes and times of change.

    Args:
        path (str | Path): the file or folder.

    Returns:
        str: hexadecimal.
    """
    top = Path(path)
    files = sorted(file for file in top.rglob("*") if file.is_file()) if top.is_dir() else [top]
    return _sha(json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]))


def _describe(value: Any, within: tuple[int, ...]) -> Any:
    """A value as something JSON can hold. `within` are the ids of what it is a part of."""
    if isinstance(value, ATOMS):
        return value
    if id(value) in within:
        return "itself"
    within = (*within, id(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_describe(part, within) for part in value]
        return [type(value).__name__, sorted(parts, key=json.dumps) if isinstance(value, (set, frozenset)) else parts]
    if isinstance(value, Mapping):
        return ["mapping", sorted(([str(key), _describe(own, within)] for key, own in value.items()), key=json.dumps)]
    for kind, describe in _KINDS.items():
        if isinstance(value, kind):
            return [describe.__name__, describe(value, within)]
    return _instance(value, within)


def _text(value: Any, within: tuple[int, ...]) -> Any:
    return [_name(type(value)), str(value)]


def _class(value: type, within: tuple[int, ...]) -> Any:
    return _name(value)


def _bytes(value: bytes, within: tuple[int, ...]) -> str:
    return hashlib.sha256(value).hexdigest()


def _array(value: np.ndarray, within: tuple[int, ...]) -> Any:
    return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]


@torch.no_grad()
def _tensor(value: Tensor, within: tuple[int, ...]) -> Any:
    if value.device.type == "meta":
        raise Unidentifiable("Weights are not in memory (on the meta device, as sequential offloading leaves them).")
    digest = hashlib.sha256()
    for chunk in value.detach().reshape(-1).contiguous().view(torch.uint8).split(CHUNK):
        digest.update(chunk.cpu().numpy().data)
    return [str(value.dtype), list(value.shape), digest.hexdigest()]


def _module(value: nn.Module, within: tuple[int, ...]) -> Any:
    tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
    parts = {
        name: [_name(type(part)), _settings(part, within), _adapter_state(part)] for name, part in value.named_modules()
    }
    return [{name: _tensor(tensor, within) for name, tensor in sorted(tensors.items())}, parts, _own_code(value)]


def _settings(part: nn.Module, within: tuple[int, ...]) -> Any:
    """A module's public attributes, without its mode, caches and adapters, whose state is told apart."""
    if isinstance(part, BaseTunerLayer):
        return None
    known = {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "training"}
    config = {"config": _configured(part, within)} if hasattr(part, "config") else {}
    known = {name: value for name, value in known.items() if name not in ("config", "peft_config")}
    return _describe({**known, **config}, within)


def _adapter_state(part: nn.Module) -> Any:
    if not isinstance(part, BaseTunerLayer):
        return None
    scaling = {name: float(scale) for name, scale in getattr(part, "scaling", {}).items()}
    return [scaling, list(part.active_adapters), list(part.merged_adapters), bool(part.disable_adapters)]


def _configured(value: Any, within: tuple[int, ...]) -> Any:
    """Class and configuration of what libraries configure, without notes on where and how it was loaded."""
    config = getattr(value, "config", None)
    config = value.to_dict() if config is None else config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return [_name(type(value)), _describe({key: own for key, own in config.items() if not key.startswith("_")}, within)]


def _tokenizer(value: PreTrainedTokenizerBase, within: tuple[int, ...]) -> Any:
    backend = getattr(value, "backend_tokenizer", None)
    known = {"vocab": sorted(value.get_vocab().items())} if backend is None else json.loads(backend.to_str())
    words = _sha(
        json.dumps({key: own for key, own in known.items() if key not in ("padding", "truncation")})
    )  # the call's
    special = {name: str(token) for name, token in value.special_tokens_map.items()}
    return [_name(type(value)), words, special, value.model_max_length, value.padding_side, value.chat_template]


def _function(value: types.FunctionType, within: tuple[int, ...]) -> Any:
    """A function's code, what it encloses, its defaults, and the module's own values and functions that it names."""
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    named = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
    return [
        _name(value),
        _code(value.__code__),
        _describe([cells, value.__defaults__, value.__kwdefaults__, named], within),
    ]


def _code(code: types.CodeType) -> Any:
    constants = [_code(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


def _names(code: types.CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _method(value: types.MethodType, within: tuple[int, ...]) -> Any:
    return [_describe(value.__func__, within), _describe(value.__self__, within)]


def _partial(value: functools.partial, within: tuple[int, ...]) -> Any:
    return _describe([value.func, value.args, value.keywords], within)


def _named(value: Any, within: tuple[int, ...]) -> Any:
    return [getattr(value, "__name__", ""), str(getattr(value, "__version__", ""))]


def _instance(value: Any, within: tuple[int, ...]) -> Any:
    """Class, code and public attributes of an object; what keeps its state elsewhere cannot be identified.

    Attributes with a leading underscore are notes and caches, which a result must not depend on.
    """
    if hasattr(value, "to_dict") and not callable(value):
        return _configured(value, within)
    if inspect.isroutine(value):
        return _name(value)
    if not hasattr(value, "__dict__") or type(value).__module__ == "builtins":
        raise Unidentifiable(f"A {_name(type(value))} cannot be compared with one of another time.")
    public = {name: own for name, own in vars(value).items() if not name.startswith("_")}
    return [_name(type(value)), _own_code(value), _describe(public, within)]


def _own_code(value: Any) -> Any:
    """The code of an object's call and of the class that it is defined in."""
    owners = [owner for owner in type(value).__mro__ if owner.__module__.split(".")[0] not in _LIBRARIES]
    functions = [own for owner in owners for own in vars(owner).values() if isinstance(own, types.FunctionType)]
    return [[function.__qualname__, _code(function.__code__)] for function in functions]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', value)}"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_LIBRARIES = {"builtins", "torch", "transformers", "diffusers", "peft", "abc", "typing", "collections", "dataclasses"}
"""Their code is identified by their version, which is kept beside results."""
_KINDS: dict[Any, Any] = {
    (enum.Enum, torch.dtype, torch.device, Path, np.generic): _text,
    type: _class,
    bytes: _bytes,
    np.ndarray: _array,
    Tensor: _tensor,
    nn.Module: _module,
    PreTrainedTokenizerBase: _tokenizer,
    (SchedulerMixin, ConfigMixin): _configured,
    types.FunctionType: _function,
    types.MethodType: _method,
    functools.partial: _partial,
    types.ModuleType: _named,
}
