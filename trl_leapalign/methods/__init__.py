from .base import Method, Outcome, Plan, Schedule, Trajectory
from .draft import DRaFT, DRaFTLV
from .drtune import DRTune
from .flowbp import FlowBPBridge, FlowBPLagrange, FlowBPSparse
from .leapalign import LeapAlign
from .refl import ReFL

METHODS = {
    "leapalign": LeapAlign,
    "refl": ReFL,
    "draft": DRaFT,
    "draft_lv": DRaFTLV,
    "drtune": DRTune,
    "flowbp_sparse": FlowBPSparse,
    "flowbp_bridge": FlowBPBridge,
    "flowbp_lagrange": FlowBPLagrange,
}

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
]
