from .base import RewardFunction, RewardSet, Scores
from .clip import CLIPReward

__all__ = ["CLIPReward", "RewardFunction", "RewardSet", "Scores"]
