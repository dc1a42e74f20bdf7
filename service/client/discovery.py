"""Locate the service: AMD_URL with AMD_KEY or AMD_KEY_FILE, else the local stack of `amd up`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from service.client.errors import NoAnswer


class ServiceAddress(NamedTuple):
    url: str
    key: str | None


def find_service() -> ServiceAddress:
    """Locate the service from the environment, falling back to the local stack.

    Raises NoAnswer, with instructions, if there is none.
    """
    url, key, key_file = (os.environ.get(name) or None for name in ("AMD_URL", "AMD_KEY", "AMD_KEY_FILE"))
    if url is None:
        from service.stack import find_stack

        stack = find_stack()
        if stack is None:
            raise NoAnswer("no service found: start one with `amd up`, or set AMD_URL and AMD_KEY")
        url, key_file = stack.url, key_file or str(stack.key_file)
    if key is None and key_file is not None:
        try:
            key = Path(key_file).expanduser().read_text().strip()
        except OSError as error:
            raise NoAnswer(f"AMD_KEY_FILE={key_file}: cannot be read ({error.strerror})") from None
    return ServiceAddress(url, key)
