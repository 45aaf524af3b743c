"""Weights that are missing, cut off or something else, and rewards by name."""

import os
import pickle

import pytest
import torch
from reward_cases import CASES, clip_model, random_images
from safetensors.torch import save_file

from examples.tiny import tiny_tokenizer
from trl_leapalign import LeapAlignConfig, LeapAlignTrainer
from trl_leapalign.rewards import (
    REWARDS,
    CLIPReward,
    CLIPScore,
    HPSv2,
    HPSv3,
    ImageReward,
    RewardSet,
    builtin,
    load_reward,
)
from trl_leapalign.rewards.weights import find_file, load_tokenizer, read_weights


def test_weights_are_read(tmp_path):
    weights = {"a": torch.arange(3.0)}
    torch.save(weights, tmp_path / "a.pt")
    save_file(weights, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["a"], weights["a"])


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_files_that_are_cut_off(tmp_path, name, share):
    save = torch.save if name.endswith(".pt") else save_file
    save({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"{name} cannot be read as the weights of this model: .*fetch it again"):
        read_weights(tmp_path / name)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_code_in_pickles_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="only tensors are read, never other Python objects"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_a_file_that_holds_no_names(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="it holds a list, not tensors by name"):
        read_weights(tmp_path / "a.pt")


def test_files_are_found(tmp_path):
    (tmp_path / "w.pt").touch()
    assert find_file(tmp_path / "w.pt", "other.pt") == find_file(str(tmp_path), "w.pt") == tmp_path / "w.pt"


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            HPSv2.from_pretrained,
            r"HPS_v2\.1_compressed\.pt of 'xswu/HPSv2'.*`hf download xswu/HPSv2 HPS_v2\.1_compress",
        ),
        (lambda: load_reward("hpsv2.0"), r"HPS_v2_compressed\.pt of 'xswu/HPSv2'.*path_or_id='FOLDER'"),
        (ImageReward.from_pretrained, r"ImageReward\.pt of 'THUDM/ImageReward'.*HF_HUB_OFFLINE unset"),
        (lambda: HPSv3.from_pretrained(instruction="x"), r"HPSv3\.safetensors of 'MizzenAI/HPSv3'"),
        (CLIPScore.from_pretrained, r"Cannot find 'openai/clip-vit-large-patch14': .*`hf download openai/clip-vit-lar"),
        (lambda: load_reward("pickscore"), r"Cannot find 'yuvalkirstain/PickScore_v1'"),
        (lambda: load_tokenizer("bert-base-uncased"), r"`hf download bert-base-uncased --local.*tokenizer='FOLDER'"),
        (
            lambda: HPSv2.from_pretrained("/no/where.pt"),
            r"There is no file or folder '/no/where\.pt'\. Pass the path of",
        ),
        (lambda: CLIPScore.from_pretrained("./nowhere"), r"There is no file or folder '\./nowhere'"),
        (lambda: HPSv2.from_pretrained("hps.pt"), r"There is no file or folder 'hps\.pt'"),
    ],
)
def test_without_a_network_the_error_says_what_to_fetch(load, message):
    with pytest.raises(FileNotFoundError, match=message):
        load()


def test_a_folder_with_a_file_that_is_cut_off(tmp_path):
    clip_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as the weights of this model"):
        CLIPScore.from_pretrained(tmp_path, tokenizer=tiny_tokenizer())


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot be read as the weights of this model: .*no file named model\.safetensors"
    ):
        CLIPScore.from_pretrained(tmp_path, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=rf"The folder {tmp_path} holds no tokenizer: "):
        load_tokenizer(tmp_path)


def test_a_model_without_the_files_of_its_tokenizer(tmp_path):
    """transformers makes a tokenizer of two tokens from the model's config."""
    clip_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a tokenizer without words"):
        CLIPReward.from_pretrained(tmp_path)


# By name


def test_names():
    assert set(REWARDS) == {
        *("hpsv2.0", "hpsv2.1", "hpsv3", "pickscore", "clipscore", "aesthetic", "imagereward"),
    }


@pytest.mark.parametrize(
    ("name", "hint"),
    [("hpsv2", r"Did you mean 'hpsv2\.\d'"), ("PickScore", "Did you mean 'pickscore'"), ("x", "")],
)
def test_unknown_names(name, hint):
    for use in (load_reward, RewardSet, lambda name: RewardSet([darkness, name])):
        with pytest.raises(
            ValueError, match=rf"There is no built-in reward '{name}'\..*{hint}.*'aesthetic', 'clipscore'"
        ):
            use(name)


@pytest.fixture
def loaded(monkeypatch):
    """Names load tiny rewards; what they were loaded with."""
    calls = []

    def loader(name, case):
        return lambda **settings: (calls.append((name, settings)), CASES[case]())[1]

    tiny = {"hpsv2.1": loader("hpsv2.1", "hpsv2"), "clipscore": loader("clipscore", "clipscore")}
    monkeypatch.setattr(builtin, "REWARDS", tiny)
    return calls


def darkness(images, prompts, metadata):
    return 1 - images.mean((1, 2, 3))


def test_names_stand_beside_functions(loaded):
    rewards = RewardSet(["hpsv2.1", darkness, "clipscore", "clipscore"], weights=[1, 2, 3, 4])
    assert rewards.names == ["hpsv2.1", "darkness", "clipscore_2", "clipscore_3"]
    assert rewards.thresholds == [0.55, None, None, None]
    assert [name for name, settings in loaded] == ["hpsv2.1", "clipscore", "clipscore"]
    images = random_images(2, 3, 20, 20)
    scores = rewards(images, ["a red circle", "two dogs"], [{}, {}])
    assert "rewards/hpsv2.1" in scores.metrics
    assert torch.equal(scores.rewards[0], CASES["hpsv2"]()(images, ["a red circle", "two dogs"], [{}, {}]))


def test_one_name_alone(loaded):
    rewards = RewardSet("hpsv2.1")
    assert (rewards.names, rewards.thresholds) == (["hpsv2.1"], [0.55])
    assert RewardSet("hpsv2.1", thresholds=[0.3]).thresholds == [0.3]
    assert load_reward("hpsv2.1", batch_size=3).threshold == 0.55
    assert loaded[-1] == ("hpsv2.1", {"batch_size": 3})


def test_mistakes_are_found_before_anything_is_loaded(loaded):
    for functions, settings in (
        (["hpsv2.1", "nope"], {}),
        (["hpsv2.1"], {"weights": [1, 2]}),
        (["hpsv2.1"], {"thresholds": [1, 2]}),
        (["hpsv2.1"], {"weights": [0.0]}),
    ):
        with pytest.raises(ValueError):
            RewardSet(functions, **settings)
    assert not loaded


def test_the_trainer_finds_mistakes_before_it_loads_the_pipeline(loaded, tmp_path):
    for reward, settings, message in (
        ("hpsv2", {}, r"no built-in reward 'hpsv2'\. Did you mean"),
        (["hpsv2.1", darkness], {"reward_weights": [1.0]}, "reward_weights has 1 entries for 2 rewards"),
        ("hpsv2.1", {"reward_threshold": [1.0, 2.0]}, "reward_threshold has 2 entries for 1 rewards"),
    ):
        with pytest.raises(ValueError, match=message):
            LeapAlignTrainer("./no/pipeline", reward, LeapAlignConfig(str(tmp_path), **settings), train_dataset=["a"])
    with pytest.raises(ValueError, match="no/pipeline"):
        LeapAlignTrainer("./no/pipeline", "hpsv2.1", LeapAlignConfig(str(tmp_path)), train_dataset=["a"])
    assert not loaded  # nor a reward before the pipeline is known to be there


def test_the_trainer_takes_a_name(loaded, tmp_path):
    from training_cases import SETTINGS

    from examples.tiny import tiny_flux

    config = LeapAlignConfig(
        str(tmp_path), **{**SETTINGS, "max_steps": 1, "sample_kwargs": {"max_sequence_length": 16}}
    )
    trainer = LeapAlignTrainer(tiny_flux(), "hpsv2.1", config, train_dataset=["a red circle"])
    assert not loaded[1:] and trainer.rewards.thresholds == [0.55]
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
