"""Send random requests to a control plane, and check that its log contains no traceback and no forged line.

Run as `python tests/benchmarks/fuzz_requests.py [--requests 50000] [--seed 0] [--log-format text]`. Starts
`python -m service` with SQLite and without a cluster. Methods, paths, headers and bodies are random bytes, mutations of
valid requests, and text that imitates log lines; some clients disconnect before the response. Exits with 1 if a
response is a 500, if the log contains a traceback, or if any line is not a log record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx

from tests.support.service.control_plane import ControlPlane

CONCURRENT = 16
TIMEOUT_S = 300.0
PATIENCE_S = 5.0  # after which a client leaves, for example if it declared a longer body than it sent
LEFT = -1  # counted as a status: the client left before the response, or the server closed the connection
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.]+ \[[\w.-]+\] ")
FORGED = "2026-01-01 00:00:00,000 ERROR forged [-] the storage is gone"
BREAKS = ("\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\x1b[2K\r", "\x00\n")
METHODS = (
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "PATCH",
    "HEAD",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PROPFIND",
    "get",
    "G\tT",
    "",
)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 1e308, 2**63, 10**40, "", "x", [], {}, [[]], "\x00", "\ud800", "../../etc/passwd"),
    *(
        "s3://bucket/a",
        "/etc/passwd",
        "http://169.254.169.254/",
        "data:image/png;base64,AAAA",
        "https://hooks.invalid/x",
    ),
)
BODIES: tuple[dict[str, Any], ...] = (
    {"kind": "train", "preset": "demo-image-amd", "overrides": {"mask.student_ratio": 0.9}, "labels": {"team": "a"}},
    {"kind": "embed", "config": {"encoder": "a", "data": {"files": "/data"}}, "name": "a", "priority": 1},
    {"encoder": "a", "candidate": "b", "share": 0.1, "replicas": {"min": 1, "max": 2}, "project": "vision"},
    {"name": "ci", "scopes": ["read"], "project": "vision", "expires_at": "2099-01-01T00:00:00Z"},
    {"url": "https://hooks.invalid/a", "events": ["job.succeeded"]},
    {"model": "a", "input": ["data:image/png;base64,AAAA"], "encoding_format": "float", "dimensions": 3},
    {"input": [{"base64": "AAAA"}, {"uri": "s3://bucket/a"}], "tokens": "patch", "layers": [1, 2], "views": "5x3"},
    {"record": 0, "location": "a", "vector": [0.1, 0.2], "k": 3},
)
HEADERS = (
    *("X-Request-Id", "Idempotency-Key", "If-Match", "If-None-Match", "Accept", "Accept-Encoding", "Range", "Cookie"),
    *("Content-Type", "Expect", "Connection", "Upgrade", "Host", "Last-Event-ID", "X-Forwarded-For", "Authorization"),
)
TYPES = (
    "application/json",
    "image/png",
    "multipart/form-data; boundary=b",
    "multipart/form-data",
    "text/plain",
    "a;b=",
)


class RequestFuzzer:
    """Generates random requests as bytes."""

    def __init__(self, seed: int, key: str, paths: dict[str, Any]) -> None:
        self.random, self._key = random.Random(seed), key
        self._routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]

    def request(self) -> bytes:
        """Return a request, which need not be valid HTTP."""
        choose = self.random
        method, path = choose.choice(self._routes)
        if choose.random() < 0.1:
            method = choose.choice(METHODS)
        body = self._body()
        headers = [("Host", "test"), ("Content-Type", TYPES[0] if choose.random() < 0.7 else choose.choice(TYPES))]
        if choose.random() < 0.7:
            headers.append(("Authorization", f"Bearer {self._key}"))
        for _ in range(choose.choice((0, 0, 1, 3))):
            name = choose.choice(HEADERS) if choose.random() < 0.8 else self._text()
            headers.append((name, self._text()))
        framing = choose.random()
        if framing < 0.8:
            headers.append(("Content-Length", str(len(body))))
        elif framing < 0.9:
            headers.append(("Transfer-Encoding", "chunked"))
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if choose.random() < 0.7 else body
        elif framing < 0.95:
            headers.append(("Content-Length", choose.choice(("-1", "99999999999", "1e3", str(len(body) + 5), "0x10"))))
        lines = [f"{method} {self._target(path)} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        request = "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body
        if choose.random() < 0.05:  # replace one byte
            at = choose.randrange(len(request))
            request = request[:at] + bytes([choose.randrange(256)]) + request[at + 1 :]
        return request

    def _target(self, path: str) -> str:
        def value(_: re.Match[str]) -> str:
            text = self._text()
            return text if self.random.random() < 0.1 else quote(text.encode("utf-8", "surrogatepass"), safe="")

        target = re.sub(r"\{\w+\}", value, path)
        if self.random.random() < 0.2:
            target += f"/{quote(self._text(), errors='replace')}"
        if self.random.random() < 0.3:
            name = self.random.choice(("limit", "cursor", "label", "follow", "project", "x"))
            target += f"?{name}={quote(self._text(), errors='replace')}"
        return target

    def _text(self) -> str:
        """Return random characters, an ordinary value, or a line break followed by a forged log line."""
        choose = self.random
        kind = choose.random()
        if kind < 0.4:
            return f"a{choose.choice(BREAKS)}{FORGED}{choose.choice(('', *BREAKS))}"
        if kind < 0.6:
            return str(choose.choice(VALUES))
        length = choose.choice((1, 8, 64, 9000 if choose.random() < 0.05 else 3))
        return "".join(chr(choose.choice((choose.randrange(128), choose.randrange(0x10FFFF)))) for _ in range(length))

    def _body(self) -> bytes:
        choose = self.random
        kind = choose.random()
        if kind < 0.3:
            return b""
        if kind < 0.4:
            return choose.randbytes(choose.choice((1, 100, 5000)))
        if kind < 0.45:
            return choose.choice(
                (b"[" * 5000, b'{"a":' * 5000, b"null", b"1" * 5000, b'"\xff"', b"[NaN, Infinity, 1e999]")
            )
        encoded = json.dumps(self._mutated(choose.choice(BODIES))).encode()
        return encoded if choose.random() < 0.9 else encoded[: choose.randrange(len(encoded))]

    def _mutated(self, value: Any, chance: float = 0.15) -> Any:
        choose = self.random
        if choose.random() < chance:
            return choose.choice((self._text(), choose.choice(VALUES)))
        if isinstance(value, dict):
            members = {
                self._text() if choose.random() < 0.05 else key: self._mutated(each) for key, each in value.items()
            }
            return members | ({self._text(): self._text()} if choose.random() < 0.1 else {})
        return [self._mutated(each) for each in value] if isinstance(value, list) else value


async def send(port: int, request: bytes, leave: bool) -> int:
    """Send a request on a new connection; return the response status, or LEFT if the client disconnected."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        if leave:
            return LEFT
        async with asyncio.timeout(PATIENCE_S):
            line = await reader.readline()
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else LEFT
    except (ConnectionError, TimeoutError):
        return LEFT
    finally:
        writer.close()


async def run(port: int, fuzzer: RequestFuzzer, requests: int) -> Counter[int]:
    statuses, left = Counter[int](), requests

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            request, leave = fuzzer.request(), fuzzer.random.random() < 0.05
            status = await send(port, request, leave)
            statuses[status] += 1
            if status == 500:
                print(f"500: {request[:2000]!r}")

    await asyncio.gather(*(client() for _ in range(CONCURRENT)))
    return statuses


def problems_in(log: str, log_format: str) -> list[str]:
    """Return the lines of a log that are not records, or that contain a traceback."""
    lines = log.split("\n")[:-1]
    if log_format == "json":
        return [line for line in lines if not line.startswith('{"time": ') or "Traceback" in line]
    records = [line for line in lines if not RECORD.match(line) or line.startswith(FORGED) or not line.isprintable()]
    return records + [line for line in lines if "Traceback (most recent call last)" in line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    options = parser.parse_args()
    folder, many = Path(tempfile.mkdtemp(prefix="fuzz-")), "100000000/minute"
    limits = dict.fromkeys(("AMD_RATE_LIMIT", "AMD_INFERENCE_RATE_LIMIT", "AMD_FAILURE_LIMIT"), many)
    plane = ControlPlane(folder, "http://127.0.0.1:1", AMD_LOG_FORMAT=options.log_format, **limits)
    try:
        plane.start()
        paths = httpx.get(f"{plane.url}/openapi.json", timeout=TIMEOUT_S).json()["paths"]
        statuses = asyncio.run(run(plane.port, RequestFuzzer(options.seed, plane.key, paths), options.requests))
        assert plane.process is not None
        assert plane.process.poll() is None, "the control plane exited"
        httpx.get(f"{plane.url}/livez", timeout=TIMEOUT_S).raise_for_status()
    finally:
        plane.kill()
    path = folder / "control-plane.log"
    log = path.read_bytes().decode(errors="backslashreplace")  # without translating line breaks
    problems = problems_in(log, options.log_format)
    print(f"{options.requests} requests, statuses {dict(sorted(statuses.items()))}")
    print(f"{log.count(chr(10))} lines in {path}, {len(problems)} with a traceback or not in log format")
    for line in problems[:20]:
        print(repr(line[:300]))
    return 1 if problems or statuses[500] else 0


if __name__ == "__main__":
    sys.exit(main())
