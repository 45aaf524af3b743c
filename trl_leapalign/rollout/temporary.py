"""Attributes that are set for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def temporary_attribute(instance: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute past `__setattr__`, which pipelines and modules override."""
    attributes = vars(instance)
    missing = name not in attributes
    previous = attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if missing:
            del attributes[name]
        else:
            attributes[name] = previous
