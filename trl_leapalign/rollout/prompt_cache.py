"""What a pipeline's encoders return, remembered: prompts are encoded once, not in every rollout."""

import functools
import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .components import components_of, pipelines_of
from .temporary import temporary_attribute

SEAMS = ("encode_prompt", "encode_image", "encode_prompt_multiple_images")
"""Methods of diffusers pipelines that run encoders and return what these say."""
TOKENIZER_SETTINGS = ("model_max_length", "padding_side", "truncation_side")
PLAIN = (str, int, float, bool, type(None))


class NotCacheable(Exception):
    """Something that has no content to compare by, or cannot be kept."""


class PromptCache:
    """Remembers what `encode_prompt` and `encode_image` of a pipeline return, on the CPU or on disk.

    An entry belongs to all arguments of a call, defaults and contents of tensors and images included, so a batch that
    is padded together is an entry of its own, and what comes back is what the call returned, bit for bit, with its
    strides, dtype and device. Calls that draw random numbers, carry gradients, or have other arguments than texts,
    numbers, tensors and images are made as without a cache.

    Args:
        pipeline (DiffusionPipeline): its encoders are frozen.
        directory (str | Path | None): where entries are kept as safetensors files, under names that depend on the
            encoders' weights, the tokenizers and the versions of the libraries too, so that runs can share it. None
            keeps them in memory.
    """

    def __init__(self, pipeline: DiffusionPipeline, directory: str | Path | None = None):
        self.pipeline = pipeline
        self.directory = None if directory is None else Path(directory)
        self.hits = 0
        self.misses = 0
        self._entries: dict[str, _Entry] = {}
        self._active = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the entries in memory."""
        return sum(base.nbytes for entry in self._entries.values() for base, _, _ in entry.tensors)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Answer the pipeline's calls of its encoders while the context is open; may be nested."""
        if self._active:
            yield
            return
        with ExitStack() as stack:
            for part in pipelines_of(self.pipeline):
                for name in SEAMS:
                    if callable(getattr(type(part), name, None)):
                        stack.enter_context(temporary_attribute(part, name, self._remembering(part, name)))
            self._active = True
            try:
                yield
            finally:
                self._active = False

    def _remembering(self, part: DiffusionPipeline, name: str) -> Callable:
        original = getattr(part, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            try:
                key = self._key(part, name, dict(bound.arguments))
            except NotCacheable:
                return original(*args, **kwargs)
            entry = self._find(key)
            if entry is not None:
                self.hits += 1
                return entry.restore(part._execution_device)
            self.misses += 1
            before = _random_states()
            result = original(*args, **kwargs)
            if all(map(torch.equal, before, _random_states())):
                self._keep(key, result)
            return result

        return encode

    def _key(self, part: DiffusionPipeline, name: str, arguments: dict[str, Any]) -> str:
        digest = hashlib.sha256()
        device = part._execution_device
        if self.directory is not None:  # processes with devices of one kind share entries
            arguments = {k: v.type if isinstance(v, torch.device) else v for k, v in arguments.items()}
        autocast = torch.is_autocast_enabled(device.type) and str(torch.get_autocast_dtype(device.type))
        state = {key: value for key, value in vars(part).items() if isinstance(value, PLAIN) and _decides(key)}
        for value in (type(part).__qualname__, name, device.type, autocast, state, arguments):
            _update(digest, value)
        _update(digest, self._encoders if self.directory is None else self._fingerprint)
        return digest.hexdigest()

    @property
    def _encoders(self) -> list[str]:
        """Which encoders there are now: an entry of others is never used."""
        found = [(key, part) for own in pipelines_of(self.pipeline) for key, part in components_of(own).items()]
        return [f"{key} {id(part)} {getattr(part, 'dtype', None)}" for key, part in found if _encodes(part)]

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Of all that decides what the encoders return, on any machine."""
        digest = hashlib.sha256()
        versions = [module.__version__ for module in (torch, transformers, diffusers)]
        _update(digest, [type(self.pipeline).__qualname__, *versions, torch.cuda.is_available()])
        for own in pipelines_of(self.pipeline):
            for key, part in sorted(components_of(own).items()):
                if isinstance(part, transformers.PreTrainedModel):
                    _update(digest, [key, type(part).__qualname__, part.config.to_json_string(), str(part.dtype)])
                    _update(digest, [[name, value.cpu()] for name, value in part.state_dict().items()])
                elif hasattr(part, "get_vocab"):
                    backend = getattr(part, "backend_tokenizer", None)
                    vocabulary = backend.to_str() if backend is not None else sorted(part.get_vocab().items())
                    template = getattr(part, "chat_template", None)
                    sides = [str(getattr(part, name, None)) for name in TOKENIZER_SETTINGS]
                    _update(digest, [key, type(part).__qualname__, vocabulary, repr(part.init_kwargs), template, sides])
                elif _encodes(part):
                    _update(digest, [key, repr(part)])
        return digest.hexdigest()

    def _find(self, key: str) -> "_Entry | None":
        if self.directory is None:
            return self._entries.get(key)
        file = self.directory / f"{key}.safetensors"
        return _Entry.load(file) if file.exists() else None

    def _keep(self, key: str, result: Any) -> None:
        try:
            entry = _Entry.of(result)
        except NotCacheable:
            return
        if self.directory is None:
            self._entries[key] = entry
        else:
            entry.save(self.directory / f"{key}.safetensors")


@dataclass(frozen=True)
class _Entry:
    """What a call returned.

    Args:
        structure (Any): nested lists of ("tensor", index), ("plain", value), ("list" | "tuple", [...]) and
            ("dict", {...}).
        tensors (list): of each tensor its elements on the CPU, without repeats; its shape and strides; its device.
    """

    structure: Any
    tensors: list[tuple[Tensor, tuple[tuple[int, ...], tuple[int, ...]], str]]

    @staticmethod
    def of(result: Any) -> "_Entry":
        tensors: list = []

        def take(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.requires_grad or type(value) is not Tensor or value.layout is not torch.strided:
                    raise NotCacheable
                repeated = (size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))
                base = value[tuple(slice(0, 1) if each else slice(None) for each in repeated)]
                kept = base.detach().to("cpu", copy=True).contiguous()
                tensors.append((kept, (tuple(value.shape), value.stride()), str(value.device)))
                return ["tensor", len(tensors) - 1]
            if isinstance(value, PLAIN):
                return ["plain", value]
            if type(value) in (list, tuple):
                return [type(value).__name__, [take(each) for each in value]]
            if type(value) is dict and all(isinstance(key, str) for key in value):
                return ["dict", {key: take(each) for key, each in value.items()}]
            raise NotCacheable

        return _Entry(take(result), tensors)

    def restore(self, near: torch.device) -> Any:
        """Build what was returned; tensors of a device of the same kind as `near` lie there."""

        def give(node: Any) -> Any:
            kind, value = node
            if kind == "tensor":
                base, (shape, strides), device = self.tensors[value]
                device = near if torch.device(device).type == near.type else device
                gapped = torch.empty_strided(base.shape, strides, dtype=base.dtype, device=device)
                return gapped.copy_(base).expand(shape)
            if kind == "plain":
                return value
            if kind == "dict":
                return {key: give(each) for key, each in value.items()}
            return {"list": list, "tuple": tuple}[kind](map(give, value))

        return give(self.structure)

    def save(self, file: Path) -> None:
        """Write a file at once, so that other processes see all of it or nothing."""
        file.parent.mkdir(parents=True, exist_ok=True)
        layout = [[list(shape), list(strides), device] for _, (shape, strides), device in self.tensors]
        metadata = {"structure": json.dumps(self.structure), "layout": json.dumps(layout)}
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        os.close(handle)
        save_file({str(index): tensor for index, (tensor, _, _) in enumerate(self.tensors)}, name, metadata=metadata)
        os.replace(name, file)

    @staticmethod
    def load(file: Path) -> "_Entry":
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            layout = json.loads(metadata["layout"])
            tensors = [
                (opened.get_tensor(str(index)), (tuple(shape), tuple(strides)), device)
                for index, (shape, strides, device) in enumerate(layout)
            ]
        return _Entry(json.loads(metadata["structure"]), tensors)


def _encodes(part: Any) -> bool:
    """Whether a component may take part in encoding a prompt: models of transformers, tokenizers and processors."""
    return isinstance(part, transformers.PreTrainedModel) or (
        type(part).__module__.startswith("transformers") and not isinstance(part, nn.Module)
    )


def _decides(name: str) -> bool:
    """Whether an attribute of a pipeline may decide what it encodes; those of the running loop do not."""
    return name not in ("_num_timesteps", "_current_timestep", "_interrupt", "_lora_scale")


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def _update(digest: Any, value: Any) -> None:
    """Add a value to a digest, so that different values differ in it."""
    if isinstance(value, (list, tuple)):
        _add(digest, type(value).__name__, str(len(value)).encode())
        for each in value:
            _update(digest, each)
    elif isinstance(value, dict):
        _add(digest, "dict", str(len(value)).encode())
        for key, each in value.items():
            _update(digest, key)
            _update(digest, each)
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        _add(digest, f"tensor {value.dtype} {tuple(value.shape)} {value.device}", flat.numpy().data)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _add(digest, f"array {value.dtype} {value.shape}", np.ascontiguousarray(value).data)
    elif isinstance(value, Image):
        _add(digest, f"image {value.mode} {value.size}", value.tobytes())
    elif isinstance(value, (*PLAIN, torch.dtype, torch.device)):
        _add(digest, type(value).__name__, repr(value).encode())
    else:
        raise NotCacheable


def _add(digest: Any, kind: str, content: Any) -> None:
    header = f"{kind} {memoryview(content).nbytes}:".encode()
    digest.update(header)
    digest.update(content)
