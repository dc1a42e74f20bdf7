"""Generate the config key page from the models in `amd.config` and `tune_spaces.config`."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Union, get_args, get_origin

from generator.tables import NOTE, code, paragraph, slug, table, type_of
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

COMPUTED = object()  # default that is computed from other keys


class ConfigTable(NamedTuple):
    """Keys of one config section, including its nested sections."""

    title: str
    description: str
    rows: tuple[tuple[str, str, str, str], ...]  # key, type, default, description


def config_page() -> str:
    from amd.config import RunConfig
    from service.jobs.kinds import KINDS

    parts = [
        NOTE + "# Config keys",
        "Every key can be set on the command line (`amd train --preset NAME mask.teacher_ratio=0.6`), in a file "
        "(`--config FILE`) and in a REST request (`overrides`). `amd presets NAME` prints a complete config; "
        "`GET /v1/schemas/KIND` returns the JSON schema.",
    ]
    shown: dict[ConfigTable, str] = {}
    for kind, spec in KINDS.items():
        parts += [f"## {kind}", paragraph(spec.config.__doc__)]
        for found in config_tables(spec.config, skipped=RunConfig if kind == "search" else None):
            heading = f"{kind}: {found.title}"
            if (first := shown.setdefault(found, heading)) != heading:
                parts += [f"### {heading}", f"The same keys and defaults as [{first}](#{slug(first)})."]
            else:
                columns = ("key", "type", "default", "description")
                parts += [f"### {heading}", found.description, table(columns, found.rows)]
        if kind == "search":
            parts += ["### search: train", "The run to vary: all keys of [train](#train), prefixed by `train.`."]
    return "\n\n".join(parts)


def config_tables(model: type[BaseModel], skipped: type[BaseModel] | None) -> Iterator[ConfigTable]:
    """Yield one table per section, and one for the keys outside sections. `skipped`: model documented separately."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    general = []
    for name, field in model.model_fields.items():
        inner = model_in(field.annotation)
        if inner is None:
            general.append(_row(name, schema["properties"][name], definitions, field, PydanticUndefined))
        elif skipped is None or not issubclass(inner, skipped):
            rows = tuple(_rows(inner, name, definitions, _default(field, PydanticUndefined)))
            absent = " Default: none." if field.default is None else ""
            yield ConfigTable(name, paragraph(field.description or inner.__doc__) + absent, rows)
    if general:
        yield ConfigTable("other keys", "", tuple(general))


def _rows(model: type[BaseModel], prefix: str, definitions: Mapping[str, Any], default: Any) -> Iterator[Any]:
    properties = definitions[model.__name__]["properties"]
    for name, field in model.model_fields.items():
        key, value = f"{prefix}.{name}", getattr(default, name, PydanticUndefined)
        inner = model_in(field.annotation)
        if inner is None:
            yield _row(key, properties[name], definitions, field, value)
        else:
            yield from _rows(inner, key, definitions, _default(field, value))


def _row(
    key: str, schema: Mapping[str, Any], definitions: Mapping[str, Any], field: FieldInfo, value: Any
) -> tuple[str, str, str, str]:
    shown = _shown(_default(field, value))
    return f"`{key}`", type_of(schema, definitions), shown, paragraph(field.description)


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    return "computed" if default is COMPUTED else code(_plain(default))


def _default(field: FieldInfo, value: Any) -> Any:
    """Return the value that the parent's default has for a field, if any, else the field's own default."""
    if value is not PydanticUndefined:
        return value
    if field.default_factory_takes_validated_data:
        return COMPUTED
    return field.get_default(call_default_factory=True)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a section, which may be optional, or None if the field is not a section."""
    if get_origin(annotation) in (Union, types.UnionType):
        models = [model_in(part) for part in get_args(annotation) if part is not type(None)]
        return models[0] if len(models) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
