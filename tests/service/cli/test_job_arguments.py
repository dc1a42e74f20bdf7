"""Tests for requests that are built from arguments of `amd jobs`, against a real control plane over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from service.jobs.store import JobStore
from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]


def test_a_job_is_cloned_with_changes(service: Server, amd: Command, sqlite_engine: Engine) -> None:
    store = JobStore(sqlite_engine)
    _, out, _ = amd("train", "--preset", "demo-image-amd", "--submit", "--name", "first", "--label", "a=1")
    job = store.get(out.strip())
    code, out, err = amd("jobs", "clone", job.id[-8:], "optim.base_lr=0.002", "--name", "faster", "--priority", 7)
    assert (code, err) == (0, "")
    copy = store.get(out.partition(":")[0])
    assert (copy.name, copy.labels, copy.priority, copy.preset) == ("faster", {"a": "1"}, 7, "demo-image-amd")
    original, changed = ({**one.config, "name": None, "optim": None} for one in (job, copy))
    assert (changed, copy.config["optim"]["base_lr"]) == (original, 0.002)
    code, out, _ = amd("jobs", "clone", "faster", "--label", "b=2", "--json")
    copy = store.get(json.loads(out)["id"])
    assert (copy.name, copy.labels, copy.priority) == ("faster", {"b": "2"}, 7)
    code, out, _ = amd("jobs", "clone", copy.id, "--label", "", "--json")
    assert json.loads(out)["labels"] == {}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["optim.base_lrr=1"], "did you mean optim.base_lr?"),
        (["--name", "x" * 201], "name: "),
        (["--label", "odd"], "--label odd: must have the form KEY=VALUE"),
    ],
)
def test_an_invalid_change_of_a_copy_is_reported(
    service: Server, amd: Command, arguments: list[str], problem: str
) -> None:
    _, out, _ = amd("train", "--preset", "demo-image-amd", "--submit")
    code, _, err = amd("jobs", "clone", out.strip(), *arguments)
    assert (code, problem in err, "Traceback" in err) == (2, True, False)
