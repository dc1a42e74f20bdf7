"""Benchmarks: the cost of a training step and of reading data. Runs without Ray."""
