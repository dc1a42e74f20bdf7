"""Checkpoints: what continues a run, and where it is stored."""
