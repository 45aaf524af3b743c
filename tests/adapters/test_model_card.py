"""What the card says, and that its program runs and gives the trainer's images."""

from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from pipeline_cases import CASES
from pipeline_cases.video_wan import CASES as WAN
from training_cases import PROMPTS, make_trainer

from examples.tiny import tiny_flux
from trl_leapalign.adapters.model_card import base_licence, hub_id
from trl_leapalign.adapters.model_task import ModelTask
from trl_leapalign.rollout.calls import sample_images
from trl_leapalign.rollout.quantization import Quantization, quantize_pipeline

SOURCES = {
    "text to image": "text-to-image",
    "text to video": "text-to-video",
    "image to video": "image-to-video",
    "video to video": "video-to-video",
    "image to image": "image-to-image",
    "inpaint": "image-to-image",
    "audio": "text-to-audio",
    "text to video with audio": "text-to-video",
}
FLUX_LICENCE = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}


def read(trainer) -> ModelCard:
    return ModelCard.load(Path(trainer.args.output_dir, "README.md"))


def program(card: ModelCard) -> str:
    [text] = [part.split("```")[0] for part in card.text.split("```python")[1:]]
    return text


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("task", SOURCES)
def test_every_pipeline_of_a_task_has_its_tag(task):
    given = {"image to video": ["image"], "video to video": ["video"], "inpaint": ["image", "mask_image"]}
    given["image to image"] = ["image", "num_images_per_prompt", "image_guidance_scale"]
    names = {str(case) for case in CASES if case.task == task and not case.unsupported}
    names = {name for name in names if hasattr(diffusers, name)}
    assert names
    for name in names:
        pipeline = object.__new__(getattr(diffusers, name))
        assert ModelTask.of(pipeline, given.get(task, ["negative_prompt", "num_frames"])).pipeline_tag == SOURCES[task]


def test_the_program_passes_the_pictures_that_were_trained_with():
    task = ModelTask("image", ("image", "mask_image"))
    written = task.program(["pipeline = make()"], "a cat", {"strength": 0.5, "sigmas": [1.0], "image": object()})
    assert 'image=load_image("image.png"),' in written and 'mask_image=load_image("mask_image.png"),' in written
    assert (
        "strength=0.5," in written and "sigmas" not in written and "from diffusers.utils import load_image\n" in written
    )


def test_the_program_makes_the_trainers_image(tmp_path, monkeypatch):
    tiny_flux().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "base"), sample_guidance_scale=2.0)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    written = program(read(trainer))
    assert "torch_dtype=torch.float32" in written and 'weight_name="pytorch_lora_weights.safetensors"' in written
    assert str(tmp_path) not in str(read(trainer))
    monkeypatch.chdir(tmp_path)
    exec(written.replace("output = ", "torch.manual_seed(1)\noutput = "), {})
    torch.manual_seed(1)
    [expected] = trainer.pipeline(prompt=trainer.train_dataset[0]["prompt"], **trainer.args.call_kwargs()).images
    assert Image.open(tmp_path / "output.png").tobytes() == expected.tobytes()


def test_the_program_of_a_video_pipeline_writes_a_file(tmp_path, monkeypatch):
    case = next(case for case in WAN if str(case) == "WanPipeline")
    case.build().save_pretrained(tmp_path / "base")
    call = {key: value for key, value in case.inputs().items() if key in ("num_frames", "max_sequence_length")}
    trainer = make_trainer(
        tmp_path / "run", str(tmp_path / "base"), brightness, max_steps=1, sample_kwargs={**call, "num_frames": 5}
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = read(trainer)
    assert card.data.pipeline_tag == "text-to-video" and "num_frames=5" in card.text
    monkeypatch.chdir(tmp_path)
    exec(program(card), {})
    assert Image.open(tmp_path / "output.gif").n_frames == 5


def test_licence_base_and_settings(tmp_path):
    base = tmp_path / "base"
    tiny_flux().save_pretrained(base)
    (base / "README.md").write_text("---\n" + "\n".join(f"{k}: {v}" for k, v in FLUX_LICENCE.items()) + "\n---\n")
    trainer = make_trainer(tmp_path / "run", str(base), ema_decay=0.9, adapter_dtype="bfloat16")
    trainer.train()
    trainer.create_model_card()
    data = read(trainer).data.to_dict()
    assert {key: data[key] for key in FLUX_LICENCE} == FLUX_LICENCE
    assert "base_model" not in data and data["library_name"] == "diffusers"
    assert {"template:sd-lora", "lora", "diffusers", "trl", "leapalign"} <= set(data["tags"])
    for part in ("| updates | `2` |", "`redness x 1`", "| LoRA rank | `transformer: 32` |", "torch ", "1 x CPU"):
        assert part in read(trainer).text
    assert "2604.15311" in read(trainer).text and "Gallery" not in read(trainer).text
    trainer.create_model_card(license_name="mine", license_link="LICENSE.md", finetuned_from="someone/model")
    data = read(trainer).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE.md")
    assert data.base_model == "someone/model" and data.base_model_relation == "adapter"
    with pytest.raises(ValueError, match="license='mit' is one that the Hub knows"):
        trainer.create_model_card(license="mit", license_name="mine")


def test_a_base_is_an_id_of_the_hub_or_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    assert hub_id("outputs/base") is None and hub_id(str(tmp_path)) is None and hub_id(None) is None
    assert hub_id("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    folder = "/x/hub/models--black-forest-labs--FLUX.1-dev/snapshots/0123"
    assert hub_id(folder) == "black-forest-labs/FLUX.1-dev"
    assert base_licence("someone/not-cached") == {} and base_licence(None) == {}


def test_a_quantized_base_is_said(tmp_path):
    pytest.importorskip("bitsandbytes")
    pipeline = tiny_flux()
    quantize_pipeline(pipeline, Quantization(4))
    trainer = make_trainer(tmp_path, pipeline)
    trainer.create_model_card()
    assert (
        "The base was quantized while the adapter was trained (`transformer` by bitsandbytes NF4)" in read(trainer).text
    )


def test_gallery_and_evaluation(tmp_path):
    trainer = make_trainer(
        tmp_path, report_to="tensorboard", image_grid_steps=2, image_grid_prompts=2, ema_decay=0.5, eval_prompts=PROMPTS
    )
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    card = read(trainer)
    widget = card.data.widget
    assert [each["text"] for each in widget] == PROMPTS[:2] and "<Gallery />" in card.text
    assert widget[1]["output"]["url"] == "images/after_1.png"
    pictures = {path.name: Image.open(path).convert("RGB").tobytes() for path in (tmp_path / "images").iterdir()}
    assert len(pictures) == 4 and pictures["before_1.png"] != pictures["after_1.png"]
    expected = sample_images(
        trainer.pipeline,
        PROMPTS[1:2],
        [1],
        trainer.args.call_kwargs(),
        trainer.args.seed,
        columns=trainer.columns,
        metadata=[{}],
    )[0]
    found = torch.frombuffer(bytearray(pictures["after_1.png"]), dtype=torch.uint8).view(16, 16, 3).movedim(-1, 0) / 255
    assert (found - expected.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    [entry] = [each for each in trainer.state.log_history if "eval_reward" in each]
    values = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert values["eval_reward"] == pytest.approx(entry["eval_reward"])
