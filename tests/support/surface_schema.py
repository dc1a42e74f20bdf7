"""List JSON schemas and OpenAPI documents, one fact per line, independently of model names and descriptions.

References are resolved, so component names do not appear. Does not import the project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

TEXTS = {"title", "description", "summary", "examples", "example", "$defs", "operationId", "tags"}
NESTED = {"properties", "required", "items", "prefixItems", "anyOf", "oneOf", "allOf", "$ref", "discriminator"}


def compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def schema_lines(
    schema: Any, definitions: dict[str, Any], path: str = "", visited: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield `path: facts` for a schema and everything nested in it.

    `definitions` contains schemas, keyed by the last part of a `$ref`.
    """
    if not isinstance(schema, dict):
        yield f"{path}: {compact(schema)}"
        return
    schema, visited = _resolved(schema, definitions, visited)
    if "$ref" in schema:
        yield f"{path}: the same as {len(visited) - visited.index(schema['$ref'])} levels above"
        return
    facts = {key: _sorted(key, value) for key, value in schema.items() if key not in TEXTS | NESTED}
    inner = facts.get("additionalProperties")
    if isinstance(inner, dict):
        facts["additionalProperties"] = "…"
    yield f"{path}: {compact(facts)}"
    if isinstance(inner, dict):
        yield from schema_lines(inner, definitions, f"{path}.*", visited)
    required = schema.get("required", [])
    for name, value in schema.get("properties", {}).items():
        mark = "" if name in required else "?"
        yield from schema_lines(value, definitions, f"{path}.{name}{mark}", visited)
    if "items" in schema:
        yield from schema_lines(schema["items"], definitions, f"{path}[]", visited)
    for number, value in enumerate(schema.get("prefixItems", [])):
        yield from schema_lines(value, definitions, f"{path}[{number}]", visited)
    for union in ("anyOf", "oneOf", "allOf"):
        alternatives = [sorted(schema_lines(value, definitions, "", visited)) for value in schema.get(union, [])]
        for number, lines in enumerate(sorted(alternatives)):
            yield from (f"{path}<{union} {number}>{line}" for line in lines)


def _resolved(
    schema: dict[str, Any], definitions: dict[str, Any], visited: tuple[str, ...]
) -> tuple[Any, tuple[str, ...]]:
    """Follow references and return the schema they refer to. If the result still contains `$ref`, it is recursive."""
    if list(schema.get("allOf", [])) and len(schema["allOf"]) == 1:
        schema = {**schema["allOf"][0], **{key: value for key, value in schema.items() if key != "allOf"}}
    while "$ref" in schema:
        reference = schema["$ref"]
        if reference in visited:
            return schema, visited
        visited = (*visited, reference)
        siblings = {key: value for key, value in schema.items() if key != "$ref"}
        schema = {**definitions[reference.rpartition("/")[2]], **siblings}
    return schema, visited


def _sorted(key: str, value: Any) -> Any:
    return sorted(value, key=compact) if key in ("enum", "type") and isinstance(value, list) else value


def openapi_lines(document: dict[str, Any]) -> Iterator[str]:
    definitions = document["components"]["schemas"]
    shared = set[str]()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            name = f"{method.upper()} {path}"
            yield name
            for parameter in operation.get("parameters", []):
                mark = "" if parameter.get("required") else "?"
                where = f"{name} {parameter['in']} {parameter['name']}{mark}"
                yield from schema_lines(parameter["schema"], definitions, where)
            body = operation.get("requestBody", {})
            for media, content in body.get("content", {}).items():
                mark = "" if body.get("required") else "?"
                yield from schema_lines(content.get("schema", {}), definitions, f"{name} body{mark} {media}")
            for status, response in operation["responses"].items():
                yield f"{name} → {status}"
                for media, content in response.get("content", {}).items():
                    lines = list(schema_lines(content.get("schema", {}), definitions, f"→ {status} {media}"))
                    if status in ("4XX", "5XX"):  # all errors share one schema
                        shared.update(lines)
                        lines = [f"→ {status} {media}"]
                    yield from (f"{name} {line}" for line in lines)
            for scheme in operation.get("security", []):
                yield f"{name} security {', '.join(scheme)}"
    yield from shared
