import math

import pytest
import torch

from trl_leapalign.methods.flow import RECTIFIED, TRIGFLOW, Interpolant, connect, leap, scale_gradient

COSINE = Interpolant(
    alpha=lambda t: math.cos(math.pi * t / 2),
    beta=lambda t: math.sin(math.pi * t / 2),
    alpha_dot=lambda t: -math.pi / 2 * math.sin(math.pi * t / 2),
    beta_dot=lambda t: math.pi / 2 * math.cos(math.pi * t / 2),
)
POLYNOMIAL = Interpolant(
    alpha=lambda t: 1 - t**2,
    beta=lambda t: t * (2 - t),
    alpha_dot=lambda t: -2 * t,
    beta_dot=lambda t: 2 - 2 * t,
)
GENERIC_RECTIFIED = Interpolant(
    alpha=lambda t: 1 - t, beta=lambda t: t, alpha_dot=lambda t: -1.0, beta_dot=lambda t: 1.0
)
INTERPOLANTS = {
    "rectified": RECTIFIED,
    "trigflow": TRIGFLOW,
    "cosine": COSINE,
    "polynomial": POLYNOMIAL,
    "generic_rectified": GENERIC_RECTIFIED,
}
FRACTIONS = (0.0, 0.07, 0.31, 0.5, 0.83, 1.0)


@pytest.fixture
def data_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 2, 3, 4, generator=generator, dtype=torch.float64).unbind(0)


def path(interpolant, data, noise, time):
    """Latents and their velocity on the straight-through-data-and-noise path, by the interpolant's definition."""
    latents = interpolant.alpha(time) * data + interpolant.beta(time) * noise
    velocity = interpolant.alpha_dot(time) * data + interpolant.beta_dot(time) * noise
    return latents, velocity


def equation_7(interpolant, latents, velocity, from_time, to_time):
    alpha, beta = interpolant.alpha(from_time), interpolant.beta(from_time)
    alpha_dot, beta_dot = interpolant.alpha_dot(from_time), interpolant.beta_dot(from_time)
    noise_hat = (velocity - alpha_dot * latents / alpha) / (beta_dot - alpha_dot * beta / alpha)
    data_hat = (velocity - beta_dot * latents / beta) / (alpha_dot - beta_dot * alpha / beta)
    return interpolant.alpha(to_time) * data_hat + interpolant.beta(to_time) * noise_hat


@pytest.mark.parametrize("name", INTERPOLANTS)
@pytest.mark.parametrize("start", FRACTIONS)
@pytest.mark.parametrize("end", FRACTIONS)
def test_leap_is_exact_on_the_true_path(name, start, end, data_and_noise):
    interpolant = INTERPOLANTS[name]
    start, end = start * interpolant.noise_time, end * interpolant.noise_time
    latents, velocity = path(interpolant, *data_and_noise, start)
    expected, _ = path(interpolant, *data_and_noise, end)
    torch.testing.assert_close(leap(latents, velocity, start, end, interpolant), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_interpolant_is_consistent(name):
    interpolant = INTERPOLANTS[name]
    ends = [(interpolant.alpha(t), interpolant.beta(t)) for t in (0.0, interpolant.noise_time)]
    assert ends[0] == (1.0, 0.0)
    assert ends[1] == pytest.approx((0.0, 1.0), abs=1e-15)
    for fraction in FRACTIONS:
        time = torch.tensor(fraction * interpolant.noise_time, dtype=torch.float64).item()
        step = 1e-6
        for value, derivative in (
            (interpolant.alpha, interpolant.alpha_dot),
            (interpolant.beta, interpolant.beta_dot),
        ):
            assert derivative(time) == pytest.approx((value(time + step) - value(time - step)) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("name", INTERPOLANTS)
@pytest.mark.parametrize(("start", "end"), [(0.9, 0.2), (0.5, 0.0), (0.1, 1.0), (0.6, 0.6)])
def test_leap_agrees_with_equation_7_for_any_velocity(name, start, end, data_and_noise):
    interpolant = INTERPOLANTS[name]
    latents, velocity = data_and_noise
    start, end = start * interpolant.noise_time, end * interpolant.noise_time
    expected = equation_7(interpolant, latents, velocity, start, end)
    torch.testing.assert_close(leap(latents, velocity, start, end, interpolant), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", FRACTIONS)
@pytest.mark.parametrize("end", FRACTIONS)
def test_rectified_shortcut_is_the_generic_formula(start, end, data_and_noise):
    latents, velocity = data_and_noise
    shortcut = leap(latents, velocity, start, end)
    torch.testing.assert_close(leap(latents, velocity, start, end, GENERIC_RECTIFIED), shortcut, rtol=0, atol=1e-14)
    torch.testing.assert_close(shortcut, latents + (end - start) * velocity, rtol=0, atol=0)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_leap_is_differentiable_in_latents_and_velocity(name, data_and_noise):
    interpolant = INTERPOLANTS[name]
    start, end = 0.7 * interpolant.noise_time, 0.2 * interpolant.noise_time
    inputs = [tensor.clone().requires_grad_(True) for tensor in data_and_noise]
    cotangent = torch.randn(data_and_noise[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad(leap(*inputs, start, end, interpolant), inputs, cotangent)
    expected = torch.autograd.grad(equation_7(interpolant, *inputs, start, end), inputs, cotangent)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", INTERPOLANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leap_of_half_precision_is_computed_in_float32(name, dtype, data_and_noise):
    interpolant = INTERPOLANTS[name]
    latents, velocity = (tensor.to(dtype) for tensor in data_and_noise)
    start, end = 0.93 * interpolant.noise_time, 0.41 * interpolant.noise_time
    result = leap(latents, velocity, start, end, interpolant)
    exact = leap(latents.double(), velocity.double(), start, end, interpolant)
    assert result.dtype == torch.float32
    assert exact.dtype == torch.float64
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("value_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_connect_keeps_the_value_and_moves_the_gradient(value_dtype, path_dtype, data_and_noise):
    value = data_and_noise[0].to(value_dtype).requires_grad_(True)
    path = (1e3 * data_and_noise[1]).to(path_dtype).requires_grad_(True)
    connected = connect(value, path)
    assert connected.dtype == value_dtype
    assert torch.equal(connected, value)
    assert connected.data_ptr() != value.data_ptr()
    cotangent = torch.linspace(-1, 1, value.numel(), dtype=value_dtype).view(value.shape)
    connected.backward(cotangent)
    assert value.grad is None
    assert path.grad.dtype == path_dtype
    assert torch.equal(path.grad, cotangent.to(path_dtype))


def test_connect_returns_a_copy_that_may_be_written_into(data_and_noise):
    value, path = data_and_noise[0].clone(), data_and_noise[1].clone().requires_grad_(True)
    connected = connect(value, path)
    connected[0] *= 3.0
    assert torch.equal(value, data_and_noise[0])
    connected.sum().backward()
    expected = torch.ones_like(value)
    expected[0] = 3.0
    assert torch.equal(path.grad, expected)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 3, 4), (1, 2, 3, 4), (3, 2, 3, 4, 1)])
def test_connect_refuses_shapes_that_would_broadcast(shape, data_and_noise):
    with pytest.raises(ValueError, match="one shape"):
        connect(data_and_noise[0], torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 2.0**60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scale_gradient_keeps_the_value_and_scales_the_gradient(scale, dtype, data_and_noise):
    tensor = data_and_noise[0].to(dtype).requires_grad_(True)
    scaled = scale_gradient(tensor, scale)
    assert scaled.dtype == dtype
    assert torch.equal(scaled, tensor)
    assert scaled.data_ptr() != tensor.data_ptr()
    cotangent = data_and_noise[1].to(dtype)
    scaled.backward(cotangent)
    assert torch.equal(tensor.grad, scale * cotangent)


def test_scale_gradient_is_the_mixture_with_stop_gradient(data_and_noise):
    tensor = data_and_noise[0].clone().requires_grad_(True)
    mixture = 0.3 * tensor + 0.7 * tensor.detach()
    (expected,) = torch.autograd.grad(mixture.sin().sum(), tensor)
    (got,) = torch.autograd.grad(scale_gradient(tensor, 0.3).sin().sum(), tensor)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
