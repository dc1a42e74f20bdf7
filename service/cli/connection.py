"""How commands reach the service: a client, whose failures end in a message and an exit code.

The service is the one of AMD_URL, or the one that `amd up` started here. Its client is imported when it is needed.
Knows no request: what is asked through the client is the matter of `cli_jobs`, `cli_submit` and `cli_encoders`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from service.client import Client
    from service.web.errors import Problem

DONE, FAILED, BAD_INPUT = 0, 1, 2

err = Console(stderr=True)


@contextmanager
def connected(as_json: bool = False, *, patient: bool = False) -> Iterator[Client]:
    """A client of the service. What goes wrong ends in its message: exit code 2 where the request was wrong, else 1.

    `patient`: a service that is away is waited for, as it is when it restarts.
    """
    from service.client import ApiError, Client, NoAnswer, Patience

    try:
        with Client.from_environment(patience=Patience(tries=16 if patient else 4)) as client:
            yield client
    except ApiError as error:
        _refused(error.problem, as_json)
    except NoAnswer as error:
        stop([str(error)], FAILED)
    except KeyboardInterrupt:
        stop(["no longer watched; the job goes on"], FAILED)


def _refused(problem: Problem, as_json: bool) -> NoReturn:
    lines = [found.detail for found in problem.errors] or [problem.detail]
    if as_json:
        print(json.dumps({"state": "refused", "code": problem.code, "problems": lines, "request": problem.request_id}))
    asked_wrong = 400 <= problem.status < 500 and problem.status not in (401, 403, 429)
    stop(lines, BAD_INPUT if asked_wrong else FAILED)


def stop(problems: Sequence[str], code: int) -> NoReturn:
    """End the command with that exit code, each problem on a line."""
    for problem in problems:
        err.print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)
