"""Rewards without gradient train a tiny FLUX end to end: GenEval by name, texts, and votes in a real browser."""

import json
import threading

import numpy as np
import pytest
import torch
from browser import CHROMEDRIVER, CHROMIUM, Browser
from geneval_cases import MAX_SIZE, busy_detector, color_tokenizer, tiny_classifier, tiny_color_clip
from training_cases import make_trainer, sample, trained_weights
from vote_cases import served, vote_for_red

from examples.tiny import tiny_flux
from trl_leapalign.cli.main import main
from trl_leapalign.evaluation import EVALUATORS, GenEval
from trl_leapalign.rewards import HumanReward, OCRReward
from trl_leapalign.rewards.votes import VoteFolder

TASK = {"tag": "single_object", "include": [{"class": "motorcycle", "count": 1}], "prompt": "a red circle"}
SETTINGS = {"per_device_train_batch_size": 4, "learning_rate": 1e-2}
PAIRS = {"per_device_train_batch_size": 2, "samples_per_prompt": 2}
HELD_OUT = range(100, 124)


def samples(pipeline):
    with torch.no_grad():
        return torch.cat([sample(pipeline, seed) for seed in HELD_OUT])


def logged_rewards(trainer):
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


@pytest.fixture
def geneval(tmp_path):
    busy_detector().model.save_pretrained(tmp_path / "detector")
    tiny_color_clip().save_pretrained(tmp_path / "colors")
    color_tokenizer().save_pretrained(tmp_path / "colors")
    sizes = {"detector": str(tmp_path / "detector"), "color_classifier": str(tmp_path / "colors")}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(TASK) + "\n")
    return {"geneval": sizes}


def test_geneval_by_name(tmp_path, geneval):
    """A detector of random weights sees a motorcycle in some samples and none in others."""
    settings = {**SETTINGS, "max_steps": 2, "reward_kwargs": geneval}
    trainer = make_trainer(tmp_path, None, "geneval", prompts=tmp_path / "metadata.jsonl", **settings)
    assert trainer.rewards.names == ["geneval"]
    trainer.rewards.functions[0].detector.max_size = MAX_SIZE
    before = trained_weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trained_weights(trainer).items())
    assert set(np.multiply(logged_rewards(trainer), 4)) <= {1, 2, 3}


def test_geneval_from_the_command_line(tmp_path, geneval, monkeypatch):
    given = []

    def load(detector, color_classifier):
        given.append({"detector": detector, "color_classifier": color_classifier})
        return GenEval(busy_detector(), tiny_classifier())

    monkeypatch.setitem(EVALUATORS, "geneval", load)
    options = {
        **{"pipeline": "examples.tiny:tiny_flux", "reward": "geneval", "reward_kwargs": json.dumps(geneval)},
        **{"train_prompts": tmp_path / "metadata.jsonl", "output_dir": tmp_path / "run", "max_steps": 1},
        **{"per_device_train_batch_size": 4, "sample_num_steps": 2, "sample_height": 16, "sample_width": 16},
        **{"report_to": "none", "save_strategy": "no"},
    }
    main(["train", *[str(part) for name, value in options.items() for part in (f"--{name}", value)]])
    assert given == [geneval["geneval"]] and list((tmp_path / "run").glob("*.safetensors"))


def redness_in_letters(image):
    """Reads as many letters of "red" as the image is red: a real reader of colours."""
    red = image[..., 0].mean() - image[..., 1:].mean()  # 9 to 20 levels on the untrained pipeline
    return "red"[: int(np.clip((red - 6) / 6, 0, 3))]


def test_texts(tmp_path):
    pipeline = tiny_flux()
    reward = OCRReward(redness_in_letters)
    prompts = ['a circle that says "red"']

    def score():
        images = samples(pipeline)
        return reward(images, prompts * len(images), [{}] * len(images))[0].mean().item()

    before = score()
    settings = {**SETTINGS, "learning_rate": 3e-2, "max_steps": 20}
    make_trainer(tmp_path, pipeline, reward, prompts=prompts, **settings).train()
    assert score() > before + 0.05


def test_the_dry_run_asks_for_a_vote_of_the_first_update(tmp_path):
    folder, stop = VoteFolder(tmp_path / "votes"), threading.Event()

    def voter():
        while not stop.wait(0.01):
            for name in folder.pairs().keys() - folder.votes().keys():
                folder.vote(folder.pairs()[name], folder.pairs()[name].first)

    thread = threading.Thread(target=voter)
    thread.start()
    try:
        reward = HumanReward(folder.path, poll_seconds=0.01, timeout=60)
        settings = {**PAIRS, "max_steps": 1, "dry_run": True}
        trainer = make_trainer(tmp_path, None, reward, prompts=["a red circle"], **settings)
        assert len(folder.votes()) == 1
        trainer.train()
    finally:
        stop.set()
        thread.join()
    assert len(folder.pairs()) == len(folder.votes()) == 1 and logged_rewards(trainer) == [0.5]


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="there is no Chromium with its driver")
def test_votes_in_a_browser(tmp_path):
    """20 votes for the redder picture; training and the page are stopped in between and resumed."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    folder = VoteFolder(tmp_path / "votes")
    settings = {**PAIRS, "learning_rate": 3e-2, "max_steps": 20, "save_strategy": "steps", "save_steps": 4}

    def run(pipeline, resume=None, **limits):
        reward = HumanReward(folder.path, poll_seconds=0.01, **limits)
        trainer = make_trainer(tmp_path / "run", pipeline, reward, prompts=["a red circle"], **settings)
        errors, done = [], threading.Event()

        def train():
            try:
                trainer.train(resume_from_checkpoint=resume)
            except TimeoutError as error:
                errors.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=train)
        thread.start()
        return trainer, thread, done, errors

    def redness(pipeline):
        images = samples(pipeline)
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    with Browser() as browser:
        with served(folder.path) as address:
            browser.open(address)
            _, thread, done, errors = run(tiny_flux(), timeout=3.0)
            assert vote_for_red(browser, 10, done.is_set) == 10
            thread.join()  # nobody votes on the eleventh pair
        assert "1 of 1 votes are missing" in str(errors[0])
        pipeline = tiny_flux()
        before = redness(pipeline)
        with served(folder.path) as address:
            browser.open(address)
            trainer, thread, done, errors = run(pipeline, resume=True)  # from update 8
            assert vote_for_red(browser, 11, done.is_set) == 10
            thread.join()
    assert not errors and trainer.state.global_step == 20
    assert len(folder.votes()) == len(folder.pairs()) == 20  # nothing was asked twice
    assert (redness(pipeline) > before).float().mean() > 0.7

    trainer_again, thread, _, errors = run(tiny_flux(), timeout=3.0)  # all votes are there, and nobody is
    thread.join()
    resumed, whole = trained_weights(trainer), trained_weights(trainer_again)
    assert not errors and all(torch.equal(whole[name], resumed[name]) for name in whole)
