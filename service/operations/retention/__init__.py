"""Retention: which jobs, runs and records are removed after which time, and the removal itself."""
