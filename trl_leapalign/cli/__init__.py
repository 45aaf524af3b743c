"""The command `trl-leapalign`."""
