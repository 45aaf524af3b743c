"""What the real client sends to a Hub on this machine: weights and cards, no pickle, no secret."""

import base64
import json
import logging
import pickletools
import zipfile
from pathlib import Path

import pytest
import torch
from hub_server import hub_server
from safetensors.torch import load
from training_cases import make_config, make_trainer

from examples.tiny import tiny_flux
from trl_leapalign.cli.main import main
from trl_leapalign.training.publishing import published_files

TOKEN = "hf_" + "Secret0123456789" * 2
OTHER = "sk-" + "another9876543210"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server() as hub, hub.connected(monkeypatch, tmp_path / "cache"):
        yield hub


def check_nothing_leaked(hub, *secrets: str) -> None:
    """No secret in any encoding that the client uses, and no pickle, in all that the server received."""
    contents = [*hub.received, *hub.large_files.values()]
    for body in hub.received:
        for line in body.splitlines():
            if line.startswith(b'{"key": "file"'):
                contents.append(base64.b64decode(json.loads(line)["value"]["content"]))
    assert len(contents) > 5
    for content in contents:
        assert not any(secret.encode() in content for secret in secrets)
        assert not any(base64.b64encode(secret.encode())[:-4] in content for secret in secrets)
        assert not is_pickle(content)
    names = [name for repository in hub.repositories.values() for commit in repository.commits for name in commit.files]
    assert names and not any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) for name in names)


def is_pickle(content: bytes) -> bool:
    if content.startswith(b"PK\x03\x04"):  # torch.save
        return True
    try:
        return sum(1 for _ in pickletools.genops(content)) > 1
    except Exception:  # of many kinds, for what is none
        return False


def test_the_search_finds_pickles(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "optimizer.pt")
    assert is_pickle((tmp_path / "optimizer.pt").read_bytes()) and zipfile.is_zipfile(tmp_path / "optimizer.pt")
    torch.save([1, 2], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert is_pickle((tmp_path / "old.pt").read_bytes())
    assert not is_pickle(b"# A card") and not is_pickle(b'{"a": 1}')


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy_pushes_weights_and_no_secret(hub, tmp_path, strategy):
    output = tmp_path / "run"
    output.mkdir()
    torch.save({"token": TOKEN}, output / "training_args.bin")  # of an older version
    trainer = make_trainer(
        output,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_token=TOKEN,
        hub_strategy=strategy,
        hub_always_push=True,
        hub_model_id="user/tuned",
        ema_decay=0.9,
        report_to="tensorboard",
        sample_kwargs={"max_sequence_length": 64},
    )
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()
    assert hub.tokens - {None} == {TOKEN}  # the client sends it as a header, where it belongs
    check_nothing_leaked(hub, TOKEN)
    files = hub.repositories["user/tuned"].commits[-1].files
    assert files[LORA] == (output / LORA).read_bytes() and "README.md" in files
    folders = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}.get(
        strategy, set()
    )
    assert {name.partition("/")[0] for name in files if name.startswith(("last-", "checkpoint-"))} == folders
    assert all(load(files[f"{folder}/{LORA}"]) for folder in folders)
    messages = [commit.message for commit in hub.repositories["user/tuned"].commits]
    assert ("Training in progress, step 1" in messages) == (strategy != "end")
    fresh = tiny_flux()
    fresh.load_lora_weights("user/tuned", token=TOKEN)
    assert fresh.get_active_adapters()


def test_the_command_pushes_no_secret(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", OTHER)
    (tmp_path / "prompts.txt").write_text(f"a cat\na dog that says {OTHER}\n")
    options = {"hub_model_id": "user/cli", "hub_token": TOKEN, "push_to_hub": "true", "max_steps": "1"}
    options |= {"sample_num_steps": "3", "sample_height": "16", "sample_width": "16", "report_to": "tensorboard"}
    options |= {"save_steps": "1", "per_device_train_batch_size": "1", "use_cpu": "true"}
    options |= {"pipeline": "examples.tiny:tiny_flux", "reward": "training_cases:redness"}
    options |= {"train_prompts": str(tmp_path / "prompts.txt"), "output_dir": str(tmp_path / "out")}
    main(["train", *(part for name, value in options.items() for part in (f"--{name}", value))])
    check_nothing_leaked(hub, TOKEN, OTHER)
    assert LORA in hub.repositories["user/cli"].commits[-1].files


def test_files_that_hold_a_secret_and_strangers_stay(tmp_path, caplog):
    for name in ("README.md", "transformer/config.json", "runs/a/events.out.tfevents.1", "notes.txt", ".env", "x.pkl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("fine")
    (tmp_path / "run.json").write_text(f'{{"reward": "{OTHER}"}}')
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / LORA).write_text("")
    with caplog.at_level(logging.WARNING):
        names = published_files(tmp_path, {OTHER})
    assert names == ["README.md", "runs/a/events.out.tfevents.1", "transformer/config.json"]
    assert "run.json" in caplog.text and OTHER not in caplog.text


def test_a_push_that_failed_is_said(hub, tmp_path, caplog):
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_token=TOKEN, hub_model_id="user/gone", save_strategy="steps")
    trainer.args.save_steps = trainer.state.save_steps = 1
    del hub.repositories["user/gone"]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "A push during the training failed: " in caplog.text and TOKEN not in caplog.text


def test_settings_are_written_down_without_secrets(tmp_path):
    config = make_config(
        tmp_path,
        hub_token=TOKEN,
        model_init_kwargs={
            "token": OTHER,
            "torch_dtype": torch.bfloat16,
            "proxies": {"https": f"http://me:{OTHER}@host"},
        },
    )
    assert config.model_init_kwargs["token"] == OTHER
    for text in (repr(config), str(config), config.to_json_string(), json.dumps(config.to_sanitized_dict())):
        assert TOKEN not in text and OTHER not in text
    assert config.model_init_kwargs["torch_dtype"] is torch.bfloat16  # still what was set
    assert config.to_dict()["model_init_kwargs"]["proxies"] == {"https": "http://host"}
    assert Path(config.output_dir) == tmp_path
