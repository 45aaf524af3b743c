"""Evaluators by name as rewards: GenEval and UnifiedReward from folders."""

import json
import re

import pytest
import torch
from geneval_cases import busy_detector, color_tokenizer, random_images, tiny_color_clip
from reward_cases import clip_model
from training_cases import make_config, make_trainer, redness
from vlm_cases import vlm_image_processor, vlm_model, vlm_tokenizer

from examples.tiny import tiny_flux, tiny_tokenizer
from trl_leapalign import LeapAlignConfig
from trl_leapalign.comparison.compare import Comparison
from trl_leapalign.evaluation import Evaluator, GenEval, UnifiedReward, named_evaluator, named_rewards
from trl_leapalign.evaluation.evaluators import check_rows
from trl_leapalign.evaluation.rows import read_if_geneval
from trl_leapalign.rewards import HumanReward, NamedReward, RewardSet, VLMReward

ROWS = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
    {
        **{"tag": "position", "prompt": "a cat above a dog"},
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    busy_detector().model.save_pretrained(folder / "detector")
    tiny_color_clip().save_pretrained(folder / "colors")
    color_tokenizer().save_pretrained(folder / "colors")
    clip_model().save_pretrained(folder / "clip")
    tiny_tokenizer().save_pretrained(folder / "clip")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture
def settings(folder):
    return {"geneval": {"detector": str(folder / "detector"), "color_classifier": str(folder / "colors")}}


def test_names_become_rewards_that_are_loaded_later(folder, settings):
    own = NamedReward("own", lambda: redness)
    clip = {"clipscore": {"path_or_id": str(folder / "clip"), "tokenizer": str(folder / "clip")}}
    named = named_rewards(["geneval", "clipscore", own, redness], {**settings, **clip})
    assert [type(item) for item in named[:2]] == [Evaluator, Evaluator] and named[2:] == [own, redness]
    assert named_rewards("hpsv2.1", {}) == ["hpsv2.1"]  # whose loading needs no settings
    rewards = RewardSet(named)
    assert rewards.names == ["geneval", "clipscore", "own", "redness"]
    assert isinstance(rewards.functions[0], GenEval) and not rewards.functions[0].differentiable
    assert UnifiedReward.differentiable is False
    images = random_images(2, 96, 96)
    scores = rewards(images, [row["prompt"] for row in ROWS], ROWS)
    expected = named_evaluator("geneval", **settings["geneval"]).load()(images, ["", ""], ROWS)[0]
    assert torch.equal(scores.rewards[0], expected) and scores.details["geneval"]["tag"] == [
        "single_object",
        "position",
    ]


def test_questions_and_votes_by_name(tmp_path):
    for part in (vlm_model(), vlm_tokenizer(), vlm_image_processor()):
        part.save_pretrained(tmp_path / "model")
    settings = {
        "vlm": {"question": "Is it {prompt}?", "model": str(tmp_path / "model")},
        "human": {"folder": str(tmp_path / "votes"), "timeout": 0.1},
    }
    rewards = RewardSet(named_rewards(["vlm", "human"], settings))
    assert [type(function) for function in rewards.functions] == [VLMReward, HumanReward]
    assert rewards.names == ["vlm", "human"] and rewards.functions[0].questions == ["Is it {prompt}?"]


def test_bad_settings(settings):
    with pytest.raises(ValueError, match="GenEval needs a detector"):
        named_rewards("geneval", {})
    with pytest.raises(ValueError, match="reward_kwargs has settings of geneval, but the rewards given by name are"):
        named_rewards(["hpsv2.1", redness], settings)
    with pytest.raises(TypeError, match="'geneval' has no settings detektor"):
        named_rewards("geneval", {"geneval": {"detektor": "x", "detector": "y"}})
    with pytest.raises(ValueError, match=r"'vlm' needs question\..* reward_kwargs=\{'vlm': \{\"question\": \.\.\.\}\}"):
        named_rewards("vlm", {"vlm": {"model": "some/model"}})
    with pytest.raises(ValueError, match="'human' needs folder"):
        named_rewards("human", {})
    with pytest.raises(ValueError, match="There is no built-in reward 'genevall'"):
        RewardSet(named_rewards("genevall", {}))
    with pytest.raises(TypeError, match="takes"):
        RewardSet(NamedReward("two", lambda: lambda images, prompts: images))
    with pytest.raises(ValueError, match=re.escape("reward_kwargs['geneval'] must be a dict")):
        LeapAlignConfig("outputs", reward_kwargs={"geneval": 3})
    config = LeapAlignConfig("outputs", reward_kwargs='{"geneval": {"detector": "x"}}')
    assert config.reward_kwargs == config.to_dict()["reward_kwargs"] == {"geneval": {"detector": "x"}}


def test_prompts_without_geneval_metadata_are_refused(tmp_path, settings):
    named = named_rewards("geneval", settings)
    check_rows(named, ROWS, None, lambda: ("a dog", {}))
    with pytest.raises(ValueError, match="geneval cannot judge these prompts: row 1 has no 'tag'"):
        check_rows(named, ROWS, [ROWS[0], {"prompt": "a dog"}])
    with pytest.raises(ValueError, match="geneval cannot judge these prompts: row 0 has no 'tag'"):
        make_trainer(tmp_path, None, "geneval", reward_kwargs=settings, per_device_train_batch_size=4)


def test_comparisons_load_a_named_reward_once(folder, tmp_path):
    """Its settings are kept with the results, which are not taken over for others."""
    clip = {"path_or_id": str(folder / "clip"), "tokenizer": str(folder / "clip")}

    def comparison(**others):
        config = make_config(tmp_path, max_steps=1, reward_kwargs={"clipscore": {**clip, **others}})
        rows = [{"prompt": "a red circle"}]
        return Comparison(tiny_flux, "clipscore", config, {"refl": {"method": "refl"}}, rows, rows, seeds=[0])

    first = comparison()
    assert first.judges.functions[0] is first.reward[0].load() and first.judges.names == ["clipscore"]
    first.run()
    found = json.loads((tmp_path / "runs" / "refl" / "seed_0" / "settings.json").read_text())
    [kept] = found["reward"]
    assert kept.items() >= {"evaluator": "clipscore", **clip, "is_geneval": False}.items()
    with pytest.raises(ValueError, match="settings"):
        comparison(batch_size=1).run()


def test_geneval_files_are_prompts(folder, tmp_path):
    assert read_if_geneval(folder / "metadata.jsonl") == ROWS
    assert read_if_geneval(["a dog"]) == ["a dog"] and read_if_geneval(None) is None
    assert read_if_geneval(str(folder / "metadata.jsonl"), "caption") == str(folder / "metadata.jsonl")
