"""One matrix: every pipeline of `pipeline_cases` and what must hold of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from double_precision import double_precision
from pipeline_cases import CASES
from pipeline_cases.laboratory import EveryStep, Laboratory, PreciseLaboratory, make_trainer
from pipeline_table import PAGE, cheap_columns
from rollout_cases import snapshot
from torch import Tensor
from training_cases import all_weights

from trl_leapalign.adapters.loading import load_adapter
from trl_leapalign.adapters.saving import loading_lines
from trl_leapalign.evaluation.generation import Generation
from trl_leapalign.methods import DRaFT, LeapAlign

SUPPORTED = [case for case in CASES if not case.unsupported]
UNSUPPORTED = [case for case in CASES if case.unsupported]

SHARPNESS = 1e-4  # largest relative error of a derivative along a direction, in float64


def marked(cases: list) -> list:
    """The cases, all but the fast ones marked as slow, each for one process to test."""
    return [
        pytest.param(
            case,
            id=str(case),
            marks=[pytest.mark.xdist_group(str(case)), *([] if case.fast else [pytest.mark.slow])],
        )
        for case in cases
    ]


@pytest.fixture(scope="module", params=marked(SUPPORTED))
def laboratory(request) -> Iterator[Laboratory]:
    yield Laboratory(request.param)


def mean_square(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return images.float().square().flatten(1).mean(1)


def inner_weights(images: Tensor) -> Tensor:
    """Random weights of all pixels but those that are near 0 or 1, where the output is clamped."""
    random = torch.randn(images.shape, generator=torch.Generator().manual_seed(5)).to(images)
    return random * ((images > 0.05) & (images < 0.95))


def uphill(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """A random direction of length 1 that has the gradient's sign everywhere."""
    generator = torch.Generator().manual_seed(6)
    direction = {
        name: gradient.sign() * torch.randn(gradient.shape, generator=generator).abs().to(gradient)
        for name, gradient in gradients.items()
    }
    length = torch.stack([value.square().sum() for value in direction.values()]).sum().sqrt()
    return {name: value / length for name, value in direction.items()}


def along(gradients: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
    return sum((gradients[name] * direction[name]).sum().item() for name in direction)


def test_the_output_is_that_of_the_pipeline(laboratory):
    assert type(laboratory.pipeline).__name__ == str(laboratory.case)
    expected = laboratory.plain()
    expected_state = torch.get_rng_state()
    before = snapshot(laboratory.pipeline)
    output = laboratory.rollout(LeapAlign())
    after = snapshot(laboratory.pipeline)
    assert torch.equal(torch.get_rng_state(), expected_state)
    assert torch.equal(output.images, expected)
    assert output.images.requires_grad
    assert expected.std() > 0.003
    assert after.pop("attributes").keys() == before.pop("attributes").keys()
    assert after == before


def test_gradients_are_those_of_finite_differences(laboratory):
    """Of the whole pipeline in float64, along a direction that leads uphill in every parameter: nothing cancels."""
    with double_precision():
        precise = PreciseLaboratory(laboratory.case)
        weights = inner_weights(precise.plain())
        solver = precise.gradients(DRaFT(num_last_steps=None), weights)
        direction = uphill(solver)
        expected = along(solver, direction)
        found = []
        for step in (1e-5, 1e-6, 1e-7):  # the first that is fine enough by its own error
            slope, error = precise.slope(weights, direction, step)
            found.append((error / abs(slope), slope))
            if found[-1][0] < SHARPNESS / 10:
                break
        error, slope = min(found)
        assert error < SHARPNESS, found
        assert abs(expected / slope - 1) < SHARPNESS, (expected, found)
        if precise.is_euler():
            leaps = precise.gradients(EveryStep(), weights)
            assert abs(along(leaps, direction) / expected - 1) < SHARPNESS / 10


def test_training_moves_adapters_alone_and_what_is_saved_is_what_was_trained(laboratory, tmp_path):
    before = all_weights(laboratory.pipeline)
    trained = laboratory.trained_names
    trainer = make_trainer(laboratory.case, laboratory.pipeline, tmp_path / "run", mean_square)
    trainer.train()
    after = all_weights(laboratory.pipeline)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved <= trained
    assert len(moved) >= len(trained) / 4
    trainer.save_model(tmp_path / "adapter")
    laboratory.pipeline.set_progress_bar_config(disable=True)
    images = laboratory.plain()
    fresh = laboratory.build()
    untrained = laboratory.plain(fresh)
    lines = loading_lines(laboratory.pipeline, laboratory.denoisers, str(tmp_path / "adapter"))
    exec("\n".join(lines), {"pipeline": fresh})
    for denoiser in (getattr(fresh, name) for name in laboratory.denoisers):
        denoiser.eval().requires_grad_(False)
    loaded = laboratory.plain(fresh)
    torch.testing.assert_close(loaded, images, rtol=0, atol=1e-5)
    assert not torch.allclose(loaded, untrained, rtol=0, atol=1e-4)
    for again in (loaded_by_name(laboratory, tmp_path), evaluated(laboratory, tmp_path)):
        for denoiser in (getattr(again, name) for name in laboratory.denoisers):
            denoiser.eval()
        torch.testing.assert_close(laboratory.plain(again), loaded, rtol=0, atol=1e-5)


def loaded_by_name(laboratory: Laboratory, directory: Path) -> DiffusionPipeline:
    """The pipeline with what `load_adapter` loads."""
    pipeline = laboratory.build()
    load_adapter(pipeline, directory / "adapter")
    return pipeline


def evaluated(laboratory: Laboratory, directory: Path) -> DiffusionPipeline:
    """The pipeline that `evaluate(..., adapter=...)` samples with."""
    rows = [{"prompt": "a cat"}]
    pipeline = Generation(laboratory.build, rows, directory / "images", adapter=directory / "adapter").load()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_gradient_checkpointing_keeps_gradients_or_is_refused(laboratory, tmp_path):
    if laboratory.case.checkpointing:
        with pytest.raises((ValueError, RuntimeError), match="activation_checkpointing=False"):
            make_trainer(laboratory.case, laboratory.case.build(), tmp_path, mean_square, activation_checkpointing=True)
        return
    weights = inner_weights(laboratory.plain())
    expected = laboratory.gradients(LeapAlign(), weights)
    make_trainer(laboratory.case, laboratory.pipeline, tmp_path, mean_square, activation_checkpointing=True)
    try:
        actual = laboratory.gradients(LeapAlign(), weights)
    finally:
        for module in laboratory.modules:
            if getattr(module, "is_gradient_checkpointing", False):
                module.disable_gradient_checkpointing()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5 * largest.item())


@pytest.mark.parametrize("case", marked(UNSUPPORTED))
def test_what_cannot_work_is_refused_by_name_with_the_reason(case, tmp_path):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as refusal:
        make_trainer(case, case.build(), tmp_path, mean_square)
    assert case.unsupported in str(refusal.value)
    assert str(case) in str(refusal.value)


def test_the_matrix_is_wide_enough_and_its_table_up_to_date():
    assert len({str(case) for case in SUPPORTED}) >= 40
    assert len({case.family for case in SUPPORTED}) >= 25
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [line[: len(cheap_columns(case))] for line, case in zip(rows, SUPPORTED, strict=True)] == [
        cheap_columns(case) for case in SUPPORTED
    ]
    for case in SUPPORTED:
        checkpointing = f"no: {case.checkpointing}" if case.checkpointing else "yes"
        assert any(line.startswith(cheap_columns(case)) and f"| {checkpointing} |" in line for line in rows)
    for case in UNSUPPORTED:
        assert f'- `{case}`: "{case.unsupported}"' in page
