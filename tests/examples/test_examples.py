"""The example scripts run as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trl_leapalign.media import read_samples

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_flux_smoke_trains_and_saves_an_adapter(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    run(*launch, "examples/flux.py", "--smoke", "--output_dir", str(tmp_path), "--max_steps", "3")
    adapter = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") for key in adapter)
    assert any(value.abs().sum() > 0 for key, value in adapter.items() if "lora_B" in key)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert (tmp_path / "README.md").is_file()


def test_wan_smoke_trains_and_writes_videos(tmp_path):
    run("examples/wan_video.py", "--smoke", "--use_cpu", "--output_dir", str(tmp_path), "--max_steps", "10")
    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    assert any(value.abs().sum() > 0 for key, value in load_file(adapter).items() if "lora_B" in key)
    [video] = (tmp_path / "samples" / "step_000010").iterdir()
    assert read_samples([video]).shape == (1, 5, 3, 16, 16)


def test_qwen_image_edit_smoke_trains_on_the_source_image(tmp_path):
    run("examples/qwen_image_edit.py", "--smoke", "--use_cpu", "--output_dir", str(tmp_path))
    adapter = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(value.abs().sum() > 0 for key, value in adapter.items() if "lora_B" in key)
    logs = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert logs[0]["rewards/Target"] and logs[0]["rewards/likeness"] < 0


@pytest.mark.parametrize("arguments", [["--max_steps", "2", "--num_images", "30"]])
def test_quickstart_writes_pictures_table_and_adapter(tmp_path, arguments):
    printed = run("examples/quickstart.py", "--output_dir", str(tmp_path), *arguments)
    for name in ("reward.png", "before_after.png", "pytorch_lora_weights.safetensors", "results.json"):
        assert (tmp_path / name).stat().st_size > 0
    results = json.loads((tmp_path / "results.json").read_text())
    tasks = {key: value for key, value in results["after"].items() if key != "overall"}
    assert len(tasks) == 6
    assert results["after"]["overall"] == pytest.approx(sum(tasks.values()) / 6)
    assert f"{100 * results['after']['overall']:.1f}" in printed
    assert "gives the same images" in printed


def test_the_programs_of_the_readme_run(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len([line for line in program.splitlines() if line.strip()]) <= 12
    assert "max_steps=20" in program
    program = program.replace("max_steps=20", "max_steps=2, report_to='none'").replace("outputs/red", str(tmp_path))
    program += "\nassert trainer.state.global_step == 2 and pipe.transformer.peft_config"
    run("-c", program)
