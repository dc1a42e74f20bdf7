"""Parameters of search spaces, and helpers that compare their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from amd.config import TrainConfig

Point = dict[str, Any]


class Parameter(NamedTuple):
    """A parameter of a search space that maps to one or more config keys."""

    keys: tuple[str, ...]
    """Config keys that the parameter sets."""
    current: Callable[[TrainConfig], Any]
    """Function that returns the parameter's value in a config."""


def with_current(values: tuple[Any, ...], current: Any) -> tuple[Any, ...]:
    """Return the values together with a config's current value, sorted, with None first."""
    return tuple(sorted({*values, current}, key=lambda value: (value is not None, value)))


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal as JSON: a tuple equals a list, but True does not equal 1."""
    return _plain(one) == _plain(other)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return repr({key: _plain(item) for key, item in value.items()})
    return repr([_plain(item) for item in value]) if isinstance(value, list | tuple) else repr(value)


def is_number(value: object) -> bool:
    """Whether a value is an int or float, excluding bool (a subclass of int)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
