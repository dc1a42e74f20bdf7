"""Build manifests of data sets from folders, list files and tar shards. Decodes nothing."""
