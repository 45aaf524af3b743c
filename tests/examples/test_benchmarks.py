import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import step
from benchmarks.sizes import Size
from examples.tiny import tiny_clip, tiny_flux, tiny_tokenizer
from trl_leapalign.rewards import CLIPReward

CPU = torch.device("cpu")
TINY = Size(tiny_flux, lambda: CLIPReward(tiny_clip(), tiny_tokenizer()), pixels=16, batch_size=2, checkpointing=False)


def test_peak_memory_counts_what_is_alive_at_once():
    size = 2**20  # floats: 4 MiB

    def allocate():
        first = torch.zeros(size)
        second = first + 1
        del first
        third = second + 1
        return third.sum().item()

    assert step.peak_mib(allocate, CPU) == pytest.approx(8, rel=0.01)


def test_peak_memory_counts_saved_activations():
    weight = torch.zeros(2**18, requires_grad=True)

    def run(depth):
        value = weight
        for _ in range(depth):
            value = value.exp()
        value.sum().backward()
        weight.grad = None

    few, many = (step.peak_mib(lambda depth=depth: run(depth), CPU) for depth in (4, 12))
    assert many - few == pytest.approx(8, rel=0.01)


def test_a_black_box_needs_less_memory_than_a_differentiable_reward():
    size = replace(TINY, pixels=64)  # whose decoder, and not the denoiser, needs most
    boxed, smooth = (step.measure(size, name, 4, CPU, 1, False) for name in (step.BLACK_BOX, step.DIFFERENTIABLE))
    assert boxed.calls == smooth.calls == (2, 2)
    assert boxed.peak_mib < smooth.peak_mib


@pytest.mark.parametrize("method", ["leapalign", "draft_lv", "refl", step.FULL])
def test_the_floor_makes_the_calls_of_the_step(method):
    trainer = step.make_trainer(TINY, method, 4, CPU)
    inputs = {"prompts": [TINY.prompt] * 2, "metadata": [{}] * 2, "indices": [0, 1]}
    with step.recorded_calls(trainer) as calls:
        step.train_once(trainer, inputs)
    expected = {"leapalign": (2, 2), "draft_lv": (3, 3), step.FULL: (0, 4)}
    counts = (sum(not call.with_gradients for call in calls), sum(call.with_gradients for call in calls))
    assert counts == expected.get(method, (len(calls) - 1, 1))
    floor = step.make_floor(trainer, calls, inputs)
    with step.recorded_calls(trainer) as replayed:
        floor()
    assert [call.with_gradients for call in replayed] == [call.with_gradients for call in calls]
    for call, again in zip(calls, replayed, strict=True):
        assert torch.equal(call.output, again.output)
    trained = [parameter for parameter in trainer.rollout_model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


def test_a_run_writes_figures_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step.SIZES, "cpu", TINY)
    arguments = ["--methods", "leapalign", step.FULL, "--steps", "3", "6", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments, "--device", "cpu", "--output_dir", str(tmp_path)])
    step.main()
    report = json.loads((tmp_path / "step.json").read_text())
    found = {(each["method"], each["num_steps"]): each for each in report["measurements"]}
    assert set(found) == {(method, steps) for method in ("leapalign", step.FULL) for steps in (3, 6)}
    assert found[step.FULL, 6]["peak_mib"] > 1.5 * found[step.FULL, 3]["peak_mib"]
    assert found["leapalign", 6]["peak_mib"] < 1.1 * found["leapalign", 3]["peak_mib"]
    assert found["leapalign", 3]["floor_seconds"] > 0 and found["leapalign", 6]["floor_seconds"] is None
    assert (tmp_path / "memory.png").exists() and (tmp_path / "time.png").exists()
    assert "x floor" in capsys.readouterr().out
