"""Writes the tables of docs/pipelines.md from the matrix: `make pipelines`."""

import re
from pathlib import Path

import torch
from pipeline_cases import CASES, PipelineCase
from pipeline_cases.laboratory import Laboratory

from trl_leapalign.adapters.saving import saved_by_pipeline
from trl_leapalign.cli.check import Watched
from trl_leapalign.methods import LeapAlign
from trl_leapalign.rollout.pipelines import is_flow_matching, schedulers_of

PAGE = Path(__file__).parents[1] / "docs" / "pipelines.md"
BEGIN, END = "<!-- begin: written by `make pipelines` -->\n", "<!-- end -->\n"
HEAD = "| Pipeline | Family | Task | Scheduler | Trained | Calls a step | Checkpointing | LoRA saved by |\n"


def cheap_columns(case: PipelineCase) -> str:
    """The begin of a case's row."""
    return f"| `{case}` | {case.family} | {case.task} |"


def row(case: PipelineCase) -> str:
    laboratory = Laboratory(case)
    method = Watched(LeapAlign())
    with method.counting(laboratory.denoisers):
        laboratory.rollout(method)
    schedule, calls = method.last_loop
    pipeline = laboratory.pipeline
    saved = "the pipeline" if saved_by_pipeline(pipeline, laboratory.denoisers) else "PEFT"
    scheduler = next(type(each).__name__ for each in schedulers_of(pipeline) if is_flow_matching(each))
    checkpointing = f"no: {case.checkpointing}" if case.checkpointing else "yes"
    denoisers = ", ".join(f"`{name}`" for name in laboratory.denoisers)
    calls_a_step = f"{calls.total() / schedule.num_steps:g}"
    scheduler = scheduler.removesuffix("Scheduler")
    return f"{cheap_columns(case)} {scheduler} | {denoisers} | {calls_a_step} | {checkpointing} | {saved} |\n"


def tables() -> str:
    rows = "".join(row(case) for case in CASES if not case.unsupported)
    refused = "".join(f'- `{case}`: "{case.unsupported}"\n' for case in CASES if case.unsupported)
    return f"{HEAD}|{' --- |' * 8}\n{rows}\nRefused, with these words in the message:\n\n{refused}"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: f"{BEGIN}\n{tables()}\n{END}", page), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
