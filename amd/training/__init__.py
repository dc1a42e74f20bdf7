"""Pre-training runs: the loop, its checkpoints and metrics, and the ways to launch it (Ray Train, or one process)."""
