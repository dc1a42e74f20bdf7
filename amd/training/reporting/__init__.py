"""Reporting of a run: metrics, progress, bad samples, and probes of its checkpoints."""
