"""Optimizers with a train and an eval mode, and settings of optimizers that cannot work."""

import pytest
import torch
from peft import LoraConfig
from training_cases import PROMPTS, make_trainer, redness, same, sample, trained_weights

from examples.tiny import tiny_flux
from trl_leapalign.training.optimizers import has_modes


class TwoWeights(torch.optim.SGD):
    """Gradients are taken at other weights than are meant to be used, which lie between them and the first ones."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1.0, momentum=0.5)
        self.mode = "eval"

    def step(self, closure=None):
        assert self.mode == "train"
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "first" not in state:
                    state["first"] = parameter.detach().clone()
        return super().step(closure)

    def _mix(self, mode, share):
        if self.mode != mode:
            self.mode = mode
            for parameter, state in self.state.items():
                if "first" in state:
                    parameter.data.lerp_(state["first"], share)

    def train(self):
        self._mix("train", -1.0)

    def eval(self):
        self._mix("eval", 0.5)


def trainer_with_modes(directory, modes=None, **settings):
    pipeline = tiny_flux()
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"]))
    optimizer = TwoWeights([parameter for parameter in pipeline.transformer.parameters() if parameter.requires_grad])

    def reward(images, prompts, metadata):
        if modes is not None:
            modes.append(optimizer.mode)
        return redness(images, prompts, metadata)

    arguments = {"optimizers": (optimizer, None), "eval_dataset": PROMPTS[:1]}
    settings = {"sample_num_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}
    return make_trainer(directory, pipeline, reward, arguments=arguments, **settings), optimizer


def test_evaluation_saving_and_the_end_use_the_weights_of_the_eval_mode(tmp_path):
    modes = []
    trainer, optimizer = trainer_with_modes(tmp_path, modes, max_steps=2, eval_strategy="steps", eval_steps=1)
    assert has_modes(optimizer) and not has_modes(torch.optim.SGD(trainer.rollout_model.parameters()))
    trainer.train()
    assert modes == ["train", "eval"] * 2 and optimizer.mode == "eval"
    fresh = tiny_flux()
    fresh.load_lora_weights(tmp_path / "checkpoint-2")
    assert torch.equal(sample(fresh), sample(trainer.pipeline))
    scores = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert trainer.evaluate()["eval_reward"] == scores[-1]


def test_evaluating_changes_no_bit_of_the_training(tmp_path):
    plain, _ = trainer_with_modes(tmp_path / "plain", max_steps=3, save_strategy="no")
    plain.train()
    busy, _ = trainer_with_modes(tmp_path / "busy", max_steps=3, eval_strategy="steps", eval_steps=1)
    busy.train()
    assert same(trained_weights(plain), trained_weights(busy))


def test_a_resumed_training_with_modes_equals_one_never_stopped(tmp_path):
    straight, _ = trainer_with_modes(tmp_path, max_steps=3)
    straight.train()
    resumed, optimizer = trainer_with_modes(tmp_path / "other", max_steps=3)
    optimizer.mode = "train"  # schedule-free ones keep it in their state
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(trained_weights(straight), trained_weights(resumed))


def test_the_best_model_is_that_of_the_eval_mode(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    trainer, optimizer = trainer_with_modes(tmp_path, max_steps=3, **settings)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1") and optimizer.mode == "eval"
    fresh = tiny_flux()
    fresh.load_lora_weights(best)
    assert torch.equal(sample(fresh), sample(trainer.pipeline))


def test_a_moving_average_of_such_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"TwoWeights has weights of its own .* Set ema_decay=None"):
        trainer_with_modes(tmp_path, ema_decay=0.9)
    with pytest.raises(ValueError, match="optim='schedule_free_radam' averages the weights itself"):
        make_trainer(tmp_path, ema_decay=0.9, optim="schedule_free_radam")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}}, "lr_scheduler_kwargs={'power': 2} can"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cannot be made: One of min_lr or min_lr_rate"),
        ({"optim": "adafactor", "optim_args": "scale"}, "optim='adafactor', optim_args='scale', lr_scheduler_type="),
    ],
)
def test_settings_that_make_no_optimizer_are_noticed_before_training(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_no_optimizer_is_left_behind_by_that_check(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.optimizer is None and trainer.lr_scheduler is None
