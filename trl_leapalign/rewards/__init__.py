from .base import RewardFunction, RewardSet, Scores, check_finite
from .clip import CLIPReward

__all__ = ["CLIPReward", "RewardFunction", "RewardSet", "Scores", "check_finite"]
