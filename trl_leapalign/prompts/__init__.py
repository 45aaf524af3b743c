"""What a sample is: prompts from any source, columns for the pipeline's call, and the seeds of its noise."""

from .sources import load_prompts

__all__ = ["load_prompts"]
