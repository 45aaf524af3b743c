"""What the real client sends to a Hub on this machine: weights and cards, no pickle, no secret."""

import base64
import json
import logging
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import hub_server
from safetensors.torch import load
from training_cases import make_config, make_trainer

from examples.tiny import tiny_flux
from trl_leapalign.adapters.loading import load_adapter
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


def test_settings_that_json_cannot_hold_are_described_where_trackers_read_them(tmp_path):
    def look(pipe, step, time, tensors):
        return {}

    ones = torch.ones(2, 3, dtype=torch.bfloat16)
    config = make_config(
        tmp_path, sample_kwargs={"callback_on_step_end": look, "mask": ones, "sizes": (1, np.int64(2))}
    )
    described = json.loads(config.to_json_string())["sample_kwargs"]
    assert described["sizes"] == [1, 2] and described["callback_on_step_end"].endswith(".look")
    assert described["mask"].startswith("torch.bfloat16 Tensor 2x3, SHA-256 ")
    other = make_config(tmp_path, sample_kwargs={"mask": ones * 2}).to_dict()["sample_kwargs"]
    assert other["mask"] != described["mask"]
    trainer = make_trainer(tmp_path, report_to="tensorboard", sample_kwargs={"callback_on_step_end": look}, max_steps=1)
    trainer.train()
    assert trainer.args.sample_kwargs["callback_on_step_end"] is look
    assert list(tmp_path.rglob("*.tfevents.*"))


def test_saving_and_pushing_make_one_commit_and_a_licence_one_more(hub, tmp_path):
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_token=TOKEN, hub_model_id="user/once", max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()
    assert [commit.message for commit in hub.repositories["user/once"].commits] == ["initial commit", "Model save"]
    sent = len(hub.large_files)
    licence = {"license_name": "flux-1-dev-non-commercial-license", "license_link": "LICENSE.md"}
    trainer.push_to_hub(**licence)
    last = hub.repositories["user/once"].commits[-1]
    assert last.message == "End of training" and len(hub.large_files) == sent
    assert b"license: other\nlicense_name: flux-1-dev-non-commercial-license\n" in last.files["README.md"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'licence'"):
        trainer.push_to_hub(licence="mit")
    assert hub.repositories["user/once"].commits[-1] is last


def test_no_repository_is_made_before_the_dry_run(hub, tmp_path):
    def broken(images, prompts, metadata):
        return images.detach().flatten(1).mean(1)

    settings = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "user/new", "dry_run": True}
    with pytest.raises((ValueError, RuntimeError)):
        make_trainer(tmp_path, reward=broken, **settings)
    assert not hub.repositories
    trainer = make_trainer(tmp_path, **settings, hub_private_repo=True)
    assert hub.repositories["user/new"].private and trainer.hub_model_id == "user/new"
    other = make_trainer(tmp_path, hub_model_id="user/later", hub_token=TOKEN)
    assert "user/later" not in hub.repositories
    other.push_to_hub()
    assert LORA in hub.repositories["user/later"].commits[-1].files


def test_a_card_that_the_hub_refuses_stops_the_push_before_any_weights(hub, tmp_path):
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_token=TOKEN, hub_model_id="user/refused")
    hub.card_errors.append('"license" must be one of ...')
    with pytest.raises(ValueError, match="must be one of"):
        trainer.push_to_hub()
    assert not hub.large_files and len(hub.repositories["user/refused"].commits) == 1


def test_every_failed_push_is_said_not_the_last_alone(hub, tmp_path, caplog):
    trainer = make_trainer(
        tmp_path, push_to_hub=True, hub_token=TOKEN, hub_model_id="user/x", hub_strategy="every_save"
    )
    (tmp_path / "checkpoint-1").mkdir()
    kept = hub.repositories.pop("user/x")
    with caplog.at_level(logging.WARNING):
        trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
        trainer.push_in_progress.wait_until_done()
        hub.repositories["user/x"] = kept
        trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
        assert caplog.text.count("A push during the training failed: ") == 1
        trainer._finish_current_push()
    assert caplog.text.count("A push during the training failed: ") == 1
    assert kept.commits[-1].message == "Training in progress, step 0"


def test_adapters_are_saved_and_pushed_in_bfloat16(hub, tmp_path):
    settings = {"push_to_hub": True, "hub_token": TOKEN, "max_steps": 1}
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(tmp_path / dtype, **settings, hub_model_id=f"user/{dtype}", adapter_dtype=dtype)
        trainer.train()
        trainer.push_to_hub()
        content = hub.repositories[f"user/{dtype}"].commits[-1].files[LORA]
        sizes[dtype] = load(content)
        assert {value.dtype for value in sizes[dtype].values()} == {getattr(torch, dtype)}
    assert all(torch.equal(value.bfloat16(), sizes["bfloat16"][name]) for name, value in sizes["float32"].items())
    fresh = tiny_flux()
    load_adapter(fresh, "user/bfloat16")
    assert {p.dtype for p in fresh.transformer.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="adapter_dtype='float8' is unknown"):
        make_config(tmp_path, adapter_dtype="float8")
    with pytest.raises(ValueError, match="is for adapters, but full_finetuning saves all weights"):
        make_config(tmp_path, adapter_dtype="bfloat16", full_finetuning=True)
