"""Exceptions raised when storage cannot be used."""

from __future__ import annotations


class StorageError(Exception):
    """Raised when storage cannot be used. The message states the URL, the reason and how to fix it."""


class StorageUnreachable(StorageError):
    """Raised when a remote store does not respond for OUTAGE_LIMIT_S seconds, or when a disk is full or broken."""
