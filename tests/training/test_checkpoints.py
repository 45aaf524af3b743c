"""Resuming, and files that mean what was trained."""

import hashlib
import json
import logging
import random
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_cases import (
    PROMPTS,
    blueness,
    checkpoint_tensors,
    logged,
    make_trainer,
    redness,
    same,
    sample,
    trained_weights,
)
from transformers import TrainingArguments

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign import LeapAlignConfig
from trl_leapalign.adapters.saving import LORA_FILE, _compare, loading_lines, save_trained
from trl_leapalign.training import saving
from trl_leapalign.training.checkpoints import (
    SEAL_FILE,
    UNFINISHED_FILE,
    check_whole,
    last_checkpoint,
    rotate_checkpoints,
)
from trl_leapalign.training.resuming import LOGGED, SAME

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def random_prompt():
    color = random.choice(["red", "green", "blue"])
    shape = ["circle", "square", "triangle"][np.random.randint(3)]
    return f"a {color} {shape}", {"number": torch.randint(1000, ()).item()}


def shifted():
    pipeline = tiny_flux()
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, base_shift=0.9)
    return pipeline


# Resuming

RUNS = {
    "dataset": {"prompts": PROMPTS, "gradient_accumulation_steps": 2},
    "prompt_function": {"prompts": random_prompt},
    "average": {"ema_decay": 0.7},
    "full": {"full_finetuning": True, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("run", RUNS)
def test_resuming_equals_never_stopping(run, tmp_path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "linear",
        "sample_num_steps": 2,
        **RUNS[run],
    }
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(trained_weights(straight), trained_weights(resumed))
    assert logged(straight)[:4] == logged(resumed)[:4]
    tensors = checkpoint_tensors(tmp_path / "straight" / "checkpoint-4")
    assert {"optimizer.pt", "scheduler.pt", "trained_parameters.safetensors"} < tensors.keys()
    assert ("weight_average.pt" in tensors) == (run == "average")
    assert same(tensors, checkpoint_tensors(tmp_path / "resumed" / "checkpoint-4"))
    middle = checkpoint_tensors(tmp_path / "straight" / "checkpoint-2")["trained_parameters.safetensors"]
    assert not same(middle, tensors["trained_parameters.safetensors"])
    assert torch.equal(sample(straight.pipeline), sample(resumed.pipeline))


def test_going_on_beyond_the_end_equals_a_longer_training(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "sample_num_steps": 2}
    make_trainer(tmp_path, max_steps=2, **settings).train()
    longer = make_trainer(tmp_path, max_steps=3, **settings)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    straight = make_trainer(tmp_path / "other", max_steps=3, **settings)
    straight.train()
    assert same(trained_weights(longer), trained_weights(straight))
    assert [entry["step"] for entry in logged(longer)] == [1, 2, 3, 3]


def test_seconds_per_step_count_the_steps_of_this_run(tmp_path):
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, sample_num_steps=2).train()
    resumed = make_trainer(tmp_path, max_steps=4, sample_num_steps=2)
    resumed.train(resume_from_checkpoint=True)
    seconds, runtime = resumed.state.log_history[-2]["seconds_per_step"], resumed.state.log_history[-1]["train_runtime"]
    assert runtime - 0.01 < seconds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"full_finetuning": True}, "saved with full_finetuning=False, not True"),
        ({"learning_rate": 1e-3}, "saved with learning_rate=0.01, not 0.001"),
        ({"ema_decay": 0.9}, "saved with ema_decay=None, not 0.9"),
        ({"before": {"ema_decay": 0.8}}, "saved with ema_decay=0.8, not None"),
        ({"ema_decay": 0.9, "before": {"ema_decay": 0.8}}, "saved with ema_decay=0.8, not 0.9"),
        ({"method": "refl", "sample_num_steps": 4}, r"saved with method=.LeapAlign\(.*sample_num_steps=2, not 4"),
        ({"seed": 43}, "saved with seed=42, not 43; data_seed=42, not 43. Resume with what it was saved with"),
        ({"data_seed": 3}, "saved with data_seed=42, not 3"),
        ({"gradient_accumulation_steps": 2}, "samples_per_update=1, not 2"),
        ({"draw_group_size": 1, "before": {"gradient_accumulation_steps": 2}}, "draw_group_size=2, not 1"),
        ({"arguments": {"peft_config": LoraConfig(r=4, lora_alpha=4)}}, "not a checkpoint of this"),
        ({"arguments": {"peft_config": LoraConfig(r=32, target_modules=["to_q"])}}, "adapter_scales=.*'1.0': 17"),
        ({"sample_guidance_scale": 2.0}, "saved with sample_guidance_scale=None, not 2.0"),
        ({"sample_height": 32}, "saved with sample_height=16, not 32"),
        ({"sample_kwargs": {"true_cfg_scale": 2.0}}, "saved with sample_kwargs={}, not {'true_cfg_scale': 2.0}"),
        ({"prompts": PROMPTS[:-1]}, "saved with prompts='5 rows .*, not '4 rows"),
        ({"prompts": [*PROMPTS[1:], PROMPTS[0]]}, "saved with prompts="),
        ({"prompts": lambda: ("a cat", {})}, r"saved with prompts='5 rows .*, not '.*lambda.*\(\)"),
        ({"train_sampling_strategy": "sequential"}, "saved with train_sampling_strategy='random', not 'sequential'"),
        ({"reward": blueness}, "saved with rewards={.*redness.*blueness"),
        ({"reward_weights": [2.0]}, r"saved with reward_weights=\[1.0\], not \[2.0\]"),
        ({"reward_threshold": [9.0]}, r"saved with reward_threshold=\[None\], not \[9.0\]"),
        ({"base_penalty": 0.1}, "saved with base_penalty=None, not 0.1"),
        ({"bf16": True, "use_cpu": True, "before": {"use_cpu": True}}, "saved with bf16=False, not True"),
        ({"weight_decay": 0.5}, "saved with weight_decay=0.0001, not 0.5"),
        ({"adam_beta1": 0.5}, "saved with adam_beta1=0.9, not 0.5"),
        ({"optim": "sgd"}, "saved with optim='adamw_torch.*', not 'sgd'"),
        ({"lr_scheduler_type": "linear"}, "saved with lr_scheduler_type='constant', not 'linear'"),
        ({"warmup_steps": 3}, "saved with warmup_steps=0, not 3"),
        ({"pipeline": tiny_sd3}, "saved with pipeline='FluxPipeline', not 'StableDiffusion3Pipeline'"),
        ({"pipeline": partial(tiny_flux, seed=1)}, "saved with base_weights={'text_encoder': .*'vae': "),
        ({"pipeline": shifted}, "saved with scheduler={'scheduler': {'base_shift': 0.5}}, not .*'base_shift': 0.9"),
        ({"max_steps": 1, "before": {"max_steps": 2, "save_steps": 2}}, "after 2 updates, but max_steps=1"),
    ],
)
def test_resuming_from_another_training_is_refused(settings, message, tmp_path):
    settings, before = dict(settings), settings.get("before", {})
    settings.pop("before", None)
    start = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "sample_num_steps": 2}
    make_trainer(tmp_path, **{**start, **before}).train()
    pipeline = settings.pop("pipeline", tiny_flux)()
    other = make_trainer(tmp_path, pipeline, **{"sample_num_steps": 2, **settings})
    weights = trained_weights(other)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)
    assert same(weights, trained_weights(other))


def test_each_setting_of_our_own_is_decided():
    own = {option.name for option in fields(LeapAlignConfig)} - {option.name for option in fields(TrainingArguments)}
    compared_otherwise = {"method", "method_kwargs", "reward_weights", "reward_threshold", "pipeline_columns"}
    compared_otherwise |= {"train_prompts", "prompt_column", "denoisers", "model_init_kwargs"}
    assert own == own & {*SAME, *LOGGED} | compared_otherwise | {"eval_prompts", "dry_run"}


def test_what_may_change_is_logged(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "sample_num_steps": 2}
    make_trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2, **settings).train()
    changed = {"per_device_train_batch_size": 2, "max_grad_norm": 0.5, "max_steps": 2, "reward": lambda i, p, m: 0}
    changed["reward"] = with_code(changed["reward"])
    resumed = make_trainer(tmp_path, **changed, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    text = caplog.text
    assert "max_steps=1, now 2; max_grad_norm=1.0, now 0.5; per_device_train_batch_size=1, now 2" in text
    assert "gradient_accumulation_steps=2, now 1" in text and "reward_settings={'redness': {'code':" in text


def with_code(_):
    """Another reward of the same name."""

    def changed(images, prompts, metadata):
        return 0.5 * redness(images, prompts, metadata)

    changed.__name__ = "redness"
    return changed


def test_nothing_is_logged_if_nothing_changed(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "sample_num_steps": 2}
    make_trainer(tmp_path, max_steps=1, **settings).train()
    finished = make_trainer(tmp_path, max_steps=1, resume_from_checkpoint=True, **settings)
    finished.train()  # the config's setting has an effect
    assert finished.state.global_step == 1
    ours = [record for record in caplog.records if record.name.startswith("trl_leapalign")]
    [record] = [record for record in ours if record.levelno >= logging.WARNING]
    assert "saved after all 1 updates: there is nothing left to train" in record.getMessage()
    make_trainer(tmp_path / "new", max_steps=1, resume_from_checkpoint=str(tmp_path / "none")).train(False)


def test_a_loaded_adapter_goes_on_from_its_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "sample_num_steps": 2, "max_steps": 2}
    straight = make_trainer(tmp_path, **settings)
    straight.train()
    pipeline = tiny_flux()
    pipeline.load_lora_weights(tmp_path / "checkpoint-1", adapter_name="mine")
    resumed = make_trainer(tmp_path / "other", pipeline, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert list(trained_weights(straight).values()) and all(
        torch.equal(*pair)
        for pair in zip(trained_weights(straight).values(), trained_weights(resumed).values(), strict=True)
    )


def test_a_loaded_adapter_of_another_scale_is_refused(tmp_path):
    """Files of adapters have the scale in lora_B, so the checkpoint's own weights would act at another strength."""
    config = LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION)
    settings = {"save_strategy": "steps", "save_steps": 1, "sample_num_steps": 2, "max_steps": 1}
    make_trainer(tmp_path, arguments={"peft_config": config}, **settings).train()
    pipeline = tiny_flux()
    pipeline.load_lora_weights(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"adapter_scales={'transformer': {'0.5': 7}}, not .*'1.0': 7"):
        make_trainer(tmp_path, pipeline, **settings).train(resume_from_checkpoint=True)


def test_resuming_from_no_checkpoint_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    start = trained_weights(trainer)
    for folder, message in ((tmp_path, "is not a whole checkpoint"), (tmp_path / "missing", "does not exist")):
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert same(start, trained_weights(trainer))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "run.json", "trained_parameters.safetensors", "rng_state.pth", SEAL_FILE]
)
def test_resuming_from_a_part_of_a_checkpoint_is_refused(name, tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, sample_num_steps=2).train()
    (tmp_path / "checkpoint-1" / name).unlink()
    trainer = make_trainer(tmp_path, sample_num_steps=2)
    for asked in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=f"checkpoint-1 is not a whole checkpoint: it has no {name}"):
            trainer.train(resume_from_checkpoint=asked)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints."""
    directory = tmp_path_factory.mktemp("saved")
    make_trainer(directory, max_steps=2, save_strategy="steps", save_steps=1, sample_num_steps=2).train()
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def test_a_checkpoint_lists_all_of_its_files(saved):
    seal = json.loads((saved / "checkpoint-2" / SEAL_FILE).read_text())
    files = {path.relative_to(saved / "checkpoint-2").as_posix() for path in (saved / "checkpoint-2").rglob("*")}
    assert files == {*seal["files"], SEAL_FILE} and len(files) > 7 and seal["number"] == 2
    for name, known in seal["files"].items():
        content = (saved / "checkpoint-2" / name).read_bytes()
        assert known == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "rng_state.pth", LORA_FILE, SEAL_FILE])
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_resumed(name, damage, copied, caplog):
    file = copied / "checkpoint-2" / name
    if (name, damage) == (SEAL_FILE, "flipped"):
        pytest.skip("a digest of another file is what differs then")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=f"checkpoint-2 is not a whole checkpoint: its {name} is damaged"):
        check_whole(copied / "checkpoint-2")
    assert last_checkpoint(copied) == str(copied / "checkpoint-1")
    assert f"checkpoint-2 is not a whole checkpoint: its {name} is damaged" in caplog.text


def test_an_unfinished_checkpoint_is_not_resumed_and_removed_at_the_next_save(copied):
    (copied / "checkpoint-2" / SEAL_FILE).unlink()
    (copied / "checkpoint-2" / UNFINISHED_FILE).touch()
    (copied / "removed-checkpoint-3").mkdir()  # its removal was stopped
    (copied / "checkpoint-4").mkdir()  # stopped at once
    (copied / "checkpoint-5").mkdir()
    (copied / "checkpoint-5" / "adapter").touch()  # not ours
    with pytest.raises(ValueError, match="checkpoint-2 is not a whole checkpoint: it was not written to its end"):
        check_whole(copied / "checkpoint-2")
    trainer = make_trainer(copied, max_steps=3, save_strategy="steps", save_steps=3, sample_num_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in copied.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-5"]


def test_the_checkpoint_that_was_written_last_is_resumed(copied):
    """Not the highest: that may be of an older training in the same folder."""
    (copied / "checkpoint-2").rename(copied / "checkpoint-8")
    make_trainer(copied, max_steps=1, save_strategy="steps", save_steps=1, sample_num_steps=2).train()
    assert last_checkpoint(copied) == str(copied / "checkpoint-1")


def test_only_whole_checkpoints_count_when_old_ones_are_removed(copied):
    (copied / "checkpoint-1").rename(copied / "checkpoint-9")
    (copied / "checkpoint-9" / "optimizer.pt").unlink()
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "sample_num_steps": 2}
    make_trainer(copied, save_total_limit=2, **settings).train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    assert sorted(path.name for path in copied.iterdir()) == ["checkpoint-4", "checkpoint-5", "checkpoint-9"]
    rotate_checkpoints(copied, 1, best=copied / "checkpoint-4")
    assert sorted(path.name for path in copied.iterdir()) == ["checkpoint-4", "checkpoint-5", "checkpoint-9"]
    rotate_checkpoints(copied, 1)
    assert sorted(path.name for path in copied.iterdir()) == ["checkpoint-5", "checkpoint-9"]


def test_weights_alone_cannot_be_resumed(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "sample_num_steps": 2, "max_steps": 1}
    make_trainer(tmp_path, save_only_model=True, **settings).train()
    with pytest.raises(ValueError, match="checkpoint-1 is not a whole checkpoint: it was saved with save_only_model"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)


def test_old_checkpoints_are_removed_after_the_new_one_is_sealed(copied, monkeypatch):
    def stopped(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "seal_checkpoint", stopped)
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "sample_num_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(copied, save_total_limit=1, **settings).train(resume_from_checkpoint=True)
    assert last_checkpoint(copied) == str(copied / "checkpoint-2")


# Weights that are not finite


@pytest.mark.parametrize("settings", [{"save_strategy": "steps", "save_steps": 1}, {}, {"max_steps": 2}], ids=str)
def test_weights_that_are_not_finite_are_never_saved_nor_left_silently(settings, tmp_path):
    trainer = make_trainer(tmp_path, **{"learning_rate": 1e39, "max_steps": 1, "sample_num_steps": 2, **settings})
    with pytest.raises(FloatingPointError, match=r"weights are not finite, such as .* learning_rate is too high"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        trainer.save_model(str(tmp_path / "saved"))
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        trainer.evaluate(PROMPTS)
    assert not (tmp_path / "saved").exists()


# The moving average


def test_the_average_is_what_is_left_and_saved(tmp_path):
    history = []
    trainer = make_trainer(
        tmp_path, max_steps=3, ema_decay=0.6, save_strategy="steps", save_steps=1, sample_num_steps=2
    )
    average = {name: value.double() for name, value in trained_weights(trainer).items()}
    trainer.train()
    for step in (1, 2, 3):
        weights = load_file(tmp_path / f"checkpoint-{step}" / "trained_parameters.safetensors")
        average = {key: 0.6 * average[key] + 0.4 * weights[key].double() for key in weights}
        saved = load_file(tmp_path / f"checkpoint-{step}" / LORA_FILE)
        key = "transformer_blocks.0.attn.to_q"
        expected = average[f"denoisers.transformer.{key}.lora_B.default.weight"]
        torch.testing.assert_close(saved[f"transformer.{key}.lora_B.weight"].double(), expected, rtol=1e-5, atol=1e-9)
        history.append(weights)
    for name, value in trained_weights(trainer).items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-9)
    assert not same(trained_weights(trainer), history[-1])


# Adapters in diffusers' format


def disturb(trainer, seed=0):
    """Give an adapter weights that change images a lot; some training steps would do the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.rollout_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


ADAPTERS = {
    "default": None,
    "alpha = r": LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION),
    "alpha != r": LoraConfig(r=4, lora_alpha=3, target_modules=ATTENTION),
    "rslora": LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=ATTENTION),
    "patterns": LoraConfig(
        r=4, lora_alpha=6, target_modules=ATTENTION, rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 3}
    ),
    "dora": LoraConfig(r=4, lora_alpha=3, target_modules=ATTENTION, use_dora=True),
    "no targets": LoraConfig(r=4, lora_alpha=4),
}


@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_pipeline_with_the_saved_adapter_gives_the_same_images(name, build, tmp_path):
    trainer = make_trainer(tmp_path / "run", build(), max_steps=1, arguments={"peft_config": ADAPTERS[name]})
    trainer.train()
    disturb(trainer)
    trainer.save_model(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == [LORA_FILE]
    fresh = build()
    base = sample(fresh)
    fresh.load_lora_weights(tmp_path / "adapter")
    images = sample(trainer.pipeline)
    assert (images - base).abs().max() > 1e-3
    if name in ("default", "alpha = r", "no targets"):
        assert torch.equal(sample(fresh), images)
    else:
        assert (sample(fresh) - images).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["default", "alpha != r", "rslora", "patterns"])
def test_the_file_holds_alpha_equal_to_the_rank(name, tmp_path):
    trainer = make_trainer(tmp_path, arguments={"peft_config": ADAPTERS[name]})
    disturb(trainer)
    trainer.save_model(tmp_path)
    weights = load_file(tmp_path / LORA_FILE)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        metadata = file.metadata()["lora_adapter_metadata"]
    layers = {key.rpartition(".lora_")[0] for key in weights}
    assert weights.keys() == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert all(key.startswith("transformer.") for key in weights)
    assert not any(part in key for key in weights for part in ("base_model", "default", "module", "alpha"))
    assert '"transformer.use_rslora": false' in metadata
    config = trainer.pipeline.transformer.peft_config["default"]
    assert f'"transformer.r": {config.r}' in metadata and f'"transformer.lora_alpha": {config.r}' in metadata
    for layer in layers:
        module = trainer.pipeline.transformer.get_submodule(layer.removeprefix("transformer."))
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        rank = config.rank_pattern.get(layer.rpartition(".")[-1], config.r)
        alpha = config.alpha_pattern.get(layer.rpartition(".")[-1], config.lora_alpha)
        scale = alpha / rank**0.5 if config.use_rslora else alpha / rank
        assert torch.equal(weights[f"{layer}.lora_A.weight"], a) and a.shape[0] == rank
        torch.testing.assert_close(weights[f"{layer}.lora_B.weight"], b * scale, rtol=1e-7, atol=0)


def test_a_bf16_pipeline_saves_the_float32_adapter(tmp_path):
    trainer = make_trainer(tmp_path, tiny_flux().to(torch.bfloat16))
    disturb(trainer)
    trainer.save_model(tmp_path)
    weights = load_file(tmp_path / LORA_FILE)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any((value.bfloat16().float() != value).any() for value in weights.values())


def test_training_goes_on_from_a_loaded_adapter(tmp_path):
    first = make_trainer(tmp_path / "first", arguments={"peft_config": ADAPTERS["alpha != r"]})
    disturb(first)
    first.save_model(tmp_path / "adapter")
    pipeline = tiny_flux()
    pipeline.load_lora_weights(tmp_path / "adapter", adapter_name="mine")
    loaded = sample(pipeline)
    second = make_trainer(tmp_path / "second", pipeline)
    assert torch.equal(sample(pipeline), loaded)
    start = trained_weights(second)
    second.train()
    assert not any(torch.equal(start[key], value) for key, value in trained_weights(second).items())
    second.save_model(tmp_path / "result")
    assert not any("mine" in key for key in load_file(tmp_path / "result" / LORA_FILE))
    fresh = tiny_flux()
    fresh.load_lora_weights(tmp_path / "result")
    assert torch.equal(sample(fresh), sample(pipeline)) and not torch.equal(sample(fresh), loaded)


def test_the_strength_of_a_loaded_adapter_is_kept(tmp_path):
    first = make_trainer(tmp_path / "first", arguments={"peft_config": ADAPTERS["alpha = r"]})
    disturb(first)
    first.save_model(tmp_path / "adapter")
    pipeline = tiny_flux()
    pipeline.load_lora_weights(tmp_path / "adapter", adapter_name="mine")
    pipeline.set_adapters("mine", 0.5)
    make_trainer(tmp_path / "second", pipeline).save_model(tmp_path / "result")
    fresh = tiny_flux()
    fresh.load_lora_weights(tmp_path / "result")
    assert (sample(fresh) - sample(pipeline)).abs().max() < 1e-5


def test_an_adapter_on_a_frozen_part_is_refused(tmp_path):
    """It would be a part of the images in training, but not of the file."""
    pipeline = tiny_flux()
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="The text_encoder has an adapter"):
        make_trainer(tmp_path, pipeline)


def test_full_finetuning_of_an_adapted_denoiser_is_refused(tmp_path):
    pipeline = tiny_flux()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="The transformer has an adapter"):
        make_trainer(tmp_path, pipeline, full_finetuning=True)


class PlainPipeline(FluxPipeline):
    """Knows nothing of adapters on its transformer."""

    @classmethod
    def save_lora_weights(cls, save_directory, text_encoder_lora_layers=None):
        raise AssertionError("not for a transformer")


@pytest.mark.parametrize("name", ["default", "rslora", "patterns"])
def test_a_pipeline_that_cannot_save_an_adapter_gets_one_for_its_transformer(name, tmp_path):
    pipeline = PlainPipeline(**tiny_flux().components)
    trainer = make_trainer(tmp_path / "run", pipeline, arguments={"peft_config": ADAPTERS[name]})
    disturb(trainer)
    trainer.save_model(tmp_path / "adapter")
    fresh = tiny_flux()
    base = sample(fresh)
    exec("\n".join(loading_lines(pipeline, trainer.denoisers, str(tmp_path / "adapter"))), {"pipeline": fresh})
    assert (sample(fresh) - sample(pipeline)).abs().max() < 1e-5 < (sample(fresh) - base).abs().max()


# All weights


def test_full_finetuning_saves_a_folder_for_from_pretrained(tmp_path):
    trainer = make_trainer(tmp_path, full_finetuning=True, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "weights")
    fresh = tiny_flux()
    base = sample(fresh)
    fresh.transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "weights" / "transformer")
    assert same(dict(fresh.transformer.state_dict()), dict(trainer.pipeline.transformer.state_dict()))
    for parameter in fresh.transformer.parameters():
        parameter.data = parameter.data.clone()  # memory that begins elsewhere makes sums round otherwise
    assert torch.equal(sample(fresh), sample(trainer.pipeline)) and not torch.equal(sample(fresh), base)


# What is read back


def test_every_difference_of_a_file_is_noticed(tmp_path):
    weights = {"transformer.a": torch.ones(2), "transformer.b": torch.zeros(3)}
    _compare(weights, dict(weights), tmp_path)
    for wrong in (
        {"transformer.a": torch.ones(2)},
        {**weights, "transformer.c": torch.ones(1)},
        {**weights, "transformer.b": torch.full((3,), 1e-30)},
        {**weights, "transformer.b": torch.zeros(4)},
        {**weights, "transformer.a": torch.full((2,), float("nan"))},
    ):
        with pytest.raises(RuntimeError, match="1 tensors are missing, surplus or different, such as"):
            _compare(wrong, weights, tmp_path)


class LossyPipeline(FluxPipeline):
    """Writes an adapter's file without one of its layers."""

    @classmethod
    def save_lora_weights(cls, save_directory, transformer_lora_layers=None, transformer_lora_adapter_metadata=None):
        super().save_lora_weights(save_directory, transformer_lora_layers)
        weights = load_file(save_directory / LORA_FILE)
        weights.popitem()
        save_file(weights, save_directory / LORA_FILE)


def test_a_pipeline_that_drops_layers_is_noticed(tmp_path):
    pipeline = LossyPipeline(**tiny_flux().components)
    trainer = make_trainer(tmp_path, pipeline)
    with pytest.raises(RuntimeError, match="does not hold the weights that were trained: 1 tensors"):
        save_trained(pipeline, trainer.denoisers, tmp_path, full_finetuning=False)


# The card


def test_model_card(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "base"), [redness])
    trainer.create_model_card(license="mit", tags="mine")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model is None and card.data.license == "mit" and card.data.library_name == "diffusers"
    assert {"lora", "text-to-image", "trl", "leapalign", "diffusers", "mine"} <= set(card.data.tags)
    assert f'pipeline.load_lora_weights("run", weight_name="{LORA_FILE}")' in card.text and "redness" in card.text
    trainer.create_model_card(finetuned_from="someone/model")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == "someone/model" and 'from_pretrained("someone/model", ' in card.text


def test_model_card_of_all_weights(tmp_path):
    trainer = make_trainer(tmp_path / "run", full_finetuning=True)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "lora" not in card.data.tags
    assert 'type(pipeline.transformer).from_pretrained("run", subfolder="transformer", torch_dtype=' in card.text
