"""Resuming, and files that mean what was trained."""

import random
import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_cases import PROMPTS, checkpoint_tensors, logged, make_trainer, redness, same, sample, trained_weights

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign.adapters.saving import LORA_FILE, _compare, loading_lines, save_trained
from trl_leapalign.training.checkpoints import last_checkpoint

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def random_prompt():
    color = random.choice(["red", "green", "blue"])
    shape = ["circle", "square", "triangle"][np.random.randint(3)]
    return f"a {color} {shape}", {"number": torch.randint(1000, ()).item()}


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
        (
            {"full_finetuning": True, "before": {"learning_rate": 1e-5}, "learning_rate": 1e-5},
            "not a checkpoint of this",
        ),
        ({"learning_rate": 1e-3}, "saved with learning_rate=0.01, not 0.001"),
        ({"ema_decay": 0.9}, "saved with ema_decay=None, not 0.9"),
        ({"before": {"ema_decay": 0.8}}, "saved with ema_decay=0.8, not None"),
        ({"ema_decay": 0.9, "before": {"ema_decay": 0.8}}, "saved with ema_decay=0.8, not 0.9"),
        ({"method": "refl", "sample_num_steps": 4}, r"saved with method=.LeapAlign\(.*sample_num_steps=2, not 4"),
        ({"seed": 43}, "saved with seed=42, not 43; data_seed=42, not 43. Resume with what it was saved with"),
        ({"data_seed": 3}, "saved with data_seed=42, not 3"),
        ({"gradient_accumulation_steps": 2}, "samples_per_update=1, not 2"),
        ({"draw_group_size": 1, "before": {"gradient_accumulation_steps": 2}}, "draw_group_size=2, not 1"),
        ({"arguments": {"peft_config": LoraConfig(r=4, target_modules=ATTENTION)}}, "not a checkpoint of this"),
        ({"arguments": {"peft_config": LoraConfig(r=32, target_modules=["to_q"])}}, "not a checkpoint of this"),
    ],
)
def test_resuming_from_another_training_is_refused(settings, message, tmp_path):
    settings, before = dict(settings), settings.get("before", {})
    settings.pop("before", None)
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, sample_num_steps=2, **before).train()
    other = make_trainer(tmp_path, **{"sample_num_steps": 2, **settings})
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_resuming_from_no_checkpoint_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    start = trained_weights(trainer)
    for folder, message in ((tmp_path, "is not a whole checkpoint"), (tmp_path / "missing", "does not exist")):
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert same(start, trained_weights(trainer))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "run.json", "trained_parameters.safetensors"])
def test_resuming_from_a_part_of_a_checkpoint_is_refused(name, tmp_path):
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, sample_num_steps=2).train()
    (tmp_path / "checkpoint-1" / name).unlink()
    trainer = make_trainer(tmp_path, sample_num_steps=2)
    with pytest.raises(ValueError, match=f"is not a whole checkpoint: it has no {name}"):
        trainer.train(resume_from_checkpoint=True)


def test_the_last_whole_checkpoint_is_resumed(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, sample_num_steps=2).train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-2" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


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
    assert 'pipeline.load_lora_weights("run")' in card.text and "redness" in card.text
    trainer.create_model_card(finetuned_from="someone/model")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == "someone/model" and 'from_pretrained("someone/model")' in card.text


def test_model_card_of_all_weights(tmp_path):
    trainer = make_trainer(tmp_path / "run", full_finetuning=True)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "lora" not in card.data.tags
    assert (
        'pipeline.transformer = type(pipeline.transformer).from_pretrained("run", subfolder="transformer")' in card.text
    )
