"""The card of trained weights on the Hub."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import nn

from ..markdown import code, escape, literal
from .model_task import ModelTask
from .quantization_note import quantization_note
from .saving import loading_lines

logger = logging.getLogger(__name__)

LOAD_FULL = (
    "pipeline.{name} = type(pipeline.{name}).from_pretrained("
    '{repository}, subfolder="{name}", torch_dtype={dtype}).to(device)'
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CACHED = re.compile(r"models--(?P<user>[\w.-]+?)--(?P<name>[\w.-]+)[/\\]snapshots[/\\]")
"""Where huggingface_hub keeps a repository on this machine."""
IMAGES = "images"
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ kind }} for {{ base }}, trained to raise {{ rewards }} with the method {{ method }} by
[trl_leapalign](https://huggingface.co/papers/2604.15311).
{% if gallery %}
<Gallery />

| prompt | before | after |
|---|---|---|
{% for row in gallery -%}
| {{ row.prompt }} | ![before]({{ row.before }}) | ![after]({{ row.after }}) |
{% endfor %}
Each row has the same noise before and after training.
{% endif %}
## Use

```python
{{ program }}
```
{% if quantized %}
{{ quantized }}
{% endif %}
## Training

| setting | value |
|---|---|
{% for name, value in settings.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}{% if results %}
## Evaluation

| metric | value |
|---|---|
{% for name, value in results.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}{% endif %}
## Citation

```bibtex
@misc{leapalign,
  title = {LeapAlign},
  howpublished = {arXiv:2604.15311},
  year = {2026},
  url = {https://arxiv.org/abs/2604.15311}
}
```
"""


@dataclass(frozen=True)
class BeforeAfter:
    """Images of one prompt with the same noise.

    Args:
        prompt (str): the prompt.
        before (Image.Image): of the base.
        after (Image.Image): with the trained weights.
    """

    prompt: str
    before: Image.Image
    after: Image.Image


@dataclass(frozen=True)
class TrainedModel:
    """What the card tells of a training.

    Args:
        pipeline (DiffusionPipeline): the pipeline that was trained.
        denoisers (dict[str, nn.Module]): its trained components by name.
        full_finetuning (bool): whether all weights were trained rather than an adapter.
        repository (str): id on the Hub, or name of the folder.
        rewards (tuple[str, ...]): names of the rewards.
        method (str): the method with its settings.
        prompt (str): an example prompt.
        tags (tuple[str, ...]): of the trainer.
        call (Mapping[str, Any]): arguments of the pipeline's call beside the prompt.
        inputs (tuple[str, ...]): names of the arguments that came from columns of the prompts.
        settings (Mapping[str, Any]): what the table of settings shows, such as seeds, versions and hardware.
        gallery (Sequence[BeforeAfter]): images of fixed prompts and seeds.
        results (Mapping[str, float]): the last evaluation's metrics by name.
    """

    pipeline: DiffusionPipeline
    denoisers: dict[str, nn.Module]
    full_finetuning: bool
    repository: str
    rewards: tuple[str, ...]
    method: str
    prompt: str
    tags: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    gallery: Sequence[BeforeAfter] = ()
    results: Mapping[str, float] = field(default_factory=dict)

    @property
    def task(self) -> ModelTask:
        """What the pipeline makes of what."""
        return ModelTask.of(self.pipeline, [*self.call, *self.inputs])


def write_model_card(
    trained: TrainedModel,
    directory: Path,
    *,
    language: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | list[str] | None = None,
) -> None:
    """Write `README.md` with what was trained from what, how to load it, and the metadata that the Hub's pages go by.

    Images of `trained.gallery` go into the folder `images` beside it.

    Args:
        trained (TrainedModel): what was trained, and how.
        directory (Path): the folder to write into.
        language (str | None): of the prompts.
        license (str | None): of the weights, as the Hub abbreviates it. None is "other" with a `license_name`, else the
            licence of the base, if its card can be read here.
        license_name (str | None): what a licence is called that the Hub has no abbreviation for, such as
            "flux-1-dev-non-commercial-license".
        license_link (str | None): where that one is found.
        tags (str | list[str] | None): besides the usual ones.
        model_name (str | None): heading; None is the repository's name.
        finetuned_from (str | None): the base model; None is where the pipeline was loaded from.
        dataset (str | list[str] | None): ids of the prompts' datasets on the Hub.

    Raises:
        ValueError: if the licence is named but not "other", or the card that was written is not what was meant.
    """
    base = finetuned_from or getattr(trained.pipeline.config, "_name_or_path", None)
    base_id = hub_id(base)
    licence = _licence(license, license_name, license_link) or base_licence(base)
    lora = not trained.full_finetuning
    tag = trained.task.pipeline_tag
    own = [tags] if isinstance(tags, str) else list(tags or [])
    own += [tag, "diffusers", "diffusers-training", *(["lora", "template:sd-lora"] if lora else []), *trained.tags]
    gallery = [_save(each, number, directory) for number, each in enumerate(trained.gallery)]
    widget = [
        {"text": each.prompt, "output": {"url": row["after"]}}
        for each, row in zip(trained.gallery, gallery, strict=True)
    ]
    name = model_name or trained.repository
    card_data = ModelCardData(
        language=language,
        datasets=dataset,
        library_name="diffusers",
        pipeline_tag=tag,
        base_model=base_id,
        **({"base_model_relation": "adapter" if lora else "finetune"} if base_id else {}),
        tags=sorted(set(own)),
        **licence,
        **({"widget": widget} if widget else {}),
        **_evaluation(trained, tag, name),
    )
    known = base_id or (Path(base).name if base else type(trained.pipeline).__name__)
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        name=escape(name),
        kind="LoRA adapter" if lora else "Weights",
        base=code(known),
        program=_program(trained, known),
        rewards=", ".join(map(code, trained.rewards)),
        method=code(trained.method),
        gallery=gallery,
        quantized=quantization_note(trained.denoisers),
        settings={escape(key): code(value) for key, value in trained.settings.items()},
        results={code(key): f"{value:.4g}" for key, value in trained.results.items()},
    )
    card.save(directory / "README.md")
    _check_written(card, directory)


def hub_id(base: str | None) -> str | None:
    """The id of a base model on the Hub, also of one that was loaded from the cache's folder; None if it has none."""
    if not base:
        return None
    cached = CACHED.search(f"{base}/")
    if cached is not None:
        return f"{cached['user']}/{cached['name']}"
    return base if HUB_ID.fullmatch(base) and not Path(base).exists() else None


def base_licence(base: str | None) -> dict[str, str]:
    """The licence of a base model by its card.

    Args:
        base (str | None): folder or id of the base.

    Returns:
        dict[str, str]: "license", "license_name" and "license_link" as far as they are there; nothing if the base has
            no card, or it cannot be read, as without a network.
    """
    local = Path(base, "README.md") if base and Path(base).is_dir() else None
    source = str(local) if local is not None and local.is_file() else hub_id(base)
    if source is None:
        return {}
    try:
        data = ModelCard.load(source, ignore_metadata_errors=True).data
    except (OSError, ValueError, HfHubHTTPError) as error:
        logger.info("The card says no licence, since that of %s cannot be read: %s", base, error)
        return {}
    found = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if value}


def _licence(license: str | None, name: str | None, link: str | None) -> dict[str, str]:
    if (name or link) and license not in (None, "other"):
        raise ValueError(
            f"license={license!r} is one that the Hub knows, so license_name={name!r} and license_link={link!r} have "
            "no effect. Leave them out, or set license='other'."
        )
    license = license or ("other" if name or link else None)
    given = {"license": license, "license_name": name, "license_link": link}
    return {key: value for key, value in given.items() if value}


def _program(trained: TrainedModel, base: str) -> str:
    """Python that loads the base and the trained weights, and calls the pipeline as in training."""
    parts = [module for module in trained.pipeline.components.values() if isinstance(module, nn.Module)]
    dtypes = {parameter.dtype for module in parts for parameter in module.parameters() if parameter.is_floating_point()}
    dtype = str(
        torch.bfloat16 if torch.bfloat16 in dtypes else torch.float16 if torch.float16 in dtypes else torch.float32
    )
    if trained.full_finetuning:
        repository = literal(trained.repository)
        load = [LOAD_FULL.format(repository=repository, name=name, dtype=dtype) for name in trained.denoisers]
    else:
        load = loading_lines(trained.pipeline, trained.denoisers, trained.repository)
    loading = [
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"pipeline = DiffusionPipeline.from_pretrained({literal(base)}, torch_dtype={dtype}).to(device)",
        *load,
    ]
    return trained.task.program(loading, trained.prompt, dict(trained.call))


def _save(sample: BeforeAfter, number: int, directory: Path) -> dict[str, str]:
    """Write a pair of images; where they are, for the card's table."""
    (directory / IMAGES).mkdir(parents=True, exist_ok=True)
    row = {"prompt": escape(sample.prompt)}
    for name, image in (("before", sample.before), ("after", sample.after)):
        row[name] = f"{IMAGES}/{name}_{number}.png"
        image.save(directory / row[name])
    return row


def _evaluation(trained: TrainedModel, task: str, name: str) -> dict[str, Any]:
    """The card's metadata for the last evaluation."""
    results = [
        EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name="prompts of the evaluation",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in trained.results.items()
    ]
    return {"eval_results": results, "model_name": name} if results else {}


def _check_written(card: ModelCard, directory: Path) -> None:
    """Read a card back, as the Hub will."""
    found = ModelCard.load(directory / "README.md")
    missing = [each["output"]["url"] for each in found.data.get("widget") or []]
    missing = [name for name in missing if not (directory / name).is_file()]
    if found.data.to_dict() != card.data.to_dict() or missing:
        raise ValueError(
            f"{directory / 'README.md'} does not say what was meant: {missing or found.data.to_dict()}. The Hub would "
            "read it so too. Choose plainer names for the model and its tags."
        )
