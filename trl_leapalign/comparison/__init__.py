"""Several runs side by side, and their report."""
