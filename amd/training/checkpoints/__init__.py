"""Checkpoints: the saved state of a run and how it is stored."""
