"""What would go wrong without a word, or late: the right value, or an error before training."""

import copy
import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoHaConfig, LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training_cases import PROMPTS, all_weights, make_config, make_trainer, redness, same, sample, trained_weights

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign import LeapAlignTrainer
from trl_leapalign.rewards import RewardSet
from trl_leapalign.training.image_grid import NAME, grid
from trl_leapalign.training.process import prepare_process

LORA = LoraConfig(r=2, target_modules=["to_q"])


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def with_part(name, change, make=tiny_flux):
    pipeline = make()
    setattr(pipeline, name, change(getattr(pipeline, name)))
    return pipeline


def changed(change):
    pipeline = tiny_flux()
    change(pipeline)
    return pipeline


def stored_in_float8(name):
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    return lambda: changed(lambda pipeline: getattr(pipeline, name).enable_layerwise_casting(**casting))


def with_other_adapter():
    return changed(lambda pipeline: pipeline.transformer.add_adapter(LoHaConfig(r=2, target_modules=["to_q"])))


def differentiating(images, prompts, metadata):
    rewards = redness(images, prompts, metadata)
    rewards.sum().backward(retain_graph=True)
    return rewards


def differentiating_once(images, prompts, metadata):
    redness(images, prompts, metadata).sum().backward()
    return redness(images, prompts, metadata)


REFUSED = {
    "PeftModel": ({"pipeline": lambda: with_part("transformer", lambda t: get_peft_model(t, LORA))}, "peft_config"),
    "PeftModel of SD3": (
        {"pipeline": lambda: with_part("transformer", lambda t: get_peft_model(t, LORA), tiny_sd3)},
        "wrapped in a PeftModel",
    ),
    "another wrapper": (
        {"pipeline": lambda: with_part("transformer", Wrapped)},
        "wrapped in a Wrapped.*set pipeline.transformer to the FluxTransformer2DModel",
    ),
    "fused projections": (
        {"pipeline": lambda: changed(lambda pipeline: pipeline.transformer.fuse_qkv_projections())},
        "to_qkv.*unfuse_qkv_projections",
    ),
    "float8 denoiser": (
        {"pipeline": stored_in_float8("transformer")},
        "transformer stores its weights in float8_e4m3fn",
    ),
    "float8 decoder": ({"pipeline": stored_in_float8("vae")}, "vae stores its weights in float8_e4m3fn"),
    "LoHa": ({"pipeline": with_other_adapter}, "of the kind LoHa"),
    "cache": (
        {
            "pipeline": lambda: changed(
                lambda pipeline: pipeline.transformer.enable_cache(first_block_cache(threshold=0.1))
            ),
            "base_penalty": 0.1,
        },
        "keep state from call to call.*disable_cache",
    ),
    "backward": ({"reward": differentiating}, r"calls \.backward\(\) itself"),
    "backward without graph": ({"reward": differentiating_once}, r"calls \.backward\(\) itself"),
    "backward of two": ({"reward": [differentiating_once, differentiating_once]}, r"calls \.backward\(\) itself"),
    "infinite": ({"reward": lambda i, p, m: redness(i, p, m) + math.inf, "reward_threshold": 1.0}, "not finite"),
    "scale in the call": ({"sample_kwargs": {"joint_attention_kwargs": {"scale": 0.5}}}, "lora_alpha.*set_adapters"),
    "no evaluation sets": ({"arguments": {"eval_dataset": {}}}, "holds no prompts"),
    "unnamed evaluation set": ({"arguments": {"eval_dataset": {3: ["a cat"]}}}, "named by texts"),
    "metric of no set": (
        {
            "arguments": {"eval_dataset": {"new": ["a cat"]}},
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "load_best_model_at_end": True,
        },
        "new_reward",
    ),
    "grid without tracker": ({"image_grid_steps": 2}, "takes none. Choose some of tensorboard"),
}


def first_block_cache(threshold):
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=threshold)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training_and_nothing_is_left_behind(name, tmp_path):
    settings, message = REFUSED[name]
    pipeline = settings.get("pipeline", tiny_flux)()
    weights, grad_mode = all_weights(pipeline), torch.is_grad_enabled()
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for module in modules:
        module.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    options = {"dry_run": True, "activation_checkpointing": name != "cache", **settings, "pipeline": pipeline}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert same({k: v.float() for k, v in all_weights(pipeline).items()}, {k: v.float() for k, v in weights.items()})
    assert all(part.training for module in modules for part in module.modules())
    assert not any(getattr(part, "gradient_checkpointing", False) for each in modules for part in each.modules())
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())
    assert torch.is_grad_enabled() == grad_mode


@pytest.mark.parametrize(
    "arguments",
    [{"image_samples_hook": lambda data, step: None}, {"callbacks": [print]}],
    ids=["hook", "callback"],
)
def test_functions_that_cannot_be_called_are_refused(arguments, tmp_path):
    with pytest.raises(TypeError, match=r"global_step, tracker|TrainerCallbacks"):
        make_trainer(tmp_path, arguments=arguments)


def test_a_failed_trainer_leaves_the_dtype_of_an_adapter(tmp_path):
    pipeline = tiny_flux()
    pipeline.transformer.add_adapter(LORA)
    pipeline.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="has no effect"):
        make_trainer(tmp_path, pipeline, model_init_kwargs={"revision": "main"})
    with pytest.raises(ValueError, match="detached"):
        make_trainer(tmp_path, pipeline.to(torch.bfloat16), lambda i, p, m: i.mean((1, 2, 3)).detach(), dry_run=True)
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.bfloat16}


def test_a_scale_that_was_set_is_in_the_saved_weights(tmp_path, caplog):
    pipeline = tiny_flux()
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    whole = sample(pipeline)
    pipeline.set_adapters("default", 0.5)
    trainer = make_trainer(tmp_path, pipeline, max_steps=1)
    assert "used at a scale of 0.5" in caplog.text
    trainer.train()
    trainer.save_model()
    fresh = tiny_flux()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(sample(fresh), sample(pipeline))
    assert not torch.allclose(sample(fresh), whole)


def test_gradients_that_are_off_in_the_process(tmp_path):
    expected = make_trainer(tmp_path)
    expected.train()
    torch.set_grad_enabled(False)
    try:
        trainer = make_trainer(tmp_path, dry_run=True)
        trainer.train()
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert same(trained_weights(trainer), trained_weights(expected))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="Leave inference mode"):
        make_trainer(tmp_path)


def test_another_configuration_and_another_trainer_leave_a_trainer_alone(tmp_path):
    expected = make_trainer(tmp_path, gradient_accumulation_steps=2)
    expected.train()
    first = make_trainer(tmp_path, gradient_accumulation_steps=2)
    dataclasses.replace(make_config(tmp_path), max_steps=9)
    second = make_trainer(tmp_path, bf16=True, use_cpu=True)
    assert (first.accelerator.mixed_precision, second.accelerator.mixed_precision) == ("no", "bf16")
    first.train()
    second.train()
    first.evaluate(PROMPTS[:1])
    assert same(trained_weights(first), trained_weights(expected))


def test_compiling_by_way_of_accelerate_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    make_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"ACCELERATE_DYNAMO_BACKEND='INDUCTOR'.*compile_repeated_blocks"):
        make_config(tmp_path)


@pytest.mark.parametrize(("change", "message"), [("fuse_lora", "fused"), ("disable_lora", "disabled")])
def test_an_adapter_that_no_longer_acts_is_refused_when_training_goes_on(change, message, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    getattr(trainer.pipeline, change)()
    with pytest.raises(ValueError, match=f"is {message}"):
        trainer.train()


def test_an_infinite_reward_behind_the_threshold_stops_the_update(tmp_path):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        return redness(images, prompts, metadata) + (math.inf if len(calls) == 2 else 0)

    trainer = make_trainer(tmp_path, reward=reward, reward_threshold=5.0, max_steps=3)
    with pytest.raises(FloatingPointError, match="Update 2: a reward"):
        trainer.train()


def test_a_backward_pass_in_the_middle_of_training_is_noticed(tmp_path):
    trainer = make_trainer(tmp_path, reward=differentiating, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"calls \.backward\(\) itself"):
        trainer.train()


def test_a_gradient_inside_a_reward_is_allowed(tmp_path):
    def reward(images, prompts, metadata):
        rewards = redness(images, prompts, metadata)
        torch.autograd.grad(rewards.sum(), images, retain_graph=True)
        return rewards

    trainer, expected = make_trainer(tmp_path, reward=reward), make_trainer(tmp_path)
    trainer.train()
    expected.train()
    assert same(trained_weights(trainer), trained_weights(expected))


def test_several_sets_of_evaluation_prompts(tmp_path):
    sets = {"seen": PROMPTS[:2], "new": PROMPTS[2:]}
    trainer = make_trainer(
        tmp_path,
        arguments={"eval_dataset": sets},
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="new_reward",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    metrics = trainer.evaluate()
    for name, prompts in sets.items():
        own = trainer.evaluate(prompts)
        assert metrics[f"eval_{name}_reward"] == own["eval_reward"]
    logs = [entry for entry in trainer.state.log_history if "eval_new_reward" in entry]
    best = max(entry["eval_new_reward"] for entry in logs[:2])
    assert trainer.state.best_metric == best


class PassesOn(FluxPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Renames(PassesOn):
    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt, **kwargs)


@pytest.mark.parametrize("kind", [PassesOn, Renames])
def test_a_pipeline_that_passes_its_arguments_on(kind, tmp_path, caplog):
    components = {name: part for name, part in tiny_flux().components.items() if part is not None}
    rows = [{"prompt": prompt, "negative_prompt": "a dog"} for prompt in PROMPTS]
    settings = {"prompts": rows, "sample_kwargs": {"true_cfg_scale": 2.0}, "dry_run": True}
    trainer, expected = make_trainer(tmp_path, kind(**components), **settings), make_trainer(tmp_path, **settings)
    assert trainer.columns.columns == {"negative_prompt": "negative_prompt"}
    trainer.train()
    expected.train()
    assert same(trained_weights(trainer), trained_weights(expected))
    with pytest.raises(TypeError, match="cannot be called with true_cfg"):
        make_trainer(tmp_path, kind(**components), sample_kwargs={"true_cfg": 2.0})


def test_a_step_that_was_replaced_is_the_one_that_is_taken(tmp_path):
    pipeline = tiny_flux()
    step, calls = pipeline.scheduler.step, []
    pipeline.scheduler.step = replaced = lambda *args, **kwargs: calls.append(1) or step(*args, **kwargs)
    trainer, expected = make_trainer(tmp_path, pipeline), make_trainer(tmp_path)
    trainer.train()
    expected.train()
    assert len(calls) == 2 * 3 and pipeline.scheduler.step is replaced
    assert same(trained_weights(trainer), trained_weights(expected))


def test_several_gpus_in_one_process_are_warned_of(tmp_path, caplog):
    config = make_config(tmp_path)
    config._n_gpu = 4
    prepare_process(config)
    assert "accelerate launch --num_processes 4" in caplog.text and config.n_gpu == 1


def test_a_reward_on_a_device_of_its_own_stays_there():
    class Reward(nn.Linear):
        def forward(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

    # The device that needs no hardware stands for a second GPU.
    elsewhere, here = Reward(1, 1, device="meta"), Reward(1, 1)
    RewardSet([elsewhere, here]).prepare(torch.device("cpu"))
    assert elsewhere.weight.device.type == "meta" and here.weight.device.type == "cpu"
    assert not elsewhere.training and not elsewhere.weight.requires_grad


def test_pictures_go_to_the_run_of_the_training(tmp_path):
    seen = []
    trainer = make_trainer(
        tmp_path,
        arguments={"image_samples_hook": lambda data, step, tracker: seen.append(tracker.tracker)},
        report_to=["tensorboard"],
        image_grid_steps=1,
        image_grid_prompts=2,
        ema_decay=0.5,
    )
    plain = make_trainer(tmp_path / "plain", ema_decay=0.5)
    trainer.train()
    plain.train()
    assert same(trained_weights(trainer), trained_weights(plain))
    folders = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    assert len(folders) == 1 and len({id(writer) for writer in seen}) == 1
    events = EventAccumulator(str(folders.pop()))
    events.Reload()
    pictures = events.Images(NAME)
    assert [picture.step for picture in pictures] == [0, 1, 2]
    assert (pictures[0].height, pictures[0].width) == (3 * 18 - 2, 2 * 18 - 2)
    assert "train/reward" in events.Tags()["scalars"]


def test_full_finetuning_shows_the_weights_before_training(tmp_path):
    from trl_leapalign.training import image_grid

    shown = []
    trainer = make_trainer(
        tmp_path, report_to=["tensorboard"], image_grid_steps=1, full_finetuning=True, learning_rate=1e-3
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_grid, "log_image", lambda tracker, name, image, step: shown.append(image))
        trainer.train()
    halves = [(image[:, :16], image[:, 18:]) for image in shown]
    assert torch.equal(*halves[0]) and not torch.equal(*halves[2])
    assert torch.equal(halves[0][0], halves[2][0])


def test_a_grid_puts_images_of_several_sizes_side_by_side():
    picture = grid([[torch.zeros(3, 2, 3), torch.zeros(3, 4, 1)], [torch.zeros(3, 1, 1)] * 2])
    assert picture.shape == (3, 10, 8)
    assert (picture == 0).sum() == 3 * (6 + 4 + 1 + 1)


def test_the_trainer_takes_a_copy_of_its_configuration(tmp_path):
    config = make_config(tmp_path)
    before = copy.copy(vars(config))
    LeapAlignTrainer(tiny_flux(), redness, config, train_dataset=PROMPTS)
    assert vars(config) == before
