"""A few of the kills that `make kills` makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")
TESTS = SCRIPT.parent.parent


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_trainings_end_where_one_that_was_never_stopped_does(processes, tmp_path):
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    result = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "3", "--processes", str(processes)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout and result.stdout.count("having resumed") == 3
