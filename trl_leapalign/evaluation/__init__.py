"""Evaluators: callables of a reward's contract, `evaluator(images, prompts, metadata)`, that give no gradient."""

from .evaluate import Evaluation, evaluate
from .evaluators import EVALUATORS, Evaluator, named_evaluator
from .geneval.colors import ColorClassifier
from .geneval.evaluator import GenEval
from .geneval.mask2former import Mask2FormerDetector
from .geneval.metadata import GenEvalTask, parse_task, read_geneval
from .geneval.rules import Accuracy, Detection, GenEvalRules, GenEvalSummary, Verdict, summarize_geneval
from .paired import ComparedScore, PairedComparison, compare_evaluations
from .statistics import Estimate
from .tables import EvaluatorSummary
from .unified_reward import UnifiedReward

__all__ = [
    "EVALUATORS",
    "Accuracy",
    "ColorClassifier",
    "ComparedScore",
    "Detection",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "EvaluatorSummary",
    "GenEval",
    "GenEvalRules",
    "GenEvalSummary",
    "GenEvalTask",
    "Mask2FormerDetector",
    "PairedComparison",
    "UnifiedReward",
    "Verdict",
    "compare_evaluations",
    "evaluate",
    "named_evaluator",
    "parse_task",
    "read_geneval",
    "summarize_geneval",
]
