"""Checkpoints: the state that resumes a run, and its store."""
