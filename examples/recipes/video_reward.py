"""Rewards of images for videos, as MODULE:NAME on the command line; loaded when they are asked for."""

from typing import Any

from trl_leapalign.rewards import VideoReward

NAMES = {"hpsv21": "hpsv2.1", "pickscore": "pickscore"}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"There is no {name!r} here; choose one of {sorted(NAMES)}.")
    return VideoReward(NAMES[name])
