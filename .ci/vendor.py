"""Copy the console's libraries from the npm registry into service/console/static/vendor (`make vendor`).

`vendor.json` there pins the version, licence and files of each package, with their SHA-256. `--update` records the
hashes of new versions; without it, a file whose hash differs is an error. `--only NAME --to FOLDER` unpacks a single
package elsewhere, as the browser tests do with axe-core, which is not shipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "service" / "console" / "static" / "vendor"
PINS = FOLDER / "vendor.json"


def packed(name: str, version: str, folder: Path) -> dict[str, bytes]:
    """Download a package with npm, which checks it against the registry's hash, and return its files by path."""
    command = ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
    archive = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    files = {}
    with tarfile.open(folder / archive) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                files[member.name.partition("/")[2]] = content.read()
    return files


def copy(package: dict[str, Any], target: Path, update: bool) -> list[str]:
    """Write a package's files to `target`; return one line per file whose hash differs from the recorded hash."""
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        found = packed(package["name"], package["version"], Path(folder))
    for file in package["files"]:
        digest = hashlib.sha256(found[file["source"]]).hexdigest()
        if update:
            file["sha256"] = digest
        elif file["sha256"] != digest:
            problems.append(
                f"{package['name']}: {file['source']} has SHA-256 {digest}, not {file['sha256']}; see --update"
            )
            continue
        path = target / file["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found[file["source"]])
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="record the hashes of the downloaded files")
    parser.add_argument("--only", help="name of the only package to copy")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder to copy to")
    args = parser.parse_args()
    pins = json.loads(PINS.read_text())
    packages = [one for one in pins["packages"] if (args.only or "") in ("", one["name"])]
    if not args.only:
        packages = [one for one in packages if one["shipped"]]
    problems = [line for package in packages for line in copy(package, args.to, args.update)]
    if args.update:
        PINS.write_text(json.dumps(pins, indent=2) + "\n")
    print("\n".join(problems) or f"{len(packages)} packages in {args.to}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
