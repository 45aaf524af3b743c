"""How much better an image fits a prompt with some words than with others: differentiable if the reward is."""

from typing import Any

import torch
from torch import Tensor, nn

from .builtin import check_reward_name, load_reward
from .callables import RewardFunction, check_callable, check_rewards, name_of

PROMPT = "{prompt}"


class RelativeReward(nn.Module):
    """r(x, prompt with some words) - r(x, prompt with others), of any reward that reads the prompt.

    What a reward says of an image whatever the prompt falls out, and with it much of what can be hacked: the image
    moves towards the one description and away from the other, as in SRPO (https://huggingface.co/papers/2509.06942).

    Args:
        reward (RewardFunction | str): the reward, or the name of a built-in one.
        words (str): the prompt that images should fit, such as "Realistic photo. {prompt}", where {prompt} stands for
            the image's own.
        against (str): the one that they should not, such as "CG render. {prompt}". Plain "{prompt}" is the prompt
            without words.

    Raises:
        TypeError: if the reward cannot be called with images, prompts and metadata.
        ValueError: if the reward's name is unknown, the reward does not read the prompt, or the texts are equal or lack
            {prompt}.
        FileNotFoundError: if the weights of a built-in reward are not to be had.
    """

    def __init__(self, reward: RewardFunction | str, words: str, against: str = PROMPT):
        super().__init__()
        for name, text in (("words", words), ("against", against)):
            if not isinstance(text, str) or PROMPT not in text:
                raise ValueError(f'{name}={text!r} must hold {{prompt}}, such as "Realistic photo. {{prompt}}".')
        if words == against:
            raise ValueError(f"words and against are both {words!r}, so the reward would always be 0.")
        check_reward_name(reward) if isinstance(reward, str) else check_callable(reward)
        self.__name__ = f"relative_{name_of(reward)}"
        self.reward = load_reward(reward) if isinstance(reward, str) else reward
        if not getattr(self.reward, "reads_prompts", True):
            raise ValueError(f"The reward {name_of(reward)!r} does not read the prompt, so the difference would be 0.")
        self.words, self.against = words, against
        self.differentiable = getattr(self.reward, "differentiable", True)

    def forward(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score images twice.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1], or what else the reward takes.
            prompts (list[str]): length B.
            metadata (list[dict]): length B.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: the differences, shape (B,), and detached, "words" and "against", the two
                rewards of each image, shape (B,).

        Raises:
            TypeError: if the reward returns no floating tensor.
            ValueError: if the shape of what it returns is wrong.
        """
        with_words, without = (self._rewards(text, images, prompts, metadata) for text in (self.words, self.against))
        return with_words - without, {"words": with_words.detach(), "against": without.detach()}

    def _rewards(self, text: str, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        result = self.reward(images, [text.replace(PROMPT, prompt) for prompt in prompts], metadata)
        rewards = result[0] if isinstance(result, tuple) else result
        check_rewards(rewards, images.detach() if not self.differentiable else images, self.__name__)
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32))
