"""Dependencies that accept requests but never respond: a storage root that hangs, a proxy that stops forwarding."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

HANG_S = 60.0  # longer than any timeout in the service


class HangingStorage(LocalFileSystem):
    """A local folder served as `hanging://disk/path`. Calls block during an outage and fail when it ends."""

    protocol = "hanging"
    cachable = False
    _answers: ClassVar[threading.Event] = threading.Event()
    calls: ClassVar[int] = 0
    """Number of calls made during the latest outage."""

    @classmethod
    @contextmanager
    def outage(cls) -> Iterator[None]:
        cls.calls = 0
        cls._answers.clear()
        try:
            yield
        finally:
            cls._answers.set()

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("hanging://disk").rstrip("/") or "/"

    def _wait(self) -> None:
        if not self._answers.is_set():
            type(self).calls += 1
            self._answers.wait(HANG_S)
            raise ConnectionError("the store closed the connection")

    def cat_file(self, path: str, *args: Any, **options: Any) -> Any:
        self._wait()
        return super().cat_file(path, *args, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._wait()
        Path(self._strip_protocol(path)).parent.mkdir(parents=True, exist_ok=True)
        Path(self._strip_protocol(path)).write_bytes(value)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        self._wait()
        return super().ls(path, detail=detail, **options)

    def find(self, path: str, **options: Any) -> Any:
        self._wait()
        return super().find(path, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._wait()
        return super().info(path, **options)

    def open(self, path: str, *args: Any, **options: Any) -> Any:
        self._wait()
        return super().open(path, *args, **options)


HangingStorage._answers.set()
fsspec.register_implementation("hanging", HangingStorage, clobber=True)


@contextmanager
def black_hole() -> Iterator[int]:
    """Listen on a loopback port and never respond. Yields the port."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        yield server.getsockname()[1]


class StallingProxy:
    """Forwards connections to a TCP port or Unix socket, except during an outage."""

    def __init__(self, target: int | str) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._server.getsockname()[1]
        self._forwards, self._closed = threading.Event(), threading.Event()
        self._forwards.set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> StallingProxy:
        self._threads[0].start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._forwards.set()
        self._server.close()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Stop forwarding: connections are accepted and stay open, but receive no response."""
        self._forwards.clear()
        try:
            yield
        finally:
            self._forwards.set()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        self._forwards.wait()
        try:
            if isinstance(self._target, int):
                target = socket.create_connection(("127.0.0.1", self._target))
            else:
                target = socket.socket(socket.AF_UNIX)
                target.connect(self._target)
        except OSError:
            client.close()
            return
        with client, target, selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, target)
            selector.register(target, selectors.EVENT_READ, client)
            while not self._closed.is_set():
                for key, _ in selector.select(0.5):
                    self._forwards.wait()
                    try:
                        data = key.fileobj.recv(2**16)  # type: ignore[union-attr]  # a socket
                        if not data:
                            return
                        key.data.sendall(data)
                    except OSError:
                        return
