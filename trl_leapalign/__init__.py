"""Align diffusers flow-matching pipelines with a reward."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .leapalign_config import LeapAlignConfig
    from .leapalign_trainer import LeapAlignTrainer
    from .methods import DRaFT, DRaFTLV, DRTune, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign, ReFL
    from .rollout.recorder import RolloutOutput
    from .rollout.run import run_rollout

__version__ = "0.1.0.dev0"

_MODULES = {
    "DRTune": "methods",
    "DRaFT": "methods",
    "DRaFTLV": "methods",
    "FlowBPBridge": "methods",
    "FlowBPLagrange": "methods",
    "FlowBPSparse": "methods",
    "LeapAlign": "methods",
    "LeapAlignConfig": "leapalign_config",
    "LeapAlignTrainer": "leapalign_trainer",
    "ReFL": "methods",
    "RolloutOutput": "rollout.recorder",
    "run_rollout": "rollout.run",
}
"""Public names, each imported from its module when it is first used (PEP 562)."""

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
