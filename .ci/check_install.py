"""Resolve `amd-service` and its extras for every supported Python and platform; fail if one does not resolve.

Reads only metadata and accepts only wheels: nothing is downloaded, built or installed. Takes the Python versions from
the classifiers in pyproject.toml, and the package indexes from uv's own configuration and environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from uv import find_uv_bin

UV = find_uv_bin()  # resolved once: it reads sysconfig, whose first use is not thread-safe
PROJECT = Path(__file__).parents[1] / "pyproject.toml"
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux arm64": "aarch64-manylinux_2_28",
    "macOS arm64": "aarch64-apple-darwin",
}
MACOS = "14.0"  # oldest supported version
CLASSIFIER = "Programming Language :: Python :: "
PROCESSES = 3


def supported_pythons() -> list[str]:
    classifiers = tomllib.loads(PROJECT.read_text())["project"]["classifiers"]
    return [text.removeprefix(CLASSIFIER) for text in classifiers if text.startswith(CLASSIFIER)]


def resolve(python: str, platform: str) -> subprocess.CompletedProcess[str]:
    """Resolve all extras together; if that succeeds, every subset of them also resolves."""
    command = [UV, "pip", "compile", "--quiet", "--all-extras", "--only-binary", ":all:", "--no-annotate"]
    target = ["--python-version", python, "--python-platform", platform, "--no-header", str(PROJECT)]
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": MACOS}
    return subprocess.run([*command, *target], capture_output=True, text=True, env=environment)


def main() -> int:
    combinations = list(product(supported_pythons(), PLATFORMS))
    failed = 0
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = pool.map(lambda pair: resolve(pair[0], PLATFORMS[pair[1]]), combinations)
        for (python, platform), result in zip(combinations, results, strict=True):
            failed += result.returncode != 0
            found = f"{len(result.stdout.splitlines())} packages" if result.returncode == 0 else "does not resolve"
            print(f"Python {python}, {platform}: {found}\n{result.stderr}".rstrip(), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
