"""Generate the REST API page from the OpenAPI document, the route scopes and the errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generator.tables import NOTE, code, paragraph, table, type_of


def rest_page(folder: Path) -> str:
    from service.app import create_app
    from service.db.engine import open_engine
    from service.settings import Settings

    settings = Settings(data_dir=folder, storage=str(folder))
    app = create_app(settings, engine=open_engine(f"sqlite:///{folder / 'empty.db'}"))
    document, scopes = app.openapi(), _scopes(app)
    definitions = document["components"]["schemas"]
    parts = [
        NOTE + "# REST",
        document["info"]["description"],
        "Every path except `/livez`, `/readyz` and `/metrics` requires `Authorization: Bearer KEY`, with a key that "
        "has the stated scope: infer, read, submit or admin, each of which includes those before it. A running service "
        "serves this reference at `/docs` and as OpenAPI at `/openapi.json`. [Errors](#errors) and the "
        "[models](#models) of bodies follow the paths.",
    ]
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for tag in dict.fromkeys(operation["tags"][0] for *_, operation in operations):
        parts += [f"## {tag.capitalize()}"]
        for path, method, operation in operations:
            if operation["tags"][0] == tag:
                name = f"{method.upper()} {path}"
                parts += _operation(name, operation, scopes.get(name), definitions)
    return "\n\n".join([*parts, *_errors(), *_models(definitions)])


def _scopes(app: Any) -> dict[str, str]:
    """Return the scope that each operation requires, by method and path."""
    from service.auth.authentication import Admin, Inferrer, Reader, Submitter

    callers = {Inferrer: "infer", Reader: "read", Submitter: "submit", Admin: "admin"}
    scopes = {caller.__metadata__[0].dependency: scope for caller, scope in callers.items()}
    routers = [included.original_router for included in app.routes if hasattr(included, "original_router")]
    found = {}
    for route in (route for router in routers for route in router.routes):
        scope = next((scopes[call] for call in _calls(route.dependant) if call in scopes), None)
        if scope is not None:
            for prefix in ("", "/v1"):
                found |= {f"{method} {prefix}{route.path}": scope for method in route.methods}
    return found


def _calls(dependant: Any) -> Iterator[Any]:
    """Yield the functions that a route depends on, directly or indirectly."""
    yield dependant.call
    for inner in dependant.dependencies:
        yield from _calls(inner)


def _operation(
    name: str, operation: Mapping[str, Any], scope: str | None, definitions: Mapping[str, Any]
) -> Iterator[str]:
    yield f"### {name}"
    required = f" Scope: `{scope}`." if scope else ""
    yield f"**{operation['summary']}.**{required} {operation.get('description', '')}".rstrip()
    rows = []
    for parameter in operation.get("parameters", []):
        schema = parameter["schema"]
        default = "required" if parameter.get("required") else code(schema["default"]) if "default" in schema else ""
        description = parameter.get("description", "")
        rows.append((f"`{parameter['name']}`", parameter["in"], _given(schema, definitions), default, description))
    if rows:
        yield table(("parameter", "in", "type", "default", "description"), rows)
    body = operation.get("requestBody", {}).get("content", {})
    if body:
        yield table(("body", "type"), ((f"`{media}`", _content(part, definitions)) for media, part in body.items()))
    rows = []
    for status, response in operation["responses"].items():
        if status in ("4XX", "5XX"):
            continue
        contents = response.get("content", {})
        rows += [(status, f"`{media}`", _content(part, definitions)) for media, part in contents.items()]
        rows += [] if contents else [(status, "no body", "")]
    yield table(("status", "response", "type"), rows)
    for media, part in body.items():
        if fields := part.get("schema", {}).get("properties"):
            yield f"Fields of the `{media}` body:"
            yield _fields(part["schema"], fields, definitions)


def _given(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Describe the type of a parameter without null, which only means that the parameter is absent."""
    return type_of(schema, definitions, link=True).removesuffix(" or null")


def _content(content: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    return type_of(content.get("schema", {}), definitions, link=True)


def _fields(schema: Mapping[str, Any], fields: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    rows = []
    for name, field in fields.items():
        default = code(field["default"]) if "default" in field else ""
        if name in schema.get("required", ()):
            default = "required"
        rows.append((f"`{name}`", type_of(field, definitions, link=True), default, paragraph(field.get("description"))))
    return table(("field", "type", "default", "description"), rows)


# Meanings of codes that have no exception class of their own.
MEANINGS = {
    "bad_request": "The request is malformed.",
    "method_not_allowed": "The path does not support the method; `Allow` lists the supported methods.",
    "json_invalid": "The body is not valid JSON.",
    "config_invalid": "The config is invalid; `errors` has one entry per problem.",
    "request_invalid": "A parameter or field is invalid; `errors` has one entry per problem.",
    "internal": "Internal error; the service's log contains the details under `request_id`.",
    "database_unavailable": "The database does not respond; nothing was changed.",
    "storage_unavailable": "The storage root does not respond.",
    "encoder_not_deployed": "No deployment serves the encoder.",
    "encoder_unavailable": "The encoder's replicas do not respond: none runs yet, or one died during the request.",
    "lab_unavailable": "The mask lab's replica has not started yet.",
    "overloaded": "The replicas' queues are full.",
    "deadline_exceeded": "The request's own deadline has passed.",
    "input_unavailable": "The store of an input does not respond; `index` is the input's position in the request, and "
    "`reason` says why.",
    "item_invalid": "A file cannot be encoded; `index` is its position in the request, and `reason` says why.",
    "not_possible": "The encoder does not support the request, for example because it has no head or too few layers.",
}


def _errors() -> Iterator[str]:
    from service.web.errors import ERROR_RESPONSES, FRAMEWORK_CODES, ServiceError

    meanings = {kind.code: paragraph(kind.__doc__) for kind in ServiceError.__subclasses__()} | MEANINGS
    rows = [(int(found.status), name, found.retry_after_s is not None) for name, found in ERROR_RESPONSES.items()]
    rows += [(status, name, False) for status, name in FRAMEWORK_CODES.items() if name not in ERROR_RESPONSES]
    yield "## Errors"
    yield (
        "Errors are RFC 9457 problem details, `application/problem+json`, with the fields of [Problem](#problem). "
        "Programs should rely on `code`; `detail` may change. A retryable error has a `Retry-After` header."
    )
    shown = (
        (f"`{name}`", str(status), "yes" if retryable else "no", meanings[name])
        for status, name, retryable in sorted(rows)
    )
    yield table(("code", "status", "retryable", "meaning"), shown)


def _models(definitions: Mapping[str, Any]) -> Iterator[str]:
    yield "## Models"
    for name, schema in sorted(definitions.items()):
        yield f"### {name}"
        yield " ".join(schema.get("description", "").split())
        if fields := schema.get("properties"):
            yield _fields(schema, fields, definitions)
        else:
            yield f"Type: {type_of(schema, definitions, link=True)}."
