"""The scope that each REST route requires, and requests with which tests call it."""

from __future__ import annotations

from typing import Any, NamedTuple

from service.auth.authentication import Scope
from service.jobs.kinds import resolve

OPEN = None  # requires no key
JOB = {"kind": "train", "preset": "demo-image-amd"}
CONFIG = resolve("train", "demo-image-amd", None, {}).model_dump(mode="json")  # a clone needs a complete one
PICTURE = {"input": "data:image/png;base64,AAAA"}
# Values of path parameters that are the same for all objects.
FIXED = {"number": "0", "record": "0", "step": "1", "picture": "input.webp", "path": "run/result.json"}


class Rule(NamedTuple):
    """The scope that a route requires, and how tests call the route."""

    needs: Scope | None
    body: Any = None
    """Request body. Like the path, its strings may contain placeholders for objects."""
    lists: bool = False
    """Whether the route lists objects in the caller's project."""
    names: bool = False
    """Whether the route takes a name within a project, which must be specified if the key covers all projects."""
    unknown: int = 404
    """Status for an object that does not exist."""
    query: str = ""
    """Query string. Like the path, it may contain placeholders for objects."""
    all_projects: bool = False
    """Whether the key must cover all projects."""


RULES: dict[tuple[str, str], Rule] = {
    ("GET", "/livez"): Rule(OPEN),
    ("GET", "/readyz"): Rule(OPEN),
    ("GET", "/metrics"): Rule(OPEN),
    ("GET", "/openapi.json"): Rule(OPEN),
    ("GET", "/docs"): Rule(OPEN),
    ("GET", "/docs/oauth2-redirect"): Rule(OPEN),
    ("GET", "/redoc"): Rule(OPEN),
    ("GET", "/"): Rule(OPEN),  # the console, whose routes are tested in tests/service/console
    ("GET", "/v1/me"): Rule("infer"),
    ("POST", "/v1/console-links"): Rule("read"),
    ("GET", "/v1/cluster"): Rule("read"),
    ("GET", "/v1/presets"): Rule("read"),
    ("GET", "/v1/presets/{name}"): Rule("read"),
    ("GET", "/v1/schemas/{kind}"): Rule("read"),
    ("POST", "/v1/validate"): Rule("submit", JOB),
    ("POST", "/v1/jobs"): Rule("submit", JOB),
    ("GET", "/v1/jobs"): Rule("read", lists=True),
    ("GET", "/v1/jobs/{job_id}"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/logs"): Rule("read"),
    ("POST", "/v1/jobs/{job_id}/trials/{number}/stop"): Rule("submit"),
    ("GET", "/v1/jobs/{job_id}/metrics"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/events"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/trials"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/checkpoints"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/history"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/report"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/logs/search"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/logs/range"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/bad-samples"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/media"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/media/{step}/{picture}"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/artifacts"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/artifacts/{path}"): Rule("read"),
    ("PATCH", "/v1/jobs/{job_id}"): Rule("submit", {"name": "a"}),
    ("POST", "/v1/jobs/{job_id}/clone"): Rule("submit"),
    ("POST", "/v1/jobs/{job_id}/fork"): Rule("submit", {"step": 4}),
    ("POST", "/v1/jobs/{job_id}/neighbours"): Rule("read", {"record": 0}),
    ("GET", "/v1/jobs/{job_id}/map"): Rule("read"),
    ("GET", "/v1/jobs/{job_id}/map/thumbnails/{record}"): Rule("read"),
    ("POST", "/v1/jobs/{job_id}/cancel"): Rule("submit"),
    ("POST", "/v1/jobs/{job_id}/pause"): Rule("submit"),
    ("POST", "/v1/jobs/{job_id}/resume"): Rule("submit"),
    ("POST", "/v1/jobs/{job_id}/retry"): Rule("submit"),
    ("DELETE", "/v1/jobs/{job_id}"): Rule("submit"),
    ("GET", "/v1/encoders"): Rule("read", lists=True),
    ("POST", "/v1/encoders"): Rule("submit", {"weights": "timm:vit_tiny_patch16_224"}),
    ("GET", "/v1/encoders/aliases"): Rule("read", lists=True),
    ("GET", "/v1/encoders/aliases/{alias}"): Rule("read", names=True),
    ("PUT", "/v1/encoders/aliases/{alias}"): Rule("submit", {"encoder": "{encoder}"}, names=True),
    ("DELETE", "/v1/encoders/aliases/{alias}"): Rule("submit", names=True),
    ("GET", "/v1/encoders/{encoder}"): Rule("read"),
    ("DELETE", "/v1/encoders/{encoder}"): Rule("submit"),
    ("GET", "/v1/encoders/{encoder}/download"): Rule("read"),
    ("GET", "/v1/encoders/{encoder}/compare"): Rule("read", query="?other={other}"),
    ("GET", "/v1/encoders/{encoder}/compare/{other}"): Rule("read"),
    ("POST", "/v1/encoders/{encoder}/embeddings"): Rule("infer", PICTURE, unknown=409),
    ("POST", "/v1/encoders/{encoder}/classifications"): Rule("infer", PICTURE, unknown=409),
    ("POST", "/v1/encoders/{encoder}/reconstructions"): Rule("infer", PICTURE, unknown=409),
    ("POST", "/openai/v1/embeddings"): Rule("infer", {"model": "{encoder}", **PICTURE}, unknown=409),
    ("GET", "/openai/v1/models"): Rule("infer"),
    ("GET", "/v1/deployments"): Rule("read", lists=True),
    ("PUT", "/v1/deployments/{name}"): Rule("submit", {"encoder": "{encoder}", "candidate": "{other}"}, names=True),
    ("GET", "/v1/deployments/{name}"): Rule("read"),
    ("GET", "/v1/deployments/{name}/drift"): Rule("read"),
    ("GET", "/v1/deployments/{name}/revisions"): Rule("read"),
    ("POST", "/v1/deployments/{name}/rollback"): Rule("submit", {"revision": 1}),
    ("DELETE", "/v1/deployments/{name}"): Rule("submit"),
    ("POST", "/v1/keys"): Rule("admin", {"name": "a", "scopes": ["read"]}),
    ("GET", "/v1/keys"): Rule("admin", lists=True),
    ("DELETE", "/v1/keys/{key_id}"): Rule("admin"),
    ("POST", "/v1/webhooks"): Rule("admin", {"url": "https://hooks.example.com"}),
    ("GET", "/v1/webhooks"): Rule("admin", lists=True),
    ("DELETE", "/v1/webhooks/{webhook_id}"): Rule("admin"),
    ("GET", "/v1/webhooks/{webhook_id}/deliveries"): Rule("admin"),
    ("POST", "/v1/webhooks/{webhook_id}/test"): Rule("admin"),
    ("POST", "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver"): Rule("admin"),
    ("GET", "/v1/projects"): Rule("admin"),
    ("GET", "/v1/projects/{project}"): Rule("admin"),
    ("PUT", "/v1/projects/{project}"): Rule("admin", {"share": 2}, all_projects=True),
    ("GET", "/v1/usage"): Rule("read"),
    ("GET", "/v1/events"): Rule("read", lists=True),
    ("GET", "/v1/doctor"): Rule("admin", all_projects=True),
    ("GET", "/v1/gc"): Rule("admin", all_projects=True),
    ("POST", "/v1/gc"): Rule("admin", {"dry_run": False}, all_projects=True),
    ("POST", "/v1/lab/masks"): Rule("infer", {"encoder": "{encoder}"}),  # rejected, because this encoder has no decoder
    ("GET", "/v1/audit"): Rule("admin", lists=True),
}
QUESTIONS = {  # routes that answer a question sent as a body
    *("/v1/validate", "/v1/jobs/{job_id}/neighbours", "/v1/lab/masks", "/openai/v1/embeddings"),
    *(f"/v1/encoders/{{encoder}}/{task}" for task in ("embeddings", "classifications", "reconstructions")),
}
CHANGES_NOTHING = {route for route in RULES if route[0] == "GET" or route[1] in QUESTIONS}
PUBLIC = {  # parameters of routes whose objects belong to no project
    "/v1/presets/{name}": {"name": "demo-image-amd"},
    "/v1/schemas/{kind}": {"kind": "train"},
    "/v1/projects/{project}": {"project": "ours"},  # isolation is tested in tests/service/projects
}
NEVER = {  # IDs of objects that do not exist
    "job_id": "train-never",
    "key_id": "abc",
    "webhook_id": "wh_abc",
    "delivery_id": "2000000000",
    **dict.fromkeys(("encoder", "other", "alias", "name"), "never"),
}


def ids_of(route: tuple[str, str]) -> list[str]:
    """Return the placeholders for objects in a route's path, query and body."""
    text = f"{route[1]}{RULES[route].query} {RULES[route].body}"
    return [key for key in NEVER if route[1] not in PUBLIC and f"{{{key}}}" in text]


OF_OBJECTS = [route for route in RULES if ids_of(route)]
