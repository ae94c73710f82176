"""Experience: replay, rollouts, running statistics and episode counts, task-major throughout."""
