"""What all built-in reward models share: frozen weights, precision, micro-batches and cached prompts."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ranges import Range, check_bool
from .callables import check_inputs

MOST_ENCODED_PROMPTS = 1024
"""Of prompts beyond these, those that were not used for longest are encoded again."""


class RewardModel(nn.Module):
    """A frozen model that scores images, differentiably.

    A subclass implements `score`, and `encode_prompt` if it reads the prompts. Autocast is off inside: scores that
    differ in the fourth digit must not be rounded to bfloat16.

    Args:
        batch_size (int | None): images scored at a time. None is all of a batch.
        activation_checkpointing (bool): keep no activations of the scoring, and compute them again in the backward
            pass, `batch_size` images at a time. Costs a second forward pass; scores and gradients stay the same.

    Raises:
        ValueError: if a setting is out of range.
    """

    threshold: float | None = None
    """Recommended lambda on the scale of the scores; None is none. Used where the user sets none."""
    reads_prompts: ClassVar[bool] = True
    """Whether the score depends on the prompt, so that one that is empty is refused."""

    def __init__(self, *, batch_size: int | None = None, activation_checkpointing: bool = False):
        super().__init__()
        if batch_size is not None:
            Range(1, whole=True).check("batch_size", batch_size)
        check_bool("activation_checkpointing", activation_checkpointing)
        self.batch_size = batch_size
        self.activation_checkpointing = activation_checkpointing
        self._encoded_prompts: OrderedDict[str, Any] = OrderedDict()

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            prompts (list[str]): length B.
            metadata (list[dict]): unused.

        Returns:
            Tensor: scores with the images' graph, shape (B,), float32 (float64 for a model in float64).

        Raises:
            TypeError: if the images are no floating tensor, or the prompts are no list of strings.
            ValueError: if the shape, the range or the number of prompts is wrong, or a prompt is empty.
        """
        check_inputs(images, prompts, None, type(self).__name__, self.reads_prompts)
        with torch.autocast(images.device.type, enabled=False):
            images = at_least_float32(images)
            return self._score_all(images, [self._encoded(prompt) for prompt in prompts])

    def score(self, images: Tensor, texts: Sequence[Any]) -> Tensor:
        """Score images of one micro-batch.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1], float32 or float64.
            texts (Sequence[Any]): what `encode_prompt` returned for each, length B.

        Returns:
            Tensor: scores, shape (B,).
        """
        raise NotImplementedError

    def encode_prompt(self, prompt: str) -> Any:
        """Compute what does not depend on the image, without gradients; the last 1,024 results are kept.

        Args:
            prompt (str): the prompt.

        Returns:
            Any: what `score` needs of it.
        """
        return None

    def _score_all(self, images: Tensor, texts: Sequence[Any]) -> Tensor:
        """Score all images, a micro-batch at a time."""
        size = self.batch_size or len(images)
        starts = range(0, len(images), size)
        scores = [self._score(images[start : start + size], texts[start : start + size]) for start in starts]
        return at_least_float32(torch.cat(scores))

    def _score(self, images: Tensor, texts: Sequence[Any]) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.score, images, texts, use_reentrant=False, preserve_rng_state=False)
        return self.score(images, texts)

    def _encoded(self, prompt: str) -> Any:
        if prompt not in self._encoded_prompts:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used in training
                self._encoded_prompts[prompt] = self.encode_prompt(prompt)
        self._encoded_prompts.move_to_end(prompt)
        encoded = self._encoded_prompts[prompt]
        while len(self._encoded_prompts) > MOST_ENCODED_PROMPTS:
            self._encoded_prompts.popitem(last=False)
        return encoded

    def _apply(self, *args: Any, **kwargs: Any) -> "RewardModel":
        """Forget the prompts when the weights go to another device or dtype."""
        self._encoded_prompts.clear()
        return super()._apply(*args, **kwargs)


def at_least_float32(values: Tensor) -> Tensor:
    """Widen a tensor to float32, and leave float64 as it is.

    Args:
        values (Tensor): floating, any shape.

    Returns:
        Tensor: the same values.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def linear_head(width: int) -> nn.Sequential:
    """Build the head of the aesthetic predictor and of ImageReward, which has no activations.

    Its parameters are called {0,2,4,6,7}.{weight,bias}; what lies between is dropout in training.

    Args:
        width (int): of its input.

    Returns:
        nn.Sequential: maps (B, width) to (B, 1).
    """
    sizes = (width, 1024, 128, 64, 16, 1)
    first, second, third, fourth, fifth = (nn.Linear(*pair) for pair in pairwise(sizes))
    return nn.Sequential(first, nn.Identity(), second, nn.Identity(), third, nn.Identity(), fourth, fifth)


def apply_head(head: nn.Module, features: Tensor) -> Tensor:
    """Apply a small head in its own precision.

    Args:
        head (nn.Module): maps (B, D) to (B, K).
        features (Tensor): shape (B, D).

    Returns:
        Tensor: shape (B, K), float32 or float64.
    """
    dtype = next(head.parameters()).dtype
    return at_least_float32(head(features.to(dtype)))
