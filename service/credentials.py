"""Read a client's API key from AMD_KEY or, if that is not set, from the file at AMD_KEY_FILE.

Shared by the Python client and the command line. Does not import other modules of the service.
"""

from __future__ import annotations

import os
from pathlib import Path


class KeyFileError(Exception):
    """Raised when an API key file cannot be read."""


def environment_key() -> str | None:
    """Return the API key from AMD_KEY or from the file at AMD_KEY_FILE, if either is set.

    Raises KeyFileError if the file cannot be read.
    """
    if key := os.environ.get("AMD_KEY"):
        return key
    file = os.environ.get("AMD_KEY_FILE")
    return read_key_file(file, "AMD_KEY_FILE=") if file else None


def read_key_file(path: str | Path, source: str) -> str:
    """Read the API key from a file. Raises KeyFileError.

    `source`: prefix for error messages, such as the name of the setting that contains the path.
    """
    try:
        return Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise KeyFileError(f"{source}{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"{source}{path}: is not a text file; it must contain an API key") from None
