"""Every recipe is read as the command line reads it, and dry-runs on a tiny stand-in."""

from dataclasses import replace
from pathlib import Path

import pytest
from trl import TrlParser

from examples.tiny import tiny_flux, tiny_sd3
from examples.tiny_video import tiny_wan
from trl_leapalign import LeapAlignConfig, LeapAlignTrainer
from trl_leapalign.cli.arguments import TrainArguments
from trl_leapalign.cli.check import brightness

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
STAND_INS = {"flux": tiny_flux, "sd35": tiny_sd3, "qwen": tiny_flux, "wan21": tiny_wan, "wan22": tiny_wan}


def test_there_is_one_for_each_model_and_card():
    names = {path.stem for path in RECIPES}
    assert {"flux1_dev_24gb", "flux1_dev_80gb", "flux1_dev_8x80gb_full", "sd35_medium_16gb"} <= names
    assert {"qwen_image_24gb", "wan21_24gb", "wan22_80gb", "flux2_klein_24gb"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_read_and_runs_on_a_stand_in(path, tmp_path):
    arguments, config = TrlParser((TrainArguments, LeapAlignConfig)).parse_args_and_config(
        ["--config", str(path), "--use_cpu", "true"]
    )
    assert arguments.pipeline.count("/") == 1 and arguments.reward
    assert config.samples_per_update * (8 if "8x" in path.stem else 1) == 64
    [make] = [make for name, make in STAND_INS.items() if path.stem.startswith(name)]
    small = {"sample_height": 16, "sample_width": 16, "sample_num_steps": 3, "model_init_kwargs": None}
    kwargs = {**config.sample_kwargs, "max_sequence_length": 16}
    config = replace(config, output_dir=str(tmp_path), sample_kwargs=kwargs, train_prompts=None, **small)
    config = replace(config, prompt_column="prompt", use_cpu=True, report_to="none", optim="adamw_torch")
    if "wan22_80gb" in path.stem:
        pipeline = make(boundary_ratio=0.9)
    else:
        pipeline = make()
    LeapAlignTrainer(pipeline, brightness, config, train_dataset=["a red circle"])  # with the dry run


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_says_where_it_comes_from(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if line and not line.startswith("#")]
    assert all("  # " in line for line in values if not line.startswith("output_dir"))
