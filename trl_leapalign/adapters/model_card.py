"""The card of trained weights on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from .quantization_note import quantization_note
from .saving import loading_lines

if TYPE_CHECKING:
    from ..leapalign_trainer import LeapAlignTrainer

LOAD_FULL = 'pipeline.{name} = type(pipeline.{name}).from_pretrained("{repository}", subfolder="{name}")'
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ kind }} for `{{ base }}`, trained to raise {{ rewards }} by
`trl_leapalign` ([LeapAlign](https://huggingface.co/papers/2604.15311)) with the method `{{ method }}`.
{% if quantization %}
{{ quantization }}
{% endif %}
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{{ base }}")
{{ load }}
image = pipeline("{{ prompt }}").images[0]
```
"""


def write_model_card(
    trainer: "LeapAlignTrainer",
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
        trainer (LeapAlignTrainer): the trainer of the weights.
        directory (Path): the folder to write into.
        language (str | None): of the prompts.
        license (str | None): of the weights.
        tags (str | list[str] | None): besides the usual ones.
        model_name (str | None): heading; None is the repository's name.
        finetuned_from (str | None): the base model; None is where the pipeline was loaded from.
        dataset (str | list[str] | None): ids of the prompts' datasets on the Hub.
    """
    base = finetuned_from or getattr(trainer.pipeline.config, "_name_or_path", None)
    on_hub = bool(base) and not Path(base).exists()
    repository = trainer.hub_model_id or directory.name
    lora = not trainer.args.full_finetuning
    if lora:
        load = loading_lines(trainer.pipeline, trainer.denoisers, repository)
    else:
        load = [LOAD_FULL.format(repository=repository, name=name) for name in trainer.denoisers]
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    tags += ["text-to-image", "diffusers", "diffusers-training", *(["lora"] if lora else []), *trainer._tag_names]
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
        name=model_name or repository,
        kind="LoRA adapter" if lora else "Weights",
        base=base or type(trainer.pipeline).__name__,
        rewards=", ".join(f"`{reward}`" for reward in trainer.rewards.names),
        method=repr(trainer.rollout_model.method),
        quantization=quantization_note(trainer.denoisers),
        load="\n".join(load),
        prompt=trainer.train_dataset[0]["prompt"].replace('"', "'"),
    )
    card.save(directory / "README.md")
