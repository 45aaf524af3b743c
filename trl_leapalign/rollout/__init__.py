"""Runs the user's own pipeline with a method's graph: all that knows diffusers' insides."""
