"""List the service's REST API, errors, events, metrics, database, environment, configs and presets, one fact per line.

Depends on few modules: where possible, it sends HTTP requests to a service that runs on a copy of the version 0.1
store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from fastapi import Body, HTTPException
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, MetaData, UniqueConstraint, text
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from amd.config import ConfigError
from amd.storage import StorageError
from service.app import create_app
from service.db.engine import migrate, open_engine
from service.db.models import Base
from service.settings import Settings
from service.web.errors import Refusal, RefusalCode, ServiceError
from tests.support.stored import EXPECTED, copy_database, copy_root
from tests.support.surface_schema import compact, openapi_lines, schema_lines

PACKAGES = ("amd", "service", "tune_spaces")
HEADERS = {"Authorization": f"Bearer {EXPECTED['database']['key']}"}
JOBS = {state: job_id for job_id, state in EXPECTED["database"]["job_states"].items() if job_id != "tiny-teacher"}


def config_lines(client: TestClient) -> Iterator[str]:
    """Yield the config keys of every job kind, with type, default and limits."""
    for kind in _kinds_of_jobs(client):
        schema = client.get(f"/v1/schemas/{kind}").json()
        yield from schema_lines(schema, schema.get("$defs", {}), kind)


def _kinds_of_jobs(client: TestClient) -> list[str]:
    return [line.removeprefix("kind: ") for line in job_lines(client) if line.startswith("kind: ")]


def preset_lines(client: TestClient) -> Iterator[str]:
    """Yield every value of every preset."""
    for preset in client.get("/v1/presets").json():
        name = f"{preset['kind']} {preset['name']}"
        yield name
        config = client.get(f"/v1/presets/{preset['name']}").json()["config"]
        yield from (f"{name} {key} = {value}" for key, value in _leaves(config))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, compact(value)


def environment_lines(repository: Path) -> Iterator[str]:
    """Yield the settings with their types and defaults, and every AMD_ variable mentioned in the code."""
    for name, field in Settings.model_fields.items():
        default = "computed" if field.default_factory else repr(field.default)
        limits = [compact(repr(rule)) for rule in field.metadata if type(rule).__name__ in ("Gt", "Ge", "Lt", "Le")]
        yield f"setting AMD_{name.upper()}: {field.annotation} = {default} {' '.join(limits)}".rstrip()
    names = set[str]()
    for package in PACKAGES:
        for path in (repository / package).rglob("*.py"):
            names |= set(re.findall(r"\bAMD_[A-Z][A-Z_]*[A-Z]\b", path.read_text()))
    yield from (f"name {name}" for name in names)


def database_lines(engine: Engine) -> Iterator[str]:
    """Yield the tables declared by the models, and the tables that migrations create in an empty SQLite database."""
    migrate(engine)
    migrated = MetaData()
    migrated.reflect(engine)
    for origin, metadata in (("declared", Base.metadata), ("migrated", migrated)):
        for table in metadata.tables.values():
            for column in table.columns:
                foreign = [f"→ {key.target_fullname} {key.ondelete}" for key in column.foreign_keys]
                facts = [str(column.type), "null" if column.nullable else "not null", *foreign]
                yield f"{origin} {table.name}.{column.name}: {', '.join(facts)}"
            yield f"{origin} {table.name} primary key: {[column.name for column in table.primary_key.columns]}"
            for constraint in table.constraints:
                if isinstance(constraint, UniqueConstraint):
                    yield f"{origin} {table.name} unique: {[column.name for column in constraint.columns]}"
            for index in table.indexes:
                unique = " unique" if index.unique else ""
                yield f"{origin} {table.name} index {index.name}{unique}: {[column.name for column in index.columns]}"


def served(folder: Path) -> TestClient:
    """Return a client for a service that runs on a copy of the version 0.1 store."""
    root = copy_root(folder)
    engine = open_engine(f"sqlite:///{copy_database(folder, root)}")
    migrate(engine)
    settings = Settings(data_dir=folder, storage=str(root), serve_url="http://127.0.0.1:1")
    return TestClient(create_app(settings, engine=engine), headers=HEADERS, raise_server_exceptions=False)


def api_lines(client: TestClient) -> Iterator[str]:
    yield from openapi_lines(client.get("/openapi.json").json())


def job_lines(client: TestClient) -> Iterator[str]:
    """Yield job kinds, states, reasons and origins, and the actions that each state allows."""
    document = client.get("/openapi.json").json()
    definitions = document["components"]["schemas"]
    submit = document["paths"]["/v1/jobs"]["post"]
    show = document["paths"]["/v1/jobs/{job_id}"]["get"]["responses"]["200"]["content"]["application/json"]
    for args, schema in (
        (("kind",), submit["requestBody"]["content"]["application/json"]["schema"]),
        (("state", "reason", "origin", "allowed_actions[]"), show["schema"]),
    ):
        for line in schema_lines(schema, definitions):
            path, _, facts = line.partition(": ")
            if path.split("<")[0].removeprefix(".") in args and "enum" in facts:
                (field,) = [part for part in args if path.startswith(f".{part}")]
                yield from (f"{field}: {value}" for value in json.loads(facts)["enum"])
    for job in client.get("/v1/jobs?limit=100").json()["items"]:
        yield f"{job['state']} {job['origin']} allows {', '.join(job['allowed_actions']) or 'nothing'}"


def metric_lines(client: TestClient) -> Iterator[str]:
    """Yield the metrics that /metrics exposes after a failed request to an encoder."""
    client.post("/v1/encoders/tiny-teacher/embeddings", content=b"x", headers={"Content-Type": "image/png"})
    for family in text_string_to_metric_families(client.get("/metrics").text):
        labels = sorted({label for sample in family.samples for label in sample.labels})
        yield f"{family.name} {family.type}: {', '.join(labels)}"


def event_lines(client: TestClient) -> Iterator[str]:
    """Yield the server-sent events for finished jobs, and the fields that webhooks receive."""
    for job, path in ((JOBS["failed"], "events"), (JOBS["succeeded"], "logs?follow=true")):
        for block in client.get(f"/v1/jobs/{job}/{path}").text.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if not fields:
                continue
            yield f"{path}: fields {', '.join(sorted(fields))}"
            if "event" in fields:
                yield f"{path}: event {fields['event']} with {', '.join(sorted(json.loads(fields['data'])))}"
    with client.app.state.engine.begin() as connection:
        connection.execute(text("UPDATE webhooks SET events = '[]'"))
    assert client.post(f"/v1/jobs/{JOBS['queued']}/cancel").status_code == 202
    with client.app.state.engine.connect() as connection:
        body = connection.execute(text("SELECT body FROM deliveries ORDER BY id DESC LIMIT 1")).scalar_one()
    delivery = json.loads(body)
    yield f"webhook type {delivery['type']}"
    yield f"webhook body {', '.join(sorted(delivery))}"
    yield f"webhook data {', '.join(sorted(delivery['data']))}"


def error_lines(client: TestClient) -> Iterator[str]:
    """Yield the code and status of every error as received by clients, using routes that raise them."""
    failures: dict[str, Exception] = {f"service error {code}": Refusal(code, "…") for code in get_args(RefusalCode)}
    kinds = set(_kinds(ServiceError)) - {Refusal}
    failures |= {f"service error {kind.__name__}": kind("…") for kind in kinds}
    failures |= {f"status {status}": HTTPException(status) for status in (400, 403, 404, 405, 413, 415, 422, 500, 503)}
    failures |= {
        "a config": ConfigError(["mask.teacher_ratio=2 must be below 1"]),
        "the storage": StorageError("…"),
        "the database": OperationalError("…", {}, Exception("…")),
        "an unforeseen exception": RuntimeError("…"),
    }

    def fail(number: int) -> None:
        raise list(failures.values())[number]

    def take(body: Annotated[dict[str, int], Body()]) -> None:
        pass

    client.app.add_api_route("/fail/{number}", fail)
    client.app.add_api_route("/take", take, methods=["POST"])
    for number, cause in enumerate(failures):
        named = "" if cause.startswith("service error") else f" after {cause}"  # classes may be renamed
        yield _problem(client.get(f"/fail/{number}")) + named
    yield _problem(client.get("/nowhere")) + " after an unknown path"
    yield _problem(client.get("/take")) + " after an unknown method"
    yield (
        _problem(client.post("/take", content=b"{", headers={"Content-Type": "application/json"}))
        + " after a body that is not JSON"
    )
    yield _problem(client.post("/take", content=b"x", headers={"Content-Type": "text/x"})) + " after another media type"
    yield _problem(client.post("/take", json={"a": "b"})) + " after a body of another form"
    yield _problem(client.get("/v1/jobs?cursor=x")) + " after a bad cursor"
    yield _problem(client.get("/v1/jobs", headers={"Authorization": "Bearer x"})) + " after a bad key"


def _problem(response: Any) -> str:
    problem = response.json()
    headers = [name for name in ("allow", "retry-after", "www-authenticate") if name in response.headers]
    facts = [f"retryable {problem['retryable']}", response.headers["content-type"], problem["type"], *headers]
    return f"{problem['code']} {response.status_code}: {', '.join(facts)} [{', '.join(sorted(problem))}]"


def _kinds(kind: type[ServiceError]) -> list[type[ServiceError]]:
    return [found for child in kind.__subclasses__() for found in (child, *_kinds(child))]
