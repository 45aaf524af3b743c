"""Which way the end latents should go, from rewards without gradient: differences within groups. Pure torch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Directions:
    """What the differences of a batch say.

    Args:
        gradients (Tensor): stands in for the gradient of each sample's reward, shape (B, ...), detached.
        differing (Tensor): share of a sample's pairs whose rewards differ, shape (B,).
    """

    gradients: Tensor
    differing: Tensor


def directions(
    latents: Tensor, rewards: Tensor, group_size: int, power: float = 1.0, shared: bool = False
) -> Directions:
    """Estimate gradients of rewards with respect to end latents by comparing the samples of each group.

        g_ab = (r_a - r_b) (x_a - x_b) / |x_a - x_b|^p,        g_a = mean of g_ab over the other samples b

    With p = 2 a pair's term is the finite difference along the line through both; with p = 1 it does not grow as the
    samples come close. Pairs of equal rewards, or of equal latents, say nothing. For p = 2, a smooth reward and small
    isotropic differences d, the mean of d (d . g) / |d|^2 is g / D, the gradient's own direction.

    Args:
        latents (Tensor): x, shape (B, ...), groups one after another.
        rewards (Tensor): r, shape (B,).
        group_size (int): G, samples of a group, at least 2; divides B.
        power (float): p.
        shared (bool): all samples of a group get the mean of their g_a; for samples close to each other.

    Returns:
        Directions: in float32 at least.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    x = latents.detach().to(dtype).reshape(-1, group_size, latents[0].numel())
    r = rewards.detach().to(dtype).reshape(-1, group_size)
    sums = torch.zeros_like(x)
    for other in range(group_size):
        apart = x - x[:, other : other + 1]
        better = r - r[:, other : other + 1]
        distances = apart.norm(dim=2)
        factors = torch.where(distances > 0, better / distances.clamp(min=torch.finfo(dtype).tiny) ** power, 0.0)
        sums += torch.where(better != 0, factors, 0.0)[:, :, None] * apart
    gradients = sums / (group_size - 1)
    if shared:
        gradients = gradients.mean(1, keepdim=True).expand_as(gradients)
    differing = (r[:, :, None] != r[:, None, :]).to(dtype).sum(2) / (group_size - 1)
    return Directions(gradients.reshape(latents.shape), differing.reshape(-1))


def group_scales(rewards: Tensor, group_size: int) -> Tensor:
    """One over the standard deviation of the rewards within each group; 0 where they are all the same.

    Args:
        rewards (Tensor): shape (B,), groups one after another.
        group_size (int): samples of a group; divides B.

    Returns:
        Tensor: shape (B,), detached.
    """
    grouped = rewards.detach().reshape(-1, group_size)
    deviations = grouped.std(1, correction=0, keepdim=True)
    same = (grouped == grouped[:, :1]).all(1, keepdim=True)
    scales = torch.where(same, 0.0, 1.0 / torch.where(same, 1.0, deviations))
    return scales.expand_as(grouped).reshape(-1)
