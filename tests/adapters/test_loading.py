"""Adapters from folders and from the Hub's cache, in every format that is saved; what does not fit is an error."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from training_cases import make_trainer, sample

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign.adapters.loading import find_adapter, load_adapter
from trl_leapalign.adapters.saving import LORA_FILE
from trl_leapalign.evaluation import evaluate

CALL = {"height": 16, "width": 16, "num_inference_steps": 2}


def save(directory, seed=0, **settings):
    """An adapter that changes images, and the images of its pipeline."""
    arguments = {} if settings else {"peft_config": LoraConfig(r=2, target_modules=["to_q", "to_v"])}
    trainer = make_trainer(directory / "run", tiny_flux(), arguments=arguments, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trainer.save_model(directory / "adapter")
    return directory / "adapter", sample(trainer.pipeline)


def on_the_hub(cache, adapter, commit, repository="someone/adapter"):
    """Lay files into the Hub's cache as a download of a commit leaves them."""
    top = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(adapter, top / "snapshots" / commit)
    (top / "refs").mkdir(exist_ok=True)
    (top / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("settings", [{}, {"full_finetuning": True, "learning_rate": 1e-4}], ids=["lora", "all"])
def test_what_was_saved_gives_the_images_of_training(settings, tmp_path):
    adapter, images = save(tmp_path, **settings)
    pipeline = tiny_flux()
    assert not torch.equal(sample(pipeline), images)
    files = load_adapter(pipeline, adapter)
    assert torch.equal(sample(pipeline), images)
    assert files.commit is None and len(files.digest()) == 64


def test_subfolder_and_file_name_choose_among_several(tmp_path):
    adapter, images = save(tmp_path)
    shutil.move(adapter, tmp_path / "several" / "best")
    shutil.copy(tmp_path / "several" / "best" / LORA_FILE, tmp_path / "several" / "best" / "a_second_one.safetensors")
    for chosen in ({"subfolder": "best"}, {"subfolder": "best", "weight_name": "a_second_one.safetensors"}):
        pipeline = tiny_flux()
        load_adapter(pipeline, tmp_path / "several", **chosen)
        assert torch.equal(sample(pipeline), images)
    with pytest.raises(ValueError, match=r"no weights in the safetensors format at .*several/worst"):
        find_adapter(tmp_path / "several", subfolder="worst")
    with pytest.raises(ValueError, match="revision='v1' is for repositories on the Hub"):
        find_adapter(tmp_path / "several", revision="v1")


def test_weights_of_another_model_are_refused(tmp_path):
    for settings in ({}, {"full_finetuning": True, "learning_rate": 1e-4}):
        adapter, _ = save(tmp_path / str(len(settings)), **settings)
        with pytest.raises(ValueError, match="StableDiffusion3Pipeline"):
            load_adapter(tiny_sd3(), adapter)
    (tmp_path / "foreign" / "unet").mkdir(parents=True)
    shutil.copy(tmp_path / "0" / "adapter" / LORA_FILE, tmp_path / "foreign" / "unet")
    with pytest.raises(ValueError, match="holds weights for unet, which the pipeline does not have"):
        load_adapter(tiny_flux(), tmp_path / "foreign")


def test_another_adapter_under_the_same_id_is_noticed(tmp_path, monkeypatch):
    """The scores of what a repository held before are not those of what it holds now."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    first, images = save(tmp_path / "first")
    second, _ = save(tmp_path / "second", seed=1)
    on_the_hub(tmp_path / "cache", first, "a" * 40)
    pipeline = tiny_flux()
    assert load_adapter(pipeline, "someone/adapter").commit == "a" * 40
    assert torch.equal(sample(pipeline), images)

    def run(**options):
        return evaluate(
            tiny_flux,
            ["a cat"],
            lambda images, prompts, metadata: images.mean((1, 2, 3)),
            tmp_path / "out",
            adapter="someone/adapter",
            images_per_prompt=1,
            call_kwargs=CALL,
            **options,
        )

    run()
    known = json.loads((tmp_path / "out" / "settings.json").read_text())["images"]
    assert known["adapter_commit"] == "a" * 40
    on_the_hub(tmp_path / "cache", second, "b" * 40)
    with pytest.raises(ValueError, match="adapter_sha256 changed"):
        run()
    run(adapter_kwargs={"revision": "a" * 40})
