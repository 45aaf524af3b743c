"""Find weights on the Hub or on disk, and load them strictly."""

import hashlib
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Model = TypeVar("Model", bound=PreTrainedModel)
BROKEN_FILE = (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError, KeyError, ValueError)
"""What torch and safetensors raise for a file that is cut off or no weights at all."""
REPOSITORY = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
BUFFERS = ("position_ids", "relative_position_index")
"""What old versions of transformers saved, and the model computes by itself."""


def find_file(path_or_id: str | Path, filename: str, revision: str | None = None) -> Path:
    """Find a file of weights, and download it if need be.

    Args:
        path_or_id (str | Path): the file, a folder that holds it, or a repository of the Hub.
        filename (str): in the folder or repository.
        revision (str | None): branch, tag or commit of the repository; None is its main branch.

    Returns:
        Path: the file on disk.

    Raises:
        FileNotFoundError: if it is neither on disk nor to be had from the Hub.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        raise FileNotFoundError(f"The folder {path} has no {filename}. Pass the path of the file itself.")
    try:
        return Path(hf_hub_download(str(path_or_id), filename, revision=revision))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(_how_to_get(str(path_or_id), filename)) from error


def read_weights(path: Path) -> dict[str, Any]:
    """Read the tensors of a .safetensors file, or of a pickle without running its code.

    Args:
        path (Path): the file.

    Returns:
        dict[str, Any]: what it holds, on the CPU.

    Raises:
        ValueError: if the file is cut off, or holds something other than tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (*BROKEN_FILE, OSError) as error:
        raise ValueError(_broken(path, error)) from error
    if not isinstance(weights, dict):
        raise ValueError(_broken(path, f"it holds a {type(weights).__name__}, not tensors by name"))
    return weights


def load_model(
    model_class: type[Model],
    source: str | Path,
    *,
    config: Any = None,
    weights: dict[str, Tensor] | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    argument: str = "path_or_id",
    unused: Collection[str] = (),
    **settings: Any,
) -> Model:
    """Load a model of transformers strictly: each of its weights is there, and no other.

    Args:
        model_class (type[Model]): its class, or one of transformers' Auto classes.
        source (str | Path): repository of the Hub or folder; with `weights`, where these come from.
        config (Any): its configuration, where the source has none.
        weights (dict[str, Tensor] | None): its weights, where the source has them under other names.
        revision (str | None): branch, tag or commit of the repository.
        dtype (torch.dtype): of the model.
        argument (str): what the user knows the source as, for the message.
        unused (Collection[str]): weights that may be missing, since nothing depends on them.
        **settings: of the model's constructor.

    Returns:
        Model: on the CPU.

    Raises:
        FileNotFoundError: if the source is neither on disk nor to be had from the Hub.
        ValueError: if weights are missing, unexpected, of another shape, or cannot be read.
    """
    if weights is None:
        _check_is_no_file(source, argument)
    try:
        model, report = model_class.from_pretrained(
            None if weights is not None else str(source),
            config=config,
            state_dict=weights,
            revision=revision or "main",
            dtype=dtype,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
            **settings,
        )
    except OSError as error:
        if Path(source).exists():
            raise ValueError(_broken(source, error)) from error
        raise FileNotFoundError(_how_to_get(str(source), None, argument)) from error
    except BROKEN_FILE as error:
        raise ValueError(_broken(source, error)) from error
    missing = [name for name in report["missing_keys"] if name not in unused]
    check_names(missing, report["unexpected_keys"], source)
    for name, theirs, ours in report["mismatched_keys"]:
        raise ValueError(_broken(source, f"{name} has shape {tuple(theirs)}, but the model's has {tuple(ours)}"))
    return model


def load_module(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load the weights of a module strictly.

    Args:
        module (nn.Module): the module.
        weights (Mapping[str, Tensor]): by the names of its parameters.
        source (str | Path): where they come from, for the message.

    Raises:
        ValueError: if weights are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    check_names(own.keys() - weights.keys(), weights.keys() - own.keys(), source)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(_broken(source, error)) from error


def check_names(missing: Iterable[str], unexpected: Iterable[str], source: str | Path) -> None:
    """Raise ValueError if weights are missing or unexpected.

    Args:
        missing (Iterable[str]): names of weights that the model has and the source has not.
        unexpected (Iterable[str]): names of weights that the source has and the model has not.
        source (str | Path): for the message.
    """
    unexpected = [name for name in unexpected if not name.endswith(BUFFERS)]
    problems = [
        f"{len(names)} weights are {kind}, such as {', '.join(sorted(names)[:4])}"
        for kind, names in (("missing", list(missing)), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not hold this model: {'; '.join(problems)}. It is the file of another model or version, or "
            "incomplete: fetch the one that the reward's documentation names."
        )


def check_sha256(path: Path, digest: str) -> None:
    """Raise ValueError if a file is not the one of a SHA-256 digest.

    Args:
        path (Path): the file.
        digest (str): 64 hexadecimal digits.
    """
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != digest:
        raise ValueError(
            f"{path} has the SHA-256 digest {actual}, not {digest}: it is cut off or another file. Fetch it again; for "
            "weights of your own, pass sha256=None."
        )


def load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase, revision: str | None = None, argument: str = "tokenizer"
) -> Any:
    """Load a tokenizer, or pass one on.

    Args:
        tokenizer (str | Path | PreTrainedTokenizerBase): repository of the Hub, folder, or the tokenizer itself.
        revision (str | None): branch, tag or commit of the repository.
        argument (str): what the user knows the source as, for the message.

    Returns:
        PreTrainedTokenizerBase: the tokenizer.

    Raises:
        FileNotFoundError: if it is neither on disk nor to be had from the Hub.
        ValueError: if the folder holds none: transformers makes an empty one from the model's config.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    loaded = _load_part(AutoTokenizer.from_pretrained, "tokenizer", tokenizer, revision, argument)
    if len(loaded) <= len(set(loaded.all_special_tokens)):
        raise ValueError(
            f"{tokenizer} holds a tokenizer without words, to which all prompts are the same. Add the files of the "
            "model's tokenizer, or pass it as tokenizer."
        )
    return loaded


def load_image_processor(source: str | Path, argument: str = "path_or_id", revision: str | None = None) -> Any:
    """Load an image processor that works on PIL images, which needs no torchvision.

    Args:
        source (str | Path): repository of the Hub or folder.
        argument (str): what the user knows the source as, for the message.
        revision (str | None): branch, tag or commit of the repository.

    Returns:
        BaseImageProcessor: the image processor.

    Raises:
        FileNotFoundError: if it is neither on disk nor to be had from the Hub.
        ValueError: if the folder holds none.
    """
    return _load_part(AutoImageProcessor.from_pretrained, "image processor", source, revision, argument, backend="pil")


def _load_part(
    load: Callable[..., Any], what: str, source: str | Path, revision: str | None, argument: str, **settings: Any
) -> Any:
    """What goes with a model and has no weights."""
    _check_is_no_file(source, argument)
    try:
        return load(str(source), revision=revision or "main", **settings)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"The folder {source} holds no {what}: {reason}") from error
        raise FileNotFoundError(_how_to_get(str(source), None, argument)) from error


def _check_is_no_file(source: str | Path, argument: str) -> None:
    if Path(source).is_file():
        raise ValueError(
            f"{argument}={str(source)!r} is a file. Pass the folder that it is in, with the config of the model beside "
            "the weights, or an id of the Hub."
        )


def _how_to_get(source: str, filename: str | None, argument: str = "path_or_id") -> str:
    if not REPOSITORY.fullmatch(source) or source.endswith(FILE_SUFFIXES):
        return f"There is no file or folder {source!r}. Pass the path of one, or an id of the Hub, as {argument}."
    what = f"{filename} of {source!r}" if filename else repr(source)
    file = f" {filename}" if filename else ""
    return (
        f"Cannot find {what}: there is no such path, and the Hub does not give it (is there a network, and is "
        f"HF_HUB_OFFLINE unset?). On a machine with a network, run `hf download {source}{file} --local-dir FOLDER`; "
        f"then pass {argument}='FOLDER'."
    )


def _broken(source: str | Path, reason: Any) -> str:
    lines = str(reason).splitlines() or [type(reason).__name__]
    return (
        f"{source} cannot be read as the weights of this model: {lines[0]}. If the file is cut off, "
        "fetch it again; only tensors are read, never other Python objects."
    )
