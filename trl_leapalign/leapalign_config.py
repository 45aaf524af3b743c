"""LeapAlignConfig: every setting of a training run."""

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import TrainingArguments

from .config_checks import METRIC_SCHEDULERS, check_training, check_values, read_settings, refuse_unsupported
from .methods import Method, build_method
from .process_state import state_of_others_kept
from .redaction import plain


@dataclass
class LeapAlignConfig(TrainingArguments):
    r"""
    Configuration of [`LeapAlignTrainer`].

    Only the parameters that `TrainingArguments` does not have are listed. `LeapAlignConfig` is parsed from the command
    line or a YAML file by `trl.TrlParser`.

    > Parameters that control the sampling

    Args:
        sample_num_steps (`int`, *optional*, defaults to `25`):
            Sampling steps of a training rollout, at least as many as the method draws.
        sample_guidance_scale (`float`, *optional*):
            `guidance_scale` of the pipeline. None is the pipeline's own default.
        sample_height (`int`, *optional*):
            Height in pixels. None is the pipeline's own default.
        sample_width (`int`, *optional*):
            Width in pixels. None is the pipeline's own default.
        sample_kwargs (`dict`, *optional*):
            Further arguments of the pipeline's call, such as `{"max_sequence_length": 256}`.
        eval_num_steps (`int`, *optional*):
            Sampling steps in evaluation. None is `sample_num_steps`.
        image_grid_steps (`int`, *optional*):
            Report a picture to TensorBoard, W&B or Trackio every so many updates: images of the first prompts (of
            evaluation, else of training) with fixed noise, from the base beside the live weights and, with `ema_decay`,
            their average. None reports none.
        image_grid_prompts (`int`, *optional*, defaults to `4`):
            Prompts of that picture.
        watch_steps (`int`, *optional*):
            Every so many updates, log how diverse pictures of the first prompts (of evaluation, else of training) are
            with fixed noise, and how far from the base's. None watches nothing.
        watch_prompts (`int`, *optional*, defaults to `4`):
            Prompts that are watched, with four pictures each.
        watch_action (`str`, *optional*, defaults to `"warn"`):
            What happens when a watched number passes its limit: "warn", or "stop", which ends training.
        watch_limits (`dict`, *optional*):
            Limits that differ from the usual ones, such as `{"diversity_share": 0.7}`. None within switches one off.

        > Parameters that control the method

        method (`str` or [`Method`], *optional*, defaults to `"leapalign"`):
            Name of the method, or an instance of it.
        method_kwargs (`dict`, *optional*):
            Settings of a method given by name, such as `{"gradient_discount": 0.1}`.
        draw_group_size (`int`, *optional*):
            Samples that share one choice of steps. None is all samples of an update, as in the paper; else a multiple
            of `per_device_train_batch_size` that divides the samples of an update.

        base_penalty (`float`, *optional*):
            Factor of the squared distance between the denoiser's output and the base model's, at the steps with
            gradients; each costs one more call without. For LoRA only. None leaves it out.
        max_sample_grad_norm (`float`, *optional*):
            Largest norm of the gradient of one sample's loss with respect to its clean latents; what is larger is
            scaled down to it, so that one broken image does not decide an update. Logged as `sample_grad_norm` and
            `sample_grad_norm_median`. None is no limit.
        ema_decay (`float`, *optional*):
            Decay of a moving average of the trained weights, which is then what is evaluated, saved and left in the
            pipeline. The paper uses 0.995. None keeps the weights as they are.

        > Parameters that control the reward

        reward_weights (`list[float]`, *optional*):
            Weight of each reward, or one number for a single reward. None is 1 for each.
        reward_threshold (`list[float]`, *optional*):
            Threshold lambda of each reward, on its own scale, or one number for a single reward: samples above it have
            no loss. None is the recommended one of each built-in reward and none for others; [None] is none, which
            maximises without end.
        reward_kwargs (`dict`, *optional*):
            By the name of a reward, settings with which it is loaded, JSON:
            `{"geneval": {"detector": "mask2former.pth"}}`.
        normalize_rewards (`bool`, *optional*, defaults to `False`):
            Divide each reward's loss by its standard deviation over the samples of a prompt, so that the scales of
            several rewards do not decide.

        > Parameters that control rewards without gradient

        samples_per_prompt (`int`, *optional*):
            Consecutive samples that share a prompt; those rewarded at a time (on all processes) must be a multiple.
            None is 4 if a reward has no gradient, else 1.
        pairs (`str`, *optional*):
            "far" gives each sample noise of its own; "near" lets those of a prompt share the steps before `near_step`
            and part there. None is "far".
        near_step (`int`, *optional*):
            Step at which near pairs part, from 1 on. None is 1.
        near_noise (`float`, *optional*):
            Share rho in (0, 1) of new noise with which near pairs part. None is 0.7.
        difference_power (`float`, *optional*):
            Power p in (r_a - r_b) (x_a - x_b) / |x_a - x_b|^p, which stands in for the gradient of a reward without
            one: 2 is a finite difference. None is 1.

        > Parameters that control the prompts

        train_prompts (`str` or `list[str]`, *optional*):
            Prompts to train on: a text file with one a line, a dataset file, a dataset id on the Hub, or a list.
        eval_prompts (`str` or `list[str]`, *optional*):
            Prompts to evaluate on, likewise.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt. The others are passed to the reward as metadata.
        pipeline_columns (`list[str]` or `dict[str, str]`, *optional*):
            Columns that also go into the pipeline's call: names such as `image` or `negative_prompt`, or
            `{argument: column}` (`argument=column` on the command line) where they differ. None takes columns of images
            and texts that are called like an argument; [] takes none.

        > Parameters that control the model

        full_finetuning (`bool`, *optional*, defaults to `False`):
            Train all weights of the denoisers instead of a LoRA adapter.
        adapter_dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of an adapter's saved files, "float32" or "bfloat16", which halves them.
        denoisers (`list[str]`, *optional*):
            Names of the pipeline's components to train. None takes those called transformer... or unet....
        model_init_kwargs (`dict`, *optional*):
            Arguments of `DiffusionPipeline.from_pretrained`, for a pipeline given by name. `load_in_4bit` or
            `load_in_8bit` quantizes the denoisers, and encoders of 2 GiB or more, by bitsandbytes, for LoRA; a
            `quantization_config` chooses other back ends and components.
        unconditional_gradient (`bool`, *optional*, defaults to `True`):
            Whether the unconditional call of classifier-free guidance has a gradient, where the pipeline makes it a
            call of its own. False takes it for a constant, and keeps half the activations.
        cache_prompt_embeddings (`bool`, *optional*, defaults to `False`):
            Remember on the CPU what `encode_prompt` and `encode_image` of the pipeline return, so that each batch of
            prompts is encoded once. Changes no bit of what is computed.
        prompt_cache_dir (`str`, *optional*):
            Folder to remember the prompts' embeddings in, instead of memory, for further runs too.
        offload_text_encoders (`bool`, *optional*, defaults to `False`):
            Keep text and image encoders on the CPU but while they encode.
        reward_device (`str`, *optional*):
            Device of the reward models, such as `cuda:1`. None is that of the pipeline.
        offload_rewards (`bool`, *optional*, defaults to `False`):
            Keep reward models on the CPU but while they score; they score a second time in the backward pass.
        dry_run (`bool`, *optional*, defaults to `True`):
            Run one rollout and its reward when the trainer is made, so that whatever cannot work is said then.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `max_steps`: 300, unless `num_train_epochs` is given.
    > - `learning_rate`: 1e-4 for LoRA, 1e-5 (the paper's) for full fine-tuning.
    > - `weight_decay`: 1e-4.
    > - `lr_scheduler_type`: "constant".
    > - `per_device_train_batch_size`: 4. The paper's updates see 64 images: mind `gradient_accumulation_steps`.
    > - `logging_steps`: 1.
    > - `save_steps`: 50.
    > - `dataloader_pin_memory`: False, as prompts are no tensors.
    > - `remove_unused_columns`: False, the only value that is possible.
    > - `ddp_broadcast_buffers`: False, as buffers never change.
    """

    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Times to go through the prompts, if max_steps is not given."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate. None is 1e-4 for LoRA, 1e-5 for full fine-tuning."}
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Images a device samples at a time."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    save_steps: float = field(default=50, metadata={"help": "Save a checkpoint every so many updates."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin memory for prompts; no use in it."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: columns are metadata."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Let DDP send buffers, which never change, from the first process to all."}
    )

    # Parameters that control the sampling
    sample_num_steps: int = field(
        default=25, metadata={"help": "Sampling steps of a training rollout, at least as many as the method draws."}
    )
    sample_guidance_scale: float | None = field(
        default=None, metadata={"help": "`guidance_scale` of the pipeline. None is the pipeline's own default."}
    )
    sample_height: int | None = field(
        default=None, metadata={"help": "Height in pixels. None is the pipeline's own default."}
    )
    sample_width: int | None = field(
        default=None, metadata={"help": "Width in pixels. None is the pipeline's own default."}
    )
    sample_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Further arguments of the pipeline\'s call, such as `{"max_sequence_length": 256}`.'},
    )
    eval_num_steps: int | None = field(
        default=None, metadata={"help": "Sampling steps in evaluation. None is `sample_num_steps`."}
    )
    image_grid_steps: int | None = field(
        default=None,
        metadata={
            "help": "Report a picture to TensorBoard, W&B or Trackio every so many updates: images of the first "
            "prompts (of evaluation, else of training) with fixed noise, from the base beside the live weights and, "
            "with `ema_decay`, their average. None reports none."
        },
    )
    image_grid_prompts: int = field(default=4, metadata={"help": "Prompts of that picture."})
    watch_steps: int | None = field(
        default=None,
        metadata={
            "help": "Every so many updates, log how diverse pictures of the first prompts (of evaluation, else of "
            "training) are with fixed noise, and how far from the base's. None watches nothing."
        },
    )
    watch_prompts: int = field(default=4, metadata={"help": "Prompts that are watched, with four pictures each."})
    watch_action: str = field(
        default="warn",
        metadata={
            "help": 'What happens when a watched number passes its limit: "warn", or "stop", which ends training.'
        },
    )
    watch_limits: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Limits that differ from the usual ones, such as `{"diversity_share": 0.7}`. None within switches '
            "one off."
        },
    )

    # Parameters that control the method
    method: str = field(default="leapalign", metadata={"help": "Name of the method, or an instance of it."})
    method_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Settings of a method given by name, such as `{"gradient_discount": 0.1}`.'},
    )
    draw_group_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples that share one choice of steps. None is all samples of an update, as in the paper; else "
            "a multiple of `per_device_train_batch_size` that divides the samples of an update."
        },
    )

    base_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the squared distance between the denoiser's output and the base model's, at the steps "
            "with gradients; each costs one more call without. For LoRA only. None leaves it out."
        },
    )
    max_sample_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Largest norm of the gradient of one sample's loss with respect to its clean latents; what is "
            "larger is scaled down to it, so that one broken image does not decide an update. Logged as "
            "`sample_grad_norm` and `sample_grad_norm_median`. None is no limit."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the trained weights, which is then what is evaluated, saved and "
            "left in the pipeline. The paper uses 0.995. None keeps the weights as they are."
        },
    )

    # Parameters that control the reward
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward, or one number for a single reward. None is 1 for each."}
    )
    reward_threshold: list[float] | None = field(
        default=None,
        metadata={
            "help": "Threshold lambda of each reward, on its own scale, or one number for a single reward: samples "
            "above it have no loss. None is the recommended one of each built-in reward and none for others; [None] is "
            "none, which maximises without end."
        },
    )
    reward_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "By the name of a reward, settings with which it is loaded, JSON: "
            '`{"geneval": {"detector": "mask2former.pth"}}`.'
        },
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Divide each reward's loss by its standard deviation over the samples of a prompt, so that the "
            "scales of several rewards do not decide."
        },
    )

    # Parameters that control rewards without gradient
    samples_per_prompt: int | None = field(
        default=None,
        metadata={
            "help": "Consecutive samples that share a prompt; those rewarded at a time (on all processes) must be a "
            "multiple. None is 4 if a reward has no gradient, else 1."
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": '"far" gives each sample noise of its own; "near" lets those of a prompt share the steps before '
            '`near_step` and part there. None is "far".'
        },
    )
    near_step: int | None = field(
        default=None, metadata={"help": "Step at which near pairs part, from 1 on. None is 1."}
    )
    near_noise: float | None = field(
        default=None,
        metadata={"help": "Share rho in (0, 1) of new noise with which near pairs part. None is 0.7."},
    )
    difference_power: float | None = field(
        default=None,
        metadata={
            "help": "Power p in (r_a - r_b) (x_a - x_b) / |x_a - x_b|^p, which stands in for the gradient of a reward "
            "without one: 2 is a finite difference. None is 1."
        },
    )

    # Parameters that control the prompts
    train_prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to train on: a text file with one a line, a dataset file, a dataset id on the Hub, or a "
            "list."
        },
    )
    eval_prompts: str | None = field(default=None, metadata={"help": "Prompts to evaluate on, likewise."})
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column that holds the prompt. The others are passed to the reward as metadata."},
    )
    pipeline_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns that also go into the pipeline's call: names such as `image` or `negative_prompt`, or "
            "`{argument: column}` (`argument=column` on the command line) where they differ. None takes columns of "
            "images and texts that are called like an argument; [] takes none."
        },
    )

    # Parameters that control the model
    full_finetuning: bool = field(
        default=False, metadata={"help": "Train all weights of the denoisers instead of a LoRA adapter."}
    )
    adapter_dtype: str = field(
        default="float32",
        metadata={"help": 'Dtype of an adapter\'s saved files, "float32" or "bfloat16", which halves them.'},
    )
    denoisers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the pipeline's components to train. None takes those called transformer... or unet...."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of `DiffusionPipeline.from_pretrained`, for a pipeline given by name. `load_in_4bit` or "
            "`load_in_8bit` quantizes the denoisers, and encoders of 2 GiB or more, by bitsandbytes, for LoRA; "
            "a `quantization_config` chooses other back ends and components."
        },
    )
    unconditional_gradient: bool = field(
        default=True,
        metadata={
            "help": "Whether the unconditional call of classifier-free guidance has a gradient, where the pipeline "
            "makes it a call of its own. False takes it for a constant, and keeps half the activations."
        },
    )
    cache_prompt_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Remember on the CPU what `encode_prompt` and `encode_image` of the pipeline return, so that each "
            "batch of prompts is encoded once. Changes no bit of what is computed."
        },
    )
    prompt_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to remember the prompts' embeddings in, instead of memory, for further runs too."},
    )
    offload_text_encoders: bool = field(
        default=False,
        metadata={"help": "Keep text and image encoders on the CPU but while they encode."},
    )
    reward_device: str | None = field(
        default=None,
        metadata={"help": "Device of the reward models, such as `cuda:1`. None is that of the pipeline."},
    )
    offload_rewards: bool = field(
        default=False,
        metadata={
            "help": "Keep reward models on the CPU but while they score; they score a second time in the backward pass."
        },
    )
    dry_run: bool = field(
        default=True,
        metadata={
            "help": "Run one rollout and its reward when the trainer is made, so that whatever cannot work is said "
            "then."
        },
    )

    def __post_init__(self):
        if self.num_train_epochs is None:
            self.num_train_epochs = 1.0
            if self.max_steps == -1:
                self.max_steps = 300
        if self.learning_rate is None:
            self.learning_rate = 1e-5 if self.full_finetuning else 1e-4
        read_settings(self)
        compares = self.load_best_model_at_end or self.save_strategy == "best"
        if self.metric_for_best_model is None and (compares or self.lr_scheduler_type in METRIC_SCHEDULERS):
            self.metric_for_best_model = "reward"
        refuse_unsupported(self)
        check_values(self)
        self.build_method()
        super().__post_init__()
        if self.lr_scheduler_type in METRIC_SCHEDULERS:
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode, **(self.lr_scheduler_kwargs or {})}
        check_training(self)

    def build_method(self) -> Method:
        """Return the method that `method` and `method_kwargs` describe.

        Raises:
            ValueError: if the method or one of its settings is unknown, or a setting is out of range.
            TypeError: if `method` is neither a name nor a method.
        """
        return build_method(self.method, self.method_kwargs)

    def call_kwargs(self, num_steps: int | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's call that are the same for every batch.

        Args:
            num_steps (int | None): sampling steps; None is `sample_num_steps`.

        Returns:
            dict[str, Any]: by the pipeline's names.
        """
        optional = {
            "guidance_scale": self.sample_guidance_scale,
            "height": self.sample_height,
            "width": self.sample_width,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return {"num_inference_steps": num_steps or self.sample_num_steps, **given, **self.sample_kwargs}

    def to_dict(self) -> dict[str, Any]:
        described = copy.copy(self)  # TrainingArguments changes nested settings in place
        for name in (option.name for option in dataclasses.fields(self) if option.init):
            if isinstance(getattr(self, name), (dict, list, tuple)):
                setattr(described, name, plain(getattr(self, name), name))
        described.method = self.method if isinstance(self.method, str) else repr(self.method)
        return plain(super(LeapAlignConfig, described).to_dict())

    def __str__(self) -> str:
        values = ",\n".join(f"    {name}={value!r}" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{values},\n)"

    __repr__ = __str__

    @cached_property
    def _setup_devices(self) -> torch.device:
        with state_of_others_kept():
            return super()._setup_devices

    @property
    def samples_per_update(self) -> int:
        """Samples of one update, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def prompt_seed(self) -> int:
        """Seed of the order of prompts, and of a prompt_function."""
        return self.seed if self.data_seed is None else self.data_seed

    def count_updates(self, num_prompts: int | None) -> int:
        """Return how many updates a training makes.

        Args:
            num_prompts (int | None): prompts of an epoch; None is a prompt_function.

        Raises:
            ValueError: if there is no end.
        """
        if self.max_steps > 0:
            return self.max_steps
        if num_prompts is None:
            raise ValueError("A prompt_function has no end, so num_train_epochs means nothing. Set max_steps.")
        return math.ceil(self.num_train_epochs * num_prompts / self.samples_per_update)
