"""The training loop, the optimizer, checkpoints and resuming."""
