"""GenEval: its prompts, detector, colour classifier and rules."""
