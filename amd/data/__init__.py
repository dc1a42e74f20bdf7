"""Data: what the samples are (records, manifest, lists, shards), how they are read (readers, video, images, isolation,
cache), how they become batches (sampling, transforms, loader), and how a raw collection is prepared (prepare).

Readers never replace a sample: a bad one is named, with its reason, and whoever asked decides.
"""
