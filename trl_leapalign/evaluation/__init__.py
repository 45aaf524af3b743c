"""Scores of pipelines on fixed prompts, and how they compare."""

from .scoring import score_pipeline

__all__ = ["score_pipeline"]
