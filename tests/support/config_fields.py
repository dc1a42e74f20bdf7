"""Enumerate the fields of a JSON schema that accept arbitrary text. Does not import the project."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Path = tuple[str, ...]

ANY_KEY = "*"
ITEM = "0"


def text_fields(schema: Any, definitions: dict[str, Any] | None = None, visited: Path = ()) -> Iterator[Path]:
    """Yield the path of every string without a fixed set of values, and of every untyped value.

    Unions add nothing to a path; the key of an open object is `*`, and the index of an item is `0`.
    """
    definitions = schema.get("$defs", {}) if definitions is None else definitions
    if reference := schema.get("$ref"):
        if reference not in visited:
            yield from text_fields(definitions[reference.rpartition("/")[2]], definitions, (*visited, reference))
        return
    options = [option for union in ("anyOf", "oneOf", "allOf") for option in schema.get(union, [])]
    for option in options:
        yield from text_fields(option, definitions, visited)
    if options or "enum" in schema or "const" in schema:
        return
    if schema.get("type", "string") == "string":
        yield ()
    for name, value in schema.get("properties", {}).items():
        yield from _below(name, value, definitions, visited)
    others = schema.get("additionalProperties", False)
    if others is not False:
        yield from _below(ANY_KEY, {} if others is True else others, definitions, visited)
    for value in [*([schema["items"]] if schema.get("items") is not None else []), *schema.get("prefixItems", [])]:
        yield from _below(ITEM, value, definitions, visited)


def _below(name: str, schema: Any, definitions: dict[str, Any], visited: Path) -> Iterator[Path]:
    yield from ((name, *rest) for rest in text_fields(schema, definitions, visited))


def nested(path: Path, value: Any) -> Any:
    """Nest a value in dicts and lists, so that `path` leads to it."""
    for name in reversed(path):
        value = [value] if name == ITEM else {name: value}
    return value
