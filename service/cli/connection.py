"""Connect commands to the service, turning client failures into a message and an exit code.

The service is the one at AMD_URL, or the one that `amd up` started on this machine. The client is imported on first
use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from service.cli.console import fail
from service.cli.exit_codes import BAD_INPUT, FAILURE

if TYPE_CHECKING:
    from service.client import Client
    from service.web.errors import Problem

TRIES = 4
PERSISTENT_TRIES = 16


@contextmanager
def connected(as_json: bool = False, *, persistent: bool = False) -> Iterator[Client]:
    """Yield a client for the service. On failure, print the message and exit: code 2 for an invalid request, else 1.

    `persistent`: retry for as long as a restart of the service takes.
    """
    from service.client import ApiError, Client, NoAnswer, Patience

    try:
        tries = PERSISTENT_TRIES if persistent else TRIES
        with Client.from_environment(patience=Patience(tries=tries)) as client:
            yield client
    except ApiError as error:
        _fail_refused(error.problem, as_json)
    except NoAnswer as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; the job continues on the service")


def _fail_refused(problem: Problem, as_json: bool) -> NoReturn:
    lines = [found.detail for found in problem.errors] or [problem.detail]
    if as_json:
        print(json.dumps({"state": "refused", "code": problem.code, "problems": lines, "request": problem.request_id}))
    is_bad_input = 400 <= problem.status < 500 and problem.status not in (401, 403, 429)
    fail(*lines, code=BAD_INPUT if is_bad_input else FAILURE)
