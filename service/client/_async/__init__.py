"""One variant of the client: its base class, and one module per group of methods."""
