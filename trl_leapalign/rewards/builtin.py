"""Built-in rewards by name."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from .aesthetic import AestheticScore
from .callables import NamedReward, RewardFunction, check_callable
from .clip import CLIPScore, PickScore
from .hpsv2 import HPSv2
from .hpsv3 import HPSv3
from .image_reward import ImageReward
from .reward_model import RewardModel

REWARDS: dict[str, Callable[..., RewardModel]] = {
    "hpsv2.0": partial(HPSv2.from_pretrained, version="2.0"),
    "hpsv2.1": partial(HPSv2.from_pretrained, version="2.1"),
    "hpsv3": HPSv3.from_pretrained,
    "pickscore": PickScore.from_pretrained,
    "clipscore": CLIPScore.from_pretrained,
    "aesthetic": AestheticScore.from_pretrained,
    "imagereward": ImageReward.from_pretrained,
}
"""What loads each built-in reward."""


def load_reward(name: str, **settings: Any) -> RewardModel:
    """Load a built-in reward; its weights come from the Hub unless they are on disk.

    Args:
        name (str): one of `REWARDS`.
        **settings: of its `from_pretrained`, such as `path_or_id`, `revision` or `batch_size`.

    Returns:
        RewardModel: the reward, on the CPU.

    Raises:
        ValueError: if the name is unknown, or the weights cannot be loaded.
        FileNotFoundError: if the weights are neither on disk nor to be had from the Hub.
    """
    check_reward_name(name)
    return REWARDS[name](**settings)


def load_named(reward: RewardFunction | NamedReward | str, **settings: Any) -> RewardFunction:
    """Load a reward that is given by its name or will be loaded later, and pass on any other.

    Args:
        reward (RewardFunction | NamedReward | str): the reward.
        **settings (Any): arguments of `load_reward` for one that is given by its name.

    Returns:
        RewardFunction: the reward function.

    Raises:
        TypeError: if what was loaded cannot be called with images, prompts and metadata.
    """
    if isinstance(reward, str):
        return load_reward(reward, **settings)
    if not isinstance(reward, NamedReward):
        return reward
    function = reward.load()
    check_callable(function)
    return function


def check_reward_name(name: str) -> None:
    """Raise ValueError unless a built-in reward has this name."""
    if name not in REWARDS:
        close = difflib.get_close_matches(name.lower(), REWARDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no built-in reward {name!r}.{hint} Choose one of {sorted(REWARDS)}.")
