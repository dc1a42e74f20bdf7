"""The service around `amd`: command line, control plane, client, and encoder serving."""
