"""LeapAlignTrainer: prompts -> rollout -> reward -> loss."""

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from .adapters.lora import check_active, prepare_denoisers
from .adapters.model_card import write_model_card
from .adapters.restored import random_state_restored_on_error, restored_on_error
from .evaluation.evaluators import check_rows, named_rewards
from .evaluation.rows import read_if_geneval
from .evaluation.scoring import scored_batches
from .leapalign_config import LeapAlignConfig
from .media import on_cpu
from .process_state import use_state
from .prompts.columns import CallColumns
from .prompts.named import is_named, load_named_prompts
from .prompts.sources import (
    PromptFunction,
    PromptSource,
    PromptStream,
    check_picklable,
    check_stateless,
    choose_prompts,
    collate,
    load_prompts,
)
from .rewards import RewardFunction, RewardSet, check_finite
from .rewards.reward_set import check_reward_settings
from .rollout.pipelines import check_call_arguments, load_pipeline, quiet
from .rollout.recorder import RolloutOutput
from .rollout.rollout_model import RolloutModel, end_latents, for_copies
from .training.callbacks import WeightAverage
from .training.card import describe_training
from .training.dry_run import DryRun, dry_run
from .training.groups import Groups
from .training.guards import (
    check_best_model,
    check_callbacks,
    check_evaluation,
    check_kinds,
    check_optimizer,
    check_optimizer_settings,
    check_output_dir,
    check_weights,
    no_gradients_added,
)
from .training.image_grid import ImageGrid
from .training.logs import ImageSamplesHook, TrainingLogs
from .training.losses import limit_sample_gradients, reward_loss
from .training.memory_report import MemoryReport
from .training.memory_switches import MemorySwitches
from .training.metrics import merge, summarise
from .training.optimizers import EndInEvaluationMode, evaluation_mode
from .training.process import check_gradients_possible, prepare_process
from .training.publishing import HubPushes
from .training.resuming import choose_checkpoint
from .training.saving import TrainingSaves
from .training.sharding import shard_trainer
from .training.watch import Watch

MOST_SHOWN = 64


class LeapAlignTrainer(TrainingLogs, TrainingSaves, HubPushes, Trainer):
    """Aligns a flow-matching pipeline with a differentiable reward, by LeapAlign or another direct-gradient method.

    Arguments are those of TRL's DDPOTrainer in a new order; the training loop is that of `transformers.Trainer`. After
    `train()` the pipeline carries the trained weights.

    Args:
        pipeline (DiffusionPipeline | str): a pipeline with a flow-matching scheduler, or its Hub id or path.
        reward_function (RewardFunction | str | Sequence[RewardFunction | str]): `reward(images, prompts, metadata)`
            with images (B, 3, H, W) in [0, 1] that carry the graph, or video (B, F, 3, H, W), returns differentiable
            rewards (B,), or these and a dict to report; or the name of a built-in reward, such as "hpsv2.1". Several
            are weighted by `config.reward_weights`. `BlackBox(reward)` is one without gradient.
        config (LeapAlignConfig | None): settings.
        prompt_function (PromptFunction | None): returns a prompt and its metadata; in place of a dataset.
        image_samples_hook (ImageSamplesHook | None): called as `hook(image_data, global_step, tracker)` when training
            logs and after an evaluation; `image_data` is a list of (images, prompts, metadata, rewards, details) on
            the CPU, with the last batch of training or the first 64 or so images of an evaluation, and `tracker` the
            Accelerate tracker of the run that `config.report_to` has open, its first one, or None.
        train_dataset (PromptSource | None): prompts to train on; its other columns are the metadata.
        eval_dataset (PromptSource | dict[str, PromptSource] | None): prompts of `evaluate()`, or several sets by name.
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

    @random_state_restored_on_error()
    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        reward_function: RewardFunction | str | Sequence[RewardFunction | str],
        config: LeapAlignConfig | None = None,
        prompt_function: PromptFunction | None = None,
        image_samples_hook: ImageSamplesHook | None = None,
        *,
        train_dataset: PromptSource | None = None,
        eval_dataset: PromptSource | dict[str, PromptSource] | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        check_kinds(config, image_samples_hook)
        check_callbacks(callbacks)
        check_gradients_possible()
        config = copy.copy(config) if config is not None else LeapAlignConfig()
        check_output_dir(config)
        set_seed(config.seed)
        named = {"activation_checkpointing": True} if config.activation_checkpointing else {}
        reward_function = named_rewards(reward_function, config.reward_kwargs, named)
        check_reward_settings(reward_function, config.reward_weights, config.reward_threshold)
        self.pipeline = load_pipeline(pipeline, config.device, config.model_init_kwargs)
        check_call_arguments(self.pipeline, ["prompt", "generator", *config.call_kwargs()])
        self.rewards = RewardSet(reward_function, config.reward_weights, config.reward_threshold, named)
        self.image_samples_hook = image_samples_hook
        self.prompt_source = choose_prompts(
            config.prompt_column,
            prompt_function=prompt_function,
            train_dataset=read_if_geneval(train_dataset, config.prompt_column),
            train_prompts=read_if_geneval(config.train_prompts, config.prompt_column),
        )
        eval_rows = self._read_evaluation(config, eval_dataset, reward_function)
        self.groups = Groups.of(config, self.rewards, config.build_method())
        self.columns = self._find_columns(config, eval_rows)
        epoch = None if callable(self.prompt_source) else len(self.prompt_source) * self.groups.size
        config.max_steps = config.count_updates(epoch)
        check_best_model(config)
        prepare_process(config)
        self.weight_average: WeightAverage | None = None
        self._reset_metrics(config)
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
                decoding=self.rewards.decoding,
                near=self.groups.near,
                unconditional_gradient=config.unconditional_gradient,
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
                    group_size=self.groups.size,
                ),
                eval_dataset=eval_rows,
                callbacks=callbacks,
                optimizers=optimizers,
            )
            self._prepare_training(config)

    def _read_evaluation(self, config: LeapAlignConfig, eval_dataset: Any, reward_function: Any) -> Any:
        """Prompts of evaluations, by name if there are several sets; None if there are none."""
        check_evaluation(config, self.rewards.names, eval_dataset)
        source = eval_dataset if eval_dataset is not None else config.eval_prompts
        if is_named(source):
            source = {name: read_if_geneval(own, config.prompt_column) for name, own in source.items()}
        rows = load_named_prompts(read_if_geneval(source, config.prompt_column), config.prompt_column, split="test")
        for own in rows.values() if is_named(rows) else [rows]:
            check_rows(reward_function, self.prompt_source, own)
        return rows

    def _prepare_training(self, config: LeapAlignConfig) -> None:
        """What comes after Trainer's own preparation: sharding, devices, callbacks and, last, the dry run."""
        if self.is_fsdp_enabled:
            self._base_weights  # noqa: B018  read before they are divided
        self.sharded = shard_trainer(self)
        check_optimizer(self.optimizer, self.rollout_model, config.ema_decay)
        self._given_optimizer = self.optimizer
        check_optimizer_settings(self)
        self._state = partial(use_state, self.accelerator.state, config.distributed_state)
        self.memory = MemorySwitches(self.pipeline, self.denoisers, config)
        self.callback_handler.callbacks.insert(0, EndInEvaluationMode())
        if config.ema_decay is not None:
            self.weight_average = WeightAverage(self.rollout_model, config.ema_decay)
            self.callback_handler.callbacks.insert(0, self.weight_average)
        self.memory.place_rewards(self.rewards)
        if config.image_grid_steps is not None:
            self.add_callback(ImageGrid(self, self._shown_rows(config.image_grid_prompts), config.image_grid_steps))
        if config.watch_steps is not None:
            self.add_callback(Watch(self, self._shown_rows(config.watch_prompts)))
        self.add_callback(MemoryReport(self))
        if config.dry_run:
            self.dry_run()
        self._make_repository()

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
        asking = self.rewards.asking_for_latents
        ends = end_latents(output, type(self.pipeline).__name__, asking) if asking else None
        with no_gradients_added(self.rollout_model):
            scores = self.rewards(output.images, prompts, metadata, ends)
        self.groups.check_prompts(prompts)
        compared = self.groups.with_gradients(scores.rewards, ends, self.rewards)
        coefficients = [weight * scale for weight, scale in zip(self.rewards.weights, compared.scales, strict=True)]
        weights = output.weights.to(scores.rewards.dtype)
        loss = reward_loss(compared.rewards, weights, coefficients, self.rewards.thresholds)
        trained = [latents for latents in output.latents if latents.requires_grad and loss.requires_grad]
        for number, latents in enumerate(trained):
            loop = number // output.num_calls
            name = "sample_grad_norm" if loop == 0 else f"sample_grad_norm_{loop}"
            report = partial(self._record_norms, name)
            limit_sample_gradients(loss, latents, self.args.max_sample_grad_norm, report, output.num_calls)
        if output.penalty is not None:
            loss = loss + self.args.base_penalty * output.penalty.mean()
        self._record(output, scores, compared, loss)
        if self.image_samples_hook is not None and self.is_world_process_zero():
            self._last_samples = on_cpu((output.images, prompts, metadata, scores.total, scores.details))
        return (loss, output) if return_outputs else loss

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; the pipeline carries the trained weights afterwards.

        Args:
            resume_from_checkpoint (str | bool | None): a checkpoint-... folder, or True for the last whole one of
                `output_dir`: goes on as if training had never stopped. None is that of the config, False none.
            trial (Any): of a hyperparameter search, for Trainer.
            ignore_keys_for_eval (list[str] | None): unused, for Trainer.

        Returns:
            TrainOutput: updates, mean loss and speed.

        Raises:
            FloatingPointError: if loss or gradient are not finite, when the weights are those of the update before, or
                the weights themselves.
            NothingLearnt: if no gradient came for many updates.
            ValueError: if the checkpoint is not whole, or of a training with other settings.
        """
        self._reset_metrics(self.args)
        self.__dict__.pop("_run", None)
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        self._state()
        check_gradients_possible()
        checkpoint = choose_checkpoint(asked, self.args)
        for name, denoiser in {} if self.args.full_finetuning else self.denoisers.items():
            check_active(name, denoiser)
        with torch.enable_grad(), self.memory.prompts_cached():
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        check_weights(self.rollout_model)
        return output

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: PromptSource | dict[str, PromptSource] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Reward images of fixed prompts with fixed noise.

        Args:
            eval_dataset (PromptSource | dict[str, PromptSource] | None): prompts, or several sets of them by name,
                whose metrics are called PREFIX_NAME_...; None takes those given to the trainer.
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
        if is_named(source):
            parts = [self.evaluate(own, ignore_keys, f"{metric_key_prefix}_{name}") for name, own in source.items()]
            return {key: value for part in parts for key, value in part.items()}
        self._state()
        source = read_if_geneval(source, self.args.prompt_column)
        rows = load_prompts(source, self.args.prompt_column, split="test")
        self.columns.check(rows)
        check_weights(self.rollout_model)
        start = time.perf_counter()
        batches, columns = [], []
        shows = self.image_samples_hook is not None and self.is_world_process_zero()
        with self._averaged(), quiet(self.pipeline), self.memory.prompts_cached(), self.accelerator.autocast():
            for batch in scored_batches(
                self.pipeline,
                self.rewards,
                rows,
                self._own_indices(len(rows)),
                self.args.call_kwargs(self.args.eval_num_steps),
                prompt_column=self.args.prompt_column,
                seed=self.args.seed,
                batch_size=self.args.per_device_eval_batch_size,
                columns=self.columns,
            ):
                scores = batch.scores
                check_finite(scores, self.rewards.names, batch.prompts)
                values = {"reward": scores.total, **scores.metrics}
                count = sum(index < len(rows) for index in batch.indices)  # those beyond keep sharded processes in step
                columns.append({name: value.float().reshape(-1)[:count].tolist() for name, value in values.items()})
                if shows and sum(len(images) for images, *_ in batches) < MOST_SHOWN:
                    shown = (batch.images, batch.prompts, batch.metadata, scores.total, scores.details)
                    batches.append(on_cpu(shown))
        means = summarise(merge(gather_object(columns)))
        logs = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        logs[f"{metric_key_prefix}_runtime"] = seconds = time.perf_counter() - start
        self._last_log += seconds  # training's seconds_per_step leaves evaluations out
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._show(batches)
        return logs

    def _own_indices(self, count: int) -> range:
        """Numbers of the images that this process makes; as many as the others' where weights are sharded."""
        processes = self.args.world_size
        end = -(-count // processes) * processes if self.sharded else count
        return range(self.args.process_index, end, processes)

    def predict(self, *arguments: Any, **options: Any) -> None:
        """Not for images: use `evaluate`, or the pipeline itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("There are no labels to predict. Call evaluate(prompts), or trainer.pipeline(...).")

    def _averaged(self) -> AbstractContextManager:
        if self.weight_average is not None:
            return self.weight_average.applied()
        return evaluation_mode(self.optimizer, self.rollout_model.parameters()) if self.is_in_train else nullcontext()

    # Checks before training

    def _find_columns(self, config: LeapAlignConfig, eval_rows: Any) -> CallColumns:
        """Which columns go into the pipeline's call, checked on all prompts that are there."""
        rows: Any = self.prompt_source
        if callable(rows):
            check_stateless(rows, config.seed)
            rows = [PromptStream(rows, 1, config.prompt_seed)[0]["metadata"]]
        if config.dataloader_num_workers > 0 and isinstance(rows, list):
            check_picklable(rows)
        options = (config.pipeline_columns, rows, config.call_kwargs(), config.prompt_column)
        columns = CallColumns.of(self.pipeline, *options)
        for own in eval_rows.values() if is_named(eval_rows) else [eval_rows] if eval_rows is not None else []:
            columns.check(own)
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
        with self.memory.prompts_cached(), self.accelerator.autocast():
            return dry_run(
                self.rollout_model,
                self.rewards,
                batch,
                checkpointing=self.args.activation_checkpointing,
                may_underflow=self.accelerator.scaler is not None,
            )

    def create_model_card(self, **metadata: Any) -> None:
        """Write the card of the trained weights into `output_dir`.

        Args:
            **metadata: arguments of `adapters.model_card.write_model_card`, such as `license` or `tags`.
        """
        if not self.is_world_process_zero():
            return
        write_model_card(describe_training(self), Path(self.args.output_dir), **metadata)
