"""What samples a data set has: manifests built from folders, list files and tar shards. Decodes nothing."""
