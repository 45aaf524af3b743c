from dataclasses import fields
from typing import Any

from .base import Method, Outcome, Plan, Schedule, Trajectory
from .draft import DRaFT, DRaFTLV
from .drtune import DRTune
from .flowbp import FlowBPBridge, FlowBPLagrange, FlowBPSparse
from .leapalign import LeapAlign
from .refl import ReFL

METHODS: dict[str, Any] = {
    "leapalign": LeapAlign,
    "refl": ReFL,
    "draft": DRaFT,
    "draft_lv": DRaFTLV,
    "drtune": DRTune,
    "flowbp_sparse": FlowBPSparse,
    "flowbp_bridge": FlowBPBridge,
    "flowbp_lagrange": FlowBPLagrange,
}


def build_method(method: Method | str, settings: dict[str, Any]) -> Method:
    """Return a method by its name and settings, or one that is there already.

    Args:
        method (Method | str): one of `METHODS`, or an instance.
        settings (dict[str, Any]): of the method that is named.

    Returns:
        Method: the method.

    Raises:
        ValueError: if the method or one of its settings is unknown, or a setting is out of range.
        TypeError: if `method` is neither a name nor a method.
    """
    if isinstance(method, Method):
        if settings:
            raise ValueError(
                f"method is an instance, so method_kwargs={settings} would have no effect. Pass them to "
                f"{type(method).__name__}(...) instead."
            )
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a Method, got {method!r}. Names: {sorted(METHODS)}.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {sorted(METHODS)}.")
    kind = METHODS[method]
    known = [option.name for option in fields(kind)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"The method {method!r} has no settings {unknown}; it has {known}.")
    return kind(**settings)


__all__ = [
    "METHODS",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "LeapAlign",
    "Method",
    "Outcome",
    "Plan",
    "ReFL",
    "Schedule",
    "Trajectory",
    "build_method",
]
