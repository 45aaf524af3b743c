"""Options of the command `trl-leapalign`."""

from dataclasses import dataclass, field
from typing import Any

from ..leapalign_config import read_dict


@dataclass
class TrainArguments:
    """Arguments of `trl-leapalign train`: what is trained, with which reward."""

    pipeline: str = field(metadata={"help": "Hub id or path of the pipeline, or MODULE:FUNCTION that returns one."})
    reward: list[str] = field(
        metadata={"help": "Reward functions: names of built-in ones or of evaluators, such as geneval, or MODULE:NAME."}
    )
    lora: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Arguments of peft.LoraConfig, such as `{"r": 64}`. None is the default LoRA.'}
    )


@dataclass
class CheckArguments:
    """Arguments of `trl-leapalign check`."""

    pipeline: str = field(metadata={"help": "Hub id or path of the pipeline, or MODULE:FUNCTION that returns one."})


@dataclass
class VoteArguments:
    """Arguments of `trl-leapalign vote`."""

    folder: str = field(metadata={"help": "Folder of the pictures and votes, which HumanReward is given too."})
    port: int = field(default=7860, metadata={"help": "Of the page."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address that the page is served on. 0.0.0.0 lets the whole network see it and vote."},
    )


@dataclass
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
