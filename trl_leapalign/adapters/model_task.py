"""What a pipeline makes of what: the Hub's name for its task, and the program that calls it."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from ..markdown import literal
from ..prompts.arguments import call_parameters

OUTPUTS = {"frames": "video", "audios": "audio", "images": "image"}
"""What the fields of diffusers' output classes hold."""
FIELDS = {kind: field for field, kind in OUTPUTS.items()}
MEDIA = re.compile(r"(?!num_)(\w+_)?(?P<kind>image|video)s?")
"""Arguments of a call that take pictures or videos, such as `image`, `mask_image` or `control_video`."""
LOADERS = {"image": "load_image", "video": "load_video"}
SUFFIXES = {"image": ".png", "video": ".mp4"}
PICTURES = {"output_type": '"pil"'}
SAVED = {
    "image": ('output.save("output.png")', None),
    "video": ('export_to_gif(output, "output.gif")', "export_to_gif"),
    "audio": (None, None),
}


@dataclass(frozen=True)
class ModelTask:
    """What a pipeline makes of what.

    Args:
        output (str): "image", "video" or "audio".
        media (tuple[str, ...]): names of the arguments of its call that take pictures or videos.
    """

    output: str
    media: tuple[str, ...] = ()

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, given: Iterable[str]) -> "ModelTask":
        """Find it.

        Args:
            pipeline (DiffusionPipeline): the pipeline.
            given (Iterable[str]): names of the arguments that it was called with.

        Returns:
            ModelTask: by the class of the pipeline's output and the arguments.
        """
        return cls(_output(pipeline), tuple(sorted(name for name in given if MEDIA.fullmatch(name))))

    @property
    def pipeline_tag(self) -> str:
        """The Hub's name for it, such as "text-to-image", "image-to-image" or "image-to-video"."""
        kinds = {MEDIA.fullmatch(name)["kind"] for name in self.media}
        source = "video" if "video" in kinds else "image" if "image" in kinds else "text"
        return f"{source}-to-{self.output}" if self.output != "audio" else "text-to-audio"

    def program(self, loading: list[str], prompt: str, call: dict[str, Any]) -> str:
        """Write a program that loads the pipeline, calls it and saves what it makes.

        Args:
            loading (list[str]): lines after which there is a `pipeline`; those that import come first.
            prompt (str): the prompt.
            call (dict[str, Any]): other arguments of the call; those that are no numbers and no texts are left out.

        Returns:
            str: Python code.
        """
        saved, saver = SAVED[self.output]
        media = {name: MEDIA.fullmatch(name)["kind"] for name in self.media}
        helpers = sorted({LOADERS[kind] for kind in media.values()} | ({saver} if saver else set()))
        plain = {name: _plain(value) for name, value in call.items() if name not in media and name != "prompt"}
        plain |= PICTURES if self.output == "video" else {}
        arguments = [
            f"prompt={literal(prompt)}",
            *(f'{name}={LOADERS[kind]}("{name}{SUFFIXES[kind]}")' for name, kind in media.items()),
            *(f"{name}={value}" for name, value in plain.items() if value is not None),
        ]
        imports = [line for line in loading if line.startswith(("import ", "from "))]
        lines = [
            "import torch",
            "from diffusers import DiffusionPipeline",
            *([f"from diffusers.utils import {', '.join(helpers)}"] if helpers else []),
            *imports,
            "",
            *(line for line in loading if line not in imports),
            "output = pipeline(",
            *(f"    {argument}," for argument in arguments),
            f").{FIELDS[self.output]}[0]",
            *([saved] if saved else []),
        ]
        return "\n".join(lines)


def _output(pipeline: DiffusionPipeline) -> str:
    """By the fields of the output class beside the pipeline's call; by the call's arguments where there is none."""
    for owner in type(pipeline).__mro__:
        names = set()
        for value in vars(sys.modules[owner.__module__]).values() if "__call__" in vars(owner) else ():
            if isinstance(value, type) and issubclass(value, BaseOutput) and is_dataclass(value):
                names |= {field.name for field in fields(value)}
        for field, kind in OUTPUTS.items():
            if field in names:
                return kind
    return "video" if "num_frames" in call_parameters(pipeline) else "image"


def _plain(value: Any) -> str | None:
    """A number or a text as code; None for all else."""
    if isinstance(value, str):
        return literal(value)
    return repr(value) if isinstance(value, (bool, int, float)) else None
