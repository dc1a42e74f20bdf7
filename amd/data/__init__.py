"""Data pipeline: manifests of records, isolated decoding, batches of clips, and preparation of raw collections.

Readers never replace a sample: an unreadable one raises `BadSample` with the reason, and the caller decides.
"""
