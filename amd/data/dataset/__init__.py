"""Data sets as manifests, built from folders, list files and tar shards. Decodes nothing."""
