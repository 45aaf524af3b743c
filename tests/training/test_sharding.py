"""Two processes that share the weights by FSDP2 compute, save and resume what one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import free_port
from training_cases import relative_error

SCRIPT = Path(__file__).with_name("sharding_script.py")
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process with batches of 2, and two with batches of 1, both accumulated twice."""
    directory = tmp_path_factory.mktemp("runs")
    for name, processes, size in (("one", 1, 2), ("two", 2, 1)):
        (directory / name).mkdir()
        # `accelerate launch --cpu` starts one process only, unless it has mpirun.
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        result = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), SCRIPT, directory / name, str(size), "2"],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parents[1])]),
                "OMP_NUM_THREADS": "1",
            },
            timeout=240,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    return directory


def seen(runs, run, process=0):
    return json.loads((runs / run / f"seen-{process}.json").read_text())


def tensors(directory):
    return {
        f"{path.relative_to(directory)}.{key}": value
        for path in sorted(directory.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


@pytest.mark.parametrize("training", ["lora", "full"])
def test_weights_and_saved_files_are_those_of_one_process(training, runs):
    one, two = (runs / run / training for run in ("one", "two"))
    expected = load_file(one / "weights-0.safetensors")
    assert relative_error(load_file(two / "weights-0.safetensors"), expected) < TOLERANCE
    for folder in ("saved", "checkpoint-1", "checkpoint-2"):
        assert relative_error(tensors(two / folder), tensors(one / folder)) < TOLERANCE
    for config in one.glob("saved/*/config.json"):
        assert config.read_text() == (two / config.relative_to(one)).read_text()


@pytest.mark.parametrize("training", ["lora", "full"])
def test_logged_values_and_evaluations_agree(training, runs):
    one, two = (seen(runs, run)[training] for run in ("one", "two"))
    for expected, actual in zip(one["history"][:2], two["history"][:2], strict=True):
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=TOLERANCE)
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert two["metrics"]["eval_reward"] == pytest.approx(one["metrics"]["eval_reward"], rel=1e-6)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_resuming_equals_never_stopping(training, runs):
    assert all(seen(runs, "two", process)[training]["resumed"] for process in (0, 1))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_checkpoints_hold_whole_averages_and_optimizers(training, runs):
    states = [torch.load(runs / run / training / "checkpoint-2" / "weight_average.pt") for run in ("one", "two")]
    averages = [dict(enumerate(state["shadow_params"])) for state in states]
    averages = [{str(key): value for key, value in average.items()} for average in averages]
    assert relative_error(averages[1], averages[0]) < TOLERANCE


def test_float32_weights_keep_small_updates_in_bfloat16_training(runs):
    """Updates of 1e-5 would be lost in bfloat16 weights of the size of 0.1."""
    result = seen(runs, "two")["bf16"]
    assert result["dtypes"] == ["torch.float32"]
    assert result["moved"] > 0.9
