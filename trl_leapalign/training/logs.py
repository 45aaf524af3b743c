"""What the trainer records of its updates, shows of them, and stops at."""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn
from transformers import Trainer

from ..leapalign_config import LeapAlignConfig
from ..rewards import RewardSet, Scores
from ..rollout.recorder import RolloutOutput
from ..rollout.rollout_model import RolloutModel
from .groups import Compared, FlatUpdates, Groups
from .guards import NothingLearnt, check_weights
from .losses import below_threshold
from .metrics import MetricBuffer, peak_memory_gib, saturated, summarise
from .sharding import whole
from .trackers import live_tracker

MOST_IDLE_UPDATES = 10

ImageSamplesHook = Callable[[list[tuple], int, GeneralTracker | None], None]


class TrainingLogs(Trainer):
    """Metrics of each update, pictures for the hook, and a stop when nothing is learnt or something is not finite."""

    args: LeapAlignConfig
    rewards: RewardSet
    groups: Groups
    rollout_model: RolloutModel
    prompt_source: Any
    image_samples_hook: ImageSamplesHook | None

    def _record(self, output: RolloutOutput, scores: Scores, compared: Compared, loss: Tensor) -> None:
        images = output.images.detach()
        steps = {f"active_step_{n}": torch.tensor(float(step)) for n, step in enumerate(output.active_steps)}
        self._metrics.add(
            {
                "reward": scores.total,
                **scores.metrics,
                **compared.metrics,
                **output.metrics,
                **{name: step.to(images.device) for name, step in steps.items()},
                **({} if output.penalty is None else {"base_distance": output.penalty.detach()}),
                **({} if self.rewards.decoding == "none" else {"saturated": saturated(images)}),
                "below_threshold": below_threshold(scores.rewards, self.rewards.thresholds, compared.teaching),
                "pairs_teach": _any_pair_differs(compared, loss.device),
                "finite": torch.isfinite(loss) & torch.isfinite(scores.rewards).all(),
            }
        )

    def _record_norms(self, name: str, norms: Tensor) -> None:
        self._metrics.add({name: norms})

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """Stop before the optimizer's step if something is not finite, or nothing was learnt for long."""
        norm = whole(super()._get_grad_norm(model, grad_norm))
        steps = self.args.gradient_accumulation_steps
        finite = self._metrics.latest("finite", steps).min()
        active = self._metrics.latest("below_threshold", steps).max()
        own_norm = torch.as_tensor(norm, dtype=torch.float32, device=finite.device)
        pairs = self._metrics.latest("pairs_teach", steps).max()
        status = self.accelerator.gather(torch.stack([own_norm, finite, active, pairs])[None]).cpu()  # (processes, 4)
        norms, all_finite, any_active = status[:, 0], bool(status[:, 1].min()), bool(status[:, 2].max())
        overflow = self.accelerator.scaler is not None and all_finite and not norms.isfinite().all()
        if not overflow and not (all_finite and norms.isfinite().all()):
            check_weights(self.rollout_model)
            raise FloatingPointError(
                f"Update {self.state.global_step + 1}: a reward, the loss or its gradient is not finite (gradient norm "
                f"{norms.max().item()}). The weights were not changed. Last metrics: {self._metrics.last_batch()}. "
                "Check the reward on the images of this step. Train again, from the last checkpoint's adapter if "
                "you like, with a lower learning_rate, max_grad_norm or gradient_discount, or in bfloat16 or float32."
            )
        self._flat_updates.add(bool(status[:, 3].max()))
        idle = overflow or (any_active and not norms.any())
        self._idle_updates = self._idle_updates + 1 if idle else 0
        if self._idle_updates >= MOST_IDLE_UPDATES:
            decoded = self.rewards.decoding != "none"
            share = self._metrics.latest("saturated", 1).mean().item() if decoded else 0.0
            problem = "overflowed float16" if overflow else "was exactly zero"
            raise NothingLearnt(
                f"For {MOST_IDLE_UPDATES} updates the gradient {problem} though rewards are below their threshold, so "
                f"nothing is learnt. {share:.0%} of the pixels are saturated, which have no gradient. Train in "
                "bfloat16, or check that the reward changes with these images."
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values, in training together with the means of the rollouts' metrics since the last time.

        Args:
            logs (dict[str, float]): values by name.
            start_time (float | None): start of training, for Trainer.
        """
        training = "loss" in logs and bool(self._metrics)
        if training:
            logs.update(self._pop_metrics())
        if not callable(self.prompt_source):
            prompts_seen = self.state.global_step * self.args.samples_per_update / self.groups.size
            self.state.epoch = prompts_seen / len(self.prompt_source)
        super().log(logs, start_time)
        if training and self._last_samples is not None:
            self._show([self._last_samples])
            self._last_samples = None

    def _show(self, image_data: list[tuple]) -> None:
        if self.image_samples_hook is not None and self.is_world_process_zero():
            trackers = (
                live_tracker(name, self.callback_handler.callbacks, self.tracker_run_name)
                for name in self.args.report_to
            )
            tracker = next((each for each in trackers if each is not None), None)
            self.image_samples_hook(image_data, self.state.global_step, tracker)

    @property
    def tracker_run_name(self) -> str:
        """What trackers call the run."""
        return self.args.run_name or "trl_leapalign"

    def _shown_rows(self, count: int) -> list[dict[str, Any]]:
        """The prompts that a grid shows and that are watched: the first for evaluation, else the first to train on."""
        rows = self.eval_dataset
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        if rows is None:
            rows = self.prompt_source
        if callable(rows):
            drawn = [self.train_dataset[index] for index in range(count)]
            return [{**each["metadata"], self.args.prompt_column: each["prompt"]} for each in drawn]
        return [rows[index] for index in range(min(count, len(rows)))]

    def leave_out_of_speed(self, seconds: float) -> None:
        """Leave time that was spent on something else out of training's seconds_per_step."""
        self._last_log += seconds

    def _pop_metrics(self) -> dict[str, float]:
        updates = self._metrics.num_batches("reward") / self.args.gradient_accumulation_steps
        columns = self._metrics.pop()
        del columns["finite"], columns["pairs_teach"]
        start, self._last_log = self._last_log, time.perf_counter()
        return {
            **summarise(columns),
            **self._flat_updates.pop(),
            "seconds_per_step": (self._last_log - start) / updates,
            "peak_memory_gib": peak_memory_gib(self.args.device),
        }

    def _reset_metrics(self, config: LeapAlignConfig) -> None:
        self._metrics = MetricBuffer(config.gradient_accumulation_steps if config.logging_strategy == "no" else None)
        self._last_samples: tuple | None = None
        self._last_log = time.perf_counter()
        self._idle_updates = 0
        self._flat_updates = FlatUpdates(self.rewards.black_boxes)


def _any_pair_differs(compared: Compared, device: torch.device) -> Tensor:
    """Whether samples of a prompt differed in a reward without gradient, as a number; 1 if all rewards have one."""
    shares = [value for name, value in compared.metrics.items() if name.endswith("differing_pairs")]
    return torch.stack([share.max() for share in shares]).max() > 0 if shares else torch.ones((), device=device)
