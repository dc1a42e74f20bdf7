"""Fixtures for browser tests: a service with realistic data, and a browser that fails the test on any page error.

`make test-browser` installs Chromium, Playwright and axe-core, and sets AMD_CHROMIUM and AMD_AXE.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from service.db.engine import migrate, open_engine
from service.jobs.execution.protocol import JobFolder
from service.jobs.execution.ray_jobs import RayJobStatus
from service.jobs.execution.reconciler import submission_id
from service.jobs.store import JobStore
from service.serving.gateway import EncoderReply
from tests.support.browser import scenes
from tests.support.browser.embedded_digits import add_embedded_digits
from tests.support.service.fake_cluster import FakeCluster, report_status
from tests.support.service.local_lab import LocalLab
from tests.support.service.server import Server, serving

CHROMIUM = os.environ.get("AMD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 60_000  # the machine may be busy
EMBEDDED_SAMPLES = 2000


class ConsoleService(NamedTuple):
    """A running service and its fake cluster, whose jobs the tests advance."""

    server: Server
    cluster: FakeCluster
    root: str

    def api(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.server.key}"}
        response = httpx.request(method, f"{self.server.url}/v1{path}", headers=headers, timeout=60, **options)
        response.raise_for_status()
        return response.json() if response.content else None

    def key(self, scope: str) -> str:
        return str(self.api("POST", "/keys", json={"name": f"a {scope} key", "scopes": [scope]})["key"])

    def report(self, job_id: str, state: str | None = None, **facts: Any) -> None:
        """Report the progress or the outcome of a job's newest attempt, once the job has started."""
        jobs = self.server.app.state.jobs
        until = time.monotonic() + PATIENCE_MS / 1000
        while jobs.get(job_id).state not in ("starting", "running", "cancelling"):
            assert time.monotonic() < until, jobs.get(job_id).state
            time.sleep(0.05)
        report_status(self.root, jobs.get(job_id), state, **facts)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleService]:
    folder = tmp_path_factory.mktemp("console")
    engine = open_engine(f"sqlite:///{folder / 'control-plane.db'}")
    migrate(engine)
    cluster = FakeCluster(cpus=8.0)
    many = {"rate_limit": "100000/minute", "failure_limit": "100000/minute"}
    root = str(folder / "root")
    scenes.populate(engine, root)
    for seed, job_id in enumerate((scenes.EMBEDDED, scenes.OTHER_EMBEDDED)):
        name = f"Digits, embedded by encoder {'AB'[seed]}"
        add_embedded_digits(JobStore(engine), root, EMBEDDED_SAMPLES, seed, id=job_id, name=name)
    _report_alive(JobStore(engine), cluster, root)  # before the service checks the jobs
    with serving(engine, folder, cluster, storage=root, **many) as server:
        _serve_vectors(server.app.state.gateway)
        lab = LocalLab(server.app)
        stop = threading.Event()
        beating = threading.Thread(target=_keep_alive, args=(server.app.state.jobs, cluster, root, stop))
        beating.start()
        yield ConsoleService(server, cluster, root)
        stop.set()
        beating.join()
        lab.engine.close()


def _keep_alive(store: JobStore, cluster: FakeCluster, root: str, stop: threading.Event) -> None:
    """Send heartbeats for the jobs stored as running, so that the service does not restart them."""
    while not stop.wait(0.2):
        _report_alive(store, cluster, root)


def _report_alive(store: JobStore, cluster: FakeCluster, root: str) -> None:
    for job_id in (scenes.RUNNING, scenes.SWEEP):
        job = store.get(job_id)
        cluster.jobs.setdefault(submission_id(job, job.attempt), RayJobStatus("RUNNING"))
        JobFolder(root, job_id).write_heartbeat(job.attempt, job.progress)


def _serve_vectors(gateway: Any) -> None:
    """Make the gateway return vectors as a replica would, because no replica runs in these tests."""

    async def infer(request: Any, name: str, project: Any, items: Any, options: Any, *more: Any, **rest: Any) -> Any:
        found: dict[str, Any] = {"embedding": [0.1 * (index % 7) - 0.3 for index in range(64)]}
        if options["task"] == "classification":
            found = {"labels": ["three", "eight"], "scores": [0.91, 0.06]}
        return EncoderReply(name, [found], None, 100)

    async def replica_state(deployment: Any) -> dict[str, Any]:
        drift = {"items": 40, "cosine_mean": 0.94, "cosine_min": 0.71, "neighbours": 10, "neighbours_kept": 0.83}
        return {"drift": drift, "trouble": {}}

    gateway.infer, gateway.replica_state = infer, replica_state


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "Chromium is not installed; run `make test-browser`, or set AMD_CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, service: ConsoleService) -> Iterator[Callable[..., Page]]:
    """Open pages in a signed-in browser. Fails on console errors, policy violations and requests to other hosts."""
    problems: list[str] = []
    contexts: list[BrowserContext] = []

    def new_page(theme: str = "light", width: int = 1440, key: str | None = None) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda line: problems.append(f"{page.url}: {line.text}") if _is_error(line) else None)
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


def _is_error(line: Any) -> bool:
    return line.type in ("error", "warning")


def _is_foreign(url: str, service: ConsoleService) -> bool:
    return not url.startswith((service.server.url, "data:", "blob:"))


@pytest.fixture(scope="session")
def axe() -> str:
    """Return the axe-core source code."""
    folder = os.environ.get("AMD_AXE")
    assert folder, "axe-core is not installed; run `make test-browser`, or set AMD_AXE to the folder of axe.min.js"
    return (Path(folder) / "axe.min.js").read_text()
