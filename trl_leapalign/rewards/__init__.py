from ..media import column_images
from .aesthetic import AestheticScore
from .black_box import BlackBox
from .builtin import REWARDS, load_reward
from .clip import CLIPReward, CLIPScore, PickScore
from .hpsv2 import HPSv2
from .hpsv3 import HPSv3
from .image_reward import ImageReward
from .remote import RemoteReward
from .reward_model import RewardModel
from .reward_set import RewardFunction, RewardSet, Scores, check_finite
from .video import VideoReward

__all__ = [
    "REWARDS",
    "AestheticScore",
    "BlackBox",
    "CLIPReward",
    "CLIPScore",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "PickScore",
    "RemoteReward",
    "RewardFunction",
    "RewardModel",
    "RewardSet",
    "Scores",
    "VideoReward",
    "check_finite",
    "column_images",
    "load_reward",
]
