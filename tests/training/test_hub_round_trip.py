"""What is pushed gives the trainer's own images to somebody else: by id, in a fresh process, from an empty cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import hub_server
from pipeline_cases import CASES
from training_cases import PROMPTS, make_trainer, redness
from training_cases import sample as sample_flux

from examples.tiny import tiny_flux
from trl_leapalign.adapters.loading import load_adapter
from trl_leapalign.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "Another0123456789" * 2
TRAINED = ("FluxPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "WanPipeline")
SETTINGS = {"num_inference_steps": "sample_num_steps", "guidance_scale": "sample_guidance_scale"}
SETTINGS |= {"height": "sample_height", "width": "sample_width"}
OTHERS = ("prompt", "generator", "output_type", "return_dict")
SOMEBODY = """
import sys, torch
from pipeline_cases import CASES
from pathlib import Path
torch.set_num_threads(1)
for name in sys.argv[2:]:
    case = next(case for case in CASES if str(case) == name)
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(f"user/{name}", weight_name="pytorch_lora_weights.safetensors")
    arguments = case.inputs() | {"output_type": "pt", "return_dict": False}
    torch.save(pipeline(**arguments)[0], Path(sys.argv[1], f"{name}.pt"))
"""


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1)


def own_images(case, pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**case.inputs() | {"output_type": "pt", "return_dict": False})[0]


def test_somebody_else_gets_the_trainers_images(tmp_path, monkeypatch):
    expected, untrained = {}, {}
    with hub_server() as hub:
        with hub.connected(monkeypatch, tmp_path / "cache"):
            for name in TRAINED:
                case = next(case for case in CASES if str(case) == name)
                pipeline, call = case.build(), case.inputs()
                untrained[name] = own_images(case, pipeline)
                trainer = make_trainer(
                    tmp_path / name,
                    pipeline,
                    brightness,
                    **{SETTINGS[key]: call[key] for key in SETTINGS if key in call},
                    sample_kwargs={key: call[key] for key in call if key not in (*SETTINGS, *OTHERS)},
                    push_to_hub=True,
                    hub_token=TOKEN,
                    hub_model_id=f"user/{name}",
                )
                trainer.train()
                trainer.push_to_hub()
                assert len(hub.repositories[f"user/{name}"].commits) == 2
                expected[name] = own_images(case, trainer.pipeline)
        environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        environment.pop("HF_HUB_CACHE", None)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, "-c", SOMEBODY, str(tmp_path), *TRAINED]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in TRAINED:
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-6)
        assert (found - untrained[name]).abs().max() > 1e-4


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    with hub_server() as hub, hub.connected(monkeypatch, tmp_path / "cache"):
        trainer = make_trainer(tmp_path / "run", push_to_hub=True, hub_token=TOKEN, hub_model_id="user/tuned")
        trainer.train()
        trainer.push_to_hub()
        yield trainer


def test_evaluate_takes_the_id_of_an_adapter(pushed, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    options = {"pipeline": "examples.tiny:tiny_flux", "prompts": str(tmp_path / "prompts.txt")}
    options |= {"evaluators": "training_cases:redness", "images_per_prompt": "1", "num_inference_steps": "3"}
    options |= {"height": "16", "width": "16"}
    images = {}
    for name, adapter in {"id": "user/tuned", "folder": str(tmp_path / "run"), "none": None}.items():
        options["output_dir"] = str(tmp_path / name)
        more = {"adapter": adapter} if adapter else {}
        main(["evaluate", *(part for key, value in {**options, **more}.items() for part in (f"--{key}", value))])
        images[name] = [path.read_bytes() for path in sorted((tmp_path / name / "images").rglob("*.png"))]
    assert images["id"] == images["folder"] != images["none"] and len(images["id"]) == 2


def test_training_goes_on_from_the_hub(pushed, tmp_path):
    pipeline = tiny_flux()
    load_adapter(pipeline, "user/tuned")
    start = sample_flux(pipeline)
    torch.testing.assert_close(start, sample_flux(pushed.pipeline), rtol=0, atol=1e-6)
    trainer = make_trainer(tmp_path / "more", pipeline, redness, max_steps=1)
    trainer.train()
    assert (sample_flux(trainer.pipeline) - start).abs().max() > 1e-5
