"""A config on the way: its sections are right by themselves, the rules between them are not asked yet.

Words of a space are resolved against it (depths, cells, weights so far). Knows nothing of any space. No torch, no Ray.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from amd.config import TrainConfig, overridden, validate


class Draft(TrainConfig):
    def _problems(self) -> list[str]:
        return []


def drafted(config: TrainConfig, overrides: Mapping[str, Any]) -> Draft:
    """Raises ConfigError where a key does not exist or a section breaks a rule of its own."""
    return validate(Draft, overridden(config.model_dump(mode="json"), overrides))


def look_up(values: Any, key: str) -> Any:
    """The value at a dotted key of plain values; None where a section on the way is absent."""
    for part in key.split("."):
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None
    return values


def keys_of(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a config, sections too."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        if section := _section(field.annotation):
            keys += keys_of(section, f"{prefix}{name}.")
    return keys


def is_key(key: str) -> bool:
    """Whether a config may have it: a field, an entry of a list (objective.layers.0.teacher), a key of a dict."""
    return _field(key)[1]


def wrong_value(key: str, value: object) -> str | None:
    """Why a field cannot have this value whatever the others have; None: it can."""
    field, _ = _field(key)
    if field is None:
        return None
    try:
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return f"{message[0].lower()}{message[1:]}"
    return None


def _field(key: str) -> tuple[FieldInfo | None, bool]:
    """The field at a key, where it is one, and whether there may be such a key."""
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
