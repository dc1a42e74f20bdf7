"""Arguments and options of commands for jobs: the ID of a job, labels, and requests that are built from options."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from amd.config import ConfigError, broken_rule
from service.cli.ids import UNKNOWN_ID_STATUSES, named_id

if TYPE_CHECKING:
    from service.client import Client
    from service.jobs.schemas import JobDetail

SEARCHED_JOBS = 2000  # number of newest jobs searched for a shortened id

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job name or ID, or a prefix of the ID or of its last part.")]
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", help="Label as KEY=VALUE; may be repeated.")]

M = TypeVar("M", bound=BaseModel)


def find_job(client: Client, text: str) -> JobDetail:
    """Find a job by its ID or, among the newest jobs, by its name, or by a prefix of the ID or of its last part.

    Raises the service's error if there is none, and ConfigError if several match.
    """
    from service.client import ApiError

    try:
        return client.jobs.get(text)
    except ApiError as error:
        if error.problem.status not in UNKNOWN_ID_STATUSES:
            raise
        newest = {job.id: job.name for job in itertools.islice(client.jobs.list(), SEARCHED_JOBS)}
        return client.jobs.get(named_id(text, newest, "job", error))


def parse_labels(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """Parse `--label` values, or return None if there are none. Raises ConfigError if one is invalid."""
    for pair in pairs or ():
        if "=" not in pair:
            raise ConfigError([f"--label {pair}: must have the form KEY=VALUE"])
    return dict(pair.split("=", 1) for pair in pairs) if pairs else None


def build_request(model: type[M], **values: Any) -> M:
    """Build the body of a request. Raises ConfigError with one line per invalid field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, found['loc']))}: {broken_rule(found)}" for found in error.errors()]
        raise ConfigError(problems) from None
