"""Two processes compute what one computes, write once and stop together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_cases import relative_error, same

SCRIPT = Path(__file__).with_name("distributed_script.py")
TOLERANCE = 1e-12
TRAININGS = ("lora", "full", "columns")  # the last with images from the prompts' rows


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(directory: Path, processes: int, batch_size: int, accumulation: int) -> None:
    # `accelerate launch --cpu` starts one process only, unless it has mpirun.
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    tests = SCRIPT.parents[1]
    path = os.pathsep.join(map(str, [tests.parent, tests, tests / "prompts"]))
    result = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), SCRIPT, directory, str(batch_size), str(accumulation)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process with batches of 4, and two with batches of 1 that they accumulate twice."""
    directory = tmp_path_factory.mktemp("runs")
    launch(directory / "one", 1, 4, 1)
    launch(directory / "two", 2, 1, 2)
    return directory


def seen(runs, run, process=0):
    return json.loads((runs / run / f"seen-{process}.json").read_text())


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("kind", ["gradients", "weights"])
def test_two_processes_learn_what_one_learns(kind, training, runs):
    expected = load_file(runs / "one" / training / f"{kind}-0.safetensors")
    first, second = (load_file(runs / "two" / training / f"{kind}-{process}.safetensors") for process in (0, 1))
    assert same(first, second)
    assert relative_error(first, expected) < TOLERANCE
    if kind == "gradients":
        assert {key.partition(".")[0] for key in expected} == {"0", "1"}


@pytest.mark.parametrize("training", TRAININGS)
def test_logged_values_agree(training, runs):
    one, two = (seen(runs, run)[training]["history"] for run in ("one", "two"))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == [1, 2, 2, 2]
    for expected, actual in zip(one[:2], two[:2], strict=True):
        assert expected.keys() == actual.keys()
        for key in (
            "loss",
            "reward",
            "reward_std",
            "d_0",
            "d_j",
            "weight",
            "saturated",
            "active_step_0",
            "active_step_1",
            "epoch",
        ):
            assert actual[key] == pytest.approx(expected[key], rel=1e-6), key
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=TOLERANCE)


@pytest.mark.parametrize("training", TRAININGS)
def test_evaluations_agree(training, runs):
    """Three prompts on two processes: one has two of them."""
    one, two, other = (seen(runs, *who)[training]["metrics"] for who in (("one",), ("two",), ("two", 1)))
    for key in ("eval_reward", "eval_reward_std"):
        assert two[key] == other[key] == pytest.approx(one[key], rel=1e-6)


@pytest.mark.parametrize("training", TRAININGS)
def test_only_the_first_process_writes(training, runs):
    def files(run):
        paths = (path.relative_to(runs / run / training) for path in (runs / run / training).rglob("*"))
        return {str(path) for path in paths}

    added = {"gradients-1.safetensors", "weights-1.safetensors"}
    states = {f"checkpoint-2/rng_state_{process}.pth" for process in (0, 1)}
    assert files("two") - files("one") == added | states
    assert files("one") - files("two") == {"checkpoint-2/rng_state.pth"}
    assert "hook-0" in files("two") and "README.md" in files("two")


def test_nan_in_one_process_stops_all(runs):
    for process in (0, 1):
        message = seen(runs, "two", process)["nan"]
        assert message.startswith("1: Update 2: a reward, the loss or its gradient is not finite"), message
    assert seen(runs, "one")["nan"].startswith("1: Update 2: ")
