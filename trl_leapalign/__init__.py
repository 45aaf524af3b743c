"""Align diffusers flow-matching pipelines with a differentiable reward."""

from .leapalign_config import LeapAlignConfig
from .leapalign_trainer import LeapAlignTrainer
from .methods import DRaFT, DRaFTLV, DRTune, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign, ReFL
from .rollout.run import RolloutOutput, run_rollout

__version__ = "0.1.0.dev0"

__all__ = [
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "LeapAlign",
    "LeapAlignConfig",
    "LeapAlignTrainer",
    "ReFL",
    "RolloutOutput",
    "run_rollout",
]
