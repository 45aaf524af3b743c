"""Evaluators: callables of a reward's contract, `evaluator(images, prompts, metadata)`, that give no gradient."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluators import EVALUATORS, Evaluator, named_evaluator, named_rewards
    from .geneval.colors import ColorClassifier
    from .geneval.evaluator import GenEval
    from .geneval.mask2former import Mask2FormerDetector
    from .geneval.metadata import GenEvalTask, parse_task, read_geneval
    from .geneval.rules import Detection, GenEvalRules, GenEvalSummary, Verdict, summarize_geneval
    from .paired import ComparedScore, PairedComparison, compare_evaluations
    from .run import Evaluation, evaluate
    from .statistics import Estimate
    from .tables import EvaluatorSummary
    from .unified_reward import UnifiedReward

_MODULES = {
    "ColorClassifier": "geneval.colors",
    "ComparedScore": "paired",
    "Detection": "geneval.rules",
    "EVALUATORS": "evaluators",
    "Estimate": "statistics",
    "Evaluation": "run",
    "Evaluator": "evaluators",
    "EvaluatorSummary": "tables",
    "GenEval": "geneval.evaluator",
    "GenEvalRules": "geneval.rules",
    "GenEvalSummary": "geneval.rules",
    "GenEvalTask": "geneval.metadata",
    "Mask2FormerDetector": "geneval.mask2former",
    "PairedComparison": "paired",
    "UnifiedReward": "unified_reward",
    "Verdict": "geneval.rules",
    "compare_evaluations": "paired",
    "evaluate": "run",
    "named_evaluator": "evaluators",
    "named_rewards": "evaluators",
    "parse_task": "geneval.metadata",
    "read_geneval": "geneval.metadata",
    "summarize_geneval": "geneval.rules",
}
"""Public names, each imported from its module when it is first used (PEP 562)."""

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
