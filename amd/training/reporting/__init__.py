"""What a run reports: metrics, progress, bad samples, and probes of its checkpoints."""
