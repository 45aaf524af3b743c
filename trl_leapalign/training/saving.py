"""Saving and resuming a training: the part of the trainer that writes and reads checkpoints."""

from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..adapters.saving import save_trained
from ..leapalign_config import LeapAlignConfig
from ..prompts.sources import PromptStream
from ..rewards import RewardSet
from ..rollout.rollout_model import RolloutModel
from .callbacks import WeightAverage
from .checkpoints import begin_checkpoint, load_parameters, only_writing, rotate_checkpoints, save_run, seal_checkpoint
from .guards import check_weights
from .optimizers import has_modes
from .resuming import base_weights, choose_checkpoint, describe_run, load_run
from .sharding import gathered_state, load_optimizer_state, optimizer_state


class TrainingSaves(Trainer):
    """Checkpoints that are whole or not taken, and resuming that equals never stopping."""

    args: LeapAlignConfig
    pipeline: DiffusionPipeline
    rollout_model: RolloutModel
    rewards: RewardSet
    train_dataset: PromptStream
    weight_average: WeightAverage | None
    denoisers: dict[str, nn.Module]
    sharded: bool
    _given_optimizer: torch.optim.Optimizer | None

    def _averaged(self) -> AbstractContextManager:
        raise NotImplementedError

    @cached_property
    def _base_weights(self) -> dict[str, str]:
        return base_weights(self.pipeline)

    @cached_property
    def _run(self) -> dict[str, Any]:
        parts = (self.args, self.rollout_model, self.rewards, self.train_dataset, self._base_weights)
        return describe_run(*parts, self._given_optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_weights(self.rollout_model)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        with only_writing(self.args):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save and not self.sharded:
            return
        check_weights(self.rollout_model)
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        with self._averaged():
            states = {name: gathered_state(denoiser) for name, denoiser in self.denoisers.items()}
            if self.args.should_save:
                formats = (self.args.full_finetuning, states, self.args.adapter_dtype)
                save_trained(self.pipeline, self.denoisers, directory, *formats)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        writes = self.args.should_save
        if writes or self.sharded:
            run = {**self._run, "updates": self.state.global_step}
            save_run(output_dir, self.rollout_model, run, writes)
            if self.weight_average is not None:
                self.weight_average.save(output_dir, writes)
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sharded:  # in place of this process's part, which Trainer wrote
            state = optimizer_state(self.rollout_model, self.optimizer)
            if writes:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, "cpu", weights_only=True)
        load_optimizer_state(self.rollout_model, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_run(resume_from_checkpoint, self.rollout_model, self._run)
        if self.weight_average is not None:
            self.weight_average.load(resume_from_checkpoint)

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(self.args, max_steps)  # the checkpoint's logging_steps and the like do not count
        return position

    def _load_best_model(self) -> None:
        self.accelerator.wait_for_everyone()
        best = choose_checkpoint(self.state.best_model_checkpoint, self.args)
        load_parameters(best, self.rollout_model)
        if self.weight_average is not None:
            self.weight_average.load(best)
        if has_modes(self.optimizer):
            self._load_optimizer_and_scheduler(best)
