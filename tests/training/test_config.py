import dataclasses
import json
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from trl_leapalign import LeapAlign, LeapAlignConfig
from trl_leapalign.config_checks import UNSUPPORTED

OWN = [
    field for field in dataclasses.fields(LeapAlignConfig) if field.name not in TrainingArguments.__dataclass_fields__
]
CHANGED = {
    "max_steps": 300,
    "learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 50,
    "dataloader_pin_memory": False,
    "remove_unused_columns": False,
    "ddp_broadcast_buffers": False,
}


def docstring_entries():
    """Name, type, default and text of each documented argument."""
    entries, name = {}, None
    for line in LeapAlignConfig.__doc__.splitlines():
        match = re.fullmatch(r" {8}(\w+) \((.+?)(?:, \*optional\*)?(?:, defaults to `(.+)`)?\):", line)
        if match:
            name = match[1]
            entries[name] = (match[2], match[3], [])
        elif line.startswith(" " * 12):
            entries[name][2].append(line.strip())
    return {name: (kind, default, " ".join(lines)) for name, (kind, default, lines) in entries.items()}


def test_every_setting_is_documented_in_order():
    assert list(docstring_entries()) == [field.name for field in OWN]


@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_documentation_is_help_and_default(field):
    _, default, text = docstring_entries()[field.name]
    assert text == " ".join(field.metadata["help"].split())
    assert (default or "None").strip('"') == str(field.default)


def test_changed_defaults_are_those_documented(tmp_path):
    note = LeapAlignConfig.__doc__.split("default values different")[1]
    assert re.findall(r"> - `(\w+)`", note) == list(CHANGED)
    config = LeapAlignConfig(output_dir=str(tmp_path))
    assert {name: getattr(config, name) for name in CHANGED} == CHANGED
    assert LeapAlignConfig(output_dir=str(tmp_path), full_finetuning=True).learning_rate == 1e-5
    epochs = LeapAlignConfig(output_dir=str(tmp_path), num_train_epochs=2)
    assert (epochs.max_steps, epochs.num_train_epochs) == (-1, 2)
    base = TrainingArguments(output_dir=str(tmp_path))
    fields = [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in CHANGED]
    changed = {name for name in fields if getattr(config, name) != getattr(base, name)}
    assert changed <= {"num_train_epochs", "accelerator_config", "logging_dir"}


ARGV = [
    *("--output_dir", "out", "--max_steps", "7", "--sample_num_steps", "9", "--sample_guidance_scale", "3.5"),
    *("--sample_kwargs", '{"max_sequence_length": 77}', "--method_kwargs", '{"gradient_discount": 0.1}'),
    *("--reward_weights", "1", "0.5", "--reward_threshold", "0.3", "2", "--train_prompts", "prompts.txt"),
    *("--full_finetuning", "--denoisers", "transformer", "unet", "--dry_run", "False", "--ema_decay", "0.995"),
    *("--sample_height", "64", "--eval_num_steps", "4", "--method", "leapalign"),
]
YAML = """
output_dir: out
max_steps: 7
sample_num_steps: 9
sample_guidance_scale: 3.5
sample_kwargs: {max_sequence_length: 77}
method_kwargs: {gradient_discount: 0.1}
reward_weights: [1, 0.5]
reward_threshold: [0.3, 2]
train_prompts: prompts.txt
full_finetuning: true
denoisers: [transformer, unet]
dry_run: false
ema_decay: 0.995
sample_height: 64
eval_num_steps: 4
method: leapalign
"""
PARSED = {
    "max_steps": 7,
    "sample_num_steps": 9,
    "sample_guidance_scale": 3.5,
    "sample_kwargs": {"max_sequence_length": 77},
    "method_kwargs": {"gradient_discount": 0.1},
    "reward_weights": [1.0, 0.5],
    "reward_threshold": [0.3, 2.0],
    "train_prompts": "prompts.txt",
    "full_finetuning": True,
    "denoisers": ["transformer", "unet"],
    "dry_run": False,
    "ema_decay": 0.995,
    "sample_height": 64,
    "eval_num_steps": 4,
    "method": "leapalign",
    "learning_rate": 1e-5,
    "sample_width": None,
    "eval_prompts": None,
    "model_init_kwargs": {},
}


def check(config):
    assert {name: getattr(config, name) for name in PARSED} == PARSED
    assert config.build_method() == LeapAlign(gradient_discount=0.1)


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_parsing_the_command_line(parser):
    if parser is TrlParser:
        [config] = TrlParser([LeapAlignConfig]).parse_args_and_config(ARGV)
    else:
        [config] = HfArgumentParser([LeapAlignConfig]).parse_args_into_dataclasses(ARGV)
    check(config)


def test_parsing_yaml(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(YAML)
    [config] = TrlParser([LeapAlignConfig]).parse_args_and_config(["--config", str(file)])
    check(config)
    [config] = HfArgumentParser([LeapAlignConfig]).parse_yaml_file(str(file))
    check(config)
    [config] = TrlParser([LeapAlignConfig]).parse_args_and_config(["--config", str(file), "--sample_num_steps", "5"])
    assert config.sample_num_steps == 5


def test_one_threshold_and_lists_of_prompts_in_yaml(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("output_dir: out\nreward_threshold: 0.3\ntrain_prompts: [a cat, a dog]\n")
    [config] = TrlParser([LeapAlignConfig]).parse_args_and_config(["--config", str(file)])
    assert config.reward_threshold == [0.3] and config.train_prompts == ["a cat", "a dog"]


def test_one_entry_needs_no_list(tmp_path):
    config = LeapAlignConfig(output_dir=str(tmp_path), reward_weights=2, reward_threshold=0.3, denoisers="unet")
    assert (config.reward_weights, config.reward_threshold, config.denoisers) == ([2.0], [0.3], ["unet"])


def test_replace_keeps_values(tmp_path):
    config = LeapAlignConfig(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        sample_kwargs={"max_sequence_length": 8},
        reward_threshold=0.5,
        method=LeapAlign(num_leaps=3),
        learning_rate=3e-4,
    )
    other = dataclasses.replace(config, sample_num_steps=11)
    for field in (*OWN, *(TrainingArguments.__dataclass_fields__[name] for name in CHANGED)):
        expected = 11 if field.name == "sample_num_steps" else getattr(config, field.name)
        assert getattr(other, field.name) == expected, field.name
    assert dataclasses.replace(LeapAlignConfig(output_dir=str(tmp_path)), seed=1).max_steps == 300


def test_to_json_with_an_instance_of_a_method(tmp_path):
    config = LeapAlignConfig(output_dir=str(tmp_path), method=LeapAlign(gradient_discount=0.1))
    values = json.loads(config.to_json_string())
    assert values["method"] == repr(config.method) and "gradient_discount=0.1" in values["method"]
    assert config.to_sanitized_dict()["sample_num_steps"] == 25
    assert config.build_method() is config.method


def test_call_kwargs(tmp_path):
    config = LeapAlignConfig(output_dir=str(tmp_path), sample_height=32, sample_kwargs={"max_sequence_length": 8})
    assert config.call_kwargs() == {"num_inference_steps": 25, "height": 32, "max_sequence_length": 8}
    assert config.call_kwargs(4)["num_inference_steps"] == 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sample_num_steps": 0}, ValueError, "sample_num_steps=0 must be a whole number of at least 1"),
        ({"sample_num_steps": 2.5}, ValueError, "sample_num_steps=2.5"),
        ({"sample_num_steps": None}, ValueError, "sample_num_steps=None"),
        ({"eval_num_steps": True}, ValueError, "eval_num_steps=True"),
        ({"max_steps": 0}, ValueError, "max_steps=0 must be a whole number of at least 1"),
        ({"max_steps": -2}, ValueError, "max_steps=-2"),
        ({"max_steps": "7"}, ValueError, "max_steps='7'"),
        ({"num_train_epochs": 0}, ValueError, "num_train_epochs=0 must be a finite number above 0"),
        ({"num_train_epochs": float("nan")}, ValueError, "num_train_epochs=nan"),
        ({"per_device_train_batch_size": 0}, ValueError, "per_device_train_batch_size=0"),
        ({"per_device_eval_batch_size": 2.0}, ValueError, "per_device_eval_batch_size=2.0"),
        ({"gradient_accumulation_steps": None}, ValueError, "gradient_accumulation_steps=None"),
        ({"learning_rate": -1e-4}, ValueError, "learning_rate=-0.0001 must be a finite number of at least 0"),
        ({"learning_rate": "1e-4"}, ValueError, "learning_rate='1e-4'"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm=nan"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0"),
        ({"max_grad_norm": None}, ValueError, "max_grad_norm=None"),
        ({"sample_guidance_scale": "3"}, ValueError, "sample_guidance_scale='3' must be a finite number"),
        ({"full_finetuning": "no"}, ValueError, "full_finetuning='no' must be True or False"),
        ({"dry_run": 1}, ValueError, "dry_run=1 must be True or False"),
        ({"prompt_column": 3}, ValueError, "prompt_column=3 must be the name of a column"),
        ({"method_kwargs": {"gradient_discount": "0.3"}}, ValueError, "gradient_discount='0.3' must be"),
        ({"fp16": True, "use_cpu": True}, ValueError, "fp16=True needs a GPU"),
        ({"save_strategy": "best"}, ValueError, "save_strategy='best' never saves without evaluations"),
        ({"eval_num_steps": 0}, ValueError, "eval_num_steps=0"),
        ({"sample_height": -8}, ValueError, "sample_height=-8"),
        ({"sample_width": "64"}, ValueError, "sample_width='64'"),
        ({"ema_decay": 0.0}, ValueError, "ema_decay=0.0 must be a finite number between 0 and 1, which are excl"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay=1.0"),
        ({"ema_decay": float("nan")}, ValueError, "ema_decay=nan"),
        ({"sample_kwargs": "{"}, ValueError, "sample_kwargs='{' is not a JSON object"),
        ({"sample_kwargs": "[1]"}, ValueError, r"sample_kwargs must be a dict, got \[1\]"),
        ({"method_kwargs": [1]}, ValueError, "method_kwargs must be a dict"),
        ({"method": "refl_"}, ValueError, "method='refl_' is unknown; choose one of"),
        ({"method": 3}, TypeError, "method must be a name or a Method, got 3"),
        ({"method": LeapAlign}, TypeError, "method must be a name or a Method"),
        (
            {"method_kwargs": {"alpha": 1}},
            ValueError,
            r"'leapalign' has no settings \['alpha'\]; it has \['gradient_disc",
        ),
        (
            {"method_kwargs": {"gradient_discount": 2}},
            ValueError,
            "gradient_discount=2 must be a finite number between 0 and 1",
        ),
        (
            {"method": LeapAlign(), "method_kwargs": {"num_leaps": 3}},
            ValueError,
            "method_kwargs=.* would have no effect",
        ),
        ({"remove_unused_columns": True}, ValueError, "would drop the metadata"),
        ({"save_strategy": "epoch"}, ValueError, "save_strategy='epoch' is not supported"),
        ({"eval_strategy": "epoch"}, ValueError, "eval_strategy='epoch' is not supported"),
        ({"logging_strategy": "epoch"}, ValueError, "logging_strategy='epoch' is not supported"),
        ({"train_sampling_strategy": "group_by_length"}, ValueError, "train_sampling_strategy='group_by_length'"),
        (
            {"auto_find_batch_size": True},
            ValueError,
            "auto_find_batch_size=True is not supported: it would change which noise",
        ),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            ValueError,
            "activation_checkpointing_kwargs=.* is not supported",
        ),
        ({"torch_compile": True}, ValueError, "torch_compile=True is not supported: compile the denoiser instead"),
        ({"ignore_data_skip": True}, ValueError, "ignore_data_skip=True is not supported: a resumed run would repeat"),
        ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor=0.1 is not supported"),
        ({"label_names": ["x"]}, ValueError, "label_names=.'x'. is not supported"),
        ({"eval_accumulation_steps": 2}, ValueError, "eval_accumulation_steps=2 is not supported"),
        (
            {"accelerator_config": {"split_batches": True}},
            ValueError,
            "accelerator_config.split_batches is not support",
        ),
        (
            {
                **{"load_best_model_at_end": True, "save_only_model": True},
                **{"eval_strategy": "steps", "eval_steps": 50},
            },
            ValueError,
            "load_best_model_at_end needs whole checkpoints",
        ),
        ({"draw_group_size": 0}, ValueError, "draw_group_size=0 must be a whole number"),
        ({"draw_group_size": 2}, ValueError, "draw_group_size=2 must be a multiple of per_device_train_batch_size=4"),
        ({"draw_group_size": 8}, ValueError, "that divides the 4 samples of an update"),
        ({"draw_group_size": 8, "gradient_accumulation_steps": 3}, ValueError, "that divides the 12 samples"),
    ],
)
def test_impossible_settings_are_refused(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        LeapAlignConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize(
    "name",
    [
        *("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt"),
        *("num_inference_steps", "guidance_scale", "height", "width", "latents", "sigmas", "timesteps"),
    ],
)
def test_arguments_that_are_not_the_users_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"sample_kwargs cannot set '{name}': "):
        LeapAlignConfig(output_dir=str(tmp_path), sample_kwargs={name: 1})


def test_draw_groups_that_fit(tmp_path):
    for size in (4, 8, 24):
        LeapAlignConfig(output_dir=str(tmp_path), gradient_accumulation_steps=6, draw_group_size=size)


VALUES = {"include_num_input_tokens_seen": "all", "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_options_that_could_not_work_are_refused_by_name(name, tmp_path):
    kinds = {"label_names": ["labels"], "include_for_metrics": ["inputs"], "eval_accumulation_steps": 2}
    value = VALUES.get(name, kinds.get(name, {"use_reentrant": True} if name.endswith("kwargs") else True))
    with pytest.raises(ValueError, match=f"{name}=.* is not supported: "):
        LeapAlignConfig(output_dir=str(tmp_path), **{name: value})


def test_a_plateau_scheduler_waits_for_a_higher_reward(tmp_path):
    config = LeapAlignConfig(
        output_dir=str(tmp_path), lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1
    )
    assert config.metric_for_best_model == "reward" and config.lr_scheduler_kwargs["mode"] == "max"
