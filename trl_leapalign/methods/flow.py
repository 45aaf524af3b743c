"""Interpolants, the one-step leap between two times, and the two gradient primitives. Pure torch.

Times are noise times: `noise_time` of the interpolant (1 for rectified flow) is pure noise, 0 is data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interpolant:
    """The path `x_t = alpha(t) * data + beta(t) * noise` that a flow-matching model was trained on.

    Args:
        alpha (Callable[[float], float]): weight of the data at time t.
        beta (Callable[[float], float]): weight of the noise at time t.
        alpha_dot (Callable[[float], float]): derivative of `alpha`.
        beta_dot (Callable[[float], float]): derivative of `beta`.
        noise_time (float): the time of pure noise; 0 is the time of data.
    """

    alpha: Callable[[float], float]
    beta: Callable[[float], float]
    alpha_dot: Callable[[float], float]
    beta_dot: Callable[[float], float]
    noise_time: float = 1.0


RECTIFIED = Interpolant(
    alpha=lambda t: 1.0 - t,
    beta=lambda t: t,
    alpha_dot=lambda t: -1.0,
    beta_dot=lambda t: 1.0,
)
"""Rectified flow, used by nearly every flow-matching model."""

TRIGFLOW = Interpolant(
    alpha=math.cos,
    beta=math.sin,
    alpha_dot=lambda t: -math.sin(t),
    beta_dot=math.cos,
    noise_time=math.pi / 2,
)
"""TrigFlow (https://huggingface.co/papers/2410.11081), times in radians."""


def leap_weights(from_time: float, to_time: float, interpolant: Interpolant = RECTIFIED) -> tuple[float, float]:
    """Return the factors of latents and velocity in a one-step leap (LeapAlign, Eq. 7).

    Data and noise are predicted from latents and velocity and interpolated again at `to_time`. Multiplied out, so that
    nothing is divided by alpha or beta, which vanish at the two ends; for rectified flow the factors are 1 and
    `to_time - from_time` (Eq. 9).

    Args:
        from_time (float): time in [0, `interpolant.noise_time`].
        to_time (float): time in [0, `interpolant.noise_time`].
        interpolant (Interpolant): the path of the model.

    Returns:
        tuple[float, float]: factor of the latents, factor of the velocity.
    """
    if interpolant is RECTIFIED:
        return 1.0, to_time - from_time
    alpha, beta = interpolant.alpha(from_time), interpolant.beta(from_time)
    alpha_dot, beta_dot = interpolant.alpha_dot(from_time), interpolant.beta_dot(from_time)
    to_alpha, to_beta = interpolant.alpha(to_time), interpolant.beta(to_time)
    determinant = alpha * beta_dot - alpha_dot * beta
    return (to_alpha * beta_dot - to_beta * alpha_dot) / determinant, (to_beta * alpha - to_alpha * beta) / determinant


def leap(
    latents: Tensor, velocity: Tensor, from_time: float, to_time: float, interpolant: Interpolant = RECTIFIED
) -> Tensor:
    """Predict the latents at `to_time` from those at `from_time` in one step, with the factors of `leap_weights`.

    Args:
        latents (Tensor): latents at `from_time`, shape (B, ...).
        velocity (Tensor): d latents / d time at `from_time`, after guidance, same shape.
        from_time (float): time in [0, `interpolant.noise_time`].
        to_time (float): time in [0, `interpolant.noise_time`].
        interpolant (Interpolant): the path of the model.

    Returns:
        Tensor: the predicted latents, same shape, in `promote_types(latents.dtype, float32)`.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    latents_weight, velocity_weight = leap_weights(from_time, to_time, interpolant)
    return latents_weight * latents.to(dtype) + velocity_weight * velocity.to(dtype)


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Tensor) -> Tensor:
        ctx.dtype = path.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.to(ctx.dtype)


def connect(value: Tensor, path: Tensor) -> Tensor:
    """Give `value` the gradient of `path` (the latent connector of LeapAlign, Eq. 8, without its rounding error).

    Args:
        value (Tensor): what the forward pass returns, bit for bit (a copy), shape (B, ...). It gets no gradient.
        path (Tensor): what receives the whole gradient, same shape, any floating dtype.

    Returns:
        Tensor: shape and dtype of `value`.

    Raises:
        ValueError: if the shapes differ.
    """
    if value.shape != path.shape:
        raise ValueError(f"connect() needs a value and a path of one shape, got {value.shape} and {path.shape}.")
    return _Connect.apply(value, path)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def scale_gradient(tensor: Tensor, scale: float) -> Tensor:
    """Multiply the gradient that flows back through `tensor` (gradient discounting, LeapAlign, Eq. 11).

    It is `scale * tensor + (1 - scale) * tensor.detach()` without the rounding error.

    Args:
        tensor (Tensor): returned bit for bit (a copy), any shape.
        scale (float): factor of the gradient; 0 stops it.

    Returns:
        Tensor: shape and dtype of `tensor`.
    """
    return _ScaleGradient.apply(tensor, scale)
