"""Draft configs: each section is validated, but rules that span sections are not checked yet.

Space parameters are resolved against a draft config, which provides depths, cells and weights. Imports neither torch
nor Ray.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from amd.config import TrainConfig, broken_rule, overridden, validate


class DraftConfig(TrainConfig):
    """A training config without cross-section checks."""

    def _problems(self) -> list[str]:
        return []


def draft_config(config: TrainConfig, overrides: Mapping[str, Any]) -> DraftConfig:
    """Apply overrides without cross-section checks.

    Raises ConfigError for an unknown key or an invalid section.
    """
    return validate(DraftConfig, overridden(config.model_dump(mode="json"), overrides))


def value_at(values: Any, key: str) -> Any:
    """Return the value at a dotted key in plain data, or None if a section along the path is absent."""
    for part in key.split("."):
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None
    return values


def config_keys(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Return every dotted key of a config, including sections."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        if section := _section(field.annotation):
            keys += config_keys(section, f"{prefix}{name}.")
    return keys


def is_key(key: str) -> bool:
    """Whether a key can exist in a config: a field, a list item (objective.layers.0.teacher) or a dict key."""
    return _field(key)[1]


def value_problem(key: str, value: object) -> str | None:
    """Return why a field rejects a value regardless of other fields; return None if it accepts the value."""
    field, _ = _field(key)
    if field is None:
        return None
    try:
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        adapter.validate_python(value)
    except ValidationError as error:
        return broken_rule(error.errors()[0])
    return None


def _field(key: str) -> tuple[FieldInfo | None, bool]:
    """Return the field at a key (None if it is not a field), and whether such a key can exist."""
    current: Any = TrainConfig
    field: FieldInfo | None = None
    for part in key.split("."):
        if section := _section(current):
            field = section.model_fields.get(part)
            if field is None:
                return None, False
            current = field.annotation
        elif get_origin(current) is tuple and part.isdigit():
            field, current = None, get_args(current)[0]
        else:
            return None, get_origin(current) is dict
    return field, True


def _section(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
