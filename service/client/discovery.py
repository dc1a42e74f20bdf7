"""Locate the service: AMD_URL (with AMD_KEY or AMD_KEY_FILE), or else the stack that `amd up` started."""

from __future__ import annotations

import os
from typing import NamedTuple

from service.client.errors import NoAnswer
from service.credentials import KeyFileError, environment_key, read_key_file


class ServiceAddress(NamedTuple):
    url: str
    key: str | None


def find_service() -> ServiceAddress:
    """Locate the service from the environment, falling back to the local stack.

    Raises NoAnswer, with a remedy, if no service is found.
    """
    try:
        if url := os.environ.get("AMD_URL"):
            return ServiceAddress(url, environment_key())
        from service.stack import find_stack

        stack = find_stack()
        if stack is None:
            raise NoAnswer("no service found: start one with `amd up`, or set AMD_URL and AMD_KEY")
        return ServiceAddress(stack.url, environment_key() or read_key_file(stack.key_file, "key file "))
    except KeyFileError as error:
        raise NoAnswer(str(error)) from None
