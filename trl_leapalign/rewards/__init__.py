from ..media import column_images
from .aesthetic import AestheticScore
from .black_box import BlackBox
from .builtin import REWARDS, load_reward
from .callables import NamedReward
from .clip import CLIPReward, CLIPScore, PickScore
from .hpsv2 import HPSv2
from .hpsv3 import HPSv3
from .human import HumanReward
from .image_reward import ImageReward
from .ocr import OCRReward
from .relative import RelativeReward
from .remote import RemoteReward
from .reward_model import RewardModel
from .reward_set import RewardFunction, RewardSet, Scores, check_finite
from .video import VideoReward
from .vlm import VLMReward

__all__ = [
    "REWARDS",
    "AestheticScore",
    "BlackBox",
    "CLIPReward",
    "CLIPScore",
    "HPSv2",
    "HPSv3",
    "HumanReward",
    "ImageReward",
    "NamedReward",
    "OCRReward",
    "PickScore",
    "RelativeReward",
    "RemoteReward",
    "RewardFunction",
    "RewardModel",
    "RewardSet",
    "Scores",
    "VLMReward",
    "VideoReward",
    "check_finite",
    "column_images",
    "load_reward",
]
