"""What a word of a space is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from amd.config import TrainConfig

Point = dict[str, Any]


class Word(NamedTuple):
    """A name of a space that is no key of a config."""

    sets: tuple[str, ...]
    """The keys of a config that it decides."""
    own: Callable[[TrainConfig], Any]
    """The value by which it says what a config has already."""


def with_own(values: tuple[Any, ...], own: Any) -> tuple[Any, ...]:
    """Numbers in order, a config's own among them; a value that is none (null) stands first."""
    return tuple(sorted({*values, own}, key=lambda value: (value is not None, value)))


def same(one: Any, other: Any) -> bool:
    """Whether two values are one, as JSON has them: a tuple and a list are the same, True and 1 are not."""
    return _plain(one) == _plain(other)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return repr({key: _plain(item) for key, item in value.items()})
    return repr([_plain(item) for item in value]) if isinstance(value, list | tuple) else repr(value)
