"""The card of trained weights on the Hub."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from ..markdown import code, escape, literal
from .quantization_note import quantization_note
from .saving import loading_lines

LOAD_FULL = 'pipeline.{name} = type(pipeline.{name}).from_pretrained({repository}, subfolder="{name}")'
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ kind }} for {{ base }}, trained to raise {{ rewards }} by
`trl_leapalign` ([LeapAlign](https://huggingface.co/papers/2604.15311)) with the method {{ method }}.
{% if quantization %}
{{ quantization }}
{% endif %}
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({{ source }})
{{ load }}
image = pipeline({{ prompt }}).images[0]
```
"""


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
    """

    pipeline: DiffusionPipeline
    denoisers: dict[str, nn.Module]
    full_finetuning: bool
    repository: str
    rewards: tuple[str, ...]
    method: str
    prompt: str
    tags: tuple[str, ...] = ()


def write_model_card(
    trained: TrainedModel,
    directory: Path,
    *,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | list[str] | None = None,
) -> None:
    """Write `README.md` with what was trained from what, how to load it, and the tags that the Hub's pages go by.

    Args:
        trained (TrainedModel): what was trained, and how.
        directory (Path): the folder to write into.
        language (str | None): of the prompts.
        license (str | None): of the weights.
        tags (str | list[str] | None): besides the usual ones.
        model_name (str | None): heading; None is the repository's name.
        finetuned_from (str | None): the base model; None is where the pipeline was loaded from.
        dataset (str | list[str] | None): ids of the prompts' datasets on the Hub.
    """
    base = finetuned_from or getattr(trained.pipeline.config, "_name_or_path", None)
    on_hub = bool(base) and not Path(base).exists()
    repository = trained.repository
    lora = not trained.full_finetuning
    if lora:
        load = loading_lines(trained.pipeline, trained.denoisers, repository)
    else:
        load = [LOAD_FULL.format(repository=literal(repository), name=name) for name in trained.denoisers]
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    tags += ["text-to-image", "diffusers", "diffusers-training", *(["lora"] if lora else []), *trained.tags]
    card_data = ModelCardData(
        language=language,
        license=license,
        datasets=dataset,
        library_name="diffusers",
        base_model=base if on_hub else None,
        tags=sorted(set(tags)),
    )
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        name=escape(model_name or repository),
        kind="LoRA adapter" if lora else "Weights",
        base=code(base or type(trained.pipeline).__name__),
        source=literal(base or type(trained.pipeline).__name__),
        rewards=", ".join(map(code, trained.rewards)),
        method=code(trained.method),
        quantization=quantization_note(trained.denoisers),
        load="\n".join(load),
        prompt=literal(trained.prompt),
    )
    card.save(directory / "README.md")
