"""The `amd` command: one module per command or command group."""
