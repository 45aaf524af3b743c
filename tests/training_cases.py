"""Short training runs of tiny pipelines, for the trainer's tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from examples.tiny import tiny_flux
from trl_leapalign import LeapAlignConfig, LeapAlignTrainer

PROMPTS = ["a red circle", "two blue squares", "the green dog", "a yellow cat above a triangle", "three cats"]
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 1,
    "sample_num_steps": 3,
    "sample_height": 16,
    "sample_width": 16,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dry_run": False,
}
TIMING = {"seconds_per_step", "peak_memory_gib", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def redness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """A reward that is not linear and differs from prompt to prompt."""
    signs = images.new_tensor([1.0 if "red" in prompt else -1.0 for prompt in prompts])
    return signs * images[:, 0].mean((1, 2)) - images[:, 2].square().mean((1, 2))


def blueness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images[:, 2].mean((1, 2))


class Recorder(TrainerCallback):
    """Keeps the gradients of every update."""

    def __init__(self):
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
        self.gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})


def unwrap(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


def make_config(directory: Path, **settings: Any) -> LeapAlignConfig:
    return LeapAlignConfig(output_dir=str(directory), **{**SETTINGS, **settings})


def make_trainer(
    directory: Path,
    pipeline: DiffusionPipeline | None = None,
    reward: Any = redness,
    *,
    prompts: Any = PROMPTS,
    arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> LeapAlignTrainer:
    """Build a trainer on a tiny pipeline; `arguments` are the trainer's, `settings` those of its configuration."""
    sources = {"prompt_function": prompts} if callable(prompts) else {"train_dataset": prompts}
    return LeapAlignTrainer(
        pipeline if pipeline is not None else tiny_flux(),
        reward,
        make_config(directory, **settings),
        **{**sources, **(arguments or {})},
    )


def trained_weights(trainer: LeapAlignTrainer) -> dict[str, Tensor]:
    parameters = trainer.rollout_model.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


def all_weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Every parameter and buffer of a pipeline by the name that it had before an adapter came."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        f"{name}.{key}".replace(".base_layer", ""): value.detach().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def sample(pipeline: DiffusionPipeline, seed: int = 1, **arguments: Any) -> Tensor:
    call = {"prompt": "a red circle", "height": 16, "width": 16, "num_inference_steps": 3, **arguments}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(generator=generator, output_type="pt", return_dict=False, **call)[0]


def logged(trainer: LeapAlignTrainer, ignored: frozenset[str] | set[str] = TIMING) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key not in ignored} for entry in trainer.state.log_history]


def checkpoint_tensors(directory: Path) -> dict[str, Any]:
    """All that a checkpoint holds of the weights and the optimizer."""
    load = {".safetensors": load_file, ".pt": lambda file: torch.load(file, weights_only=True)}
    files = sorted(path for path in directory.rglob("*") if path.suffix in load)
    return {str(path.relative_to(directory)): load[path.suffix](path) for path in files}


def same(first: Any, second: Any) -> bool:
    """Whether two nested structures are equal bit for bit."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor, by its norm."""
    assert actual.keys() == expected.keys() and actual
    pairs = [(actual[key].double(), expected[key].double()) for key in expected]
    errors = [(value - reference).norm() / reference.norm().clamp(min=1e-300) for value, reference in pairs]
    return torch.stack(errors).max().item()
