"""Decode samples to frames, in a separate process with time and memory limits."""
