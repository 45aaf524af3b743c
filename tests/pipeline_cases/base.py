"""What the matrix of pipelines consists of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class PipelineCase:
    """A tiny pipeline of a real class, and how it is called.

    Args:
        family (str): the model family, such as "flux" or "wan".
        task (str): "text to image", "text to video", "image to image", "edit", "inpaint", "control", "image to video",
            "audio", ...
        build (Callable[[], DiffusionPipeline]): makes the pipeline with seeded random weights, frozen.
        inputs (Callable[[], dict]): arguments of its call for a batch of one, with the prompt, the number of steps, the
            smallest sizes that work and a generator of their own each time.
        checkpointing (str): why gradient checkpointing cannot be used; "" where it can.
        unsupported (str): why it cannot be trained at all, as a part of the message that refuses it; "" where it can.
        name (str): the pipeline's class; "" is the one that `build` is annotated to return.
        fast (bool): whether it is one of the few that every run of the tests tries.
    """

    family: str
    task: str
    build: Callable[[], DiffusionPipeline]
    inputs: Callable[[], dict[str, Any]]
    checkpointing: str = ""
    unsupported: str = ""
    name: str = ""
    fast: bool = False

    def __str__(self) -> str:
        return self.name or get_type_hints(self.build)["return"].__name__
