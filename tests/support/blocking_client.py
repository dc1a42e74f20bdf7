"""Derive the blocking client from the asynchronous one: `python -m tests.support.blocking_client` writes it.

unasync removes `async` and `await` from the modules of `service/client/_async`, and renames identifiers that
have a different name in blocking code; the result is written to `_sync`. Does not import the client.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from unasync import Rule, unasync_files

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "service" / "client" / "_async"
TARGET = REPOSITORY / "service" / "client" / "_sync"
COMMAND = "python -m tests.support.blocking_client"

REPLACEMENTS = {
    "_async": "_sync",
    "aclose": "close",
    "aclosing": "closing",
    "aiter_bytes": "iter_bytes",
    "aiter_sse": "iter_sse",
    "aread": "read",
    "asyncio": "time",  # asyncio.sleep
}


def generate(target: Path = TARGET) -> None:
    """Write the blocking counterpart of each module to a folder."""
    sources = sorted(SOURCE.glob("*.py"))
    names = {name for path in sources for name in re.findall(r"\bAsync[A-Z]\w*", path.read_text())}
    replacements = REPLACEMENTS | {name: name.removeprefix("Async") for name in names}
    unasync_files([str(path) for path in sources], [Rule(str(SOURCE), str(target), replacements)])
    for path in sources:
        written = target / path.name
        header = f"# Generated from {path.relative_to(REPOSITORY)} by `{COMMAND}`; do not edit.\n"
        written.write_text(header + written.read_text())
    for arguments in (["check", "--select=I", "--fix-only"], ["format"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--quiet", "--config=pyproject.toml", str(target)]
        subprocess.run(command, cwd=REPOSITORY, check=True)


if __name__ == "__main__":
    generate()
