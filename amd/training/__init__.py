"""Training runs: the loop, its checkpoints and metrics, and launching on Ray Train or in this process."""
