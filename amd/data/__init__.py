"""Data pipeline: manifests, isolated decoding, batching of clips, and preparation of raw data sets.

Readers never substitute samples: an unreadable sample raises `BadSample` with the reason, and the caller handles it.
"""
