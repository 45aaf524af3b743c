"""Built-in rewards with their real weights, where someone has recorded values and the weights are on disk."""

import json

import numpy as np
import pytest
from PIL import Image
from reward_cases import CASES

from tests.golden import fill
from trl_leapalign.rewards import REWARDS, load_reward


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_recorded_scores(name):
    path = fill.FOLDER / f"{name}.json"
    if not path.is_file():
        pytest.skip("nothing is recorded: see tests/golden/fill.py")
    record = json.loads(path.read_text(encoding="utf-8"))
    try:
        reward = load_reward(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    actual = fill.score(reward, fill.FOLDER / record["image"], record["prompt"])
    assert actual == pytest.approx(record["score"], rel=record["tolerance"], abs=record["tolerance"])


def test_recording(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    monkeypatch.setattr(fill, "load_reward", lambda name, **settings: CASES["hpsv2"](**settings))
    command = ["--reward", "hpsv2.1", "--image", str(tmp_path / "cat.png"), "--prompt", "a cat"]
    record = fill.main([*command, "--folder", str(tmp_path), "--settings", '{"batch_size": 2}'])
    assert record == json.loads((tmp_path / "hpsv2.1.json").read_text())
    assert record["score"] == fill.score(CASES["hpsv2"](), tmp_path / "hpsv2.1.png", "a cat")
    assert record["source"].startswith("this library")
    record = fill.main([*command, "--folder", str(tmp_path), "--expected", "0.27", "--source", "hpsv2 1.2.0"])
    assert (record["score"], record["source"], record["tolerance"]) == (0.27, "hpsv2 1.2.0", 2e-3)
