"""A reward without gradient: verdicts, services, detectors, people."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ranges import Range
from .callables import check_callable, name_of


class BlackBox:
    """Marks a reward that has no gradient; training compares the samples of a prompt with each other instead.

    The function is called as any reward is, `function(images, prompts, metadata)`, without gradients and with a copy of
    the images on their device. It may use NumPy, PIL, a detector or a service, and returns one number for each image: a
    tensor, an array or a list, of floats, integers or booleans; or these and a dict of things to report.

        trainer = LeapAlignTrainer(pipeline, BlackBox(is_right), config)

    Args:
        function (Callable): the reward. If its attribute `inputs` is "latents", it is called with the end latents.
        batch_size (int | None): images of one call. None is all of a batch, or 1 with `num_threads`.
        num_threads (int): calls of one batch that run at the same time; for services, which wait most of the time.
        retries (int): further attempts after a ConnectionError or TimeoutError of a call, each after a longer pause.

    Raises:
        TypeError: if the function cannot be called with images, prompts and metadata.
        ValueError: if a setting is out of range.
    """

    differentiable = False

    def __init__(self, function: Callable, *, batch_size: int | None = None, num_threads: int = 1, retries: int = 0):
        check_callable(function)
        if batch_size is not None:
            Range(1, whole=True).check("BlackBox: batch_size", batch_size)
        Range(1, whole=True).check("BlackBox: num_threads", num_threads)
        Range(0, whole=True).check("BlackBox: retries", retries)
        self.function = function
        self.batch_size, self.num_threads, self.retries = batch_size, num_threads, retries
        self.inputs = getattr(function, "inputs", "images")
        self.__name__ = name_of(function)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Tensor, dict]:
        """Score images.

        Args:
            images (Tensor): what the function takes, shape (B, ...).
            prompts (list[str]): length B.
            metadata (list[dict]): length B.

        Returns:
            tuple[Tensor, dict]: rewards without graph, shape (B,), float32 or float64, and what is to be reported.

        Raises:
            TypeError: if the function returns no numbers.
            ValueError: if it does not return one for each image.
            ConnectionError: if a call still fails after all attempts.
        """
        images = images.detach().clone()
        size = self.batch_size or (len(images) if self.num_threads == 1 else 1)
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        if self.num_threads == 1 or len(parts) == 1:
            answers = [self._ask(images[part], prompts[part], metadata[part]) for part in parts]
        else:
            with ThreadPoolExecutor(self.num_threads) as pool:
                calls = [pool.submit(self._ask, images[part], prompts[part], metadata[part]) for part in parts]
                answers = [call.result() for call in calls]
        rewards = torch.cat([rewards for rewards, _ in answers])
        reports = [report for _, report in answers]
        return rewards, reports[0] if len(reports) == 1 else _joined(reports)

    @torch.no_grad()  # gradient mode belongs to a thread
    def _ask(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Tensor, dict]:
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), 30.0))
            try:
                answer = self.function(images, list(prompts), [dict(row) for row in metadata])
                break
            except (ConnectionError, TimeoutError) as error:
                failure = error
        else:
            raise ConnectionError(
                f"The reward {self.__name__!r} failed {self.retries + 1} times on {prompts[0]!r}, at last with "
                f"{type(failure).__name__}: {failure}. Resume from the last checkpoint when it works again."
            ) from failure
        return read_numbers(answer, images, self.__name__)


def read_numbers(answer: Any, images: Tensor, name: str) -> tuple[Tensor, dict[str, Any]]:
    """Read what a reward without gradient returned.

    Args:
        answer (Any): a tensor, an array or a list of numbers, one an image; or a tuple of these and a dict.
        images (Tensor): what it was asked about, shape (B, ...).
        name (str): of the reward, for the message.

    Returns:
        tuple[Tensor, dict]: numbers on the images' device, shape (B,), float32 at least, and the dict.

    Raises:
        TypeError: if there are no numbers.
        ValueError: if there is not one for each image.
    """
    numbers, report = answer if isinstance(answer, tuple) and len(answer) == 2 and _is_dict(answer[1]) else (answer, {})
    try:
        if not isinstance(numbers, (Tensor, np.ndarray)):
            numbers = [value.item() if isinstance(value, (Tensor, np.generic)) else value for value in numbers]
            if any(isinstance(value, str) for value in numbers):
                raise TypeError("texts are no numbers")
        dtype = torch.promote_types(images.dtype if images.is_floating_point() else torch.float32, torch.float32)
        rewards = torch.as_tensor(numbers).detach().to(images.device, dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"The reward {name!r} returned {str(answer)[:200]}, which cannot be read as numbers ({error}). Return a "
            "list, an array or a tensor with one number for each image."
        ) from error
    if rewards.shape != (len(images),):
        raise ValueError(
            f"The reward {name!r} returned shape {tuple(rewards.shape)} for {len(images)} images. Return one number "
            f"for each image, shape ({len(images)},)."
        )
    return rewards, report


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of each key, one call after another: those of the images where all are tensors, else a list."""
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for report in reports for key in report):
        values = [report.get(key) for report in reports]
        tensors = all(isinstance(value, Tensor) and value.ndim == 1 for value in values)
        joined[key] = torch.cat(values) if tensors else values
    return joined
