"""Types for locations in configs, and functions that find or replace the locations in a config.

A location is a path, a URI, or a name that resolves to either: `demo:NAME`, `timm:NAME` or an encoder ID. Every config
field that holds a location uses a type from this module. Torch-free; opens no files.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

LocationRole = Literal["data", "weights", "encoder", "storage", "output", "cache", "tracking"]

WRITTEN: frozenset[LocationRole] = frozenset({"storage", "output", "cache", "tracking"})
"""Roles of locations that a run writes to; it reads from all others."""
FIXED_SECTIONS = ("storage", "output", "name", "tracking", "start")
"""Fields of a run that neither a search dimension nor a teacher's override may set, like every location in WRITTEN."""
MAX_DEPTH = 64  # maximum nesting of keys; valid configs are shallower


@dataclass(frozen=True)
class LocationType:
    """Marks a string as a location."""

    role: LocationRole


DataLocation = Annotated[str, LocationType("data")]
WeightsLocation = Annotated[str, LocationType("weights")]
EncoderLocation = Annotated[str, LocationType("encoder")]
StorageLocation = Annotated[str, LocationType("storage")]
OutputLocation = Annotated[str, LocationType("output")]
CacheLocation = Annotated[str, LocationType("cache")]
TrackingLocation = Annotated[str, LocationType("tracking")]


@dataclass(frozen=True)
class KeyedByConfig:
    """Marks a dict that maps dotted config keys to values."""

    model: Callable[[], type[BaseModel]]
    """Function that returns the config class, which may not yet exist when the annotation is evaluated."""
    choices: bool = False
    """Whether the values are search dimensions that list the config values under `choices`."""


class ConfigLocation(NamedTuple):
    """A location in a config."""

    field: str
    """Dotted name of the field."""
    value: str
    role: LocationRole


class FixedFieldError(ValueError):
    """Raised for a search dimension or teacher override that would change where a run writes."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message, field)
        self.field = field
        """Dotted name of the field, relative to the validated section."""

    def __str__(self) -> str:
        return str(self.args[0])


Replace = Callable[[ConfigLocation], str]


def locations(config: BaseModel) -> Iterator[ConfigLocation]:
    """Yield every location in a config: in its fields, override values, and search dimension choices."""
    return locations_in(type(config), config.model_dump(mode="json"))


def locations_in(model: type[BaseModel], values: Mapping[str, Any]) -> Iterator[ConfigLocation]:
    """Like `locations`, but for plain config values, which need not be valid."""
    found, collect = _collector()
    replace_locations(model, values, collect)
    return iter(found)


def replace_locations(model: type[BaseModel], values: Mapping[str, Any], replace: Replace) -> dict[str, Any]:
    """Return plain config values with every location replaced."""
    replaced: dict[str, Any] = _visit(model, values, "", replace)
    return replaced


def replace_in_overrides(model: type[BaseModel], overrides: Mapping[str, Any], replace: Replace) -> dict[str, Any]:
    """Return dotted config overrides with every location replaced."""
    return {key: _visit_key(model, key, value, "", replace) for key, value in overrides.items()}


def check_fixed_fields(model: type[BaseModel], field: str, changes: Mapping[str, Any], rule: str) -> None:
    """Check that dotted overrides do not change where a run writes.

    `field`: config field that contains the overrides; `rule`: text that ends each line of the message. Raises
    FixedFieldError with one line per rejected override, and ValueError for values that are nested too deeply.
    """
    fixed = []
    for key, value in changes.items():
        if _depth(key, value) > MAX_DEPTH:
            raise ValueError(f"{field}.{key[:80]}: nested more than {MAX_DEPTH} levels deep; reduce the nesting")
        found, collect = _collector()
        _visit_key(model, key, value, field, collect)
        written = [location.field for location in found if location.role in WRITTEN]
        fixed += written or [f"{field}.{key}"] * (key.partition(".")[0] in FIXED_SECTIONS)
    if fixed:
        raise FixedFieldError("\n".join(f"{each}: {rule}" for each in dict.fromkeys(fixed)), fixed[0])


def _collector() -> tuple[list[ConfigLocation], Replace]:
    """Return an empty list, and a function that appends each location to it and returns the value unchanged."""
    found: list[ConfigLocation] = []

    def collect(location: ConfigLocation) -> str:
        found.append(location)
        return location.value

    return found, collect


def _depth(key: str, value: Any) -> int:
    """Return the nesting depth of a dotted key and its value. Iterative, because the depth is unbounded."""
    deepest, pending = 0, [(value, key.count(".") + 1)]
    while pending:
        item, depth = pending.pop()
        deepest = max(deepest, depth)
        if isinstance(item, Mapping):
            pending += [(inner, depth + str(name).count(".") + 1) for name, inner in item.items()]
        elif isinstance(item, list | tuple):
            pending += [(inner, depth + 1) for inner in item]
    return deepest


def _visit(kind: Any, value: Any, field: str, replace: Replace) -> Any:
    """Return a value of type `kind` with its locations replaced; values of any other type are returned unchanged."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        for mark in arguments[1:]:
            if isinstance(mark, LocationType) and isinstance(value, str):
                return replace(ConfigLocation(field, value, mark.role)) if value else value
            if isinstance(mark, KeyedByConfig) and isinstance(value, Mapping):
                visit = _visit_choices if mark.choices else _visit_key
                return {key: visit(mark.model(), key, item, field, replace) for key, item in value.items()}
        return _visit(arguments[0], value, field, replace)
    if origin in (Union, types.UnionType):
        for option in arguments:
            value = _visit(option, value, field, replace)
        return value
    if isinstance(value, Mapping):
        return {name: _visit(_kind_at(kind, name), item, _join(field, name), replace) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = enumerate(value)
        return [_visit(_kind_at(kind, str(number)), item, _join(field, str(number)), replace) for number, item in items]
    return value


def _kind_at(kind: Any, name: str) -> Any:
    """Return the type of a config field, dict value or sequence item; None if unknown."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _annotation(kind.model_fields[name]) if name in kind.model_fields else None
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return arguments[1]
    if origin is tuple and name.isdigit():
        return arguments[0] if arguments[-1] is Ellipsis else dict(enumerate(arguments)).get(int(name))
    return arguments[0] if arguments and name.isdigit() else None


def _annotation(field: FieldInfo) -> Any:
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _visit_key(model: type[BaseModel], key: str, value: Any, field: str, replace: Replace) -> Any:
    """Visit the value at a dotted key: `{"data.train": …}` means `{"data": {"train": …}}`."""
    parts = key.split(".")
    for part in reversed(parts):
        value = {part: value}
    value = _visit(model, value, field, replace)
    for part in parts:
        value = value[part]
    return value


def _visit_choices(model: type[BaseModel], key: str, dimension: Any, field: str, replace: Replace) -> Any:
    """Visit the choices of a search dimension, which is a list of choices or has a `choices` field."""
    if isinstance(dimension, Mapping) and "choices" in dimension:
        return {**dimension, "choices": _visit_choices(model, key, dimension["choices"], field, replace)}
    if isinstance(dimension, list | tuple):
        return [_visit_key(model, key, choice, field, replace) for choice in dimension]
    return dimension


def _join(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name
