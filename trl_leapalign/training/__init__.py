"""What the trainer is made of: losses, metrics, checkpoints, the dry run, guards and callbacks."""
