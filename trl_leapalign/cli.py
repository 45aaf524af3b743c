"""The command `trl-leapalign`."""

import importlib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from .leapalign_config import LeapAlignConfig, read_dict
from .methods import METHODS
from .pipelines import load_pipeline
from .prompts import load_prompts

SHAPES = "examples/shapes/compare.yaml"
USAGE = f"""usage: trl-leapalign COMMAND [options]

commands:
  train     train a pipeline with a reward
  compare   train several methods on the same prompts and seeds, and judge them ({SHAPES} by default)

trl-leapalign COMMAND --help tells the options, of which all settings of LeapAlignConfig are some. --config FILE reads
options from YAML. Where an object is asked for, MODULE:NAME is what Python finds under that name, from here.
"""


@dataclass
class TrainArguments:
    """Arguments of `trl-leapalign train`: what is trained, with which reward."""

    pipeline: str = field(metadata={"help": "Hub id or path of the pipeline, or MODULE:FUNCTION that returns one."})
    reward: list[str] = field(metadata={"help": "Reward functions: names of built-in ones, or MODULE:NAME."})
    lora: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Arguments of peft.LoraConfig, such as `{"r": 64}`. None is the default LoRA.'}
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments (Sequence[str] | None): of the command line; None is the process's own.
    """
    command, *options = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
    elif command not in COMMANDS:
        sys.exit(f"{USAGE}\nerror: unknown command {command!r}")
    else:
        sys.path.insert(0, "")
        COMMANDS[command](options)


def train(options: list[str]) -> None:
    """Train a pipeline, save the weights, and push them if asked to."""
    from .leapalign_trainer import LeapAlignTrainer

    arguments, config = _parse(TrainArguments, options)
    trainer = LeapAlignTrainer(
        _object(arguments.pipeline)() if _is_object(arguments.pipeline) else arguments.pipeline,
        [_reward(name) for name in arguments.reward],
        replace(config, train_prompts=None, eval_prompts=None),
        train_dataset=_rows("train_prompts", config.train_prompts, config),
        eval_dataset=config.eval_prompts and _rows("eval_prompts", config.eval_prompts, config, "test"),
        peft_config=_lora(arguments),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()


def compare(options: list[str]) -> None:
    """Compare runs, print the table and say where the report is."""
    from .compare import Comparison

    if not {"--config", "--pipeline"} & {option.partition("=")[0] for option in options}:
        if not Path(SHAPES).exists():
            sys.exit(f"error: there is no {SHAPES} here. Pass --pipeline, --reward and prompts, or --config FILE.")
        options = ["--config", SHAPES, *options]
    arguments, config = _parse(CompareArguments, options)
    for name, instead in NOT_COMPARED.items():
        if getattr(config, name) != LeapAlignConfig.__dataclass_fields__[name].default:
            sys.exit(f"error: compare does not take --{name}. {instead}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_leapalign").setLevel(logging.INFO)
    comparison = Comparison(
        make_pipeline=_maker(arguments.pipeline, config),
        reward=[_reward(name) for name in arguments.reward],
        config=config,
        runs=read_dict("runs", arguments.runs) or {name: {"method": name} for name in METHODS},
        train_rows=_rows("train_prompts", config.train_prompts, config),
        eval_rows=_rows("eval_prompts", config.eval_prompts, config, "test"),
        tuning_rows=arguments.tuning_prompts and _rows("tuning_prompts", arguments.tuning_prompts, config),
        evaluators=arguments.evaluator and [_reward(name) for name in arguments.evaluator],
        seeds=arguments.seeds,
        num_images=arguments.num_images,
        group_by=arguments.group_by,
        train_seconds=arguments.train_seconds,
        learning_rates=arguments.learning_rates or (),
        peft_config=_lora(arguments),
    )
    report = comparison.run()
    print(report.read_text(encoding="utf-8"))
    print(f"The report is {report}.")


NOT_COMPARED = {
    "seed": "Set --seeds.",
    "resume_from_checkpoint": "It goes on with the runs that are not done yet by itself.",
    "push_to_hub": "Train the run that you choose with `trl-leapalign train`.",
    "eval_strategy": "Each run is judged once, after training.",
}

COMMANDS = {"train": train, "compare": compare}


def _parse(kind: type, options: list[str]) -> tuple[Any, LeapAlignConfig]:
    from trl import TrlParser

    return TrlParser((kind, LeapAlignConfig)).parse_args_and_config(options)


def _is_object(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def _object(name: str) -> Any:
    """What Python finds under MODULE:NAME."""
    if not _is_object(name):
        raise ValueError(f"{name!r} names no object. Write MODULE:NAME, such as my_rewards:brightness.")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"There is no {name!r}: {error}. Modules are looked for here and among those installed."
        ) from error


def _reward(name: str) -> Any:
    """A reward function, or the name of a built-in reward."""
    return _object(name) if ":" in name else name


def _lora(arguments: TrainArguments) -> LoraConfig | None:
    settings = read_dict("lora", arguments.lora)
    return LoraConfig(**settings) if settings else None


def _maker(pipeline: str, config: LeapAlignConfig) -> Callable:
    if _is_object(pipeline):
        return _object(pipeline)
    return lambda: load_pipeline(pipeline, config.device, config.model_init_kwargs)


def _rows(option: str, source: str | None, config: LeapAlignConfig, split: str = "train") -> Sequence[dict[str, Any]]:
    if source is None:
        raise ValueError(f"There are no prompts: set {option}.")
    return load_prompts(_object(source)() if _is_object(source) else source, config.prompt_column, split)


if __name__ == "__main__":
    main()
