"""JSON schemas and OpenAPI as sorted lines, one fact each, in a form that survives renamed models and new descriptions.

References are resolved, so names of components do not appear. Imports nothing of the project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

TEXTS = {"title", "description", "summary", "examples", "example", "$defs", "operationId", "tags"}
NESTED = {"properties", "required", "items", "prefixItems", "anyOf", "oneOf", "allOf", "$ref", "discriminator"}


def compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def schema_lines(schema: Any, definitions: dict[str, Any], path: str = "", seen: tuple[str, ...] = ()) -> Iterator[str]:
    """`path: facts` for a schema and all within. `definitions`: by the last part of a reference."""
    if not isinstance(schema, dict):
        yield f"{path}: {compact(schema)}"
        return
    schema, seen = _resolved(schema, definitions, seen)
    if "$ref" in schema:
        yield f"{path}: the same as {len(seen) - seen.index(schema['$ref'])} levels above"
        return
    facts = {key: _sorted(key, value) for key, value in schema.items() if key not in TEXTS | NESTED}
    inner = facts.get("additionalProperties")
    if isinstance(inner, dict):
        facts["additionalProperties"] = "…"
    yield f"{path}: {compact(facts)}"
    if isinstance(inner, dict):
        yield from schema_lines(inner, definitions, f"{path}.*", seen)
    required = schema.get("required", [])
    for name, value in schema.get("properties", {}).items():
        mark = "" if name in required else "?"
        yield from schema_lines(value, definitions, f"{path}.{name}{mark}", seen)
    if "items" in schema:
        yield from schema_lines(schema["items"], definitions, f"{path}[]", seen)
    for number, value in enumerate(schema.get("prefixItems", [])):
        yield from schema_lines(value, definitions, f"{path}[{number}]", seen)
    for union in ("anyOf", "oneOf", "allOf"):
        alternatives = [sorted(schema_lines(value, definitions, "", seen)) for value in schema.get(union, [])]
        for number, lines in enumerate(sorted(alternatives)):
            yield from (f"{path}<{union} {number}>{line}" for line in lines)


def _resolved(
    schema: dict[str, Any], definitions: dict[str, Any], seen: tuple[str, ...]
) -> tuple[Any, tuple[str, ...]]:
    """The schema that references lead to; one that still has `$ref` is recursive."""
    if list(schema.get("allOf", [])) and len(schema["allOf"]) == 1:
        schema = {**schema["allOf"][0], **{key: value for key, value in schema.items() if key != "allOf"}}
    while "$ref" in schema:
        reference = schema["$ref"]
        if reference in seen:
            return schema, seen
        seen = (*seen, reference)
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        schema = {**definitions[reference.rpartition("/")[2]], **beside}
    return schema, seen


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
                    if status in ("4XX", "5XX"):  # one form for all errors
                        shared.update(lines)
                        lines = [f"→ {status} {media}"]
                    yield from (f"{name} {line}" for line in lines)
            for scheme in operation.get("security", []):
                yield f"{name} security {', '.join(scheme)}"
    yield from shared
