"""The plan of a training's memory: what it counts, against sums by hand and what is measured."""

import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from training_cases import make_trainer

from examples.tiny import tiny_clip, tiny_flux, tiny_sd3, tiny_tokenizer
from examples.tiny_video import tiny_wan
from trl_leapalign.cli.main import main
from trl_leapalign.rewards import CLIPReward
from trl_leapalign.training import memory_report
from trl_leapalign.training.live_bytes import LiveBytes
from trl_leapalign.training.memory_plan import GIB, state_bytes
from trl_leapalign.training.memory_report import plan_training

MIB = 2**20


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_that_live_are_those_that_autograd_keeps(checkpointing):
    with FakeTensorMode():
        layers = [nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(4)]
        values = torch.zeros(1024, 256, requires_grad=True)
        with LiveBytes() as count:
            hidden = values
            for layer in layers:
                hidden = checkpoint(layer, hidden, use_reentrant=False) if checkpointing else layer(hidden)
            # Of each layer: its output, and without checkpointing GELU's input and output.
            assert count.live == 4 * (1 if checkpointing else 9) * MIB
            hidden.backward(torch.ones_like(hidden))
            del hidden
            weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
            assert count.live == 4 * (weights + values.numel())


@pytest.mark.parametrize("make, call", [(tiny_flux, {}), (tiny_sd3, {}), (tiny_wan, {"num_frames": 5})])
def test_the_parts_are_those_of_the_pipeline(make, call, tmp_path):
    kwargs = {**call, **({"max_sequence_length": 16} if make is tiny_wan else {})}
    pipeline = make()
    vae = sum(p.numel() * p.element_size() for p in pipeline.vae.parameters())
    before = [id(part) for part in pipeline.components.values()]
    trainer = make_trainer(tmp_path, pipeline, sample_kwargs=kwargs, ema_decay=0.9)
    plan = plan_training(trainer)
    trained = sum(p.numel() for p in trainer.rollout_model.parameters() if p.requires_grad)
    assert plan.trained == plan.gradients == plan.average == 4 * trained / GIB
    assert plan.optimizer == 8 * trained / GIB
    assert plan.weights["vae"] == pytest.approx(vae / GIB, rel=0.01)
    assert plan.num_kept == (4 if make is tiny_wan else 2)  # two steps; Wan's guidance makes a call of its own
    assert 0 < plan.kept and 0 < plan.decoder
    assert plan.peak == pytest.approx(sum(plan.rows().values()))
    assert before == [id(part) for part in pipeline.components.values()]
    assert not any(parameter.is_meta for parameter in pipeline.vae.parameters())


def test_the_plan_knows_what_checkpointing_and_rewards_take(tmp_path):
    reward = CLIPReward(tiny_clip(), tiny_tokenizer())
    plain = plan_training(make_trainer(tmp_path, tiny_sd3(), reward))
    less = plan_training(make_trainer(tmp_path, tiny_sd3(), reward, activation_checkpointing=True))
    assert less.kept < 0.5 * plain.kept and less.decoder < 0.7 * plain.decoder
    assert plain.reward > 0 and plain.weights["reward CLIPReward"] > 0
    two = plan_training(make_trainer(tmp_path, tiny_sd3(), reward, per_device_train_batch_size=2))
    assert two.kept == pytest.approx(2 * plain.kept, rel=0.2)


def test_states_of_optimizers():
    assert state_bytes("adamw_torch") == 8
    assert state_bytes("adamw_bnb_8bit") < 2.2 and state_bytes("paged_adamw_8bit") == 0 and state_bytes("sgd") == 0


def test_the_plan_is_logged_with_what_was_measured(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory_report, "PLANNED_FROM", 0)
    with caplog.at_level(logging.INFO, "trl_leapalign"):
        make_trainer(tmp_path, tiny_flux(), max_steps=1).train()
    assert "kept activations of 2 denoiser calls" in caplog.text
    assert "After the first update: planned" in caplog.text


def test_check_answers_from_configs_alone(tmp_path, capsys):
    pipeline = tiny_flux()
    pipeline.save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    options = ["check", str(tmp_path / "model"), "--sample_height", "16", "--sample_width", "16"]
    for memory, code in ((24, 0), (1, 1)):
        with pytest.raises(SystemExit) as ended:
            main([*options, "--memory", str(memory), "--output_dir", str(tmp_path)])
        assert ended.value.code == code
    printed = capsys.readouterr().out
    assert "Fits into 24 GiB" in printed and "Does not fit into 1 GiB" in printed
    assert "offload_rewards=True" in printed
