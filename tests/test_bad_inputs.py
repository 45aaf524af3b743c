"""A table of bad inputs: each is refused with an error of its kind that tells what to do, and leaves nothing behind.

A case is what is done with a `Desk`, the error, and a pattern of what it says.
"""

import importlib.util
import io
import json
import os
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from training_cases import make_config, redness

from examples.tiny import tiny_flux
from trl_leapalign import LeapAlign, LeapAlignTrainer
from trl_leapalign.adapters.loading import load_adapter
from trl_leapalign.cli.main import main
from trl_leapalign.comparison.compare import Comparison
from trl_leapalign.evaluation import Evaluator, compare_evaluations, evaluate
from trl_leapalign.media import column_images, open_image
from trl_leapalign.methods import METHODS
from trl_leapalign.prompts.columns import CallColumns
from trl_leapalign.prompts.sources import load_prompts
from trl_leapalign.rewards import RemoteReward, RewardSet, VideoReward, load_reward
from trl_leapalign.training.checkpoints import last_checkpoint

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RESTORES_ALL = importlib.util.find_spec("trl_leapalign.adapters.restored") is not None
"""Whether a constructor that fails also puts back the random state and the modes of modules."""


def mean(images, prompts, metadata):
    return images.mean((1, 2, 3))


class Desk:
    """What all cases share: one pipeline, and a folder of the case's own."""

    pipeline = None

    def __init__(self, folder):
        self.folder = folder
        if Desk.pipeline is None:
            Desk.pipeline = tiny_flux()

    def config(self, **settings):
        return make_config(self.folder / "out", **settings)

    def trainer(
        self, pipeline=None, reward=redness, config=None, *, arguments=None, prompts=("a red cat",), **settings
    ):
        sources = {} if prompts is None else {"train_dataset": list(prompts) if isinstance(prompts, tuple) else prompts}
        pipeline = self.pipeline if pipeline is None else pipeline
        config = self.config(**settings) if config is None else config
        return LeapAlignTrainer(pipeline, reward, config, **{**sources, **(arguments or {})})

    def reward(self, function):
        return self.trainer(reward=function, dry_run=True)

    def score(self, function, images=IMAGES, prompts=("a", "b"), metadata=({}, {})):
        return function(images, list(prompts) if isinstance(prompts, tuple) else prompts, list(metadata))

    def file(self, name, content=""):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def columns(self, wanted, rows):
        return CallColumns.of(self.pipeline, wanted, rows, {"height": 16}, "prompt")

    def cli(self, *words):
        main(
            [*words, *([] if words[0] == "evaluate" or len(words) < 2 else ["--output_dir", str(self.folder / "out")])]
        )

    def yaml(self, command, text):
        return self.cli(command, "--config", str(self.file("c.yaml", text)))

    def evaluate(self, pipeline=None, rows=("a cat",), judges=mean, output="out", **options):
        pipeline = self.pipeline if pipeline is None else pipeline
        call = {"height": 16, "width": 16, "num_inference_steps": 2, **options.pop("call_kwargs", {})}
        return evaluate(pipeline, rows, judges, self.folder / output, call_kwargs=call, **options)

    def compare(self, runs=None, **options):
        given = {
            "runs": {"a": {}} if runs is None else runs,
            "train_rows": [{"prompt": "a"}],
            "eval_rows": [{"prompt": "b"}],
        }
        return Comparison(**{"make_pipeline": tiny_flux, "reward": mean, "config": self.config(), **given, **options})


def numpy_reward(images, prompts, metadata):
    return torch.tensor(images.detach().numpy().mean((1, 2, 3)))


def in_place(images, prompts, metadata):
    return images.mul_(1).mean((1, 2, 3))


def wants_two(images, prompts):
    return images.mean((1, 2, 3))


def method(name, **settings):
    return lambda desk: METHODS[name](**settings)


def setting(**settings):
    return lambda desk: desk.config(**settings)


def train(**options):
    return lambda desk: desk.trainer(**options)


NUMBER = "must be a (finite|whole) number"
CONFIG = {
    **{
        f"{name}={value!r}": (setting(**{name: value}), ValueError, f"{name}={value!r} {NUMBER}")
        for name, value in [
            ("learning_rate", -1.0),
            ("learning_rate", float("nan")),
            ("learning_rate", "fast"),
            ("weight_decay", -0.1),
            ("max_grad_norm", float("inf")),
            ("per_device_train_batch_size", 0),
            ("per_device_train_batch_size", True),
            ("per_device_eval_batch_size", -1),
            ("gradient_accumulation_steps", 0),
            ("sample_num_steps", 2.5),
            ("sample_num_steps", "4"),
            ("eval_num_steps", 0),
            ("sample_height", 0),
            ("sample_width", -16),
            ("ema_decay", 1.0),
            ("base_penalty", 0),
            ("max_sample_grad_norm", 0),
            ("num_train_epochs", 0),
            ("max_steps", 0),
            ("max_steps", -2),
            ("seed", -1),
            ("data_seed", 1.5),
            ("draw_group_size", 0),
        ]
    },
    "guidance nan": (setting(sample_guidance_scale=float("nan")), ValueError, "sample_guidance_scale=nan must be"),
    "group of draws": (setting(per_device_train_batch_size=2, draw_group_size=3), ValueError, "must be a multiple of"),
    "method": (setting(method="dpo"), ValueError, "method='dpo' is unknown; choose one of"),
    "method's kind": (setting(method=3), TypeError, "must be a name or a Method"),
    "method's setting": (setting(method_kwargs={"discount": 1}), ValueError, "has no settings .*; it has"),
    "settings beside a method": (
        setting(method=LeapAlign(), method_kwargs={"a": 1}),
        ValueError,
        "Pass them to LeapAlign",
    ),
    "broken JSON": (setting(method_kwargs="{"), ValueError, "method_kwargs='{' is not a JSON object"),
    "a list for a dict": (setting(sample_kwargs=[1]), ValueError, "sample_kwargs must be a dict"),
    "full_finetuning": (setting(full_finetuning="yes"), ValueError, "must be True or False"),
    "dry_run": (setting(dry_run=1), ValueError, "dry_run=1 must be True or False"),
    "prompt_column": (setting(prompt_column=3), ValueError, "must be the name of a column"),
    "own prompt": (setting(sample_kwargs={"prompt": "a"}), ValueError, "cannot set 'prompt': prompts come from"),
    "own generator": (setting(sample_kwargs={"generator": None}), ValueError, "noise follows from seed"),
    "own height": (setting(sample_kwargs={"height": 8}), ValueError, "set sample_height"),
    "copies": (setting(sample_kwargs={"num_images_per_prompt": 2}), ValueError, "repeat prompts for more"),
    "pipeline_columns": (setting(pipeline_columns=3), ValueError, "must be a list of columns, such as"),
    "unused columns": (setting(remove_unused_columns=True), ValueError, "Leave it False"),
    "epochs": (setting(eval_strategy="epoch"), ValueError, "Use 'steps'"),
    "sampling": (setting(train_sampling_strategy="group_by_length"), ValueError, "use 'random' or 'sequential'"),
    "compile": (setting(torch_compile=True), ValueError, "compile the denoiser instead"),
    "label smoothing": (setting(label_smoothing_factor=0.1), ValueError, "there are no labels"),
    "penalty of all weights": (setting(base_penalty=1.0, full_finetuning=True), ValueError, "or train a LoRA"),
    "float16 on a CPU": (setting(fp16=True, use_cpu=True), ValueError, "Set bf16=True, or neither"),
    "best without evaluation": (setting(save_strategy="best"), ValueError, "Set eval_strategy='steps'"),
}
CONSTRUCTOR = {
    "a dict as config": (train(config={"max_steps": 1}), TypeError, "must be a LeapAlignConfig, got dict. The order"),
    "hook": (lambda desk: desk.trainer(arguments={"image_samples_hook": 3}), TypeError, "must be callable"),
    "a number as pipeline": (train(pipeline=3), TypeError, "Expected a diffusers pipeline, got int. Load one"),
    "a pipeline nowhere": (train(pipeline="./no where"), ValueError, "There is no pipeline './no where'"),
    "a dtype": (
        train(pipeline="a/b", model_init_kwargs={"torch_dtype": {"default": "float99"}}),
        ValueError,
        "'float99' is no dtype of torch. Choose one such as",
    ),
    "settings of a loaded pipeline": (train(model_init_kwargs={"a": 1}), ValueError, "no effect on .* Leave it out"),
    "an argument": (train(sample_kwargs={"foo": 1}), TypeError, "cannot be called with foo. It takes: prompt"),
    "a denoiser": (train(denoisers=["unet"]), ValueError, "called unet. Set denoisers to some of"),
    "an optimizer": (
        lambda desk: desk.trainer(arguments={"optimizers": (torch.optim.SGD([nn.Parameter(torch.ones(1))]), None)}),
        ValueError,
        "leave the optimizer to the trainer",
    ),
    "no evaluation prompts": (train(eval_strategy="steps", eval_steps=1), ValueError, "Pass eval_dataset, or set"),
    "evaluation prompts twice": (
        lambda desk: desk.trainer(arguments={"eval_dataset": ["a"]}, eval_prompts="b.txt"),
        ValueError,
        "got both",
    ),
    "a metric": (train(metric_for_best_model="loss"), ValueError, "Choose one of .*'reward'"),
    "a lora of numbers": (
        lambda desk: desk.trainer(arguments={"peft_config": 3}),
        TypeError,
        "must be a peft.LoraConfig",
    ),
    "another PEFT method": (
        lambda desk: desk.trainer(arguments={"peft_config": LoHaConfig(target_modules=["to_q"])}),
        TypeError,
        "must be a peft.LoraConfig, got LoHaConfig",
    ),
    "a lora beside all weights": (
        lambda desk: desk.trainer(arguments={"peft_config": LoraConfig()}, full_finetuning=True),
        ValueError,
        "Drop one",
    ),
    "a checkpoint nowhere": (
        lambda desk: desk.trainer(pipeline=tiny_flux()).train(resume_from_checkpoint=str(desk.folder / "nowhere")),
        ValueError,
        "The checkpoint .*nowhere does not exist",
    ),
    "evaluation without prompts": (
        lambda desk: desk.trainer(pipeline=tiny_flux()).evaluate(),
        ValueError,
        "Pass eval_dataset, or set eval_prompts",
    ),
}
PROMPTS = {
    "none": (train(prompts=None), ValueError, "exactly one of prompt_function, train_dataset, train_prompts; got none"),
    "two": (train(train_prompts="p.txt"), ValueError, "got train_dataset, train_prompts"),
    "an empty list": (train(prompts=[]), ValueError, "There are no prompts: the dataset, list or file"),
    "spaces": (train(prompts=["a", " "]), ValueError, "Prompt 1 is ' '; every row needs a text"),
    "a number": (train(prompts=["a", 7]), ValueError, "Prompt 1 is 7; every row needs a text"),
    "half a pair": (train(prompts=[*"abcde", "f\ud800"]), ValueError, "Prompt 5 is no whole Unicode.*Mend the text"),
    "a dict": (train(prompts={"prompt": ["a"]}), TypeError, "Dataset.from_dict"),
    "another column": (train(prompts=[{"text": "a"}]), ValueError, "Set prompt_column to the one"),
    "a single text": (train(prompts="a red cat"), ValueError, "A single prompt must be a list"),
    "a pattern": (
        lambda desk: load_prompts(desk.file("a.csv", "prompt\nx\n").parent / "*.csv"),
        ValueError,
        "not exist",
    ),
    "a folder": (lambda desk: load_prompts(desk.folder), ValueError, "is a folder. Give a file in it"),
    "a kind of file": (lambda desk: load_prompts(desk.file("a.yaml", "x")), ValueError, "Give text with one prompt"),
    "Latin-1": (lambda desk: load_prompts(desk.file("a.txt", b"T\xfcr")), ValueError, "not in UTF-8"),
    "a comma": (
        lambda desk: load_prompts(desk.file("a.csv", "prompt\na, b\n")),
        ValueError,
        "line 2 .*in double quotes",
    ),
    "a quote": (lambda desk: load_prompts(desk.file("a.csv", 'prompt\n"a" b\n')), ValueError, "line 2"),
    "cut off": (
        lambda desk: load_prompts(desk.file("a.jsonl", '{"prompt": "a"}\n{"pro')),
        ValueError,
        "line 2: Unterm",
    ),
    "twice": (lambda desk: load_prompts(desk.file("a.jsonl", '{"prompt": "a", "prompt": "b"}')), ValueError, "twice"),
    "broken parquet": (
        lambda desk: load_prompts(desk.file("a.parquet", "x")),
        ValueError,
        "a.parquet' is empty, broken",
    ),
    "a function that is none": (
        lambda desk: desk.trainer(prompts=None, arguments={"prompt_function": 3}),
        TypeError,
        "prompt_function must be callable",
    ),
    "a function of texts": (
        lambda desk: desk.trainer(prompts=None, arguments={"prompt_function": lambda: "a cat"}),
        TypeError,
        r"must return \(prompt, metadata\)",
    ),
    "a function's metadata": (
        lambda desk: desk.trainer(prompts=None, arguments={"prompt_function": lambda: ("a cat", [1])}),
        TypeError,
        "metadata as a dict",
    ),
}
METADATA = {
    "an unknown argument": (
        lambda desk: desk.columns({"imag": "x"}, [{"prompt": "a", "x": 1}]),
        TypeError,
        "It takes:",
    ),
    "an unknown column": (
        lambda desk: desk.columns({"negative_prompt": "n"}, [{"prompt": "a"}]),
        ValueError,
        "They have",
    ),
    "no value": (
        lambda desk: desk.columns({"negative_prompt": "n"}, [{"prompt": "a", "n": "x"}, {"prompt": "b"}]),
        ValueError,
        "row 1 has no value in it. Give each row one",
    ),
    "set twice": (
        lambda desk: desk.columns({"height": "h"}, [{"prompt": "a", "h": 16}]),
        ValueError,
        "Drop one of them",
    ),
    "the trainer's own": (
        lambda desk: desk.columns({"latents": "h"}, [{"prompt": "a", "h": 1}]),
        ValueError,
        "noise fol",
    ),
    "an unclear column": (
        lambda desk: desk.columns(None, [{"prompt": "a", "width": 16}]),
        ValueError,
        "Say whether they go into the call",
    ),
    "an image nowhere": (lambda desk: open_image(desk.folder / "no.png"), ValueError, "Give whole paths, images"),
    "an empty image": (lambda desk: open_image(desk.file("a.png")), ValueError, "Mend it, or leave the row out"),
    "half an image": (
        lambda desk: open_image({"bytes": encoded()[:100], "path": None}),
        ValueError,
        "its content is no image that can be read: .*leave the row out",
    ),
    "a number as image": (lambda desk: open_image(3), TypeError, "by a PIL image or the path of a file"),
    "no column of images": (lambda desk: column_images([{"a": 1}], "image", IMAGES), KeyError, "which has"),
    "a later row's image": (
        lambda desk: desk.columns(
            {"ip_adapter_image": "i"},
            [*({"prompt": "a", "i": Image.new("RGB", (4, 4))} for _ in range(5)), {"prompt": "b", "i": "no.png"}],
        ),
        ValueError,
        "Row 5, column 'i': There is no image file",
    ),
}
REWARDS = {
    "an unknown name": (train(reward="hpsv9"), ValueError, "Did you mean 'hpsv2.1'|Choose one of"),
    "none": (train(reward=[]), ValueError, "pass a reward function"),
    "a class": (train(reward=nn.Identity), TypeError, "Pass an instance of it"),
    "a number": (train(reward=3), TypeError, "must be callable as reward"),
    "two arguments": (
        train(reward=wants_two),
        TypeError,
        r"is called as reward\(images, prompts, metadata\), but takes",
    ),
    "weights": (train(reward_weights=[1.0, 2.0]), ValueError, "Give one for each"),
    "zero weights": (train(reward_weights=[0.0]), ValueError, "all zero, so nothing would be learnt"),
    "a word as weight": (train(reward_weights=["x"]), ValueError, NUMBER),
    "thresholds": (train(reward_threshold=[None, None]), ValueError, "Give one for each"),
    "an infinite threshold": (train(reward_threshold=[float("inf")]), ValueError, NUMBER),
    "a number returned": (lambda desk: desk.score(RewardSet(lambda *a: 0.5)), TypeError, "Return a tensor of shape"),
    "whole numbers": (
        lambda desk: desk.score(RewardSet(lambda i, p, m: torch.ones(2).long())),
        TypeError,
        "Return floats",
    ),
    "one for all": (
        lambda desk: desk.score(RewardSet(lambda i, p, m: i.mean())),
        ValueError,
        "Return one reward an image",
    ),
    "a list beside": (
        lambda desk: desk.score(RewardSet(lambda i, p, m: (mean(i, p, m), [1]))),
        TypeError,
        "or .rewards, dict",
    ),
    "detached": (
        lambda desk: desk.score(RewardSet(lambda i, p, m: i.mean((1, 2, 3)).detach()), IMAGES.clone().requires_grad_()),
        ValueError,
        r"torch operations only: no \.detach",
    ),
    "NumPy": (
        lambda desk: desk.score(RewardSet(numpy_reward), IMAGES.clone().requires_grad_()),
        ValueError,
        "torch op",
    ),
    "in place": (
        lambda desk: desk.score(RewardSet(in_place), IMAGES.clone()),
        ValueError,
        r"images = images.clone\(\)",
    ),
    "not a number": (
        lambda desk: desk.reward(lambda i, p, m: mean(i, p, m) * torch.nan),
        ValueError,
        "not finite.*Check",
    ),
    "constant": (lambda desk: desk.reward(lambda i, p, m: i.mean((1, 2, 3)) * 0), ValueError, "set dry_run=False"),
    "apart": (
        lambda desk: desk.reward(lambda i, p, m: torch.ones(1, requires_grad=True) * 1),
        ValueError,
        "Compute it",
    ),
    "a server's address": (lambda desk: RemoteReward("localhost:80"), ValueError, "starts with http://"),
    "a server's timeout": (lambda desk: RemoteReward("http://a", timeout=0), ValueError, NUMBER),
    "a server's images": (lambda desk: desk.score(RemoteReward("http://a"), IMAGES[0]), ValueError, "shape"),
    "one prompt": (lambda desk: desk.score(RemoteReward("http://a"), prompts="a cat"), TypeError, r"Pass \[prompt\]"),
    "a prompt too few": (
        lambda desk: desk.score(RemoteReward("http://a"), prompts=["a"]),
        ValueError,
        "one prompt an im",
    ),
    "bright images": (lambda desk: desk.score(RemoteReward("http://a"), IMAGES * 255), ValueError, r"in \[0, 1\]"),
    "loading by another name": (lambda desk: load_reward("HPSV2.1"), ValueError, "Did you mean 'hpsv2.1'"),
    "frames of a video": (lambda desk: VideoReward(mean, every=0), ValueError, NUMBER),
}
METHODS_TABLE = {
    "discount": (method("leapalign", gradient_discount=2), ValueError, "gradient_discount=2 .*between 0 and 1"),
    "leaps": (method("leapalign", num_leaps=0), ValueError, NUMBER),
    "range": (method("leapalign", step_range=(0.9, 0.1)), ValueError, r"must be \(low, high\) with"),
    "nested": (method("leapalign", nested_gradient_only=1), ValueError, "must be True or False"),
    "draft": (method("draft", num_last_steps=0), ValueError, NUMBER),
    "drtune": (method("drtune", num_train_steps=1.5), ValueError, NUMBER),
    "steps for drtune": (
        lambda desk: desk.trainer(method="drtune", method_kwargs={"num_train_steps": 9}, dry_run=True),
        ValueError,
        "Use more sampling steps",
    ),
    "steps for draft": (
        lambda desk: desk.trainer(method="draft", method_kwargs={"num_last_steps": 9}, dry_run=True),
        ValueError,
        "Use more sampling steps",
    ),
}
ADAPTERS = {
    "nowhere": (lambda desk: load_adapter(desk.pipeline, "./no where"), ValueError, "neither a file, a folder, nor"),
    "no weights": (
        lambda desk: load_adapter(desk.pipeline, desk.file("a.safetensors", "x")),
        ValueError,
        "Pass the folder",
    ),
    "an empty folder": (
        lambda desk: load_adapter(desk.pipeline, desk.folder),
        ValueError,
        "Pass the folder that save_mod",
    ),
    "of another model": (
        lambda desk: load_adapter(desk.pipeline, other_adapter(desk)),
        ValueError,
        "pass the one that|Pass",
    ),
}
CHECKPOINTS = {
    "no folder": (lambda desk: last_checkpoint(desk.folder / "nowhere"), (ValueError, OSError), "nowhere"),
    "no checkpoint": (lambda desk: last_checkpoint(desk.folder), ValueError, "no whole checkpoint"),
    "an empty checkpoint": (
        lambda desk: desk.trainer(pipeline=tiny_flux()).train(resume_from_checkpoint=str(desk.file("x").parent)),
        ValueError,
        "not a (whole )?checkpoint|is not whole|no whole",
    ),
}
EVALUATE = {
    "no evaluators": (lambda desk: desk.evaluate(judges=[]), ValueError, "There are no evaluators. Pass some of"),
    "an evaluator": (lambda desk: desk.evaluate(judges="hpsv9"), ValueError, "no evaluator 'hpsv9'.*Choose one of"),
    "two of a name": (lambda desk: desk.evaluate(judges=[mean, mean]), ValueError, "under names of your own"),
    "a name with a slash": (lambda desk: Evaluator("a/b", lambda: mean), ValueError, "one that a file can have"),
    "images a prompt": (lambda desk: desk.evaluate(images_per_prompt=0), ValueError, NUMBER),
    "batch": (lambda desk: desk.evaluate(batch_size=0), ValueError, NUMBER),
    "seed": (lambda desk: desk.evaluate(seed=-1), ValueError, NUMBER),
    "steps": (lambda desk: desk.evaluate(call_kwargs={"num_inference_steps": 0}), ValueError, NUMBER),
    "height": (lambda desk: desk.evaluate(call_kwargs={"height": 0}), ValueError, NUMBER),
    "guidance": (lambda desk: desk.evaluate(call_kwargs={"guidance_scale": float("inf")}), ValueError, NUMBER),
    "own generator": (
        lambda desk: desk.evaluate(call_kwargs={"generator": 1}),
        ValueError,
        "which the evaluation sets",
    ),
    "an argument": (lambda desk: desk.evaluate(call_kwargs={"foo": 1}), TypeError, "It takes:"),
    "groups": (lambda desk: desk.evaluate(group_by="tag"), ValueError, "no column of all prompts"),
    "a file as folder": (lambda desk: desk.evaluate(output=desk.file("x").name), ValueError, "Choose a folder"),
    "another's settings": (
        lambda desk: desk.evaluate(output=desk.file("settings.json", '{"a": 1}').parent),
        ValueError,
        "Choose another output_dir",
    ),
    "an adapter too late": (lambda desk: desk.evaluate(adapter="x"), ValueError, "load_lora_weights"),
    "a pipeline": (lambda desk: desk.evaluate(pipeline=lambda: 3), TypeError, "must be a diffusers pipeline or return"),
    "no prompts": (lambda desk: desk.evaluate(rows=[]), ValueError, "There are no prompts"),
}
COMPARE = {
    "no runs": (lambda desk: desk.compare({}), ValueError, "must name at least one run"),
    "a run's settings": (lambda desk: desk.compare({"a": 3}), ValueError, "must name at least one run, by a text"),
    "a number as name": (lambda desk: desk.compare({1: {}}), ValueError, "by a text"),
    **{
        f"named {name!r}": (lambda desk, name=name: desk.compare({name: {}}), ValueError, "no name of a folder")
        for name in ("", ".", "a/b", "a\0b", "a\nb", "base", "x" * 300, "\ud800")
    },
    "shared": (lambda desk: desk.compare({"a": {"seed": 1}}), ValueError, "sets what all runs share"),
    "a run's setting": (lambda desk: desk.compare({"a": {"learning_rat": 1}}), TypeError, "learning_rat"),
    "no seeds": (lambda desk: desk.compare(seeds=[]), ValueError, "must differ"),
    "equal seeds": (lambda desk: desk.compare(seeds=[1, 1]), ValueError, "must differ"),
    "rates": (lambda desk: desk.compare(learning_rates=[0.0], tuning_rows=[{"prompt": "c"}]), ValueError, NUMBER),
    "rates without prompts": (lambda desk: desk.compare(learning_rates=[1e-3]), ValueError, "set both or neither"),
    "images": (lambda desk: desk.compare(num_images=0), ValueError, NUMBER),
    "groups": (lambda desk: desk.compare(group_by="tag"), ValueError, "no column of all prompts"),
    "seconds": (lambda desk: desk.compare(train_seconds=0), ValueError, NUMBER),
    "one folder": (lambda desk: compare_evaluations([desk.folder]), ValueError, "at least two different folders"),
    "folders without evaluation": (
        lambda desk: compare_evaluations([desk.folder / "a", desk.folder / "b"]),
        ValueError,
        "evaluat",
    ),
}
COMMON = ("--pipeline", "examples.tiny:tiny_flux", "--reward", "training_cases:redness")
CLI = {
    "a command": (lambda desk: main(["fly"]), SystemExit, "unknown command 'fly'"),
    "an option": (lambda desk: desk.cli("train", *COMMON, "--lerning_rate", "1"), ValueError, "not used|lerning_rate"),
    "a word as number": (lambda desk: desk.cli("train", *COMMON, "--learning_rate", "x"), SystemExit, "2"),
    "no prompts": (lambda desk: desk.cli("train", *COMMON), ValueError, "set train_prompts"),
    "a module": (
        lambda desk: desk.cli("train", *COMMON, "--reward", "nowhere:f"),
        ValueError,
        "There is no 'nowhere:f'",
    ),
    "a name in a module": (lambda desk: desk.cli("train", *COMMON, "--reward", "json:f"), ValueError, "has no 'f'"),
    "no name": (lambda desk: desk.cli("train", *COMMON, "--reward", "a b:c"), ValueError, "Write MODULE:NAME"),
    "no reward": (lambda desk: desk.cli("train", *COMMON[:3]), ValueError, "pass a reward function|set train_prompts"),
    "broken lora": (
        lambda desk: desk.cli("train", *COMMON, "--train_prompts", prompts_of(desk), "--lora", "{"),
        ValueError,
        "lora",
    ),
    "runs": (lambda desk: desk.cli("compare", *COMMON, "--runs", "{"), ValueError, "runs='{' is not a JSON object"),
    "a seed of all": (lambda desk: desk.cli("compare", *COMMON, "--seed", "3"), SystemExit, "Set --seeds"),
    "nothing to evaluate": (lambda desk: desk.cli("evaluate"), SystemExit, "pass --pipeline"),
    "a height of nothing": (
        lambda desk: desk.cli(*evaluation(desk), "--height", "0"),
        ValueError,
        f"height=0 {NUMBER}",
    ),
    "no steps": (lambda desk: desk.cli(*evaluation(desk), "--num_inference_steps", "0"), ValueError, NUMBER),
    "set twice": (
        lambda desk: desk.cli(*evaluation(desk), "--height", "8", "--call_kwargs", '{"height": 8}'),
        ValueError,
        "Set one",
    ),
    "unused settings": (
        lambda desk: desk.cli(*evaluation(desk), "--evaluator_kwargs", '{"a": {}}'),
        ValueError,
        "no effect",
    ),
    "a pipeline that is none": (lambda desk: desk.cli("check", "./nowhere"), SystemExit, "1"),
}
YAML = {
    "no file": (lambda desk: desk.cli("train", "--config", "nowhere.yaml"), ValueError, "--config should name"),
    "a key twice": (lambda desk: desk.yaml("train", "seed: 1\nseed: 2\n"), ValueError, "drop one"),
    "a key twice in a run": (
        lambda desk: desk.yaml("compare", "runs: {a: {seed: 1, seed: 2}}\n"),
        ValueError,
        "drop one",
    ),
    "an unknown key": (lambda desk: desk.yaml("train", "rewrad: x\n"), ValueError, "Did you mean reward"),
    "a list": (lambda desk: desk.yaml("train", "- a\n"), ValueError, "must hold settings as NAME: VALUE"),
    "cut off": (lambda desk: desk.yaml("train", "reward: [\n"), ValueError, "cannot be read as YAML"),
    "code": (lambda desk: desk.yaml("train", "a: !!python/name:os.system\n"), ValueError, "cannot be read as YAML"),
    "environment": (lambda desk: desk.yaml("train", "env: 3\n"), ValueError, "env .* must hold"),
    "a number out of range": (
        lambda desk: desk.yaml(
            "train", f"pipeline: x\nreward: pickscore\nlearning_rate: -1e-4\noutput_dir: {desk.folder}\n"
        ),
        ValueError,
        "learning_rate=-0.0001 must be",
    ),
}
TABLE = {
    f"{area}: {name}": case
    for area, cases in {
        "config": CONFIG,
        "constructor": CONSTRUCTOR,
        "prompts": PROMPTS,
        "metadata": METADATA,
        "rewards": REWARDS,
        "methods": METHODS_TABLE,
        "adapters": ADAPTERS,
        "checkpoints": CHECKPOINTS,
        "evaluate": EVALUATE,
        "compare": COMPARE,
        "cli": CLI,
        "yaml": YAML,
    }.items()
    for name, case in cases.items()
}


def encoded():
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def other_adapter(desk):
    weights = {f"transformer.nowhere.to_q.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(weights, desk.folder / "pytorch_lora_weights.safetensors")
    return desk.folder


def prompts_of(desk):
    return str(desk.file("p.txt", "a cat\n"))


def evaluation(desk):
    words = [
        "--pipeline",
        "examples.tiny:tiny_flux",
        "--prompts",
        prompts_of(desk),
        "--evaluators",
        "training_cases:redness",
    ]
    return ["evaluate", *words, "--output_dir", str(desk.folder / "out")]


def state_of(pipeline):
    """What a failure must leave as it was."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    parts = [(f"{name}.{key}", part) for name, module in modules.items() for key, part in module.named_modules()]
    found = {
        "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "default dtype": torch.get_default_dtype(),
        "sys.path": list(sys.path),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "ACCELERATE_", "KMP_"))},
        "folder": os.getcwd(),
        "hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for name, part in parts
        },
        "replaced methods": [name for name, value in vars(pipeline.scheduler).items() if callable(value)],
        "adapters": {name: sorted(getattr(module, "peft_config", None) or {}) for name, module in modules.items()},
        "modules": [name for name, _ in parts],
        "flags": {f"{name}.{key}": p.requires_grad for name, m in modules.items() for key, p in m.named_parameters()},
        "gradients": [key for m in modules.values() for key, p in m.named_parameters() if p.grad is not None],
    }
    if RESTORES_ALL:
        found["modes"] = {name: (part.training, getattr(part, "gradient_checkpointing", None)) for name, part in parts}
        found["random state"] = (
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
            torch.get_rng_state().tolist(),
        )
    return found


def weights_of(pipeline):
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return [value.clone() for module in modules for value in module.state_dict().values()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return weights_of(Desk(tmp_path_factory.mktemp("first")).pipeline)


def test_the_table_is_long_and_covers_all_areas():
    assert len(TABLE) >= 100
    assert len({name.partition(":")[0] for name in TABLE}) == 12


@pytest.mark.parametrize("name", TABLE)
def test_bad_inputs_are_told_with_a_remedy_and_leave_nothing(name, tmp_path, monkeypatch, capsys, weights):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    desk, (act, error, message) = Desk(tmp_path), TABLE[name]
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    before = state_of(desk.pipeline)
    with pytest.raises(error, match=f"(?s){message}") as caught:
        act(desk)
    assert len(str(caught.value)) < 3000 and "hf_" not in str(caught.value)
    assert isinstance(caught.value, (ValueError, TypeError, KeyError, SystemExit, OSError))
    after = state_of(desk.pipeline)
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert not changed, {key: str(pair)[:500] for key, pair in changed.items()}
    assert all(torch.equal(*pair) for pair in zip(weights_of(desk.pipeline), weights, strict=True))
    assert not list(tmp_path.rglob("checkpoint-*")) and not list(tmp_path.rglob("*.part"))
    assert not [path for path in tmp_path.rglob("settings.json") if json.loads(path.read_text()) != {"a": 1}]
    assert Path.cwd() == Path(before["folder"])
