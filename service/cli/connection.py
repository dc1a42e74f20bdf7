"""Decide which service a command uses, connect to it, and turn client failures into error messages and exit codes.

The first of these that is available selects the service: --context, AMD_URL, AMD_CONTEXT, the current context of `amd
login`, and the stack that `amd up` started on this machine. The client is imported on first use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from service import credentials
from service.cli.console import fail, print_progress
from service.cli.context_store import ServiceContext, read_contexts
from service.cli.exit_codes import BAD_INPUT, FAILURE
from service.credentials import KeyFileError

if TYPE_CHECKING:
    from service.client import Client
    from service.stack import Stack
    from service.web.errors import Problem

TRIES = 4
PERSISTENT_TRIES = 16
NO_SERVICE = "no service found: start one with `amd up`, log in to one with `amd login URL`, or set AMD_URL and AMD_KEY"

selected_context: ContextVar[str | None] = ContextVar("selected_context", default=None)
"""Value of --context."""


class ServiceTarget(NamedTuple):
    """A service and how it was selected."""

    url: str
    key: str | None
    project: str | None
    """Project of the context, used as the default for `--project`."""
    source: str

    def __str__(self) -> str:
        return f"{self.url} ({self.source})"


# Selection


def configured_target() -> ServiceTarget | None:
    """Return the service that an option, the environment or the current context selects, if any.

    Raises ConfigError if the context does not exist. AMD_KEY and AMD_KEY_FILE override the key of a context, unless
    --context selects the context.
    """
    selected = selected_context.get()
    if selected is None and (url := os.environ.get("AMD_URL")):
        return ServiceTarget(url, _environment_key(), None, "AMD_URL")
    contexts = read_contexts()
    name = selected or os.environ.get("AMD_CONTEXT") or contexts.current
    if name is None:
        return None
    context = contexts.get(name)
    key = None if selected else _environment_key()
    return ServiceTarget(context.url, key or context_key(context), context.project, f"context {name}")


def service_target() -> ServiceTarget:
    """Return the configured service, else the stack on this machine. Exits if there is none."""
    target = configured_target()
    if target is not None:
        return target
    stack = local_stack()
    if stack is None:
        fail(NO_SERVICE)
    key = _environment_key() or read_key_file(stack.key_file, "key file ")
    return ServiceTarget(stack.url, key, None, f"amd up, {stack.data_dir}")


def local_stack() -> Stack | None:
    """Return the stack that `amd up` started on this machine, if it is running."""
    from service.stack import StackError, find_stack

    try:
        return find_stack()
    except StackError as error:
        fail(str(error))


def default_project(project: str | None) -> str | None:
    """Return the project given by an option, or else the context's project."""
    if project is not None:
        return project
    target = configured_target()
    return target.project if target else None


def context_key(context: ServiceContext) -> str | None:
    """Return a context's key, reading it from the key file if one is set."""
    return read_key_file(context.key_file, "key file ") if context.key_file else context.key


def read_key_file(path: str | Path, source: str) -> str:
    """Read the key from a file. If it cannot be read, exit with a message that starts with `source`."""
    try:
        return credentials.read_key_file(path, source)
    except KeyFileError as error:
        fail(str(error))


def _environment_key() -> str | None:
    try:
        return credentials.environment_key()
    except KeyFileError as error:
        fail(str(error))


# Connection


@contextmanager
def connected(as_json: bool = False, *, persistent: bool = False, announce: bool = False) -> Iterator[Client]:
    """Yield a client for the selected service. On failure, exit as `connected_to` does.

    `persistent`: keep retrying long enough to survive a service restart. `announce`: print which service is used.
    """
    target = service_target()
    if announce:
        print_progress(str(target))
    with connected_to(target, as_json, persistent=persistent) as client:
        yield client


@contextmanager
def connected_to(target: ServiceTarget, as_json: bool = False, *, persistent: bool = False) -> Iterator[Client]:
    """Yield a client. On failure, print the error and exit with code 2 for an invalid request, 1 otherwise."""
    from service.client import ApiError, Client, NoAnswer, Patience

    try:
        tries = PERSISTENT_TRIES if persistent else TRIES
        with Client(target.url, target.key, patience=Patience(tries=tries)) as client:
            yield client
    except ApiError as error:
        _fail_refused(error.problem, as_json)
    except NoAnswer as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; a job that was submitted continues on the service")


def _fail_refused(problem: Problem, as_json: bool) -> NoReturn:
    lines = [found.detail for found in problem.errors] or [problem.detail]
    if as_json:
        print(json.dumps({"state": "refused", "code": problem.code, "problems": lines, "request": problem.request_id}))
    is_bad_input = 400 <= problem.status < 500 and problem.status not in (401, 403, 429)
    fail(*lines, code=BAD_INPUT if is_bad_input else FAILURE)
