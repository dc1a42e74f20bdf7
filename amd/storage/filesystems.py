"""Storage locations: local paths and remote URLs, and the fsspec filesystem of each.

The only module that resolves fsspec filesystems.
"""

from __future__ import annotations

import os
import posixpath
import sys
from pathlib import Path
from typing import Any

from amd.storage.credentials import credential_for, store_of
from amd.storage.errors import StorageError

S3_CONNECTIONS = 128  # botocore's default of 10 limits a process to 200 requests/s at 50 ms each, however many threads


def default_root() -> str:
    """Return AMD_STORAGE if set, else a folder in the user's data directory."""
    if root := os.environ.get("AMD_STORAGE"):
        return root
    if sys.platform == "darwin":
        return str(Path.home() / "Library" / "Application Support" / "amd")
    return str(Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "amd")


def resolve_root(storage: str | None) -> str:
    """Return the storage root as a URL or absolute path, because Ray workers run in different working directories."""
    root = storage or default_root()
    return root.rstrip("/") if is_remote(root) else str(local_path(root))


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """Return the absolute path of a local URL or path."""
    return Path(url.removeprefix("file://").removeprefix("local://")).expanduser().absolute()


def join(url: str, *parts: str) -> str:
    return posixpath.join(url, *parts)


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem for a URL, and the path within it.

    Uses the storage credential that covers the URL, if any. The S3 endpoint is read from the credential,
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, as in boto3. Raises StorageError.
    """
    import fsspec  # here, because decoding processes and commands that use no files would otherwise start later

    if not is_remote(url):
        return fsspec.filesystem("file"), str(local_path(url))
    store, credential = store_of(url), credential_for(url)
    options: dict[str, Any] = {}
    if store == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["endpoint_url"] = endpoint
    if credential is not None:
        options |= credential.options(store)
    if store == "s3":
        configured = options.get("config_kwargs") or fsspec.config.conf.get("s3", {}).get("config_kwargs") or {}
        options["config_kwargs"] = {"max_pool_connections": S3_CONNECTIONS, **configured}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except Exception as error:  # every backend raises its own exceptions
        if credential is not None and not isinstance(error, ImportError):  # the message may quote the secret
            raise credential.error("is rejected by the filesystem; correct its options") from None
        if not isinstance(error, ImportError | ValueError):
            raise
        raise StorageError(
            f"{url}: no filesystem is installed for this URL ({error}); install the fsspec package that supports it"
        ) from None
    return fs, path
