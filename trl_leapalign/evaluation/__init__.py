"""Evaluators: callables of a reward's contract, `evaluator(images, prompts, metadata)`, that give no gradient."""

from .geneval import Accuracy, Detection, GenEvalRules, GenEvalSummary, Verdict, summarize_geneval
from .geneval_colors import ColorClassifier
from .geneval_evaluator import GenEval
from .geneval_metadata import GenEvalTask, parse_task, read_geneval
from .mask2former import Mask2FormerDetector
from .unified_reward import UnifiedReward

__all__ = [
    "Accuracy",
    "ColorClassifier",
    "Detection",
    "GenEval",
    "GenEvalRules",
    "GenEvalSummary",
    "GenEvalTask",
    "Mask2FormerDetector",
    "UnifiedReward",
    "Verdict",
    "parse_task",
    "read_geneval",
    "summarize_geneval",
]
