"""What a pipeline consists of."""

from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

DENOISER_PREFIXES = ("transformer", "unet")
"""What the names of components begin with that predict the velocity."""


def components_of(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The components of a pipeline by name; also those with a default, which `pipeline.components` leaves out."""
    registered = {name: getattr(pipeline, name, None) for name in pipeline.config if not name.startswith("_")}
    return {**registered, **pipeline.components}


def pipelines_of(pipeline: DiffusionPipeline) -> list[DiffusionPipeline]:
    """The pipeline and those among its components."""
    parts = [pipeline]
    for component in components_of(pipeline).values():
        if isinstance(component, DiffusionPipeline):
            parts += pipelines_of(component)
    return parts


def schedulers_of(pipeline: DiffusionPipeline) -> list[SchedulerMixin]:
    """The schedulers of a pipeline and of those among its components, each once."""
    components = [component for part in pipelines_of(pipeline) for component in components_of(part).values()]
    return list({id(c): c for c in components if isinstance(c, SchedulerMixin)}.values())


def modules_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The modules of a pipeline and of those among its components, by name."""
    return {
        name: component
        for part in pipelines_of(pipeline)
        for name, component in components_of(part).items()
        if isinstance(component, nn.Module)
    }
