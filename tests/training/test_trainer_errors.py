"""What cannot be trained is refused when the trainer is made, and the pipeline stays as it was."""

import math
from contextlib import contextmanager

import datasets
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FluxTransformer2DModel
from peft import LoraConfig
from torch import nn
from training_cases import PROMPTS, make_config, redness
from transformers import TrainingArguments

from examples.tiny import tiny_flux
from trl_leapalign import LeapAlign, LeapAlignTrainer
from trl_leapalign.training.dry_run import check_gradients


def mean(images):
    return images.mean((1, 2, 3))


def mean_of(images, prompts, metadata):
    return mean(images)


def with_scheduler(scheduler):
    pipeline = tiny_flux()
    pipeline.scheduler = scheduler
    return pipeline


def without_checkpointing():
    pipeline = tiny_flux()
    pipeline.transformer.__class__ = type(
        "Bare", (FluxTransformer2DModel,), {"_supports_gradient_checkpointing": False}
    )
    return pipeline


def compiled():
    pipeline = tiny_flux()
    pipeline.transformer = torch.compile(pipeline.transformer)
    return pipeline


def offloaded():
    pipeline = tiny_flux()
    pipeline.transformer._hf_hook = object()
    return pipeline


def with_adapter(scale=1.0):
    pipeline = tiny_flux()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.transformer.set_adapters("default", scale)
    return pipeline


def rows(prompts):
    return datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])


def lora(**settings):
    return LoraConfig(**{"target_modules": ["to_q"], **settings})


CASES = {
    # the pipeline
    "DDIM": ({"pipeline": lambda: with_scheduler(DDIMScheduler())}, ValueError, "flow matching: it has DDIMScheduler"),
    "Euler": ({"pipeline": lambda: with_scheduler(EulerDiscreteScheduler())}, ValueError, "EulerDiscreteScheduler"),
    "module": ({"pipeline": lambda: nn.Linear(1, 1)}, TypeError, "Expected a diffusers pipeline, got Linear"),
    "none": ({"pipeline": lambda: None}, TypeError, "Expected a diffusers pipeline, got NoneType"),
    "offloaded": ({"pipeline": offloaded}, ValueError, "moves weights between devices"),
    "init kwargs": ({"model_init_kwargs": {"revision": "main"}}, ValueError, "model_init_kwargs has no effect"),
    # prompts
    "no prompts": ({"train_dataset": None}, ValueError, "exactly one of prompt_function, train_dataset, .*got none"),
    "two sources": ({"train_prompts": PROMPTS}, ValueError, "got train_dataset, train_prompts"),
    "dataset and function": (
        {"prompt_function": lambda: ("a cat", {})},
        ValueError,
        "got prompt_function, train_datas",
    ),
    "empty list": ({"train_dataset": []}, ValueError, "There are no prompts"),
    "empty dataset": ({"train_dataset": rows([])}, ValueError, "There are no prompts"),
    "no column": (
        {"train_dataset": [{"text": "a cat"}]},
        ValueError,
        "no column 'prompt'; there are .'text'.. Set prom",
    ),
    "empty prompt": ({"train_dataset": ["a cat", " "]}, ValueError, "Prompt 1 is ' '"),
    "missing prompt": ({"train_dataset": [{"prompt": "a"}, {"n": 1}]}, ValueError, "Prompt 1 is None"),
    "stream": (
        {"train_dataset": rows(PROMPTS).to_iterable_dataset()},
        TypeError,
        "streaming dataset cannot be resumed",
    ),
    "splits": ({"train_dataset": datasets.DatasetDict(train=rows(PROMPTS))}, TypeError, r"splits \['train'\]"),
    "number": ({"train_dataset": 3}, TypeError, "but a int was given"),
    "missing file": ({"train_dataset": "prompts.txt"}, ValueError, "'prompts.txt' does not exist"),
    "empty evaluation": ({"eval_dataset": []}, ValueError, "There are no prompts"),
    "two of evaluation": (
        {"eval_dataset": PROMPTS, "eval_prompts": PROMPTS},
        ValueError,
        "from eval_dataset or config.eval_prompts; got both",
    ),
    "function ends": (
        {"train_dataset": None, "prompt_function": lambda: next(iter([]))},
        RuntimeError,
        "ran out of prompts",
    ),
    "function returns text": (
        {"train_dataset": None, "prompt_function": lambda: "a cat"},
        TypeError,
        r"must return \(prompt, metadata\)",
    ),
    "endless epochs": (
        {"train_dataset": None, "prompt_function": lambda: ("a cat", {}), "max_steps": -1, "num_train_epochs": 1},
        ValueError,
        "no end, so num_train_epochs means nothing. Set max_steps",
    ),
    # rewards
    "detached": ({"reward": lambda i, p, m: mean(i).detach()}, ValueError, "is detached from the images"),
    "constant": ({"reward": lambda i, p, m: torch.ones(len(i))}, ValueError, "is detached from the images"),
    "column": ({"reward": lambda i, p, m: mean(i)[:, None]}, ValueError, r"shape \(1, 1\) for 1 images"),
    "scalar": ({"reward": lambda i, p, m: i.mean()}, ValueError, r"shape \(\) for 1 images"),
    "list": ({"reward": lambda i, p, m: mean(i).tolist()}, TypeError, "returned a list, through which no gradient"),
    "integers": ({"reward": lambda i, p, m: mean(i).long()}, TypeError, "torch.int64, which has no gradient"),
    "two tensors": ({"reward": lambda i, p, m: (mean(i), mean(i))}, TypeError, "returned a Tensor beside its rewards"),
    "NaN": ({"reward": lambda i, p, m: mean(i) * math.nan}, ValueError, "not finite, such as 'lambda' of '.*': nan"),
    "other inputs": (
        {"reward": lambda i, p, m: torch.ones(len(i), requires_grad=True) * 2},
        ValueError,
        "'lambda' does not depend on the images",
    ),
    "rounded": ({"reward": lambda i, p, m: mean(i).round()}, ValueError, "exactly zero, already at the images"),
    "scale of zero": (
        {"pipeline": lambda: with_adapter(scale=0.0)},
        ValueError,
        "exactly zero, at the trained parameters: are all pixels saturated, is the adapter's scale 0, or",
    ),
    "infinite gradient": (
        {"reward": lambda i, p, m: (mean(i) - mean(i).detach()).clamp(min=0).sqrt()},
        ValueError,
        "gradient of the reward is not finite",
    ),
    "not callable": ({"reward": 3}, TypeError, "A reward must be callable"),
    "unknown name": ({"reward": "hps"}, (TypeError, ValueError), "'hps'"),
    "no reward": ({"reward": []}, ValueError, "There is no reward"),
    "zero weight": ({"reward_weights": 0}, ValueError, "are all zero"),
    "weights": ({"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights has 2 entries for 1 rewards"),
    "thresholds": ({"reward_threshold": [1.0, 2.0]}, ValueError, "reward_threshold has 2 entries for 1 rewards"),
    "one threshold for two": (
        {"reward": [redness, redness], "reward_threshold": 1.0},
        ValueError,
        "reward_threshold has 1 entries for 2 rewards",
    ),
    # the method
    "too few steps": ({"sample_num_steps": 1}, ValueError, "draws 2 different steps .*only 1 of the 1"),
    "three leaps": ({"method_kwargs": {"num_leaps": 4}}, ValueError, "draws 4 different steps .*only 3 of the 3"),
    "step range": ({"method_kwargs": {"step_range": (0.0, 0.1)}}, ValueError, "only 0 of the 3 .*wider step_range"),
    # sampling
    "unknown argument": ({"sample_kwargs": {"cfg": 1}}, TypeError, "FluxPipeline cannot be called with cfg. It takes"),
    # the trained weights
    "no such layer": ({"peft_config": lora(target_modules=["nothing"])}, ValueError, "does not fit the transformer"),
    "dropout": ({"peft_config": lora(lora_dropout=0.1)}, ValueError, "lora_dropout=0.1 would make trained images diff"),
    "bias": ({"peft_config": lora(bias="lora_only")}, ValueError, "bias='lora_only', .*pipelines cannot load"),
    "saved modules": ({"peft_config": lora(modules_to_save=["proj_out"])}, ValueError, "modules_to_save=.'proj_out'."),
    "dict": ({"peft_config": {"r": 4}}, TypeError, "peft_config must be a peft.LoraConfig, got dict"),
    "adapter on a frozen part": (
        {"denoisers": ["vae"], "pipeline": with_adapter},
        ValueError,
        "transformer has an adapt",
    ),
    "initialisation": ({"peft_config": lora(init_lora_weights="pissa")}, ValueError, "changes the base weights"),
    "all weights in bf16": (
        {"pipeline": lambda: tiny_flux().to(torch.bfloat16), "full_finetuning": True},
        ValueError,
        "torch.bfloat16 are too coarse for full fine-tuning",
    ),
    "LoRA and all weights": (
        {"peft_config": lora(), "full_finetuning": True},
        ValueError,
        "full_finetuning=True train",
    ),
    "second adapter": (
        {"pipeline": with_adapter, "peft_config": lora()},
        ValueError,
        r"transformer already has the adapters \['default'\]",
    ),
    "unknown denoiser": (
        {"denoisers": ["unet"]},
        ValueError,
        "no module to train called unet. Set denoisers to some of",
    ),
    "text encoder": ({"denoisers": "text_encoder"}, ValueError, "text_encoder .CLIPTextModel. is no diffusers model"),
    "text encoder as well": (
        {"denoisers": ["transformer", "text_encoder_2"], "full_finetuning": True},
        RuntimeError,
        "No gradient of the reward reaches the text_encoder_2. Leave it out",
    ),
    "compiled": ({"pipeline": compiled}, ValueError, "Compile it in place"),
    "an optimizer of other weights": (
        {"optimizers": (torch.optim.SGD(nn.Linear(1, 1).parameters()), None)},
        ValueError,
        "misses 34 trained parameters, such as denoisers.transformer..*Attach the adapter",
    ),
    "a part without weights": ({"denoisers": ["scheduler"]}, ValueError, "called scheduler"),
    "no denoisers": ({"denoisers": []}, ValueError, "called transformer or unet"),
    "denoiser without effect": (
        {"denoisers": ["text_encoder_2"], "full_finetuning": True},
        RuntimeError,
        "no gradient",
    ),
    "checkpointing": (
        {"pipeline": without_checkpointing, "activation_checkpointing": True},
        ValueError,
        "transformer .Bare. has no gradient checkpointing",
    ),
    # what Trainer refuses
    "evaluation without prompts": (
        {"eval_strategy": "steps", "eval_steps": 1},
        ValueError,
        "no prompts for the evaluations",
    ),
    "first evaluation without prompts": ({"eval_on_start": True}, ValueError, "no prompts for the evaluations"),
    "metric": (
        {"eval_dataset": PROMPTS, "eval_strategy": "steps", "metric_for_best_model": "eval_loss"},
        ValueError,
        r"do not report metric_for_best_model='eval_loss'. Choose one of \['reward', 'reward_std', 'runtime'\]",
    ),
    "metric of another reward": (
        {"reward": [redness, mean_of], "metric_for_best_model": "rewards/blueness"},
        ValueError,
        "'rewards/redness', 'rewards/mean_of'",
    ),
    "hook": ({"image_samples_hook": "wandb"}, TypeError, "image_samples_hook must be callable, got 'wandb'"),
}
ARGUMENTS = {"train_dataset", "eval_dataset", "prompt_function", "peft_config", "optimizers", "image_samples_hook"}


def state_of(pipeline):
    """What a failed construction must leave alone."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return (
        {
            f"{name}.{key}": value.requires_grad
            for name, part in modules.items()
            for key, value in part.named_parameters()
        },
        {name: sorted(getattr(part, "peft_config", None) or {}) for name, part in modules.items()},
        type(pipeline.scheduler),
        getattr(pipeline.transformer, "gradient_checkpointing", None),
    )


@contextmanager
def unchanged(pipeline):
    before = state_of(pipeline) if hasattr(pipeline, "components") else None
    yield
    assert before is None or state_of(pipeline) == before


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_trained_is_refused(name, tmp_path):
    options, error, message = CASES[name]
    options = {"train_dataset": PROMPTS, "dry_run": True, "max_steps": 1, **options}
    pipeline = options.pop("pipeline", tiny_flux)()
    if hasattr(pipeline, "components"):
        pipeline.vae.requires_grad_(True)  # to be put back
    reward = options.pop("reward", redness)
    arguments = {key: options.pop(key) for key in ARGUMENTS & options.keys()}
    config = make_config(tmp_path, **options)
    with unchanged(pipeline), pytest.raises(error, match=message):
        LeapAlignTrainer(pipeline, reward, config, **arguments)


def test_after_a_failed_construction_another_one_trains_as_if_it_were_the_first(tmp_path):
    config, settings = (
        make_config(tmp_path, max_steps=1, dry_run=True),
        {"train_dataset": PROMPTS, "peft_config": lora()},
    )
    pipeline = tiny_flux()
    with pytest.raises(ValueError, match="detached"):
        LeapAlignTrainer(pipeline, lambda i, p, m: mean(i).detach(), config, **settings)
    second = LeapAlignTrainer(pipeline, redness, config, **settings)
    second.train()
    first = LeapAlignTrainer(tiny_flux(), redness, config, **settings)
    first.train()
    expected = dict(first.rollout_model.named_parameters())
    actual = dict(second.rollout_model.named_parameters())
    assert expected.keys() == actual.keys() and all(torch.equal(expected[key], actual[key]) for key in expected)


def test_without_dry_run_the_first_update_says_it(tmp_path):
    config = make_config(tmp_path)
    trainer = LeapAlignTrainer(tiny_flux(), lambda i, p, m: mean(i).detach(), config, train_dataset=PROMPTS)
    with pytest.raises(ValueError, match="is detached from the images"):
        trainer.train()


def test_the_dry_run_leaves_no_trace(tmp_path):
    runs = []
    for dry_run in (False, True):
        config = make_config(tmp_path, dry_run=dry_run, max_steps=1, method=LeapAlign(num_leaps=3))
        trainer = LeapAlignTrainer(tiny_flux(), redness, config, train_dataset=PROMPTS)
        assert all(parameter.grad is None for parameter in trainer.rollout_model.parameters())
        trainer.train()
        runs.append([p.detach() for p in trainer.rollout_model.parameters() if p.requires_grad])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("config", [lambda: ("a cat", {}), {"max_steps": 3}, TrainingArguments("out")], ids=type)
def test_a_config_of_another_kind_is_refused_with_the_order_of_arguments(config):
    with pytest.raises(TypeError, match=r"config must be a LeapAlignConfig, got .*\(pipeline, reward_function, config"):
        LeapAlignTrainer(tiny_flux(), redness, config, train_dataset=PROMPTS)


def test_a_trainer_is_made_without_gradients_around_it(tmp_path):
    with torch.no_grad():
        LeapAlignTrainer(tiny_flux(), redness, make_config(tmp_path, dry_run=True), train_dataset=PROMPTS)


def test_the_dry_run_has_the_size_of_lists_in_sample_kwargs(tmp_path):
    lists = {"negative_prompt": ["a dog"] * 3, "true_cfg_scale": 2.0}
    for settings in ({"sample_kwargs": lists}, {}):
        sizes = []
        config = make_config(tmp_path, dry_run=True, per_device_train_batch_size=3, **settings)
        reward = lambda i, p, m: sizes.append(len(p)) or mean(i)  # noqa: B023, E731
        LeapAlignTrainer(tiny_flux(), reward, config, train_dataset=PROMPTS)
        assert sizes == [3 if settings else 2]


def test_a_threshold_on_another_scale_is_warned_of(tmp_path, caplog):
    for threshold in (-10.0, 10.0):
        config = make_config(tmp_path, dry_run=True, reward_threshold=threshold)
        LeapAlignTrainer(tiny_flux(), redness, config, train_dataset=PROMPTS)
        assert ("probably not on the scale of this reward" in caplog.text) == (threshold < 0)
        caplog.clear()


def test_parameters_that_are_bypassed_are_warned_of(tmp_path, caplog):
    pipeline = tiny_flux()
    pipeline.transformer.transformer_blocks[0].ff.forward = lambda hidden_states: hidden_states
    LeapAlignTrainer(pipeline, redness, make_config(tmp_path, dry_run=True), train_dataset=PROMPTS)
    assert "trained parameters of the transformer in the dry run, such as transformer_blocks.0.ff" in caplog.text


def test_a_denoiser_that_rests_is_warned_of(caplog):
    denoisers = {"transformer": nn.Linear(1, 1), "transformer_2": nn.Linear(1, 1)}
    images = torch.ones(1, 3, 2, 2) * denoisers["transformer"](torch.ones(1)).sum()
    check_gradients(images, images.mean((1, 2, 3))[None], ["mean"], denoisers, may_underflow=False)
    assert "reaches 2 of 2 trained parameters of the transformer_2" in caplog.text


def test_an_optimizer_of_the_adapter_trains_it(tmp_path):
    pipeline = with_adapter()
    trained = [p for name, p in pipeline.transformer.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    before = [p.detach().clone() for p in trained]
    trainer = LeapAlignTrainer(
        *(pipeline, redness, make_config(tmp_path, max_steps=1)),
        train_dataset=PROMPTS,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))


def test_predict_points_to_evaluate(tmp_path):
    trainer = LeapAlignTrainer(tiny_flux(), redness, make_config(tmp_path), train_dataset=PROMPTS)
    with pytest.raises(NotImplementedError, match=r"Call evaluate\(prompts\)"):
        trainer.predict(PROMPTS)
