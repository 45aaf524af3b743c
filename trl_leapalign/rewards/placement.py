"""Reward models that are on the device only while they score, or on a device of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PlacedReward:
    """A reward model on a device of its own, or on it only while it is needed.

    Images are copied to its device, and rewards and gradients come back. One that is moved in and out keeps no graph:
    it scores again in the backward pass, so the gradient is the model's own at the price of a second forward pass.

    Args:
        function (nn.Module): the reward, `reward(images, prompts, metadata)`.
        device (torch.device): where it runs.
        offload (bool): keep it on the CPU but while it scores or is differentiated.
    """

    def __init__(self, function: nn.Module, device: torch.device, offload: bool):
        self.function = function
        self.device = device
        self.offload = offload
        self._move("cpu" if offload else device)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        """Score images; arguments and result are the reward's own, on its device."""
        given = images.to(self.device)
        if not self.offload:
            return self.function(given, prompts, metadata)
        extra: list[dict] = []

        def score(images: Tensor) -> Tensor:
            result = self.function(images, list(prompts), [dict(row) for row in metadata])
            if isinstance(result, tuple) and len(result) == 2:
                extra.append(result[1])
                return result[0]
            return result

        if given is images:
            given = images.view_as(images)  # so that what changes it in place is noticed
        if not (images.requires_grad and torch.is_grad_enabled()):
            rewards = self._inside(lambda: score(given))
        else:
            rewards = _Recomputed.apply(given, score, self._inside)
        return (rewards, extra[0]) if extra else rewards

    def _inside(self, run: Callable[[], Any]) -> Any:
        self._move(self.device)
        try:
            return run()
        finally:
            self._move("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _move(self, device: torch.device | str) -> None:
        if any(parameter.device != torch.device(device) for parameter in self.function.parameters()):
            self.function.to(device)


class _Recomputed(torch.autograd.Function):
    """Scores without a graph, and scores again to differentiate."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, score: Callable, inside: Callable) -> Tensor:
        ctx.save_for_backward(images)
        ctx.score, ctx.inside = score, inside

        def run() -> Tensor:
            with torch.enable_grad():
                rewards = score(images.detach().requires_grad_())
            if not isinstance(rewards, Tensor):
                return rewards
            if not rewards.requires_grad:
                ctx.mark_non_differentiable(rewards)
                return rewards
            return rewards.detach()

        return inside(run)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        [images] = ctx.saved_tensors

        def run() -> Tensor:
            with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
                given = images.detach().requires_grad_()
                rewards = ctx.score(given)
            return torch.autograd.grad(rewards, given, gradient.to(rewards))[0]

        return ctx.inside(run), None, None
