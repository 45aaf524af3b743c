"""What a plain run of a pipeline did, so that formulas can be written with denoiser calls of their own."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rollout_cases import Case, seeded, trained_parameters
from torch import Tensor

GLOBAL_SEED = 9  # stochastic Euler and LCM draw from the global generator


@dataclass
class Recording:
    """What a plain run of a pipeline did."""

    case: Case
    pipeline: DiffusionPipeline
    latents: list[Tensor]  # what entered each step, then the clean latents
    calls: list[list[dict[str, Any]]]  # arguments of each step's denoiser calls
    sigmas: list[float]  # of each step, then the last
    height: int = 16
    width: int = 16

    def velocity(self, step: int, latents: Tensor) -> Tensor:
        """The guided velocity, with the graph."""
        denoiser = self.pipeline.transformer
        if self.case.family == "sd3" and self.case.guided:
            (arguments,) = self.calls[step]
            doubled = torch.cat([latents, latents])
            without, conditional = denoiser(**{**arguments, "hidden_states": doubled})[0].chunk(2)
            return without + 4.0 * (conditional - without)
        conditional, *without = [denoiser(**{**kwargs, "hidden_states": latents})[0] for kwargs in self.calls[step]]
        return without[0] + 2.0 * (conditional - without[0]) if without else conditional

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        if self.case.family == "flux":
            latents = self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1)


@cache
@torch.no_grad()
def record(case: Case, num_steps: int) -> Recording:
    pipeline = case.pipeline()
    calls: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    torch.manual_seed(GLOBAL_SEED)
    end = pipeline(**case.inputs(num_steps), output_type="latent", return_dict=False)[0]
    hook.remove()
    per_step = 2 if case.family == "flux" and case.guided else 1
    grouped = [calls[first : first + per_step] for first in range(0, len(calls), per_step)]
    latents = [group[0]["hidden_states"][: end.shape[0]].clone() for group in grouped]
    sigmas = pipeline.scheduler.sigmas.tolist()[-len(grouped) - 1 :]
    return Recording(case, pipeline, [*latents, end], grouped, sigmas)


def gradients(pipeline: DiffusionPipeline, output: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed, uneven functional of the output."""
    pipeline.transformer.zero_grad()
    cotangent = torch.randn(output.shape, generator=seeded(4), dtype=output.dtype)
    (output * cotangent).sum().backward()
    return {name: value.grad for name, value in trained_parameters(pipeline).items() if value.grad is not None}


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Relative error over all parameters, and the largest of one parameter where that is not tiny itself."""
    assert got.keys() == expected.keys()
    norms = {name: value.norm().item() for name, value in expected.items()}
    differences = {name: (got[name] - expected[name]).norm().item() for name in expected}
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total > 1e-3
    each = [differences[name] / norm for name, norm in norms.items() if norm > 1e-6 * total]
    assert len(each) > len(norms) / 2
    return sum(difference**2 for difference in differences.values()) ** 0.5 / total, max(each)
