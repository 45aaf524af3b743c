"""The images that evaluators judge: numbered, with noise of their own, in files."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..adapters.loading import AdapterFiles, find_adapter, load_adapter
from ..media import as_text, read_samples, save_sample
from ..prompts.columns import COPIES, CallColumns
from ..prompts.sources import split_row
from ..ranges import Range
from ..rollout.calls import sample_images
from ..rollout.pipelines import check_call_arguments, load_pipeline, modules_of, quiet
from .identity import identify_source

PipelineSource: TypeAlias = DiffusionPipeline | str | Path | Callable[[], DiffusionPipeline]

RESERVED = {
    "prompt": "prompts",
    "generator": "seed",
    "latents": "seed",
    **dict.fromkeys(COPIES, "images_per_prompt"),
    "output_type": None,
    "return_dict": None,
}
"""Arguments of the pipeline's call that an evaluation makes itself, and the setting to use in their place."""


@dataclass(frozen=True)
class Generation:
    """Which images are made, and where they are kept.

    Image k of the prompt in row p has the number `p * images_per_prompt + k`, which its noise follows from.

    Args:
        source (PipelineSource): a pipeline, its Hub id or path, or a function that returns one.
        rows (Sequence[dict]): prompts and their metadata.
        directory (Path): where the images go.
        adapter (str | Path | None): LoRA to load into the pipeline.
        images_per_prompt (int): how many images each row gets.
        seed (int): of the noise.
        batch_size (int): images sampled or judged at a time.
        call_kwargs (dict[str, Any]): arguments of the pipeline's call.
        prompt_column (str): the column that holds the prompt.
        pipeline_columns (dict[str, str] | None): by argument of the call, the column that it comes from; None takes
            columns of images and texts that are called like an argument.
        adapter_kwargs (dict[str, str]): "revision", "subfolder" and "weight_name" of the adapter.

    Raises:
        ValueError: if a setting is out of range, there are no prompts, or `call_kwargs` has what is set otherwise.
    """

    source: PipelineSource
    rows: Sequence[dict[str, Any]]
    directory: Path
    adapter: str | Path | None = None
    images_per_prompt: int = 4
    seed: int = 0
    batch_size: int = 1
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_column: str = "prompt"
    pipeline_columns: dict[str, str] | None = None
    adapter_kwargs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        Range(1, whole=True).check("images_per_prompt", self.images_per_prompt)
        Range(0, whole=True).check("seed", self.seed)
        Range(1, whole=True).check("batch_size", self.batch_size)
        for name in self.call_kwargs.keys() & RESERVED:
            remedy = f"Set {RESERVED[name]} instead." if RESERVED[name] else "Leave it out."
            raise ValueError(f"call_kwargs has {name!r}, which the evaluation sets itself. {remedy}")
        for name in ("num_inference_steps", "height", "width"):
            if self.call_kwargs.get(name) is not None:
                Range(1, whole=True).check(name, self.call_kwargs[name])
        if self.call_kwargs.get("guidance_scale") is not None:
            Range().check("guidance_scale", self.call_kwargs["guidance_scale"])
        if self.adapter is not None and isinstance(self.source, DiffusionPipeline):
            raise ValueError(
                "adapter is for a pipeline given by name or as a function that returns it. Load it yourself: "
                f"pipeline.load_lora_weights({str(self.adapter)!r})."
            )

    def __len__(self) -> int:
        return len(self.rows) * self.images_per_prompt

    def row(self, number: int) -> tuple[str, dict[str, Any]]:
        """Prompt and metadata of an image."""
        return split_row(self.rows[number // self.images_per_prompt], self.prompt_column)

    def path(self, number: int) -> Path:
        """File of an image."""
        return self.directory / f"{number:05d}.png"

    def missing(self) -> list[int]:
        """Numbers of the images that are not there."""
        return [number for number in range(len(self)) if not self.path(number).exists()]

    @cached_property
    def adapter_files(self) -> AdapterFiles | None:
        """The adapter's files; those of a repository on the Hub are downloaded when this is first asked for."""
        return None if self.adapter is None else find_adapter(self.adapter, **self.adapter_kwargs)

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """What the images depend on and can be known before the pipeline is loaded."""
        split = [split_row(row, self.prompt_column) for row in self.rows]
        text = json.dumps(split, sort_keys=True, default=as_text)
        columns = {} if self.pipeline_columns is None else {"pipeline_columns": self.pipeline_columns}
        return {
            "pipeline": describe(self.source),
            "pipeline_files": identify_source(self.source) if isinstance(self.source, (str, Path)) else None,
            "adapter": None if self.adapter is None else str(self.adapter),
            "adapter_sha256": None if self.adapter_files is None else self.adapter_files.digest(),
            "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "num_prompts": len(self.rows),
            "images_per_prompt": self.images_per_prompt,
            "seed": self.seed,
            "call_kwargs": self.call_kwargs,
            "device": PartialState().device.type,
            **columns,
        }

    def load(self) -> DiffusionPipeline:
        """Load the pipeline and its adapter, and check that it can be called as it will be.

        Returns:
            DiffusionPipeline: on this process's device, unless it was given loaded or is offloaded.

        Raises:
            TypeError: if there is no pipeline, or it cannot be called with `call_kwargs`.
            ValueError: if the adapter is missing or does not fit.
        """
        pipeline = self.source
        if isinstance(pipeline, (str, Path)):
            pipeline = load_pipeline(pipeline, process_device(), {})
        elif not isinstance(pipeline, DiffusionPipeline):
            pipeline = pipeline()
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(
                f"{describe(self.source)} is or returned a {type(pipeline).__name__}, but must be a diffusers pipeline "
                "or return one."
            )
        check_call_arguments(pipeline, self.call_kwargs)
        if self.adapter is not None:
            load_adapter(pipeline, self.adapter_files)
        given = isinstance(self.source, DiffusionPipeline) or getattr(pipeline, "hf_device_map", None) is not None
        offloaded = any(getattr(module, "_hf_hook", None) is not None for module in modules_of(pipeline).values())
        return pipeline if given or offloaded else pipeline.to(process_device())

    def sample(self, pipeline: DiffusionPipeline, numbers: Sequence[int]) -> None:
        """Make images; all processes share the work.

        Args:
            pipeline (DiffusionPipeline): what `load` returned.
            numbers (Sequence[int]): of the images.

        Raises:
            TypeError: if its call takes no such argument as a column is for, or needs one that is not given.
            ValueError: if it gives no images, another number of them, or NaN; if its solver draws noise of its own,
                which would follow from the batch; or if prompts lack what goes into the call.
        """
        state = PartialState()
        mine = numbers[state.process_index :: state.num_processes]
        self.directory.mkdir(parents=True, exist_ok=True)
        options = (self.pipeline_columns, self.rows, self.call_kwargs, self.prompt_column)
        columns = CallColumns.of(pipeline, *options)
        with quiet(pipeline):
            for begin in range(0, len(mine), self.batch_size):
                batch = list(mine[begin : begin + self.batch_size])
                prompts, metadata = (list(each) for each in zip(*map(self.row, batch), strict=True))
                inputs = {"independent": True, "columns": columns, "metadata": metadata}
                images = sample_images(pipeline, prompts, batch, self.call_kwargs, self.seed, **inputs)
                for number, image in zip(batch, images, strict=True):
                    save_sample(image, self.path(number))
        state.wait_for_everyone()

    def read(self, numbers: Sequence[int]) -> torch.Tensor:
        """Read images from their files.

        Args:
            numbers (Sequence[int]): of the images, length B.

        Returns:
            Tensor: shape (B, 3, H, W), or (B, F, 3, H, W) for video, in [0, 1], float32.
        """
        return read_samples([self.path(number) for number in numbers])


def process_device() -> torch.device:
    """The device of this process, without the index that accelerate gives the CPU of several.

    Moving weights to "cpu:0" would copy them to other addresses, by which sums are rounded differently.
    """
    device = PartialState().device
    return torch.device("cpu") if device.type == "cpu" else device


def describe(source: Any) -> str:
    """What a pipeline is called in the settings that are kept."""
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, DiffusionPipeline):
        return f"{type(source).__name__} {getattr(source.config, '_name_or_path', None) or ''}".strip()
    return f"{getattr(source, '__module__', '')}:{getattr(source, '__qualname__', type(source).__qualname__)}"
