"""What a training keeps does not grow with its length."""

import gc
import weakref

import psutil
import pytest
import torch
from safetensors import safe_open
from training_cases import PROMPTS, make_trainer
from transformers import TrainerCallback

from examples.tiny import tiny_flux
from trl_leapalign import leapalign_trainer
from trl_leapalign.adapters import saving
from trl_leapalign.rewards import reward_model
from trl_leapalign.rewards.reward_model import RewardModel
from trl_leapalign.training.checkpoints import load_parameters, save_run


class Census(TrainerCallback):
    """Counts live tensors and resident memory after some updates."""

    def __init__(self, *updates):
        self.updates, self.tensors, self.memory = updates, [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.updates:
            gc.collect()
            self.tensors.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
            self.memory.append(psutil.Process().memory_info().rss)


@pytest.mark.slow
@pytest.mark.parametrize("logging", ["steps", "no"])
def test_memory_is_the_same_after_50_and_after_300_updates(logging, tmp_path):
    census = Census(50, 300)
    trainer = make_trainer(
        tmp_path,
        max_steps=300,
        logging_strategy=logging,
        eval_strategy="steps",
        eval_steps=25,
        save_strategy="steps",
        save_steps=50,
        save_total_limit=1,
        ema_decay=0.9,
        sample_num_steps=2,
        max_sample_grad_norm=1.0,
        learning_rate=1e-5,
        arguments={"callbacks": [census], "eval_dataset": PROMPTS, "image_samples_hook": lambda *given: None},
    )
    trainer.train()
    for before, after in (census.tensors, census.memory):
        assert abs(after / before - 1) < 0.01, (census.tensors, census.memory)


def test_metrics_and_images_do_not_pile_up_with_logging_off(tmp_path):
    census = Census(3, 9)
    hook = {"callbacks": [census], "image_samples_hook": lambda *given: None}
    trainer = make_trainer(
        tmp_path, max_steps=9, logging_strategy="no", gradient_accumulation_steps=2, sample_num_steps=2, arguments=hook
    )
    trainer.train()
    assert census.tensors[0] == census.tensors[1]
    assert trainer._metrics.num_batches("reward") == 2


def test_no_image_is_kept_without_a_hook(tmp_path):
    trainer = make_trainer(tmp_path, sample_num_steps=2)
    sizes = []

    class Images(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gc.collect()
            tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
            sizes.append([tuple(each.shape) for each in tensors if each.shape == (1, 3, 16, 16)])

    trainer.add_callback(Images())
    trainer.train()
    assert sizes == [[], []]


def test_the_last_images_are_let_go_when_they_were_shown(tmp_path):
    shown = []

    def hook(image_data, step, tracker):
        shown.extend(weakref.ref(images) for images, *_ in image_data)

    trainer = make_trainer(tmp_path, sample_num_steps=2, arguments={"image_samples_hook": hook})
    trainer.train()
    gc.collect()
    assert len(shown) == 2 and all(reference() is None for reference in shown)


def test_an_evaluation_shows_the_first_images_alone(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(leapalign_trainer, "MOST_SHOWN", 3)
    hook = {"image_samples_hook": lambda image_data, step, tracker: shown.append(image_data)}
    trainer = make_trainer(tmp_path, sample_num_steps=1, per_device_eval_batch_size=2, arguments=hook, method="refl")
    trainer.evaluate(PROMPTS + PROMPTS)
    [batches] = shown
    assert [prompts for _, prompts, *_ in batches] == [PROMPTS[:2], PROMPTS[2:4]]
    trainer.is_world_process_zero = lambda: False
    trainer.evaluate(PROMPTS)
    assert len(shown) == 1


class Counting(RewardModel):
    """Counts how often prompts are encoded."""

    def __init__(self):
        super().__init__()
        self.encoded = []

    def encode_prompt(self, prompt):
        self.encoded.append(prompt)
        return torch.tensor(float(len(prompt)))

    def score(self, images, texts):
        return images.mean((1, 2, 3)) * torch.stack(list(texts))


def test_reward_models_keep_the_prompts_that_were_used_last(monkeypatch):
    monkeypatch.setattr(reward_model, "MOST_ENCODED_PROMPTS", 3)
    reward, images = Counting(), torch.rand(5, 3, 4, 4)
    for prompts in (["a", "b", "c"], ["a", "d"], ["a", "c", "d"], ["b"]):
        reward(images[: len(prompts)], prompts, [{}] * len(prompts))
        assert len(reward._encoded_prompts) <= 3
    assert reward.encoded == ["a", "b", "c", "d", "b"]
    many = ["v", "w", "x", "y", "z"]  # more in a batch than are kept
    assert torch.equal(reward(images, many, [{}] * 5), images.mean((1, 2, 3)))


class CountingFile:
    """Counts the tensors of a safetensors file that live at a time."""

    live, most = set(), 0

    def __init__(self, *arguments):
        self.file = safe_open(*arguments)

    def __enter__(self):
        self.open = self.file.__enter__()
        return self

    def __exit__(self, *arguments):
        return self.file.__exit__(*arguments)

    def keys(self):
        return self.open.keys()

    def get_slice(self, name):
        return self.open.get_slice(name)

    def get_tensor(self, name):
        tensor = self.open.get_tensor(name)
        CountingFile.live.add(name)
        weakref.finalize(tensor, CountingFile.live.discard, name)
        CountingFile.most = max(CountingFile.most, len(CountingFile.live))
        return tensor


def test_saved_weights_are_read_back_one_tensor_at_a_time(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, full_finetuning=True)
    monkeypatch.setattr(saving, "safe_open", CountingFile)
    monkeypatch.setattr("trl_leapalign.training.checkpoints.safe_open", CountingFile)
    trainer.save_model(tmp_path / "weights")
    assert 0 < CountingFile.most <= 2
    save_run(tmp_path, trainer.rollout_model, {})
    load_parameters(tmp_path, trainer.rollout_model)
    assert CountingFile.most <= 2 and not CountingFile.live


def test_a_pipeline_is_not_held_by_a_trainer_that_is_gone(tmp_path):
    reference = weakref.ref(make_trainer(tmp_path, tiny_flux()).pipeline.vae)
    gc.collect()
    assert reference() is None
