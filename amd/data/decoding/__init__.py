"""From the bytes of a sample to its frames: fetching, decoding in a separate process, time and memory limits."""
