"""The service around `amd`: command line, control plane, client, and serving of encoders."""
