"""Benchmarks of a training step and of data loading, without Ray."""
