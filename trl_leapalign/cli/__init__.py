"""The command `trl-leapalign`."""

from .main import main

__all__ = ["main"]
