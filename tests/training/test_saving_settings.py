"""Settings of saving, evaluating and optimizing without sense are refused before anything is made."""

import os
import stat

import pytest
from training_cases import PROMPTS, make_config, make_trainer

EVALUATES = {"eval_strategy": "steps", "eval_prompts": PROMPTS, "save_strategy": "steps"}
SENSELESS = {
    "save_steps=0": "above 0 and finite. For none: save_strategy='no'",
    "save_steps=-1": "above 0",
    "eval_steps=-2": "For none: eval_strategy='no'",
    "eval_steps=0": "For none: eval_strategy='no'",
    "logging_steps=nan": "For none: logging_strategy='no'",
    "logging_steps=inf": "above 0 and finite",
    "save_total_limit=0": "a whole number of at least 1",
    "eval_delay=-1": "a finite number of at least 0",
    "dataloader_num_workers=-1": "a whole number of at least 0",
    "dataloader_num_workers=1.5": "a whole number of at least 0",
    "adam_beta1=1.0": "a finite number of at least 0 and below 1",
    "adam_beta2=-0.5": "a finite number of at least 0 and below 1",
    "adam_beta2=nan": "a finite number of at least 0 and below 1",
    "adam_epsilon=-1e-08": "a finite number of at least 0",
    "warmup_steps=-3": "a finite number of at least 0",
    "warmup_steps=inf": "a finite number of at least 0",
}


@pytest.mark.parametrize("setting", SENSELESS)
def test_numbers_without_sense(setting, tmp_path):
    name, _, text = setting.partition("=")
    value = float(text) if text in ("nan", "inf") or "." in text or "e" in text else int(text)
    with pytest.raises(ValueError, match=f"^{setting} must be .*{SENSELESS[setting]}"):
        make_config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "settings", [{"adam_beta1": 0.0}, {"save_steps": 0.5}, {"eval_steps": None}, {"warmup_steps": 0.1}], ids=str
)
def test_numbers_with_sense(settings, tmp_path):
    [(name, value)] = settings.items()
    assert getattr(make_config(tmp_path, **settings), name) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "load_best_model_at_end=True compares evaluations, but eval_strategy='no' makes none. Set eval_strategy"),
        ({**EVALUATES, "eval_steps": 3, "save_steps": 3}, "none is made: eval_steps=3 .* max_steps=2 updates"),
        ({**EVALUATES, "eval_steps": 1, "save_steps": 1, "eval_delay": 5}, "none is made: .* eval_delay=5"),
    ],
)
def test_the_best_model_needs_evaluations(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, load_best_model_at_end=True, **settings)


def test_a_best_model_with_evaluations_is_loaded(tmp_path):
    settings = {**EVALUATES, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "sample_num_steps": 2}
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, greater_is_better=True, **settings)
    trainer.train()
    scores = {entry["step"]: entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry}
    best = max(scores, key=scores.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_reward"] == scores[best] and scores[1] != scores[2]


def no_folder(path):
    path.touch()
    return path


def below_a_file(path):
    path.touch()
    return path / "run"


def read_only(path):
    path.mkdir()
    path.chmod(stat.S_IREAD | stat.S_IEXEC)
    return path / "run"


def of_the_system(path):
    return "/proc/run"  # read-only even for root


@pytest.mark.parametrize("make", [no_folder, below_a_file, read_only, of_the_system])
def test_a_folder_that_cannot_be_written_is_noticed_at_construction(make, tmp_path):
    if (make is read_only and os.geteuid() == 0) or (make is of_the_system and not os.path.isdir("/proc")):
        pytest.skip("root may write there, or there is no such folder")
    folder = make(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"output_dir='.*' cannot be written \(.*\), .* Choose a folder in which"):
        make_trainer(folder)


def test_nothing_is_made_in_a_folder_by_that_check(tmp_path):
    with pytest.raises(TypeError):
        make_trainer(tmp_path / "new" / "run", reward=3)
    assert list(tmp_path.iterdir()) == []
