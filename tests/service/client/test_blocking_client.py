"""Tests that the generated blocking client is up to date and matches the asynchronous client's methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.client import AsyncClient, Client
from tests.support.blocking_client import COMMAND, TARGET, generate


def test_the_blocking_client_is_up_to_date(tmp_path: Path) -> None:
    generate(tmp_path)
    current, expected = ({path.name: path.read_text() for path in folder.glob("*.py")} for folder in (TARGET, tmp_path))
    assert current == expected, f"run `{COMMAND}`"


def test_the_blocking_client_contains_no_await() -> None:
    code = "".join(path.read_text() for path in TARGET.glob("*.py"))
    assert not [name for name in ("async ", "await ", "asyncio", "AsyncI", "aclose") if name in code]


def public_methods(client: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the public methods of a client and its groups."""
    for name in sorted(vars(client) | dict.fromkeys(dir(type(client)))):
        value = getattr(client, name)
        if name.startswith("_"):
            continue
        if callable(value):
            yield path + name, value
        else:
            yield from public_methods(value, f"{path}{name}.")


def parameters(method: Any) -> list[tuple[str, Any, Any]]:
    return [(one.name, one.kind, one.default) for one in inspect.signature(method).parameters.values()]


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    blocking, awaited = dict(public_methods(Client("http://a"))), dict(public_methods(AsyncClient("http://a")))
    assert list(blocking) == list(awaited)
    assert len(blocking) > 40
    for name, method in blocking.items():
        assert parameters(method) == parameters(awaited[name]), name
        assert inspect.getdoc(method) == inspect.getdoc(awaited[name]), name
    assert parameters(Client) == parameters(AsyncClient)


def test_async_methods_are_coroutines_unless_they_return_an_iterator() -> None:
    for name, method in public_methods(AsyncClient("http://a")):
        if name != "from_environment":
            yields = str(inspect.signature(method).return_annotation).startswith("AsyncIterator")
            assert inspect.iscoroutinefunction(method) != yields, name
