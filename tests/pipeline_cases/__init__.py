"""Tiny pipelines of real classes, for the matrix of `test_pipelines.py`."""

from importlib import import_module
from importlib.util import find_spec

from .base import PipelineCase

MODULES = ("images", "images_more", "images_vlm", "images_new", "video", "edits", "edits_new", "refused")
CASES: list[PipelineCase] = [
    case
    for module in MODULES
    if find_spec(f"{__name__}.{module}") is not None
    for case in import_module(f"{__name__}.{module}").CASES
]
