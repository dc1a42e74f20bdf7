# Generated from service/client/_async/__init__.py by `python -m tests.support.blocking_client`; do not edit.
"""One variant of the client: its base class, and one module per group of methods."""
