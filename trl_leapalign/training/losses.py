"""From rewards to a loss. Pure torch."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def reward_loss(
    rewards: Tensor,
    weights: Tensor,
    coefficients: Sequence[float | Tensor],
    thresholds: Sequence[float | None],
) -> Tensor:
    """Weighted hinge loss over one or several rewards (LeapAlign, Sec. 4.3).

        L = mean over the batch of  w * sum over m of  c_m * max(0, lambda_m - r_m)

    A reward without threshold is maximised without end: `-r_m` stands in place of the hinge.

    Args:
        rewards (Tensor): one row a reward, shape (M, B), with graph.
        weights (Tensor): loss weight of each sample, shape (B,).
        coefficients (Sequence[float | Tensor]): weight c_m of each reward, length M, or for each sample, shape (B,).
        thresholds (Sequence[float | None]): lambda_m of each reward, on its own scale, length M.

    Returns:
        Tensor: scalar loss.
    """
    terms = [
        coefficient * (-reward if threshold is None else (threshold - reward).clamp(min=0))
        for reward, coefficient, threshold in zip(rewards, coefficients, thresholds, strict=True)
    ]
    return (weights * torch.stack(terms).sum(0)).mean()


def below_threshold(rewards: Tensor, thresholds: Sequence[float | None], teaching: Tensor | None = None) -> Tensor:
    """Which samples have a loss: those below the threshold of at least one reward, or with one that has none.

    Args:
        rewards (Tensor): shape (M, B).
        thresholds (Sequence[float | None]): lambda_m, length M.
        teaching (Tensor | None): where a reward has something to say, shape (M, B), bool; None is everywhere.

    Returns:
        Tensor: shape (B,), bool.
    """
    limits = torch.tensor([math.inf if limit is None else limit for limit in thresholds], device=rewards.device)
    below = rewards.detach() < limits[:, None]
    return (below if teaching is None else below & teaching).any(0)


def limit_sample_gradients(
    loss: Tensor,
    latents: Tensor,
    limit: float | None,
    report: Callable[[Tensor], None] | None = None,
    num_calls: int = 1,
) -> None:
    """Scale down what single samples send back to their latents, when the loss is differentiated.

    A sample's gradient is that of its own term of the loss, of which the loss is the mean: it depends neither on the
    other samples nor on how the loss is scaled afterwards.

    Args:
        loss (Tensor): mean over the samples, scalar, with graph.
        latents (Tensor): shape (B, ...), on the way from the denoiser to the loss.
        limit (float | None): largest norm of a sample's gradient; None leaves them as they are.
        report (Callable[[Tensor], None] | None): called with the norms before that, shape (B,).
        num_calls (int): times B, the samples that the loss is the mean over.
    """
    scales: list[Tensor] = []
    loss.register_hook(scales.append)

    def limited(gradient: Tensor) -> Tensor:
        norms = gradient.detach().flatten(1).float().norm(dim=1) * len(gradient) * num_calls / scales[-1].float()
        if report is not None:
            report(norms)
        if limit is None:
            return gradient
        factors = (limit / norms.clamp(min=limit)).to(gradient.dtype)
        return gradient * factors.view(-1, *[1] * (gradient.ndim - 1))

    latents.register_hook(limited)
