"""Bytes of samples: local files, and remote ones with retries, a cache and reading ahead. Decodes nothing."""
