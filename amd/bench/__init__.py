"""Benchmarks for training steps and data loading, without Ray."""
