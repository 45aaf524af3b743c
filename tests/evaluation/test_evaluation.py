"""Evaluation on fixed prompts with fixed noise."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_cases import PROMPTS, blueness, logged, make_config, make_trainer, redness, same, trained_weights

from examples.tiny import tiny_flux
from trl_leapalign import LeapAlignTrainer
from trl_leapalign.prompts.seeds import Purpose, make_generator


def by_hand(pipeline, prompts, num_steps=3, seed=42):
    """Images one by one, by the pipeline's own call."""
    images = [
        pipeline(
            prompt,
            generator=make_generator(seed, Purpose.EVALUATION, index),
            num_inference_steps=num_steps,
            height=16,
            width=16,
            output_type="pt",
        ).images
        for index, prompt in enumerate(prompts)
    ]
    return torch.cat(images)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_evaluation_rewards_the_pipelines_own_images(batch_size, tmp_path):
    calls = []
    trainer = make_trainer(
        tmp_path,
        tiny_flux().to(torch.float64),
        per_device_eval_batch_size=batch_size,
        eval_num_steps=2,
        arguments={"image_samples_hook": lambda *args: calls.append(args)},
    )
    trainer.train()
    calls.clear()
    rows = [{"prompt": prompt, "number": index} for index, prompt in enumerate(PROMPTS[:3])]
    metrics = trainer.evaluate(rows)
    images = by_hand(trainer.pipeline, PROMPTS[:3], num_steps=2)
    rewards = redness(images, PROMPTS[:3], [])
    assert metrics["eval_reward"] == pytest.approx(rewards.mean().item(), rel=1e-6)
    assert metrics["eval_reward_std"] == pytest.approx(np.std(rewards.tolist()), rel=1e-5)
    assert set(metrics) == {"eval_reward", "eval_reward_std", "eval_runtime", "epoch"}
    [(data, step, tracker)] = calls
    assert (step, tracker) == (2, None) and len(data) == -(-3 // batch_size)
    shown = torch.cat([batch[0] for batch in data])
    assert torch.equal(shown, images) if batch_size == 1 else (shown - images).abs().max() < 1e-6
    assert [prompt for batch in data for prompt in batch[1]] == PROMPTS[:3]
    assert [row for batch in data for row in batch[2]] == [{"number": index} for index in range(3)]
    torch.testing.assert_close(torch.cat([batch[3] for batch in data]), rewards, rtol=1e-5, atol=1e-7)


def test_evaluation_is_deterministic_and_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, dry_run=True)
    start, state = trained_weights(trainer), torch.get_rng_state()
    first = trainer.evaluate(PROMPTS[:2])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = trainer.evaluate(PROMPTS[:2])
    assert {**first, "eval_runtime": 0} == {**second, "eval_runtime": 0}
    assert same(start, trained_weights(trainer))


def test_evaluating_while_training_changes_no_training(tmp_path):
    plain = make_trainer(tmp_path)
    plain.train()
    evaluated = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True, arguments={"eval_dataset": PROMPTS[:1]}
    )
    evaluated.train()
    assert same(trained_weights(plain), trained_weights(evaluated))
    entries = logged(evaluated)
    assert [entry for entry in entries if "loss" in entry] == logged(plain)[:2]
    assert [entry["step"] for entry in entries if "eval_reward" in entry] == [0, 1, 2]


def test_several_rewards_are_evaluated_by_name(tmp_path):
    trainer = make_trainer(tmp_path, reward=[redness, blueness], reward_weights=[1.0, 2.0])
    metrics = trainer.evaluate(PROMPTS[:2], metric_key_prefix="test")
    images = by_hand(trainer.pipeline, PROMPTS[:2])
    red, blue = (reward(images, PROMPTS[:2], []).mean().item() for reward in (redness, blueness))
    assert metrics["test_rewards/redness"] == pytest.approx(red, rel=1e-5)
    assert metrics["test_rewards/blueness"] == pytest.approx(blue, rel=1e-5)
    assert metrics["test_reward"] == pytest.approx(red + 2 * blue, rel=1e-5)


def test_the_average_is_evaluated(tmp_path):
    trainer = make_trainer(
        tmp_path,
        ema_decay=0.5,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        arguments={"eval_dataset": PROMPTS[:1]},
    )
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    average = redness(by_hand(trainer.pipeline, PROMPTS[:1]), PROMPTS[:1], []).item()
    raw = load_file(tmp_path / "checkpoint-2" / "trained_parameters.safetensors")
    trainer.rollout_model.load_state_dict(raw, strict=False)
    last = redness(by_hand(trainer.pipeline, PROMPTS[:1]), PROMPTS[:1], []).item()
    assert entry["eval_reward"] == pytest.approx(average, rel=1e-6) and entry["eval_reward"] != last


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    def reward(images, prompts, metadata):
        """What is evaluated is the opposite of what is trained, so that it falls."""
        return blueness(images, prompts, metadata) * images.new_tensor([row.get("sign", 1.0) for row in metadata])

    trainer = make_trainer(
        tmp_path,
        reward=reward,
        max_steps=3,
        learning_rate=0.1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        arguments={"eval_dataset": [{"prompt": prompt, "sign": -1.0} for prompt in PROMPTS[:2]]},
    )
    trainer.train()
    rewards = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    best = int(np.argmax(rewards)) + 1
    assert best < 3, rewards
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.state.best_metric == max(rewards)
    saved = load_file(tmp_path / f"checkpoint-{best}" / "trained_parameters.safetensors")
    assert same(trained_weights(trainer), saved)
    assert trainer.evaluate()["eval_reward"] == max(rewards)


def test_a_plateau_of_the_reward_lowers_the_learning_rate(tmp_path):
    trainer = make_trainer(
        tmp_path,
        reward=blueness,
        max_steps=3,
        learning_rate=1e-6,  # the reward hardly moves
        eval_strategy="steps",
        eval_steps=1,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"factor": 0.5, "patience": 0, "threshold": 1e-2},
        arguments={"eval_dataset": PROMPTS[:1]},
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == [1e-6, 1e-6, 5e-7]


@pytest.mark.parametrize("given", ["argument", "config", "file"])
def test_prompts_of_an_evaluation(given, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    settings = {"argument": {}, "config": {"eval_prompts": PROMPTS[:2]}, "file": {}}
    settings["file"] = {"eval_prompts": str(tmp_path / "prompts.txt")}
    arguments = {"eval_dataset": PROMPTS[:2]} if given == "argument" else {}
    trainer = make_trainer(tmp_path, arguments=arguments, sample_num_steps=2, **settings[given])
    images = by_hand(trainer.pipeline, PROMPTS[:2], num_steps=2)
    expected = redness(images, PROMPTS[:2], []).mean().item()
    assert trainer.evaluate()["eval_reward"] == pytest.approx(expected, rel=1e-5)


def test_a_reward_that_is_not_finite_stops_an_evaluation(tmp_path):
    def reward(images, prompts, metadata):
        return redness(images, prompts, metadata) / images.new_tensor(["blue" not in prompt for prompt in prompts])

    trainer = make_trainer(tmp_path, reward=reward, per_device_eval_batch_size=2, sample_num_steps=2)
    with pytest.raises(ValueError, match="1 of 2 rewards are not finite, such as 'reward' of 'two blue squares': -inf"):
        trainer.evaluate(PROMPTS[:2])


def test_evaluation_without_prompts_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="no prompts to evaluate on"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="eval"):
        make_trainer(tmp_path, eval_strategy="steps", eval_steps=1)


def test_bf16_evaluation_samples_as_training_does(tmp_path):
    """The same noise and prompt give the same image in a rollout and in an evaluation."""
    images = []
    config = make_config(tmp_path, bf16=True, use_cpu=True, max_steps=1, learning_rate=0.0)
    trainer = LeapAlignTrainer(
        tiny_flux(), redness, config, train_dataset=PROMPTS[:1],
        image_samples_hook=lambda data, step, tracker: images.append(data[0][0]),
    )  # fmt: skip
    trainer.train()
    with torch.no_grad(), trainer.accelerator.autocast():
        plain = trainer.pipeline(
            PROMPTS[0], generator=[make_generator(42, Purpose.NOISE, 0)], num_inference_steps=3, height=16, width=16,
            output_type="pt",
        ).images  # fmt: skip
    assert torch.equal(images[0], plain)
    trainer.evaluate(PROMPTS[:1])
    with torch.no_grad(), trainer.accelerator.autocast():
        assert torch.equal(images[1], by_hand(trainer.pipeline, PROMPTS[:1]))
