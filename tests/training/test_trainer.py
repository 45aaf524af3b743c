"""What a training step computes: loss, gradients, updates, what is logged and when it stops."""

import math

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from training_cases import (
    PROMPTS,
    Recorder,
    all_weights,
    blueness,
    logged,
    make_config,
    make_trainer,
    redness,
    relative_error,
    same,
    sample,
    trained_weights,
)

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign import LeapAlign, LeapAlignTrainer, run_rollout
from trl_leapalign.prompts.seeds import Purpose, make_generator

ADAPTER = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def double_precision():
    return tiny_flux().to(torch.float64)


# What moves


# SD3's last block computes these queries and throws away what they attend to.
@pytest.mark.parametrize(("build", "without_effect"), [(tiny_flux, "none"), (tiny_sd3, "blocks.1.attn.add_q_proj")])
def test_lora_training_moves_the_adapter_alone(build, without_effect, tmp_path):
    pipeline = build()
    before = all_weights(pipeline)
    trainer = make_trainer(tmp_path, pipeline)
    start = trained_weights(trainer)
    trainer.train()
    after = all_weights(pipeline)
    adapters = {key for key in after if ".lora_" in key}
    assert same({key: value for key, value in after.items() if key not in adapters}, before)
    end = trained_weights(trainer)
    assert len(end) == len(adapters) > 0 and all("lora_" in key for key in end)
    # An adapter begins with lora_B = 0, so lora_A learns from the second update on.
    for key in end:
        assert start[key].count_nonzero() == 0 or "lora_A" in key
        assert torch.equal(start[key], end[key]) == (without_effect in key and "lora_B" in key), key


def test_full_finetuning_moves_the_denoiser_alone(tmp_path):
    pipeline = tiny_flux()
    before = all_weights(pipeline)
    trainer = make_trainer(tmp_path, pipeline, full_finetuning=True, learning_rate=1e-3)
    trainer.train()
    after = all_weights(pipeline)
    assert before.keys() == after.keys()
    names = {f"transformer.{name}" for name, _ in pipeline.transformer.named_parameters()}
    for key in before:
        assert torch.equal(before[key], after[key]) == (key not in names), key


def test_nothing_but_trained_parameters_has_a_gradient(tmp_path):
    class Reward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3), torch.nn.Dropout(0.5))

        def forward(self, images, prompts, metadata):
            return self.layer(images).mean((1, 2, 3))

    pipeline, reward = tiny_flux(), Reward()
    trainer = make_trainer(tmp_path, pipeline, reward)
    inputs = {"prompts": PROMPTS[:1], "metadata": [{}], "indices": [0]}
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    graded = {id(p) for module in (*modules, reward) for p in module.parameters() if p.grad is not None}
    assert graded == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert not any(part.training for module in (*modules, reward) for part in module.modules())


def test_the_users_config_is_not_changed(tmp_path):
    config = make_config(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=2)
    trainer = LeapAlignTrainer(tiny_flux(), redness, config, train_dataset=PROMPTS)
    assert (config.max_steps, trainer.args.max_steps) == (-1, 5)


# One update by hand


def update_by_hand(weights, start, settings):
    """Loss, gradients and AdamW's first update for two samples, by run_rollout and autograd alone."""
    pipeline = double_precision()
    pipeline.transformer.add_adapter(LoraConfig(**ADAPTER))
    trained = {name: p for name, p in pipeline.transformer.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[f"denoisers.transformer.{name}"])
    order = np.random.default_rng([settings["seed"], 0]).permutation(len(PROMPTS))
    prompts = [PROMPTS[order[0]], PROMPTS[order[1]]]
    output = run_rollout(
        pipeline,
        LeapAlign(gradient_discount=0.7, similarity_floor=1e-4),
        method_generator=make_generator(settings["seed"], Purpose.STEPS, 0),
        prompt=prompts,
        generator=[make_generator(settings["seed"], Purpose.NOISE, index) for index in (0, 1)],
        num_inference_steps=settings["sample_num_steps"],
        guidance_scale=2.0,
        height=16,
        width=16,
    )
    hinge = (0.9 - redness(output.images, prompts, [{}, {}])).clamp(min=0)
    loss = (output.weights * (0.5 * hinge - 2.0 * blueness(output.images, prompts, [{}, {}]))).mean()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    gradients = {f"denoisers.transformer.{name}": g for name, g in zip(trained, gradients, strict=True)}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    scale = min(1.0, settings["max_grad_norm"] / (norm.item() + 1e-6))
    updated = {}
    for name, value in start.items():
        gradient = gradients[name] * scale
        step = gradient / (gradient.abs() + settings["adam_epsilon"])  # both bias corrections cancel at the first step
        decayed = value * (1 - settings["learning_rate"] * settings["weight_decay"])
        updated[name] = decayed - settings["learning_rate"] * step
    return output, loss, gradients, norm, updated


def test_first_update_is_the_one_computed_by_hand(tmp_path):
    settings = {
        "seed": 7,
        "sample_num_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1e-3,
        "adam_epsilon": 1e-6,
    }
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        double_precision(),
        [redness, blueness],
        arguments={"peft_config": LoraConfig(**ADAPTER), "callbacks": [recorder]},
        max_steps=1,
        per_device_train_batch_size=2,
        method_kwargs={"gradient_discount": 0.7, "similarity_floor": 1e-4},
        reward_weights=[0.5, 2.0],
        reward_threshold=[0.9, None],
        sample_guidance_scale=2.0,
        **settings,
    )
    start = trained_weights(trainer)
    with torch.no_grad():  # lora_B = 0 would hide the gradient of lora_A
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainer.rollout_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
                start[name] = parameter.detach().clone()
    output, loss, gradients, norm, updated = update_by_hand(trainer, start, settings)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    actual, rollout = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert torch.equal(rollout.images, output.images) and torch.equal(rollout.weights, output.weights)
    assert abs(actual.item() / loss.item() - 1) < 1e-14
    trainer.model.zero_grad()
    trainer.train()
    log = logged(trainer)[0]
    assert abs(log["loss"] / loss.item() - 1) < 1e-7  # Trainer adds losses up in float32
    assert abs(log["grad_norm"] / norm.item() - 1) < 1e-12
    assert norm.item() > settings["max_grad_norm"]
    clipped = {name: gradient * (settings["max_grad_norm"] / (norm + 1e-6)) for name, gradient in gradients.items()}
    assert relative_error(recorder.gradients[0], clipped) < 1e-12
    assert relative_error(trained_weights(trainer), updated) < 1e-12
    assert log["d_0"] == pytest.approx(output.metrics["d_0"].mean().item(), rel=1e-6)
    assert log["d_j"] == pytest.approx(output.metrics["d_j"].mean().item(), rel=1e-6)
    assert log["weight"] == pytest.approx(output.weights.mean().item(), rel=1e-6)
    assert (log["active_step_0"], log["active_step_1"]) == output.active_steps


def test_a_batch_and_accumulated_samples_give_the_same_gradients(tmp_path):
    gradients, weights, logs = [], [], []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path,
            tiny_flux().to(torch.float64),
            arguments={"callbacks": [recorder], "peft_config": LoraConfig(**ADAPTER)},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            method_kwargs={"similarity_floor": 1e-4},
            adam_epsilon=1e-2,  # else Adam turns the rounding of gradients near zero into steps of full size
        )
        trainer.train()
        gradients.append(recorder.gradients)
        weights.append(trained_weights(trainer))
        logs.append(logged(trainer))
    assert len(gradients[0]) == 2
    for other in (1, 2):
        errors = [relative_error(gradients[other][update], gradients[0][update]) for update in (0, 1)]
        assert max(errors) < 1e-12
        assert relative_error(weights[other], weights[0]) < 1e-12
        for update in (0, 1):
            for key in (
                "loss",
                "grad_norm",
                "reward",
                "reward_std",
                "d_0",
                "d_j",
                "weight",
                "active_step_0",
                "active_step_1",
            ):
                assert logs[other][update][key] == pytest.approx(logs[0][update][key], rel=1e-5), key


def test_checkpointing_changes_no_gradient(tmp_path):
    gradients, calls = [], []
    for checkpointing in (False, True):
        pipeline, recorder = tiny_sd3(), Recorder()
        trainer = make_trainer(
            tmp_path, pipeline, activation_checkpointing=checkpointing, arguments={"callbacks": [recorder]}
        )
        assert pipeline.transformer.gradient_checkpointing == checkpointing
        count = []
        pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        trainer.train()
        gradients.append(recorder.gradients)
        calls.append(len(count))
    assert same(*gradients)
    # Two updates of three steps; two active steps an update are run again in the backward pass.
    assert calls == [2 * 3, 2 * (3 + 2)]


# Precision


def test_bf16_trains_under_autocast(tmp_path):
    def reward(images, prompts, metadata):
        rewards = (images.flatten(1) @ images.new_ones(3 * 16 * 16, 1)).squeeze(1)
        assert rewards.dtype == torch.float32
        return rewards

    pipeline, dtypes = tiny_flux(), set()
    pipeline.transformer.x_embedder.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    trainer = make_trainer(tmp_path, pipeline, reward, bf16=True, use_cpu=True, dry_run=True)
    start = trained_weights(trainer)
    trainer.train()
    end = trained_weights(trainer)
    trainer.evaluate(PROMPTS[:1])
    with torch.autocast("cpu", torch.bfloat16):  # the user's own does not reach the reward either
        trainer.evaluate(PROMPTS[:1])
    assert dtypes == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in end.values())
    assert all(end[key].count_nonzero() > 0 for key in end)
    assert not same(start, end)
    assert pipeline.transformer.x_embedder.weight.dtype == torch.float32


def test_a_bf16_pipeline_trains_a_float32_adapter(tmp_path):
    pipeline = tiny_flux().to(torch.bfloat16)
    trainer = make_trainer(tmp_path, pipeline, learning_rate=1e-6, adam_epsilon=1e-20)
    start = trained_weights(trainer)
    trainer.train()
    end = trained_weights(trainer)
    assert all(value.dtype == torch.float32 for value in end.values())
    # In bfloat16 an update of 1e-6 would be rounded away from weights of a hundredth and more.
    moved = [(start[key] != end[key]).float().mean() for key in end if "lora_A" in key]
    assert min(moved) > 0.9
    assert pipeline.transformer.x_embedder.weight.dtype == torch.bfloat16
    assert math.isfinite(logged(trainer)[0]["loss"])


# What is logged


def shown_in(shown):
    """Arguments of a trainer that puts what its hook is given into a list, batch by batch."""
    return {"image_samples_hook": lambda image_data, step, tracker: shown.extend(image_data)}


def test_logged_values_of_one_reward(tmp_path):
    shown = []
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, arguments=shown_in(shown))
    trainer.train()
    update = trainer.state.log_history[0]
    expected = {"loss", "grad_norm", "learning_rate", "reward", "reward_std", "d_0", "d_j", "weight"}
    expected |= {"active_step_0", "active_step_1", "saturated", "below_threshold", "sample_grad_norm"}
    expected |= {"sample_grad_norm_median"}
    expected |= {"seconds_per_step", "peak_memory_gib", "epoch", "step"}
    assert set(update) == expected
    assert update["loss"] == pytest.approx(-update["weight"] * update["reward"], rel=1e-5)  # both weights at the floor
    assert update["weight"] == pytest.approx(5.0) and update["below_threshold"] == 1.0
    assert update["seconds_per_step"] > 0 and update["peak_memory_gib"] > 0.1
    images, prompts, metadata, rewards, _ = shown[-1]
    last = trainer.state.log_history[1]
    assert last["reward"] == pytest.approx(redness(images, prompts, metadata).mean().item(), rel=1e-6)
    assert last["reward_std"] == pytest.approx(np.std(rewards.tolist()), rel=1e-4)
    assert last["saturated"] == pytest.approx(np.mean((images.numpy() <= 0) | (images.numpy() >= 1)), rel=1e-5)


def test_a_log_entry_is_the_mean_since_the_last_one(tmp_path):
    settings = {"max_steps": 4, "learning_rate": 0.0}
    every = make_trainer(tmp_path, **settings)
    every.train()
    second = make_trainer(tmp_path, logging_steps=2, **settings)
    second.train()
    single, pairs = logged(every)[:4], logged(second)[:2]
    assert [entry["step"] for entry in pairs] == [2, 4]
    for number, pair in enumerate(pairs):
        for key in ("loss", "reward", "d_0", "d_j", "weight", "active_step_0", "saturated"):
            mean = np.mean([entry[key] for entry in single[2 * number : 2 * number + 2]])
            assert pair[key] == pytest.approx(mean, rel=1e-5), key


def test_several_rewards_are_logged_by_name(tmp_path):
    def with_details(images, prompts, metadata):
        return images.mean((1, 2, 3)), {"darkest": images.detach().amin((1, 2, 3)), "note": "text"}

    shown = []
    settings = {"reward_weights": [2.0, 0.5], "max_steps": 1, "arguments": shown_in(shown)}
    trainer = make_trainer(tmp_path, reward=[redness, with_details], **settings)
    trainer.train()
    update = trainer.state.log_history[0]
    images, prompts, metadata, _, details = shown[-1]
    red, mean = redness(images, prompts, metadata).item(), images.mean().item()
    assert update["rewards/redness"] == pytest.approx(red, rel=1e-6)
    assert update["rewards/with_details"] == pytest.approx(mean, rel=1e-6)
    assert update["reward"] == pytest.approx(2.0 * red + 0.5 * mean, rel=1e-6)
    assert update["rewards/with_details/darkest"] == pytest.approx(images.min().item(), rel=1e-6)
    assert details["with_details"]["note"] == "text" and details["redness"] == {}


def test_what_one_reward_reports_is_logged(tmp_path):
    def with_details(images, prompts, metadata):
        return images.mean((1, 2, 3)), {"darkest": images.detach().amin((1, 2, 3))}

    shown = []
    trainer = make_trainer(tmp_path, reward=with_details, max_steps=1, arguments=shown_in(shown))
    trainer.train()
    darkest = shown[-1][0].min().item()
    assert trainer.state.log_history[0]["rewards/with_details/darkest"] == pytest.approx(darkest, rel=1e-6)
    metrics = trainer.evaluate(PROMPTS[:2])
    assert 0 <= metrics["eval_rewards/with_details/darkest"] < metrics["eval_reward"]


def test_metadata_reaches_the_reward_with_its_prompt(tmp_path):
    rows = [{"prompt": prompt, "number": index, "tags": [prompt[-1]]} for index, prompt in enumerate(PROMPTS)]
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(zip(prompts, metadata, strict=True))
        return redness(images, prompts, metadata)

    make_trainer(tmp_path, reward=reward, prompts=rows, max_steps=2, per_device_train_batch_size=3).train()
    assert len(seen) == 6 and len({prompt for prompt, _ in seen[:5]}) == 5
    for prompt, metadata in seen:
        assert metadata == {"number": PROMPTS.index(prompt), "tags": [prompt[-1]]}


def test_image_samples_hook_sees_the_images_of_training(tmp_path):
    calls = []
    trainer = make_trainer(
        tmp_path,
        per_device_train_batch_size=2,
        arguments={"image_samples_hook": lambda data, step, tracker: calls.append((data, step, tracker))},
    )
    trainer.train()
    assert [(step, tracker) for _, step, tracker in calls] == [(1, None), (2, None)]
    for data, step, _ in calls:
        [(images, prompts, metadata, rewards, details)] = data
        assert images.shape == (2, 3, 16, 16) and not images.requires_grad
        assert prompts == [trainer.train_dataset[2 * step - 2]["prompt"], trainer.train_dataset[2 * step - 1]["prompt"]]
        assert metadata == [{}, {}] and details == {"redness": {}}
        assert torch.equal(rewards, redness(images, prompts, metadata))


def test_image_samples_hook_gets_the_tracker(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def hook(data, step, tracker):
        tracker.log_images({"samples": data[0][0].numpy()}, step=step, dataformats="NCHW")

    trainer = make_trainer(
        tmp_path, arguments={"image_samples_hook": hook}, report_to=["tensorboard"], run_name="run", max_steps=1
    )
    trainer.train()
    [file] = tmp_path.rglob("events.*")
    assert accumulator.EventAccumulator(str(file)).Reload().Tags()["images"] == ["samples"]


# Thresholds


def test_hinge_loss_at_a_threshold(tmp_path):
    calls = []

    def reward(images, prompts, metadata):
        rewards = redness(images, prompts, metadata)
        calls.append(rewards.tolist())
        return rewards

    probe = make_trainer(tmp_path, reward=reward, per_device_train_batch_size=2, max_steps=1)
    probe.train()
    low, high = sorted(calls[0])
    threshold = (low + high) / 2
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=2, max_steps=1, reward_threshold=threshold, reward_weights=[3.0]
    )
    trainer.train()
    update = trainer.state.log_history[0]
    assert update["weight"] == pytest.approx(5.0, rel=1e-6)
    assert update["loss"] == pytest.approx(5.0 * 3.0 * (threshold - low) / 2, rel=1e-4)
    assert update["below_threshold"] == 0.5


def test_rewards_above_the_threshold_give_no_loss_and_no_stop(tmp_path):
    trainer = make_trainer(tmp_path, reward_threshold=-10.0, max_steps=12, sample_num_steps=2, weight_decay=0.0)
    start = trained_weights(trainer)
    trainer.train()
    updates = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(updates) == 12
    assert {entry["loss"] for entry in updates} == {entry["grad_norm"] for entry in updates} == {0.0}
    assert same(start, trained_weights(trainer))


def test_ten_updates_without_gradient_stop(tmp_path):
    def constant(images, prompts, metadata):
        return images.mean((1, 2, 3)) * 0.0

    trainer = make_trainer(tmp_path, reward=constant, max_steps=12, sample_num_steps=2)
    with pytest.raises(RuntimeError, match="For 10 updates the gradient was exactly zero"):
        trainer.train()
    assert trainer.state.global_step == 9


def test_a_learning_rate_of_zero_does_not_stop(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=11, sample_num_steps=2, learning_rate=0.0)
    trainer.train()
    assert trainer.state.global_step == 11


# NaN


class Breaking:
    """A reward that returns NaN from its third call on, or never."""

    __name__ = "breaking"

    def __init__(self, after: float = 2):
        self.calls, self.after = 0, after

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        rewards = redness(images, prompts, metadata)
        return (
            rewards + math.nan if self.calls > self.after else rewards
        )  # its gradient is finite, with a threshold even zero


@pytest.mark.parametrize("threshold", [None, 5.0])
def test_nan_stops_before_the_weights_change(threshold, tmp_path):
    trainer = make_trainer(
        tmp_path,
        reward=Breaking(),
        max_steps=5,
        reward_threshold=threshold,
        ema_decay=0.9,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(FloatingPointError, match=r"Update 3: .*not finite.*'reward': nan.*Train again"):
        trainer.train()
    assert trainer.state.global_step == 2
    bad = trained_weights(trainer)
    assert not (tmp_path / "checkpoint-3").exists()
    mended = {"reward": Breaking(after=math.inf), "ema_decay": 0.9, "reward_threshold": threshold}
    other = make_trainer(tmp_path / "other", max_steps=2, **mended)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert same(bad, trained_weights(other))
    resumed = make_trainer(tmp_path, max_steps=3, **mended)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3 and math.isfinite(logged(resumed)[-2]["loss"])


def test_an_infinite_gradient_stops(tmp_path):
    def cliff(images, prompts, metadata):
        value = images.mean((1, 2, 3))
        return (value - value.detach()).clamp(min=0).sqrt()  # sqrt has an infinite gradient at 0

    trainer = make_trainer(tmp_path, reward=cliff)
    start = trained_weights(trainer)
    with pytest.raises(FloatingPointError, match="Update 1"):
        trainer.train()
    assert same(start, trained_weights(trainer))


def test_training_goes_on_after_a_stop(tmp_path):
    reward = Breaking()
    trainer = make_trainer(tmp_path, reward=reward, max_steps=4, logging_steps=2)
    with pytest.raises(FloatingPointError):
        trainer.train()
    reward.calls = -10
    trainer.train()
    assert all(math.isfinite(value) for entry in logged(trainer) for value in entry.values())


# Steps, prompts and draws


@pytest.mark.parametrize(("epochs", "batch", "updates"), [(1, 2, 3), (2, 2, 5), (0.4, 1, 2), (1, 8, 1)])
def test_epochs_are_counted_in_prompts(epochs, batch, updates, tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=-1, num_train_epochs=epochs, per_device_train_batch_size=batch, learning_rate=0.0,
        sample_num_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == updates
    assert trainer.state.log_history[0]["epoch"] == pytest.approx(batch / len(PROMPTS))


def test_max_steps_wins_over_epochs(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, num_train_epochs=3)
    trainer.train()
    assert trainer.state.global_step == 1


def test_fewer_prompts_than_samples(tmp_path):
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(prompts)
        return redness(images, prompts, metadata)

    make_trainer(tmp_path, reward=reward, prompts=PROMPTS[:2], per_device_train_batch_size=3, max_steps=2).train()
    assert [sorted(seen[i : i + 2]) for i in (0, 2, 4)] == [sorted(PROMPTS[:2])] * 3


def test_groups_draw_their_own_steps(tmp_path):
    def drawn(directory, group_size):
        trainer = make_trainer(
            directory, max_steps=2, gradient_accumulation_steps=4, draw_group_size=group_size, sample_num_steps=4
        )
        draws = []
        forward = trainer.rollout_model.register_forward_hook(lambda *args: draws.append(args[-1].active_steps))
        trainer.train()
        forward.remove()
        return draws

    paired = drawn(tmp_path / "a", 2)
    assert paired[::2] == paired[1::2] and len(set(paired)) > 1
    expected = [
        tuple(sorted(torch.randperm(4, generator=make_generator(42, Purpose.STEPS, group))[:2].tolist()))
        for group in range(4)
    ]
    assert paired[::2] == expected
    together = drawn(tmp_path / "b", None)
    assert [together[i : i + 4] for i in (0, 4)] == [[steps] * 4 for steps in expected[:2]]


def test_seeds_decide_alone(tmp_path):
    runs = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        torch.manual_seed(len(runs))  # what was drawn before does not matter
        trainer = make_trainer(tmp_path, seed=seed)
        trainer.train()
        runs[name] = trained_weights(trainer), logged(trainer)
    assert same(runs["one"], runs["again"])
    assert not same(runs["one"], runs["two"])


def test_text_arguments_are_repeated_for_each_sample(tmp_path):
    shown = []
    trainer = make_trainer(
        tmp_path,
        arguments=shown_in(shown),
        per_device_train_batch_size=2,
        sample_guidance_scale=3.5,
        sample_kwargs={"true_cfg_scale": 2.0, "negative_prompt": "a dog"},
        learning_rate=0.0,
    )
    trainer.train()
    images, prompts, *_ = shown[-1]
    by_hand = trainer.pipeline(
        prompt=prompts,
        generator=[make_generator(42, Purpose.NOISE, index) for index in (2, 3)],
        negative_prompt=["a dog", "a dog"],
        true_cfg_scale=2.0,
        guidance_scale=3.5,
        num_inference_steps=3,
        height=16,
        width=16,
        output_type="pt",
    ).images
    assert torch.equal(images, by_hand)


def test_the_pipeline_carries_the_trained_weights(tmp_path):
    pipeline = tiny_flux()
    before = sample(pipeline)
    trainer = make_trainer(tmp_path, pipeline)
    assert torch.equal(sample(pipeline), before)
    trainer.train()
    after = sample(pipeline)
    assert not torch.equal(after, before)
    pipeline.disable_lora()
    assert torch.equal(sample(pipeline), before)
    assert isinstance(pipeline.transformer, FluxTransformer2DModel) and trainer.denoisers == {
        "transformer": pipeline.transformer
    }


def test_construction_without_ci_sends_nothing(tmp_path, monkeypatch):
    for name in ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    make_trainer(tmp_path, max_steps=1).train()  # the guard of conftest.py refuses connections


def test_several_devices_of_one_process_are_not_used_by_replication(tmp_path):
    config = make_config(tmp_path)
    config._n_gpu = 2
    trainer = LeapAlignTrainer(tiny_flux(), redness, config, train_dataset=PROMPTS)
    assert trainer.args.train_batch_size == 1 and trainer.args.eval_batch_size == config.per_device_eval_batch_size
    trainer.train()
