"""Fetch the bytes of samples from local and remote files, with retries, a cache and read-ahead. Decodes nothing."""
