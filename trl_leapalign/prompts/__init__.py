"""What a sample is: prompts from any source, columns for the pipeline's call, and the seeds of its noise."""
