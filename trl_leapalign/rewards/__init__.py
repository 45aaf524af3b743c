from .base import RewardFunction, RewardSet, Scores

__all__ = ["RewardFunction", "RewardSet", "Scores"]
