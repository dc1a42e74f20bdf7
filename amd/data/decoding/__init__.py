"""Decode samples to frames: fetching, a separate decoding process, time and memory limits."""
