"""Fixtures for browser tests: a service with realistic data, and a browser that fails the test on any page error.

`make test-browser` installs Chromium, Playwright and axe-core, and sets AMD_CHROMIUM and AMD_AXE.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from sqlalchemy import Engine

from amd.config import TrainConfig, validate
from service.jobs.store import JobStore
from service.registry.discovery import EncoderDiscovery
from service.registry.store import EncoderStore
from tests.support.browser import scenes
from tests.support.browser.console_service import PATIENCE_MS, ConsoleService, console_service
from tests.support.runs.pictures import write_pictures
from tests.support.runs.published_students import publish_student

CHROMIUM = os.environ.get("AMD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleService]:
    with console_service(tmp_path_factory.mktemp("console"), _add_distilled) as service:
        yield service


def _add_distilled(engine: Engine, root: str) -> None:
    """Add the encoder and the pictures of a run with a teacher."""
    config = validate(TrainConfig, JobStore(engine).get(scenes.DISTILLED).config)
    _, url = publish_student(config, Path(root), scenes.DISTILLED)
    EncoderDiscovery(EncoderStore(engine), root).register(url)
    write_pictures(root, scenes.DISTILLED, (100, 200))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "Chromium is not installed; run `make test-browser`, or set AMD_CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, service: ConsoleService) -> Iterator[Callable[..., Page]]:
    """Open pages in a signed-in browser. Fails on console errors, policy violations and requests to other hosts.

    `expected_error`: part of the console errors that the test provokes.
    """
    problems: list[str] = []
    contexts: list[BrowserContext] = []

    def new_page(
        theme: str = "light", width: int = 1440, key: str | None = None, expected_error: str | None = None
    ) -> Page:
        def check_line(line: Any) -> None:
            if line.type in ("error", "warning") and (expected_error is None or expected_error not in line.text):
                problems.append(f"{page.url}: {line.text}")

        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", check_line)
        page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
        page.on("request", lambda request: problems.append(request.url) if _is_foreign(request.url, service) else None)
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"{service.server.url}/console")
        page.get_by_label("API key").fill(key or service.server.key)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/console/jobs")
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert problems == []


def _is_foreign(url: str, service: ConsoleService) -> bool:
    return not url.startswith((service.server.url, "data:", "blob:"))


@pytest.fixture(scope="session")
def axe() -> str:
    """Return the axe-core source code."""
    folder = os.environ.get("AMD_AXE")
    assert folder, "axe-core is not installed; run `make test-browser`, or set AMD_AXE to the folder of axe.min.js"
    return (Path(folder) / "axe.min.js").read_text()
