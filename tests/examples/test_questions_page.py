"""The programs of docs/questions.md make rewards that the trainer takes."""

import re
from pathlib import Path

import pytest
import vlm_cases
from reward_cases import CASES

import trl_leapalign
from trl_leapalign import LeapAlignConfig
from trl_leapalign.evaluation import named_rewards
from trl_leapalign.rewards import relative, vlm
from trl_leapalign.rewards.reward_set import check_reward_settings

PAGE = (Path(__file__).parent.parent.parent / "docs" / "questions.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"\n## ([^\n]+)\n+```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.parametrize("title", PROGRAMS)
def test_programs(title, tmp_path, monkeypatch):
    """With tiny models in place of those of the Hub, up to what the trainer checks of its arguments."""
    trained = []

    class Trainer:
        def __init__(self, pipeline, reward, config, train_dataset):
            assert pipeline == "black-forest-labs/FLUX.1-dev" and isinstance(config, LeapAlignConfig) and train_dataset
            trained.append(check_reward_settings(named_rewards(reward, config.reward_kwargs)))

        def train(self):
            trained.append("trained")

    if title == "Texts":
        pytest.importorskip("rapidocr")
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl_leapalign, "LeapAlignTrainer", Trainer, raising=False)
    monkeypatch.setattr(vlm, "load_model", lambda *args, **settings: vlm_cases.vlm_model())
    monkeypatch.setattr(vlm, "load_tokenizer", lambda *args: vlm_cases.vlm_tokenizer())
    monkeypatch.setattr(vlm, "load_image_processor", lambda *args: vlm_cases.vlm_image_processor())
    monkeypatch.setattr(relative, "load_reward", lambda name: CASES["hpsv2"]())
    assert len(PROGRAMS[title].strip().splitlines()) <= 10
    exec(PROGRAMS[title], {})
    [[reward], last] = trained
    assert last == "trained" and not isinstance(reward, str)


def test_all_programs_are_there():
    assert len(PROGRAMS) == 5
