"""The command `trl-leapalign`."""

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..config_checks import read_dict
from ..evaluation.rows import read_if_geneval
from ..leapalign_config import LeapAlignConfig
from ..methods import METHODS
from ..prompts.sources import load_prompts
from ..rollout.pipelines import load_pipeline
from .arguments import (
    CheckArguments,
    CompareArguments,
    EvaluateArguments,
    ModelArguments,
    TrainArguments,
    VoteArguments,
)

SHAPES = "examples/shapes/compare.yaml"
USAGE = f"""usage: trl-leapalign COMMAND [options]

commands:
  train     train a pipeline with a reward
  compare   train several methods on the same prompts and seeds, and judge them ({SHAPES} by default)
  evaluate  score a pipeline on prompts, with or without an adapter, or compare evaluations that are there
  vote      vote FOLDER: serve the page on which people vote on a training's pictures
  check     check PIPELINE: tell whether it can be trained, and what to set; with --memory 24, whether it fits a card

trl-leapalign COMMAND --help tells the options; those of all but evaluate and vote are also all settings of
LeapAlignConfig.
--config FILE reads options from YAML. Where an object is asked for, MODULE:NAME is what Python finds under that name,
from here.
"""


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
        COMMANDS[command](options)


def train(options: list[str]) -> None:
    """Train a pipeline, save the weights, and push them if asked to."""
    from ..leapalign_trainer import LeapAlignTrainer

    arguments, config = _parse(TrainArguments, options)
    trainer = LeapAlignTrainer(
        _pipeline(arguments),
        [_reward(name) for name in arguments.reward],
        replace(config, train_prompts=None, eval_prompts=None),
        train_dataset=_rows("train_prompts", config.train_prompts, config),
        eval_dataset=config.eval_prompts and _rows("eval_prompts", config.eval_prompts, config, "test"),
        peft_config=_lora(arguments, config),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if config.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
        trainer.create_model_card()


def compare(options: list[str]) -> None:
    """Compare runs, print the table and say where the report is."""
    from ..comparison.compare import Comparison

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
        make_pipeline=_maker(arguments, config),
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
        peft_config=_lora(arguments, config),
        pipeline_name=arguments.pipeline,
    )
    report = comparison.run()
    if config.process_index == 0:
        print(report.read_text(encoding="utf-8"))
        print(f"The report is {report}.")


def evaluate(options: list[str]) -> None:
    """Evaluate a pipeline, or compare evaluations, and print the table."""
    from accelerate import PartialState

    from ..evaluation import compare_evaluations
    from ..evaluation import evaluate as run
    from .parsing import OptionParser

    [arguments] = OptionParser(EvaluateArguments).parse_args_and_config(options)
    if arguments.compare:
        comparison = compare_evaluations(arguments.compare)
        print(comparison.markdown())
        if arguments.output_dir:
            print(f"The table is {comparison.write(arguments.output_dir)}.")
        return
    missing = [name for name in ("pipeline", "prompts", "evaluators", "output_dir") if not getattr(arguments, name)]
    if missing:
        sys.exit(f"error: pass {', '.join(f'--{name}' for name in missing)}, or --compare DIR_A DIR_B.")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_leapalign").setLevel(logging.INFO)
    evaluators, source = _evaluators(arguments), arguments.prompts
    result = run(
        _object(arguments.pipeline) if _is_object(arguments.pipeline) else arguments.pipeline,
        _object(source)() if _is_object(source) else source,
        evaluators,
        arguments.output_dir,
        adapter=arguments.adapter,
        images_per_prompt=arguments.images_per_prompt,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        call_kwargs=arguments.all_call_kwargs(),
        group_by=arguments.group_by,
        prompt_column=arguments.prompt_column,
        pipeline_columns=arguments.pipeline_columns,
    )
    if PartialState().is_main_process:
        print(result.report.read_text(encoding="utf-8"))
        print(f"The report is {result.report}.")


def check(options: list[str]) -> None:
    """Try a pipeline out, print what was found, and exit with status 1 if it cannot be trained.

    With --log_level debug, the traceback of what stopped it is printed too.
    """
    from .check import PROMPTS
    from .check import check as run

    if options and not options[0].startswith("-"):
        options = ["--pipeline", *options]
    arguments, config = _parse(CheckArguments, options, per_device_train_batch_size=2)
    if arguments.memory is not None:
        from .check_memory import check_memory

        source = _pipeline(arguments) if _is_object(arguments.pipeline) else arguments.pipeline
        text, fits = check_memory(source, config, arguments.memory, arguments.quantization)
        print(text)
        sys.exit(0 if fits else 1)
    prompts = config.train_prompts and _rows("train_prompts", config.train_prompts, config)
    pipeline = _pipeline(arguments)
    if config.log_level == "debug":
        logging.basicConfig(format="%(message)s")
        logging.getLogger("trl_leapalign").setLevel(logging.DEBUG)
    found = run(pipeline, config, prompts or [{config.prompt_column: prompt} for prompt in PROMPTS])
    if config.process_index == 0:
        print(found.markdown())
    if not found.trainable:
        sys.exit(1)


def vote(options: list[str]) -> None:
    """Serve the page on which people vote, until the process is stopped."""
    from trl import TrlParser

    from .vote import serve

    if options and not options[0].startswith("-"):
        options = ["--folder", *options]
    [arguments] = TrlParser(VoteArguments).parse_args_and_config(options)
    print(f"Vote on http://{arguments.host}:{arguments.port}; Ctrl-C stops, votes stay in {arguments.folder}.")
    serve(arguments.folder, arguments.host, arguments.port)


NOT_COMPARED = {
    "seed": "Set --seeds.",
    "resume_from_checkpoint": "It goes on with the runs that are not done yet by itself.",
    "push_to_hub": "Train the run that you choose with `trl-leapalign train`.",
    "eval_strategy": "Each run is judged once, after training.",
    "eval_on_start": "The pipeline before training is judged too.",
}

COMMANDS = {"train": train, "compare": compare, "evaluate": evaluate, "check": check, "vote": vote}


def _evaluators(arguments: EvaluateArguments) -> list[Any]:
    """What the options name, checked but not loaded."""
    from ..evaluation import Evaluator, named_evaluator
    from ..evaluation.evaluators import callable_evaluator

    settings = read_dict("evaluator_kwargs", arguments.evaluator_kwargs)
    settings = {name: read_dict(f"evaluator_kwargs[{name!r}]", value) for name, value in settings.items()}
    if arguments.geneval_detector is not None:
        settings["geneval"] = {**settings.get("geneval", {}), "detector": arguments.geneval_detector}
    unused = [name for name in settings if name not in arguments.evaluators or ":" in name]
    if unused:
        raise ValueError(f"Settings of {', '.join(unused)} have no effect: evaluators={arguments.evaluators}.")
    found = []
    for name in arguments.evaluators:
        if ":" in name:
            value = _object(name)
            own = isinstance(value, Evaluator)
            found.append(value if own else callable_evaluator(value, name.partition(":")[2]))
        else:
            found.append(named_evaluator(name, **settings.get(name, {})))
    return found


def _parse(kind: type, options: list[str], **defaults: Any) -> tuple[Any, LeapAlignConfig]:
    from .parsing import OptionParser

    parser = OptionParser((kind, LeapAlignConfig))
    parser.set_defaults(**defaults)
    arguments, config = parser.parse_args_and_config(options)
    if not _is_object(arguments.pipeline):
        config.model_init_kwargs = arguments.load_options(config)
    return arguments, config


def _is_object(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def _object(name: str) -> Any:
    """What Python finds under MODULE:NAME."""
    if not _is_object(name):
        raise ValueError(f"{name!r} names no object. Write MODULE:NAME, such as my_rewards:brightness.")
    module, _, attribute = name.partition(":")
    try:
        with _modules_of_this_folder():
            found = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"There is no {name!r}: {error}. Modules are looked for here and among those installed."
            ) from error
        raise ImportError(
            f"The module {module!r} of {name!r} is there, but fails when it is imported: {type(error).__name__}: "
            f"{error}. Mend it, or install what it needs."
        ) from error
    if not hasattr(found, attribute):
        raise ValueError(f"There is no {name!r}: {found.__name__} ({found.__file__}) has no {attribute!r}.")
    return getattr(found, attribute)


@contextmanager
def _modules_of_this_folder() -> Iterator[None]:
    """Let modules be imported from the current folder, for as long as the user's own are."""
    before = list(sys.path)
    sys.path.insert(0, "")
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if "" in sys.path and "" not in before:
            sys.path.remove("")


def _reward(name: str) -> Any:
    """A reward function, or the name of a built-in reward."""
    return _object(name) if ":" in name else name


def _lora(arguments: TrainArguments, config: LeapAlignConfig) -> LoraConfig | None:
    return arguments.lora_config(config, read_dict("lora", arguments.lora))


def _pipeline(arguments: ModelArguments) -> Any:
    """What MODULE:FUNCTION returns, quantized if options say so, or the name of a pipeline."""
    if not _is_object(arguments.pipeline):
        return arguments.pipeline
    return arguments.quantized(_object(arguments.pipeline)())


def _maker(arguments: ModelArguments, config: LeapAlignConfig) -> Callable:
    if _is_object(arguments.pipeline):
        return lambda: _pipeline(arguments)
    return lambda: load_pipeline(arguments.pipeline, config.device, config.model_init_kwargs)


def _rows(option: str, source: str | None, config: LeapAlignConfig, split: str = "train") -> Sequence[dict[str, Any]]:
    if source is None:
        raise ValueError(f"There are no prompts: set {option}.")
    source = _object(source)() if _is_object(source) else read_if_geneval(source, config.prompt_column)
    return load_prompts(source, config.prompt_column, split)
