"""The registry: published encoders by name, their aliases, discovery and download."""
