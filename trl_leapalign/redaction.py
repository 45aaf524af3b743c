"""Settings as they may be written down: what JSON can hold, without secrets."""

import hashlib
import os
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SECRET_NAME = re.compile(
    r"(^|[_\W])(token|secret|password|passwd|credentials?|authorization|api_?key|access_?key)$", re.I
)
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
SHORTEST_SECRET = 8
HIDDEN = "<hidden>"


def plain(value: Any, name: str = "") -> Any:
    """Turn a setting into what JSON can hold: secrets are hidden, and what JSON cannot hold is described.

    Args:
        value (Any): the setting. Dicts and lists are gone through.
        name (str): of the setting, by which a secret is known, such as "hub_token".

    Returns:
        Any: texts, numbers, truth values and None, in lists and dicts. A tensor, image or array is described by its
        shape and a digest of its values, and a function by its name, so that equal settings have equal descriptions.
    """
    if isinstance(value, str):
        return HIDDEN if SECRET_NAME.search(name) else CREDENTIALS.sub("", value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return plain(value.value, name)
    if isinstance(value, Mapping):
        return {str(key): plain(each, str(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each, name) for each in value]
    if isinstance(value, (Tensor, np.ndarray, Image.Image)):
        return _described(value)
    if hasattr(value, "to_dict") and not isinstance(value, type):
        return plain(value.to_dict())
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return CREDENTIALS.sub("", ADDRESS.sub("", str(value)))


def secrets_of(values: Mapping[str, Any]) -> set[str]:
    """Collect the secrets that settings and the process's environment hold, which `plain` hides.

    Args:
        values (Mapping[str, Any]): settings by name.

    Returns:
        set[str]: tokens, passwords and keys of at least eight characters.
    """
    found: set[str] = set()

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, each in value.items():
                collect(str(key), each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                collect(name, each)
        elif isinstance(value, str) and SECRET_NAME.search(name):
            found.add(value)

    for source in (values, os.environ):
        for name, value in source.items():
            collect(name, value)
    return {secret for secret in found if len(secret) >= SHORTEST_SECRET}


def without_credentials(url: str) -> str:
    """Return an address without its user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    try:
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:  # a password may stand where the port is expected
        return f"{parts.scheme}://..."
    return f"{parts.scheme}://{parts.hostname or '...'}{port}{parts.path if parts.hostname else ''}"


def _described(value: Tensor | np.ndarray | Image.Image) -> str:
    if isinstance(value, Image.Image):
        kind, shape, content = f"{value.mode} image", value.size, value.tobytes()
    else:
        tensor = value if isinstance(value, Tensor) else None
        array = value if tensor is None else tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        kind, shape, content = f"{value.dtype} {type(value).__name__}", tuple(value.shape), array.tobytes()
    return f"{kind} {'x'.join(map(str, shape))}, SHA-256 {hashlib.sha256(content).hexdigest()[:16]}"
