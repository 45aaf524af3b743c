"""Runs the user's own pipeline with gradients where a method wants them.

The pipeline's `__call__` runs as it is, without its `no_grad` decorator. What the method needs is threaded through the
scheduler: the real step is taken on detached values, the method decides what graph the next latents carry, and gradient
mode is switched between steps.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..methods.base import Method
from .instruments import instrumented, without_no_grad
from .pipelines import (
    check_call_arguments,
    check_pipeline,
)
from .recorder import Recorder, RolloutOutput, StartsLater
from .validation import own_generator

OUTPUT_TYPES = ("pt", "latent")


def run_rollout(
    pipeline: DiffusionPipeline,
    method: Method,
    *,
    method_generator: torch.Generator | None = None,
    differentiate_output: bool = True,
    **pipeline_kwargs: Any,
) -> RolloutOutput:
    """Call a pipeline so that its output carries the gradient that a method defines.

    Values are those of `pipeline(**pipeline_kwargs)` bit for bit, the random state included, for every method that
    rewards the sampler's own result. The pipeline is left as a plain call leaves it, also after an exception.

    Args:
        pipeline (DiffusionPipeline): any pipeline with a flow-matching scheduler, on its device but for encoders.
        method (Method): decides which steps run with gradients and how these reach the output.
        method_generator (torch.Generator | None): source of the method's choices; None draws fresh entropy.
        differentiate_output (bool): whether the images carry the graph; else only `RolloutOutput.latents` does, and
            decoding runs without gradients.
        **pipeline_kwargs: arguments of the pipeline's call, untouched; `output_type` is "pt" (default) or "latent".

    Returns:
        RolloutOutput: images with graph, loss weights, active steps and metrics.

    Raises:
        TypeError: if an argument is of the wrong kind, or unknown to the pipeline's call.
        ValueError: if the pipeline cannot be differentiated, or has too few steps for the method.
        RuntimeError: if gradients cannot be recorded, the pipeline loses them, or it is in a rollout already.
    """
    check_pipeline(pipeline)
    check_call_arguments(pipeline, pipeline_kwargs)
    _check_kinds(method, method_generator, pipeline_kwargs.get("generator"))
    call_kwargs = {"output_type": "pt", **pipeline_kwargs, "return_dict": False}
    if call_kwargs["output_type"] not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type={call_kwargs['output_type']!r} is not differentiable; choose one of {OUTPUT_TYPES}."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "run_rollout() was called under torch.inference_mode(), where no gradient can be recorded. "
            "Leave inference mode, or call the pipeline itself if you need no gradient."
        )
    if method_generator is None:
        method_generator = torch.Generator()
        method_generator.seed()
    method_generator = own_generator(method_generator)
    states = _RandomStates(method_generator, call_kwargs.get("generator"))
    first_index = 0
    tried = {first_index}
    while True:
        recorder = Recorder(method, method_generator, call_kwargs.get("generator"), first_index, differentiate_output)
        try:
            with instrumented(pipeline, recorder), torch.no_grad():
                output = without_no_grad(type(pipeline).__call__)(pipeline, **call_kwargs)
            break
        except StartsLater as start:
            if start.index in tried:
                raise ValueError(
                    f"{type(pipeline).__name__} runs several sampling loops that begin at different steps without "
                    "calling scheduler.set_begin_index(), so their steps are not known beforehand."
                ) from None
            first_index = start.index
            tried.add(first_index)
            states.restore()
        except RuntimeError as error:
            if "Can't call numpy() on Tensor that requires grad" not in str(error):
                raise
            raise RuntimeError(
                f"{type(pipeline).__name__} turns its output into a numpy array (for a safety checker or a watermark), "
                "where the gradient ends. Leave that part out if the pipeline runs without it. Where it does not, "
                "run_rollout(..., output_type='latent') works in a loop of your own, which decodes the latents itself; "
                "the trainer takes the pipeline's images."
            ) from error
    return recorder.collect(output[0], pipeline)


def _check_kinds(method: Any, method_generator: Any, generator: Any) -> None:
    if not isinstance(method, Method):
        raise TypeError(f"method must be an instance of a method, such as LeapAlign(), but got {method!r}.")
    generators = {"method_generator": [method_generator], "generator": generator}
    for name, values in generators.items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None and not isinstance(value, torch.Generator):
                raise TypeError(f"{name}={value!r} is no torch.Generator. Make one: torch.Generator().manual_seed(3).")


class _RandomStates:
    """Random states at the start of a rollout, to start it again."""

    def __init__(self, method_generator: torch.Generator, generator: torch.Generator | list[torch.Generator] | None):
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        self.generators = [(g, g.get_state()) for g in (method_generator, *generators) if g is not None]
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        for generator, state in self.generators:
            generator.set_state(state)
        torch.set_rng_state(self.cpu)
        torch.cuda.set_rng_state_all(self.cuda)
