"""Collect the documentation pages in build/site: the pages in docs/, and two pages from elsewhere in the repository.

`make docs` runs this program before the site is built with mkdocs.yml. Links to the two pages are rewritten.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
ADDED = {"deploy/README.md": "deployment.md", "CONTRIBUTING.md": "contributing.md"}


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SITE, ignore=shutil.ignore_patterns("*.py", "__pycache__", "generator"))
    for source, name in ADDED.items():
        shutil.copy(ROOT / source, SITE / name)
    for page in SITE.rglob("*.md"):
        text = page.read_text()
        for source, name in ADDED.items():
            text = text.replace(f"](../{source}", f"]({name}")
        page.write_text(text)


if __name__ == "__main__":
    main()
