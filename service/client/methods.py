"""Turn scripts into client methods. Each script is defined once, for both the blocking and the asynchronous client."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx
from pydantic import TypeAdapter

from service.client.transport import Call, Emit, Patience, Script, Steps, exchange

T = TypeVar("T")
P = ParamSpec("P")

POLL_INTERVAL_S = 0.5


def view(kind: type[T] | Any) -> Callable[[httpx.Response], T]:
    """Return a function that parses responses of this type, ignoring fields added by newer services."""
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    return lambda response: adapter.validate_json(response.content, extra="ignore")


def present(**query: Any) -> dict[str, Any]:
    """Return the parameters that are not None."""
    return {name: value for name, value in query.items() if value is not None}


def pages(path: str, kind: type[Any], query: dict[str, Any]) -> Script[Any]:
    """Emit the items of a listing, fetching pages as needed."""

    def steps(patience: Patience) -> Steps[None]:
        cursor: str | None = None
        while True:
            call: Call[Any] = Call("GET", path, view(kind), query | present(cursor=cursor))
            found = yield from exchange(call, patience)
            for item in found.items:
                yield Emit(item)
            cursor = found.next_cursor
            if cursor is None:
                return

    return Script(steps)


class BlockingMethods:
    """Base of the method groups of the blocking client."""

    def __init__(self, run: Callable[[Script[Any]], Iterator[Any]]) -> None:
        self._run = run


class AsyncMethods:
    """Base of the method groups of the asynchronous client."""

    def __init__(self, run: Callable[[Script[Any]], AsyncIterator[Any]]) -> None:
        self._run = run


def one(define: Callable[P, Script[T]]) -> Callable[Concatenate[BlockingMethods, P], T]:
    """Make a blocking method from a script that emits one value."""

    @functools.wraps(define)
    def method(self: BlockingMethods, /, *args: P.args, **kwargs: P.kwargs) -> T:
        (item,) = self._run(define(*args, **kwargs))
        return item  # type: ignore[no-any-return]

    return method


def many(define: Callable[P, Script[T]]) -> Callable[Concatenate[BlockingMethods, P], Iterator[T]]:
    """Make a blocking method from a script that emits several values."""

    @functools.wraps(define)
    def method(self: BlockingMethods, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._run(define(*args, **kwargs))

    return method


def async_one(define: Callable[P, Script[T]]) -> Callable[Concatenate[AsyncMethods, P], Awaitable[T]]:
    """Make an asynchronous method from a script that emits one value."""

    @functools.wraps(define)
    async def method(self: AsyncMethods, /, *args: P.args, **kwargs: P.kwargs) -> T:
        (item,) = [item async for item in self._run(define(*args, **kwargs))]
        return item  # type: ignore[no-any-return]

    return method


def async_many(define: Callable[P, Script[T]]) -> Callable[Concatenate[AsyncMethods, P], AsyncIterator[T]]:
    """Make an asynchronous method from a script that emits several values."""

    @functools.wraps(define)
    def method(self: AsyncMethods, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return self._run(define(*args, **kwargs))

    return method
