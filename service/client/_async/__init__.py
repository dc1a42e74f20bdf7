"""One variant of the client: its base, and one module per group of methods."""
