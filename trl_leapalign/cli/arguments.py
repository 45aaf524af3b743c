"""Options of the command `trl-leapalign`."""

from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from peft import LoraConfig

from ..adapters.lora import DEFAULT_RANK
from ..config_checks import read_dict
from ..leapalign_config import LeapAlignConfig
from ..rollout.quantization import Quantization, quantize_pipeline


@dataclass(kw_only=True)
class ModelArguments:
    """How the model is loaded and what is trained of it; the names are those of TRL's ModelConfig."""

    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Load the denoisers, and encoders of 2 GiB or more, in 4 bits by bitsandbytes, for LoRA. "
            "A quantization_config in model_init_kwargs chooses other back ends and components."
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The same in 8 bits."})
    bnb_4bit_quant_type: str | None = field(
        default=None, metadata={"help": "Kind of 4 bits: nf4, which is the default, or fp4."}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the scales of 4 bits too."})
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train a LoRA, which is the default; full_finetuning=True is the other choice."},
    )
    lora_r: int | None = field(default=None, metadata={"help": f"Rank of the LoRA. None is {DEFAULT_RANK}."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Alpha of the LoRA, whose scale is lora_alpha / lora_r. None is its rank."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of layers to adapt. None is the linear layers of all blocks."}
    )

    @property
    def quantization(self) -> dict[str, Any]:
        """What model_init_kwargs get of these options; empty for full precision.

        Raises:
            ValueError: if options contradict each other.
        """
        options = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
        given = {name: getattr(self, name) for name in options if getattr(self, name)}
        Quantization.of(given)
        return given

    def load_options(self, config: LeapAlignConfig) -> dict[str, Any]:
        """Arguments of `from_pretrained` with those that quantize.

        Args:
            config (LeapAlignConfig): with `model_init_kwargs`.

        Raises:
            ValueError: if an option is set twice.
        """
        twice = sorted(self.quantization.keys() & config.model_init_kwargs.keys())
        if twice or (self.quantization and "quantization_config" in config.model_init_kwargs):
            raise ValueError(
                f"model_init_kwargs={config.model_init_kwargs} sets what --{next(iter(self.quantization))} sets. "
                "Drop one."
            )
        return {**config.model_init_kwargs, **self.quantization}

    def quantized(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """Quantize a pipeline that a function has built, in place, if options say so."""
        if self.quantization:
            quantize_pipeline(pipeline, Quantization.of(self.quantization))
        return pipeline

    def lora_config(self, config: LeapAlignConfig, settings: dict[str, Any]) -> LoraConfig | None:
        """The adapter that options describe; None is the default.

        Args:
            config (LeapAlignConfig): with `full_finetuning`.
            settings (dict[str, Any]): further arguments of `peft.LoraConfig`.

        Raises:
            ValueError: if options contradict each other.
        """
        options = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "target_modules": self.lora_target_modules}
        given = {name: value for name, value in options.items() if value is not None}
        if config.full_finetuning and (self.use_peft or given or settings):
            raise ValueError("full_finetuning=True trains all weights, so there is no LoRA. Drop it, or its options.")
        twice = sorted(given.keys() & settings.keys())
        if twice:
            raise ValueError(f"lora={settings} sets {twice}, which have options of their own. Set one.")
        if not given:
            return LoraConfig(**settings) if settings else None
        rank = given.get("r", settings.get("r", DEFAULT_RANK))
        defaults = {"r": rank, "lora_alpha": rank, "init_lora_weights": "gaussian"}
        return LoraConfig(**{**defaults, **settings, **given})


@dataclass(kw_only=True)
class TrainArguments(ModelArguments):
    """Arguments of `trl-leapalign train`: what is trained, with which reward."""

    pipeline: str = field(metadata={"help": "Hub id or path of the pipeline, or MODULE:FUNCTION that returns one."})
    reward: list[str] = field(
        metadata={"help": "Reward functions: names of built-in ones or of evaluators, such as geneval, or MODULE:NAME."}
    )
    lora: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Arguments of peft.LoraConfig, such as `{"r": 64}`. None is the default LoRA.'}
    )


@dataclass(kw_only=True)
class CheckArguments(ModelArguments):
    """Arguments of `trl-leapalign check`."""

    pipeline: str = field(metadata={"help": "Hub id or path of the pipeline, or MODULE:FUNCTION that returns one."})
    memory: float | None = field(
        default=None,
        metadata={
            "help": "GiB of a card: tell whether a training fits, by a plan that needs the configs of the pipeline "
            "but no weights; nothing else is checked then."
        },
    )


@dataclass
class VoteArguments:
    """Arguments of `trl-leapalign vote`."""

    folder: str = field(metadata={"help": "Folder of the pictures and votes, which HumanReward is given too."})
    port: int = field(default=7860, metadata={"help": "Of the page."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address that the page is served on. 0.0.0.0 lets the whole network see it and vote."},
    )


@dataclass(kw_only=True)
class CompareArguments(TrainArguments):
    """Arguments of `trl-leapalign compare`."""

    runs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'By name, the settings in which a run differs: `{"refl": {"method": "refl"}}`. None is all methods.'
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Each run is trained with each."})
    evaluator: list[str] | None = field(
        default=None, metadata={"help": "What judges, called as rewards are; the first decides. None is the reward."}
    )
    num_images: int | None = field(default=None, metadata={"help": "Images to judge by. None is one a prompt."})
    group_by: str | None = field(default=None, metadata={"help": "Column of the prompts that scores are split by."})
    train_seconds: float | None = field(
        default=None, metadata={"help": "Train for so long, at most max_steps updates, in place of max_steps updates."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Tried for each run that sets none, on tuning_prompts; the best is used."}
    )
    tuning_prompts: str | None = field(default=None, metadata={"help": "Prompts to choose the learning rate on."})


@dataclass
class EvaluateArguments:
    """Arguments of `trl-leapalign evaluate`."""

    pipeline: str | None = field(
        default=None, metadata={"help": "Hub id or path of the pipeline, or MODULE:FUNCTION that returns one."}
    )
    adapter: str | None = field(default=None, metadata={"help": "LoRA to load: a folder, a file or a Hub id."})
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "A file, Hub id or MODULE:FUNCTION of prompts; 'geneval' or a file of its metadata. HPDv2's test "
            "prompts are not built in: pass them as a file, with the style as a column for group_by."
        },
    )
    evaluators: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of built-in rewards, 'geneval', 'unifiedreward-alignment', 'unifiedreward-iq', 'vlm', "
            "'ocr', or MODULE:NAME, called as rewards."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where images, scores and tables go."})
    images_per_prompt: int = field(default=4, metadata={"help": "Images of each prompt."})
    seed: int = field(default=0, metadata={"help": "Of the noise."})
    batch_size: int = field(default=1, metadata={"help": "Images sampled, or judged, at a time."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "Steps. None is the pipeline's default."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Strength of guidance."})
    height: int | None = field(default=None, metadata={"help": "Of the images, in pixels."})
    width: int | None = field(default=None, metadata={"help": "Of the images, in pixels."})
    call_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Other arguments of the pipeline's call, JSON."}
    )
    group_by: str | None = field(default=None, metadata={"help": "Column of the prompts that scores are split by."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompt."})
    pipeline_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns that go into the pipeline's call, or argument=column. None takes those of images and "
            "texts that are called like an argument."
        },
    )
    geneval_detector: str | None = field(
        default=None, metadata={"help": "Detector of 'geneval', which has no default: see docs/geneval.md."}
    )
    evaluator_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'By evaluator, how it is loaded, JSON: `{"unifiedreward-iq": {"score": "style"}}`.'},
    )
    compare: list[str] | None = field(
        default=None,
        metadata={"help": "Evaluate nothing, but compare these output folders with the first of them."},
    )

    def all_call_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, from the options that name some and the one for the rest.

        Raises:
            ValueError: if both set one.
        """
        names = ("num_inference_steps", "guidance_scale", "height", "width")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        others = read_dict("call_kwargs", self.call_kwargs)
        twice = sorted(given.keys() & others.keys())
        if twice:
            raise ValueError(f"call_kwargs={others} sets {', '.join(twice)}, which has an option of its own. Set one.")
        return {**given, **others}
