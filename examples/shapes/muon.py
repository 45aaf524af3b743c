"""Muon in float32: a fraction of AdamW's steps for small matrices, and no bfloat16, which is slow on CPUs."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is orthogonalized, scaled to the size of AdamW's updates.

    Args:
        parameters (`Iterable[Tensor]`): matrices only.
        lr (`float`): learning rate, as for AdamW.
        momentum (`float`): Nesterov momentum.
        weight_decay (`float`): decoupled weight decay.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Updates all matrices, those of one shape together."""
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                updates = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in parameters]
                size = 0.2 * max(shape) ** 0.5 * group["lr"]
                for parameter, update in zip(parameters, orthogonalized(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Brings all singular values near one by Newton-Schulz iteration: (N, rows, columns) to the same."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT
