"""Groups of samples learn the same in one process, in two, and where a group lies in both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_cases import relative_error, same

SCRIPT = Path(__file__).with_name("groups_script.py")
ROOT = SCRIPT.parent.parent.parent


def launch(directory, processes, batch_size, accumulation):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    directory.mkdir()
    result = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), SCRIPT, directory, str(batch_size), str(accumulation)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Updates of 8 samples in groups of 4: in one batch, a group in each process, and groups in both processes."""
    directory = tmp_path_factory.mktemp("groups")
    for name, settings in {"one": (1, 8, 1), "two": (2, 4, 1), "shared": (2, 2, 2)}.items():
        launch(directory / name, *settings)
    return directory


@pytest.mark.parametrize("pairs", ["far", "near"])
@pytest.mark.parametrize("run", ["two", "shared"])
def test_processes_learn_what_one_learns(run, pairs, runs):
    expected = load_file(runs / "one" / f"{pairs}-0.safetensors")
    first, second = (load_file(runs / run / f"{pairs}-{process}.safetensors") for process in (0, 1))
    assert same(first, second)
    assert relative_error(first, expected) < 1e-12
