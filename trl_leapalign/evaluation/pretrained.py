"""Loading pretrained parts of an evaluator, with an error that says how to get them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load_pretrained(load: Callable[..., T], source: str | Path, what: str, **options: Any) -> T:
    """Call a `from_pretrained` and say what to do if the files are missing.

    Args:
        load (Callable): the `from_pretrained` of a class.
        source (str | Path): Hub id or local folder.
        what (str): what is loaded, for the message.
        **options (Any): go to `load`.

    Returns:
        T: what `load` returns.

    Raises:
        OSError: if the files are neither in the folder, nor in the cache, nor to be had from the Hub.
    """
    try:
        return load(str(source), **options)
    except OSError as error:
        raise OSError(
            f"{what} could not be loaded from {str(source)!r}: {_first_line(error)}\nWith a network, run `hf download "
            "<repository>` once and try again. Without one, copy the repository's files to a folder and pass its path."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
