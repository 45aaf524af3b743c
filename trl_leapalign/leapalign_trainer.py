"""LeapAlignTrainer: prompts -> rollout -> reward -> loss."""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput

from .adapters.lora import prepare_denoisers, restored_on_error
from .adapters.model_card import write_model_card
from .adapters.saving import save_trained
from .evaluation.scoring import scored_batches
from .leapalign_config import LeapAlignConfig
from .prompts.columns import CallColumns
from .prompts.sources import PromptFunction, PromptSource, PromptStream, choose_prompts, collate, load_prompts
from .rewards import RewardFunction, RewardSet, Scores, check_finite
from .rewards.reward_set import check_reward_settings
from .rollout.pipelines import check_call_arguments, load_pipeline, quiet
from .rollout.recorder import RolloutOutput
from .rollout.rollout_model import RolloutModel, for_copies
from .training.callbacks import WeightAverage
from .training.checkpoints import last_checkpoint, load_run, save_run
from .training.dry_run import DryRun, dry_run
from .training.guards import NothingLearnt, check_evaluation, check_kinds, check_optimizer, check_weights
from .training.losses import below_threshold, limit_sample_gradients, reward_loss
from .training.metrics import MetricBuffer, merge, peak_memory_gib, saturated, summarise
from .training.sharding import gathered_state, load_optimizer_state, optimizer_state, shard_trainer, whole

MOST_IDLE_UPDATES = 10


ImageSamplesHook = Callable[[list[tuple], int, GeneralTracker | None], None]


class LeapAlignTrainer(Trainer):
    """Aligns a flow-matching pipeline with a differentiable reward, by LeapAlign or another direct-gradient method.

    Arguments are those of TRL's DDPOTrainer in a new order; the training loop is that of `transformers.Trainer`. After
    `train()` the pipeline carries the trained weights.

    Args:
        pipeline (DiffusionPipeline | str): a pipeline with a flow-matching scheduler, or its Hub id or path.
        reward_function (RewardFunction | str | Sequence[RewardFunction | str]): `reward(images, prompts, metadata)`
            with images (B, 3, H, W) in [0, 1] that carry the graph, or video (B, F, 3, H, W), returns differentiable
            rewards (B,), or these and a dict to report; or the name of a built-in reward, such as "hpsv2.1". Several
            are weighted by `config.reward_weights`.
        config (LeapAlignConfig | None): settings.
        prompt_function (PromptFunction | None): returns a prompt and its metadata; in place of a dataset.
        image_samples_hook (ImageSamplesHook | None): called as `hook(image_data, global_step, tracker)` when training
            logs and after an evaluation; `image_data` is a list of (images, prompts, metadata, rewards, details), and
            `tracker` the Accelerate tracker of the first entry of `config.report_to`, or None.
        train_dataset (PromptSource | None): prompts to train on; its other columns are the metadata.
        eval_dataset (PromptSource | None): prompts of `evaluate()`.
        peft_config (LoraConfig | None): the adapter; None is a LoRA of rank 32 on the linear layers of all blocks, or
            the adapter that the pipeline already has.
        callbacks (list[TrainerCallback] | None): further callbacks.
        optimizers (tuple): optimizer and learning rate scheduler, to replace those of the config.

    Raises:
        TypeError: if an argument is of the wrong kind, or unknown to the pipeline's call.
        ValueError: if the pipeline, the prompts, the reward or the adapter cannot be trained with.
        RuntimeError: if no gradient reaches the denoisers.
    """

    _tag_names = ("trl", "leapalign")

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        reward_function: RewardFunction | str | Sequence[RewardFunction | str],
        config: LeapAlignConfig | None = None,
        prompt_function: PromptFunction | None = None,
        image_samples_hook: ImageSamplesHook | None = None,
        *,
        train_dataset: PromptSource | None = None,
        eval_dataset: PromptSource | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        check_kinds(config, image_samples_hook)
        config = copy.copy(config) if config is not None else LeapAlignConfig()
        set_seed(config.seed)
        check_reward_settings(reward_function, config.reward_weights, config.reward_threshold)
        self.pipeline = load_pipeline(pipeline, config.device, config.model_init_kwargs)
        check_call_arguments(self.pipeline, ["prompt", "generator", *config.call_kwargs()])
        self.rewards = RewardSet(reward_function, config.reward_weights, config.reward_threshold)
        self.image_samples_hook = image_samples_hook
        self.prompt_source = choose_prompts(
            config.prompt_column,
            prompt_function=prompt_function,
            train_dataset=train_dataset,
            train_prompts=config.train_prompts,
        )
        check_evaluation(config, self.rewards.names, eval_dataset)
        eval_source = eval_dataset if eval_dataset is not None else config.eval_prompts
        eval_rows = load_prompts(eval_source, config.prompt_column, split="test") if eval_source is not None else None
        self.columns = self._find_columns(config, eval_rows)
        config.max_steps = config.count_updates(None if callable(self.prompt_source) else len(self.prompt_source))
        # Trainer would copy the denoisers to all devices of the process, but the rollout runs the pipeline's own.
        config._n_gpu = min(config.n_gpu, 1)
        self.weight_average: WeightAverage | None = None
        self._reset_metrics()
        with restored_on_error(self.pipeline):
            denoisers = prepare_denoisers(
                self.pipeline,
                config.denoisers,
                peft_config,
                full_finetuning=config.full_finetuning,
                checkpointing=config.activation_checkpointing,
            )
            self.rollout_model = RolloutModel(
                self.pipeline,
                denoisers,
                config.build_method(),
                config.call_kwargs(),
                seed=config.seed,
                draw_group_size=config.draw_group_size or config.samples_per_update,
                base_penalty=config.base_penalty is not None,
                columns=self.columns,
            )
            super().__init__(
                model=self.rollout_model,
                args=config,
                data_collator=collate,
                train_dataset=PromptStream(
                    self.prompt_source,
                    config.max_steps * config.samples_per_update,
                    seed=config.prompt_seed,
                    prompt_column=config.prompt_column,
                    shuffle=config.train_sampling_strategy == "random",
                ),
                eval_dataset=eval_rows,
                callbacks=callbacks,
                optimizers=optimizers,
            )
            self.sharded = shard_trainer(self)
            check_optimizer(self.optimizer, self.rollout_model)
            self.pipeline.to(config.device)
            if config.ema_decay is not None:
                self.weight_average = WeightAverage(self.rollout_model, config.ema_decay)
                self.callback_handler.callbacks.insert(0, self.weight_average)
            self.rewards.prepare(config.device)
            if config.dry_run:
                self.dry_run()

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The trained components of the pipeline, by name."""
        return dict(self.rollout_model.denoisers.items())

    # Training

    def _get_train_sampler(self, train_dataset: PromptStream | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, list],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, RolloutOutput]:
        """Sample images for a batch of prompts, reward them and return the weighted hinge loss.

        Args:
            model (nn.Module): the rollout model, as wrapped for training.
            inputs (dict[str, list]): "prompts", "metadata" and "indices" of the batch.
            return_outputs (bool): also return the rollout.
            num_items_in_batch (Tensor | int | None): unused; the loss is a mean over samples.

        Returns:
            Tensor | tuple[Tensor, RolloutOutput]: scalar loss.
        """
        output = model(inputs["prompts"], inputs["indices"], inputs["metadata"])
        prompts, metadata = for_copies(output.images, inputs["prompts"], inputs["metadata"])
        scores = self.rewards(output.images, prompts, metadata)
        loss = reward_loss(
            scores.rewards, output.weights.to(scores.rewards.dtype), self.rewards.weights, self.rewards.thresholds
        )
        trained = [latents for latents in output.latents if latents.requires_grad and loss.requires_grad]
        for number, latents in enumerate(trained):
            loop = number // output.num_calls
            name = "sample_grad_norm" if loop == 0 else f"sample_grad_norm_{loop}"
            report = partial(self._record_norms, name)
            limit_sample_gradients(loss, latents, self.args.max_sample_grad_norm, report, output.num_calls)
        if output.penalty is not None:
            loss = loss + self.args.base_penalty * output.penalty.mean()
        self._record(output, scores, loss)
        self._last_samples = (output.images.detach(), prompts, metadata, scores.total, scores.details)
        return (loss, output) if return_outputs else loss

    def _record(self, output: RolloutOutput, scores: Scores, loss: Tensor) -> None:
        images = output.images.detach()
        steps = {f"active_step_{n}": torch.tensor(float(step)) for n, step in enumerate(output.active_steps)}
        self._metrics.add(
            {
                "reward": scores.total,
                **scores.metrics,
                **output.metrics,
                **{name: step.to(images.device) for name, step in steps.items()},
                **({} if output.penalty is None else {"base_distance": output.penalty.detach()}),
                "saturated": saturated(images),
                "below_threshold": below_threshold(scores.rewards, self.rewards.thresholds),
                "finite": torch.isfinite(loss),
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
        status = self.accelerator.gather(torch.stack([own_norm, finite, active])[None]).cpu()  # (processes, 3)
        norms, all_finite, any_active = status[:, 0], bool(status[:, 1].min()), bool(status[:, 2].max())
        overflow = self.accelerator.scaler is not None and all_finite and not norms.isfinite().all()
        if not overflow and not (all_finite and norms.isfinite().all()):
            check_weights(self.rollout_model)
            raise FloatingPointError(
                f"Update {self.state.global_step + 1}: the loss or its gradient is not finite (gradient norm "
                f"{norms.max().item()}). The weights were not changed. Last metrics: {self._metrics.last_batch()}. "
                "Check the reward on the images of this step. Train again, from the last checkpoint's adapter if "
                "you like, with a lower learning_rate, max_grad_norm or gradient_discount, or in bfloat16 or float32."
            )
        idle = overflow or (any_active and not norms.any())
        self._idle_updates = self._idle_updates + 1 if idle else 0
        if self._idle_updates >= MOST_IDLE_UPDATES:
            share = self._metrics.latest("saturated", 1).mean().item()
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
            self.state.epoch = self.state.global_step * self.args.samples_per_update / len(self.prompt_source)
        super().log(logs, start_time)
        if training:
            self._show([self._last_samples])

    def _show(self, image_data: list[tuple]) -> None:
        if self.image_samples_hook is not None and self.is_world_process_zero():
            self.image_samples_hook(image_data, self.state.global_step, self._tracker)

    @cached_property
    def _tracker(self) -> GeneralTracker | None:
        names = [name for name in self.args.report_to if name in LOGGER_TYPE_TO_CLASS]
        if not names:
            return None
        tracker_class = LOGGER_TYPE_TO_CLASS[names[0]]
        needed = {"logging_dir": self.args.output_dir} if tracker_class.requires_logging_directory else {}
        tracker = tracker_class(self.args.run_name or "trl_leapalign", **needed)
        tracker.start()
        return tracker

    def _pop_metrics(self) -> dict[str, float]:
        updates = self._metrics.num_batches("reward") / self.args.gradient_accumulation_steps
        columns = self._metrics.pop()
        del columns["finite"]
        start, self._last_log = self._last_log, time.perf_counter()
        return {
            **summarise(columns),
            "seconds_per_step": (self._last_log - start) / updates,
            "peak_memory_gib": peak_memory_gib(self.args.device),
        }

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; the pipeline carries the trained weights afterwards.

        Args:
            resume_from_checkpoint (str | bool | None): a checkpoint-... folder, or True for the last one of
                `output_dir`: goes on as if training had never stopped.
            trial (Any): of a hyperparameter search, for Trainer.
            ignore_keys_for_eval (list[str] | None): unused, for Trainer.

        Returns:
            TrainOutput: updates, mean loss and speed.

        Raises:
            FloatingPointError: if loss or gradient are not finite, when the weights are those of the update before, or
                the weights themselves.
            NothingLearnt: if no gradient came for many updates.
        """
        self._reset_metrics()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        check_weights(self.rollout_model)
        return output

    def _reset_metrics(self) -> None:
        self._metrics = MetricBuffer()
        self._last_samples: tuple | None = None
        self._last_log = time.perf_counter()
        self._idle_updates = 0

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: PromptSource | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Reward images of fixed prompts with fixed noise.

        Args:
            eval_dataset (PromptSource | None): prompts; None takes those given to the trainer.
            ignore_keys (list[str] | None): unused, for Trainer.
            metric_key_prefix (str): put before the names of the metrics.

        Returns:
            dict[str, float]: mean and standard deviation of the reward, each single reward, and seconds.

        Raises:
            ValueError: if there are no prompts, or a reward is not finite.
            FloatingPointError: if the trained weights are not finite.
        """
        source = eval_dataset if eval_dataset is not None else self.eval_dataset
        if source is None:
            raise ValueError("There are no prompts to evaluate on. Pass eval_dataset, or set eval_prompts.")
        rows = load_prompts(source, self.args.prompt_column, split="test")
        self.columns.check(rows)
        check_weights(self.rollout_model)
        start = time.perf_counter()
        batches, columns = [], []
        with self._averaged(), quiet(self.pipeline), self.accelerator.autocast():
            for batch in scored_batches(
                self.pipeline,
                self.rewards,
                rows,
                range(self.args.process_index, len(rows), self.args.world_size),
                self.args.call_kwargs(self.args.eval_num_steps),
                prompt_column=self.args.prompt_column,
                seed=self.args.seed,
                batch_size=self.args.per_device_eval_batch_size,
                columns=self.columns,
            ):
                scores = batch.scores
                check_finite(scores, self.rewards.names, batch.prompts)
                values = {"reward": scores.total, **scores.metrics}
                columns.append({name: value.float().reshape(-1).tolist() for name, value in values.items()})
                if self.image_samples_hook is not None:
                    shown = (batch.images.cpu(), batch.prompts, batch.metadata, scores.total.cpu(), scores.details)
                    batches.append(shown)
        means = summarise(merge(gather_object(columns)))
        logs = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        logs[f"{metric_key_prefix}_runtime"] = seconds = time.perf_counter() - start
        self._last_log += seconds  # training's seconds_per_step leaves evaluations out
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._show(batches)
        return logs

    def predict(self, *arguments: Any, **options: Any) -> None:
        """Not for images: use `evaluate`, or the pipeline itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("There are no labels to predict. Call evaluate(prompts), or trainer.pipeline(...).")

    def _averaged(self) -> AbstractContextManager:
        return nullcontext() if self.weight_average is None else self.weight_average.applied()

    # Checks before training

    def _find_columns(self, config: LeapAlignConfig, eval_rows: Sequence[dict[str, Any]] | None) -> CallColumns:
        """Which columns go into the pipeline's call, checked on all prompts that are there."""
        rows: Any = self.prompt_source
        if callable(rows):
            rows = [PromptStream(rows, 1, config.prompt_seed)[0]["metadata"]]
        options = (config.pipeline_columns, rows, config.call_kwargs(), config.prompt_column)
        columns = CallColumns.of(self.pipeline, *options)
        if eval_rows is not None:
            columns.check(eval_rows)
        return columns

    def dry_run(self) -> DryRun:
        """Run one rollout and its reward, and differentiate, without a change of any weight.

        Returns:
            DryRun: images, scores and gradients.

        Raises:
            ValueError: if the pipeline or the reward cannot be trained with.
            RuntimeError: if no gradient reaches the denoisers, or recomputed activations differ.
        """
        size = self.args.per_device_train_batch_size
        listed = any(isinstance(value, (list, Tensor)) for value in self.args.sample_kwargs.values())
        batch = collate([self.train_dataset[index] for index in range(size if listed else min(2, size))])
        with self.accelerator.autocast():
            return dry_run(
                self.rollout_model,
                self.rewards,
                batch,
                checkpointing=self.args.activation_checkpointing,
                may_underflow=self.accelerator.scaler is not None,
            )

    # Saving

    @property
    def _run(self) -> dict[str, Any]:
        """What must stay when training is resumed: it decides noise and steps, or a checkpoint brings it itself."""
        method = self.rollout_model.method
        return {
            "method": repr(method) if is_dataclass(method) else type(method).__qualname__,
            "sample_num_steps": self.args.sample_num_steps,
            "learning_rate": self.args.learning_rate,
            "seed": self.args.seed,
            "data_seed": self.train_dataset.seed,
            "samples_per_update": self.args.samples_per_update,
            "draw_group_size": self.rollout_model.draw_group_size,
            "ema_decay": self.args.ema_decay,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save and not self.sharded:
            return
        check_weights(self.rollout_model)
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        with self._averaged():
            states = {name: gathered_state(denoiser) for name, denoiser in self.denoisers.items()}
            if self.args.should_save:
                save_trained(self.pipeline, self.denoisers, directory, self.args.full_finetuning, states)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        writes = self.args.should_save
        if writes or self.sharded:
            save_run(output_dir, self.rollout_model, self._run, writes)
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

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pushing = getattr(self, "push_in_progress", None)
        waits = pushing is not None and not pushing.is_done() and not self.args.hub_always_push
        if self.args.hub_strategy != HubStrategy.END and not waits:
            self._save(self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, **metadata: Any) -> None:
        """Write the card of the trained weights into `output_dir`.

        Args:
            **metadata: arguments of `adapters.model_card.write_model_card`, such as `license` or `tags`.
        """
        if self.is_world_process_zero():
            write_model_card(self, Path(self.args.output_dir), **metadata)
