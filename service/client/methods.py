"""Scripts as methods of a client: each is described once, and carried out blocking or awaiting.

Knows nothing of what the scripts ask for.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx
from pydantic import TypeAdapter

from service.client.transport import Call, Emit, Patience, Script, Steps, exchange

T = TypeVar("T")
P = ParamSpec("P")


def view(kind: type[T] | Any) -> Callable[[httpx.Response], T]:
    """Reads an answer; fields that a newer service adds are passed over."""
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    return lambda answer: adapter.validate_json(answer.content, extra="ignore")


def given(**query: Any) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def pages(path: str, kind: type[Any], query: dict[str, Any]) -> Script[Any]:
    """The items of a listing, one after the other; pages are fetched as they are needed."""

    def steps(patience: Patience) -> Steps[None]:
        cursor: str | None = None
        while True:
            call: Call[Any] = Call("GET", path, view(kind), query | given(cursor=cursor))
            found = yield from exchange(call, patience)
            for item in found.items:
                yield Emit(item)
            cursor = found.next_cursor
            if cursor is None:
                return

    return Script(steps)


class Blocking:
    """What has the methods of a blocking client."""

    def __init__(self, run: Callable[[Script[Any]], Iterator[Any]]) -> None:
        self._run = run


class Awaiting:
    """What has the methods of an awaiting client."""

    def __init__(self, run: Callable[[Script[Any]], AsyncIterator[Any]]) -> None:
        self._run = run


def one(describe: Callable[P, Script[T]]) -> Callable[Concatenate[Blocking, P], T]:
    @functools.wraps(describe)
    def method(of: Blocking, /, *args: P.args, **kwargs: P.kwargs) -> T:
        (item,) = of._run(describe(*args, **kwargs))
        return item  # type: ignore[no-any-return]

    return method


def many(describe: Callable[P, Script[T]]) -> Callable[Concatenate[Blocking, P], Iterator[T]]:
    @functools.wraps(describe)
    def method(of: Blocking, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return of._run(describe(*args, **kwargs))

    return method


def one_later(describe: Callable[P, Script[T]]) -> Callable[Concatenate[Awaiting, P], Awaitable[T]]:
    @functools.wraps(describe)
    async def method(of: Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> T:
        (item,) = [item async for item in of._run(describe(*args, **kwargs))]
        return item  # type: ignore[no-any-return]

    return method


def many_later(describe: Callable[P, Script[T]]) -> Callable[Concatenate[Awaiting, P], AsyncIterator[T]]:
    @functools.wraps(describe)
    def method(of: Awaiting, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return of._run(describe(*args, **kwargs))

    return method
