"""Checkpoints: the saved state of a run, and its storage."""
