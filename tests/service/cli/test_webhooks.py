"""Tests for `amd webhooks` against a real control plane."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from service.client import Client, JobRequest
from tests.support.service.server import Server

Command = Callable[..., tuple[int, str, str]]
URL = "https://hooks.example.com/amd"


def test_a_webhook_is_created_listed_shown_and_deleted(service: Server, amd: Command) -> None:
    code, out, err = amd("webhooks", "create", URL, "--event", "failed", "-e", "succeeded", "--project", "video")
    assert (code, out.startswith("whsec_")) == (0, True)
    (row,) = json.loads(amd("webhooks", "list", "--json")[1])
    assert (row["url"], row["events"], row["project"]) == (URL, ["failed", "succeeded"], "video")
    assert row["id"] in err
    assert "secret" not in row

    for text in (row["id"], row["id"][:-3], row["id"].removeprefix("wh_")[:5]):
        code, out, _ = amd("webhooks", "show", text)
        assert (code, row["id"] in out, URL in out) == (0, True, True)
    code, out, err = amd("webhooks", "list")
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    assert URL in out
    assert f"{service.url} (AMD_URL)" in err

    assert amd("webhooks", "delete", row["id"][:5])[:2] == (0, f"{row['id']}: deleted\n")
    assert amd("webhooks", "list")[1].strip() == "no webhooks"


def test_a_webhooks_deliveries_are_listed(service: Server, amd: Command) -> None:
    created = json.loads(amd("webhooks", "create", URL, "--json")[1])
    assert created["secret"].startswith("whsec_")
    assert amd("webhooks", "deliveries", created["id"])[1].strip() == "no deliveries"
    with Client(service.url, service.key) as client:
        job = client.jobs.submit(JobRequest(kind="train", preset="demo-image-mae"))
    found = json.loads(amd("webhooks", "deliveries", created["id"], "-o", "json", "--limit", 1)[1])
    assert [row["job_id"] for row in found] == [job.id]
    code, out, _ = amd("webhooks", "deliveries", created["id"])
    assert (code, job.id in out) == (0, True)
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_ping_is_sent_and_a_delivery_is_repeated(service: Server, amd: Command) -> None:
    created = json.loads(amd("webhooks", "create", URL, "--json")[1])
    code, out, _ = amd("webhooks", "test", created["id"][:7])
    assert (code, out.endswith(": ping queued\n")) == (0, True)
    (row,) = json.loads(amd("webhooks", "deliveries", created["id"], "--json")[1])
    assert (row["type"], row["job_id"]) == ("ping", None)
    again = json.loads(amd("webhooks", "redeliver", created["id"], row["id"], "--json")[1])
    assert (again["id"], again["state"]) == (row["id"], "waiting")
    code, _, err = amd("webhooks", "redeliver", created["id"], 12345)
    assert (code, "has no delivery 12345" in err) == (2, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("create", "http://127.0.0.1/"), "url: must start with https://"),
        (("create", URL, "--event", "exploded"), "events: "),
        (("show", "zzz"), "no webhook 'zzz'; `amd webhooks list`"),
    ],
)
def test_bad_input_exits_with_code_2(args: tuple[str, ...], message: str, service: Server, amd: Command) -> None:
    code, _, err = amd("webhooks", *args)
    assert (code, message in err) == (2, True)
