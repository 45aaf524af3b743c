"""Training on rewards without gradient: the formula, groups of samples, latents, and what cannot work."""

import itertools
import logging
import random

import pytest
import torch
from peft import LoraConfig
from training_cases import PROMPTS, Recorder, blueness, make_trainer, redness, relative_error, same, trained_weights

from examples.tiny import tiny_flux
from tests.prompts.test_inputs import ROWS, image_to_image
from trl_leapalign import run_rollout
from trl_leapalign.prompts.seeds import Purpose, make_generator
from trl_leapalign.rewards import BlackBox

METHODS = {
    "leapalign": {},
    "leapalign, two pairs": {"method_kwargs": {"pairs_per_rollout": 2}},
    "leapalign, the leap": {"method_kwargs": {"reward_input": "leap"}},
    "draft": {"method": "draft", "method_kwargs": {"num_last_steps": 2}},
    "flowbp_sparse": {"method": "flowbp_sparse"},
    "flowbp_bridge": {"method": "flowbp_bridge"},
    "flowbp_lagrange": {"method": "flowbp_lagrange"},
}
ADAPTER = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def verdict(images, prompts, metadata):
    """Steps of a hundredth, as a judge may give them, in NumPy."""
    return (100 * redness(images, prompts, metadata).numpy()).round() / 100


class Size:
    """Asks for latents."""

    inputs = "latents"

    def __call__(self, latents, prompts, metadata):
        return latents.square().flatten(1).mean(1)


def trainer_of(directory, reward=None, pipeline=None, **settings):
    pipeline = (pipeline or tiny_flux()).to(torch.float64)
    arguments = {"peft_config": ADAPTER, **settings.pop("arguments", {})}
    settings = {"per_device_train_batch_size": 4, "adam_epsilon": 1e-3, **settings}
    return make_trainer(directory, pipeline, reward or BlackBox(verdict), arguments=arguments, **settings)


def batch_of(trainer, count):
    rows = [trainer.train_dataset[index] for index in range(count)]
    return {key: [row[name] for row in rows] for key, name in
            (("prompts", "prompt"), ("metadata", "metadata"), ("indices", "index"))}  # fmt: skip


def gradients(trainer, loss):
    trainer.rollout_model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trainer.rollout_model.named_parameters() if p.grad is not None}


def slope_of(trainer):
    """The loss's gradient with respect to the end latents."""
    loss, output = trainer.compute_loss(trainer.rollout_model, batch_of(trainer, 4), return_outputs=True)
    return torch.autograd.grad(loss, output.latents[0])[0]


def pair_mean(latents, rewards, size, power):
    result = torch.zeros_like(latents)
    for a, b in itertools.permutations(range(len(latents)), 2):
        if a // size == b // size:
            d = latents[a] - latents[b]
            result[a] += (rewards[a] - rewards[b]) * d / d.norm() ** power / (size - 1)
    return result


# The formula


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS.keys())
def test_the_gradient_is_that_of_the_formula(settings, tmp_path):
    trainer = trainer_of(tmp_path, sample_num_steps=6, difference_power=2.0, samples_per_prompt=2, **settings)
    batch = batch_of(trainer, 4)
    actual = gradients(trainer, trainer.compute_loss(trainer.rollout_model, batch))
    reference = run_rollout(  # with graph all the way, and its own latents
        trainer.pipeline,
        trainer.rollout_model.method,
        method_generator=make_generator(trainer.args.seed, Purpose.STEPS, 0),
        prompt=batch["prompts"],
        generator=[make_generator(trainer.args.seed, Purpose.NOISE, index) for index in batch["indices"]],
        **trainer.args.call_kwargs(),
    )
    [latents] = reference.latents
    with torch.no_grad():
        rewards = torch.as_tensor(verdict(reference.images.detach(), batch["prompts"], batch["metadata"]))
        g = pair_mean(latents.detach(), rewards, 2, 2)
    assert g.any()
    expected = gradients(trainer, -(reference.weights * (g * latents).flatten(1).sum(1)).mean())
    assert relative_error(actual, expected) < 1e-9


@pytest.mark.parametrize("settings", [METHODS["leapalign"], METHODS["draft"], METHODS["flowbp_bridge"]])
def test_the_black_box_sees_the_pipelines_own_images(settings, tmp_path):
    seen = []

    def look(images, prompts, metadata):
        seen.append(images.clone())
        return [0.0, 1.0] * (len(images) // 2)

    pipeline = tiny_flux()
    trainer = make_trainer(
        tmp_path, pipeline, BlackBox(look), per_device_train_batch_size=4, sample_num_steps=6, **settings
    )
    batch = batch_of(trainer, 4)
    output = trainer.compute_loss(trainer.rollout_model, batch, return_outputs=True)[1]
    assert torch.equal(seen[0], trainer.rollout_model.sample(**batch))
    assert not output.images.requires_grad and output.latents[0].requires_grad


def test_a_threshold_levels_what_is_above_it(tmp_path):
    """Pairs above it are equal, and samples above it have no loss."""
    values = torch.tensor([0.0, 2.0, 1.5, 3.0], dtype=torch.float64)
    trainer = trainer_of(tmp_path, BlackBox(lambda i, p, m: values), reward_threshold=1.0)
    trainer.rewards.weights[0] = 2.0
    loss, output = trainer.compute_loss(trainer.rollout_model, batch_of(trainer, 4), return_outputs=True)
    [latents] = output.latents
    [slope] = torch.autograd.grad(loss, latents, retain_graph=True)
    g = pair_mean(latents.detach(), values.clamp(max=1.0), 4, 1)
    below = (values < 1)[:, None, None]
    torch.testing.assert_close(slope, -2.0 / 4 * output.weights[:, None, None] * g * below, rtol=1e-12, atol=0)
    assert loss.item() == pytest.approx(2 * output.weights[0].item() / 4)  # as of a differentiable reward
    assert trainer._metrics.latest("below_threshold", 1).tolist() == [1, 0, 0, 0]
    assert trainer._metrics.latest("differing_pairs", 1).tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


def test_rewards_with_and_without_gradient_add_up(tmp_path):
    def slopes(reward, **settings):
        trainer = trainer_of(tmp_path, reward, samples_per_prompt=2, **settings)
        return slope_of(trainer)

    both = slopes([BlackBox(verdict), blueness], reward_weights=[0.5, 3.0])
    boxed, smooth = slopes(BlackBox(verdict), reward_weights=0.5), slopes(blueness, reward_weights=3.0)
    torch.testing.assert_close(both, boxed + smooth, rtol=0, atol=1e-12 * both.abs().max().item())


def test_normalised_rewards_have_no_scale(tmp_path):
    def slopes(factors):
        rewards = [
            BlackBox(lambda i, p, m: factors[0] * torch.as_tensor(verdict(i, p, m))),
            lambda i, p, m: factors[1] * blueness(i, p, m) + factors[1],
        ]
        trainer = trainer_of(tmp_path, rewards, normalize_rewards=True)
        return slope_of(trainer)

    expected = slopes((1.0, 1.0))
    torch.testing.assert_close(slopes((1e4, 1e-3)), expected, rtol=0, atol=1e-9 * expected.abs().max().item())


# Near pairs


def test_near_pairs_share_the_steps_before_they_part(tmp_path):
    trainer = trainer_of(tmp_path, pairs="near", near_step=2, near_noise=0.5, sample_num_steps=4)
    model, batch = trainer.rollout_model, batch_of(trainer, 4)
    entered = []

    def keep(pipeline, step, timestep, given):
        entered.append(given["latents"].detach().clone())
        return given

    model.call_kwargs["callback_on_step_end"] = keep
    output = model(**batch)
    del model.call_kwargs["callback_on_step_end"]
    before, parted = entered[0], entered[1]  # what goes into steps 1 and 2
    torch.testing.assert_close(before, before[:1].expand_as(before), rtol=1e-12, atol=1e-12)
    times = trainer.pipeline.scheduler.sigmas.double().tolist()
    plain = model.sample(batch["prompts"], [0] * 4, batch["metadata"])
    assert torch.equal(output.images[0], plain[0]) and not torch.equal(output.images[1], plain[1])
    velocity = (parted[0] - before[0]) / (times[2] - times[1])  # the anchor goes on by Euler's step
    data, noise = before[0] - times[1] * velocity, before[0] + (1 - times[1]) * velocity
    for index in (1, 2, 3):
        new = torch.randn(before[:1].shape, generator=make_generator(trainer.args.seed, Purpose.PARTING, index),
                          dtype=torch.float64)[0]  # fmt: skip
        expected = (1 - times[2]) * data + times[2] * (0.75**0.5 * noise + 0.5 * new)
        torch.testing.assert_close(parted[index], expected, rtol=1e-5, atol=1e-5)  # sigmas are float32


@pytest.mark.parametrize("settings", [METHODS["leapalign, two pairs"], METHODS["draft"], METHODS["flowbp_bridge"]])
def test_near_pairs_share_one_direction(settings, tmp_path):
    trainer = trainer_of(tmp_path, pairs="near", near_step=2, sample_num_steps=6, **settings)
    loss, output = trainer.compute_loss(trainer.rollout_model, batch_of(trainer, 4), return_outputs=True)
    [slope] = torch.autograd.grad(loss, output.latents[0], retain_graph=True)
    one = slope / output.weights[:, None, None]
    torch.testing.assert_close(one, one[:1].expand_as(one), rtol=1e-12, atol=0)
    assert one.any() and all(value.any() for key, value in gradients(trainer, loss).items() if "lora_B" in key)


# Groups


def run(directory, **settings):
    recorder = Recorder()
    trainer = trainer_of(directory, arguments={"callbacks": [recorder]}, **settings)
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("pairs", ["far", "near"])
def test_accumulation_changes_nothing(pairs, tmp_path):
    whole, parts = (
        run(tmp_path, pairs=pairs, per_device_train_batch_size=8 // count, gradient_accumulation_steps=count)
        for count in (1, 2)
    )
    for first, second in zip(whole[1].gradients, parts[1].gradients, strict=True):
        assert relative_error(first, second) < 1e-12
    assert same(whole[0].train_dataset[3]["prompt"], whole[0].train_dataset[0]["prompt"])
    assert whole[0].state.epoch == pytest.approx(4 / len(PROMPTS))


@pytest.mark.parametrize("pairs", ["far", "near"])
def test_resuming_twice_equals_never_stopping(pairs, tmp_path):
    settings = {"pairs": pairs, "save_strategy": "steps", "save_steps": 1, "sample_num_steps": 4}
    settings["ema_decay"] = 0.5
    straight, _ = run(tmp_path / "straight", max_steps=3, **settings)
    for number in (1, 2):
        trainer = trainer_of(tmp_path / "parts", max_steps=3, **settings)
        trainer.train(resume_from_checkpoint=tmp_path / f"straight/checkpoint-{number}")
        assert same(trained_weights(trainer), trained_weights(straight))
    with pytest.raises(ValueError, match="Resume with what it was saved with"):
        other = trainer_of(tmp_path / "other", max_steps=3, **{**settings, "samples_per_prompt": 2})
        other.train(resume_from_checkpoint=tmp_path / "straight/checkpoint-1")


def test_a_prompt_function_is_called_once_a_group(tmp_path):
    trainer = trainer_of(tmp_path, prompts=lambda: (f"a red circle {random.random()}", {}))
    drawn = [trainer.train_dataset[index]["prompt"] for index in range(8)]
    assert len(set(drawn[:4])) == len(set(drawn[4:])) == 1 and drawn[0] != drawn[4]


def test_columns_of_images_are_compared_like_any_other(tmp_path):
    def nearness(images, prompts, metadata):
        return [float(image.mean()) for image in images]

    trainer = trainer_of(
        tmp_path, BlackBox(nearness), image_to_image(), prompts=ROWS, sample_num_steps=4,
        sample_kwargs={"strength": 0.9, "max_sequence_length": 16}, samples_per_prompt=2, dry_run=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["differing_pairs"] == 1


# Rewards of the latents


@pytest.mark.parametrize("reward", [Size(), BlackBox(Size())])
def test_latent_rewards_need_no_decoder(reward, tmp_path):
    trainer = trainer_of(tmp_path, reward, dry_run=True)
    trainer.pipeline.vae.decode = None
    batch = batch_of(trainer, 4)
    loss, output = trainer.compute_loss(trainer.rollout_model, batch, return_outputs=True)
    assert all(p.any() for key, p in gradients(trainer, loss).items() if "lora_B" in key)
    value = output.latents[0].detach().square().flatten(1).mean(1)
    assert loss.item() == pytest.approx(-(output.weights * value).mean().item())
    del trainer.pipeline.vae.decode
    trainer.train()
    assert "saturated" not in trainer.state.log_history[0]
    assert trainer.evaluate(PROMPTS[:2])["eval_reward"] > 0


def test_a_differentiable_latent_reward_has_its_own_gradient(tmp_path):
    trainer = trainer_of(tmp_path, Size())
    loss, output = trainer.compute_loss(trainer.rollout_model, batch_of(trainer, 4), return_outputs=True)
    [slope] = torch.autograd.grad(loss, output.latents[0])
    x = output.latents[0].detach()
    expected = -output.weights[:, None, None] * 2 * x / x[0].numel() / 4
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)


# What teaches nothing, and what cannot work


def test_updates_without_a_difference_are_counted_and_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path, reward=BlackBox(lambda i, p, m: [1.0] * len(i)), per_device_train_batch_size=2,
            samples_per_prompt=2, max_steps=10, logging_steps=5, sample_num_steps=2,
        )  # fmt: skip
        before = trained_weights(trainer)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "flat_updates" in entry]
    assert [entry["flat_updates"] for entry in logs] == [5, 5] and logs[0]["differing_pairs"] == 0
    assert "For 10 updates in a row no two samples of a prompt differed in their reward lambda" in caplog.text
    assert relative_error(trained_weights(trainer), before) < 1e-3  # weight decay alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "refl"}, "ReFL does not reward"),
        ({"method": "drtune", "sample_num_steps": 6}, "DRTune does not reward"),
        ({"method": "draft_lv"}, "DRaFTLV does not reward"),
        ({"samples_per_prompt": 1}, "samples_per_prompt=1. Set it to 2 or more"),
        ({"samples_per_prompt": 3}, "samples_per_prompt=3 must divide the 4 samples that are rewarded at a time"),
        ({"samples_per_prompt": 8, "gradient_accumulation_steps": 2}, "accumulated later cannot be"),
        ({"pairs": "nearby"}, "choose 'far' or 'near'"),
        ({"near_step": 2}, "near_step=2 is for near pairs"),
        ({"pairs": "near", "near_noise": 1.5}, "near_noise"),
        ({"pairs": "near", "near_step": 3, "dry_run": True}, "near_step=3 must be below"),
        ({"difference_power": -1.0}, "difference_power"),
    ],
)
def test_what_cannot_work_is_said_before_training(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **settings)


def test_settings_without_effect_are_refused(tmp_path):
    for settings in ({"pairs": "near"}, {"difference_power": 2.0}):
        with pytest.raises(ValueError, match="has no effect, since all rewards are differentiable"):
            trainer_of(tmp_path, redness, **settings)
    with pytest.raises(ValueError, match="normalize_rewards=True needs several samples"):
        trainer_of(tmp_path, redness, normalize_rewards=True)


def test_numbers_that_are_not_finite_change_no_weight(tmp_path):
    def broken(images, prompts, metadata):
        return [float("nan")] * len(images)

    with pytest.raises(ValueError, match="2 of 2 rewards are not finite"):
        trainer_of(tmp_path, BlackBox(broken), dry_run=True)
    trainer = trainer_of(tmp_path, BlackBox(broken))
    before = trained_weights(trainer)
    with pytest.raises(FloatingPointError, match="Update 1"):
        trainer.train()
    assert same(trained_weights(trainer), before)


@pytest.mark.parametrize("reward", [BlackBox(Size()), Size()], ids=["black box", "latents"])
def test_activations_are_recomputed_where_nothing_is_decoded_with_gradients(reward, tmp_path):
    plain, checkpointed = (
        trainer_of(tmp_path / str(on), reward, activation_checkpointing=on, max_steps=1) for on in (False, True)
    )
    for trainer in (plain, checkpointed):
        trainer.train()
    for ours, theirs in zip(*(trainer.rollout_model.parameters() for trainer in (plain, checkpointed)), strict=True):
        assert torch.equal(ours, theirs)


def test_flat_updates_are_counted_beside_a_differentiable_reward(tmp_path):
    def constant(images, prompts, metadata):
        return [1.0] * len(images)

    trainer = trainer_of(tmp_path, [BlackBox(constant), redness], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["flat_updates"] == 1
