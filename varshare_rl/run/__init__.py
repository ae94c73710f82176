"""Running: the loop, evaluation, checkpoints, logs and results. Knows algorithms only by their protocol."""
