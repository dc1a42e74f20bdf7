"""Measure how console pages slow down with large amounts of data, and how their memory grows over an hour.

Run as `python -m tests.benchmarks.console_scale [--repeats 3] [--only pages|memory]`. Requires Chromium and Playwright,
which `make test-browser` installs. Two services run at the same time: one has 10,000 jobs, 200 trials, 1,000,000 metric
points and 1,000,000 log lines; the other has 10, 5, 1,000 and 1,000. Each page is opened on both services in turn.
"server" is the total duration of the page's requests, except for static files and event streams; "drawn" is the time
from opening the page until its content is on the screen. Both are in milliseconds. Times depend on the machine, but
their ratios hardly do.

The memory measurement replays an hour of ten running jobs at 60 times real speed. Prints the growth of each page's
JavaScript heap during that hour. In the warm-up of an hour and a half before it, the browser compiles the functions
that run often: their machine code is part of the heap. Garbage is collected before each measurement.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

from amd.storage import join, write_bytes
from amd.training.run_folder import run_folder
from service.app import create_app
from service.auth.api_keys import ensure_admin_key
from service.db.engine import migrate, open_engine
from service.jobs.execution.protocol import JobFolder
from service.jobs.store import JobStore
from service.settings import Settings
from tests.browser.conftest import CHROMIUM
from tests.support.browser import scenes, volumes
from tests.support.browser.volumes import Volume
from tests.support.service.fake_cluster import FakeCluster
from tests.support.service.server import serve_app

LARGE = Volume(jobs=10_000, trials=200, points=1_000_000, log_lines=1_000_000)
SMALL = Volume(jobs=10, trials=5, points=1_000, log_lines=1_000)
LIMIT = 3.0  # largest acceptable ratio

SPEED = 60
HOUR_S, WARM_UP_S = 3600, 5400  # in simulated time
JOBS = 10
LINE_S, CHUNK_S, LOG_S, PROGRESS_S = 1.6, 30, 10, 30  # between metric lines, chunks, log lines and updates

PAGES = {
    "jobs": ("/jobs", "#jobs tbody tr"),
    "jobs, filtered by state": ("/jobs?state=failed", "#jobs tbody tr"),
    "jobs, searched": ("/jobs?q=ablation+7", "#jobs tbody tr"),
    "job": (f"/jobs/{scenes.RUNNING}", "#curves figure canvas"),
    "waiting job": (f"/jobs/{volumes.QUEUED}", "#job-head .notice"),
    "log": (f"/jobs/{scenes.RUNNING}/log", "#log .line"),
    "config": (f"/jobs/{scenes.RUNNING}/config", "#config tbody tr"),
    "history": (f"/jobs/{scenes.RUNNING}/history", ".timeline li"),
    "files": (f"/jobs/{scenes.RUNNING}/files", "main table"),
    "sweeps": ("/sweeps", "#sweeps tbody tr"),
    "sweep": (f"/sweeps/{scenes.SWEEP}", "#rungs canvas"),
    "encoders": ("/encoders", "main table tbody tr"),
    "cluster": ("/cluster", "main table tbody tr"),
    "failures": ("/failures?days=365", "main section"),
    "new job": ("/new", "main form"),
}
DRAWN = """async (selector) => {
    const frame = () => new Promise((done) => requestAnimationFrame(done));
    while (document.readyState !== "complete" || !document.querySelector(selector)) await frame();
    await frame();
    await frame();
    const drawn = performance.now();
    const requests = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
        .filter((one) => !one.name.includes("/static/") && !/\\/(events|follow)(\\?|$)/.test(one.name));
    return [requests.reduce((sum, one) => sum + one.responseEnd - one.requestStart, 0), drawn];
}"""


class MeasuredService(NamedTuple):
    """A running service without a reconciler, so that the states of its jobs do not change."""

    url: str
    key: str
    store: JobStore
    root: str

    def sign_in(self, browser: Browser) -> Page:
        headers = {"Authorization": f"Bearer {self.key}"}
        link = httpx.post(f"{self.url}/v1/console-links", headers=headers).raise_for_status().json()["path"]
        page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
        page.set_default_timeout(120_000)
        page.goto(self.url + link)
        return page


class Times(NamedTuple):
    """Times for one visit to a page, in milliseconds."""

    server: float
    drawn: float


@contextmanager
def serving(folder: Path, volume: Volume) -> Iterator[MeasuredService]:
    folder.mkdir()
    engine = open_engine(f"sqlite:///{folder / 'control-plane.db'}")
    migrate(engine)
    root = str(folder / "root")
    volumes.populate(engine, root, volume)
    limits = {"rate_limit": "1000000/minute", "max_streams": 1000}
    settings = Settings(data_dir=folder, storage=root, **limits)  # type: ignore[arg-type]
    ensure_admin_key(engine, settings.admin_key_path)
    app = create_app(settings, engine=engine, cluster=FakeCluster())
    with serve_app(app) as url:
        yield MeasuredService(url, settings.admin_key_path.read_text().strip(), app.state.jobs, root)
    engine.dispose()


def open_page(page: Page, url: str, selector: str) -> Times:
    page.goto(url, wait_until="commit")
    server, drawn = page.evaluate(DRAWN, selector)
    return Times(server, drawn)


def measure_pages(browser: Browser, large: MeasuredService, small: MeasuredService, repeats: int) -> None:
    pages = large.sign_in(browser), small.sign_in(browser)
    print("| page | first, drawn | server | drawn | ratio | with little data: server | drawn |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (path, selector) in PAGES.items():
        visits: list[tuple[Times, Times]] = []
        for _ in range(repeats + 1):
            one, other = (
                open_page(page, f"{service.url}/console{path}", selector)
                for page, service in zip(pages, (large, small), strict=True)
            )
            visits.append((one, other))
        first, rest = visits[0][0], visits[1:]
        much, little = ([visit[index] for visit in rest] for index in (0, 1))
        ratio = _median(much, "drawn") / _median(little, "drawn")
        print(
            f"| {name} | {first.drawn:.0f} | {_median(much, 'server'):.0f} | {_median(much, 'drawn'):.0f} "
            f"| {ratio:.1f}{' !' if ratio > LIMIT else ''} "
            f"| {_median(little, 'server'):.0f} | {_median(little, 'drawn'):.0f} |",
            flush=True,
        )
    for page in pages:
        page.context.close()


def _median(visits: Sequence[Times], field: str) -> float:
    return statistics.median(getattr(visit, field) for visit in visits)


class Recording:
    """Simulates ten running jobs whose progress, metrics and logs advance in simulated time."""

    def __init__(self, service: MeasuredService) -> None:
        self._store, self._root = service.store, service.root
        running = [job.id for job in service.store.in_states(["running"]) if job.kind == "train"]
        self.jobs = [scenes.RUNNING, *(job for job in running if job != scenes.RUNNING)][:JOBS]
        self._noise = random.Random(0)
        self._lines = dict.fromkeys(self.jobs, 0)
        self._chunks = dict.fromkeys(self.jobs, 0)
        self._offsets = dict.fromkeys(self.jobs, 0)
        for job in self.jobs:
            self._write_metrics(job, 2 * HOUR_S)
            self._write_log(job, 2 * HOUR_S // LOG_S)

    def advance(self, seconds: int) -> None:
        """Write the metrics, log lines and progress of the given number of seconds, a multiple of PROGRESS_S."""
        for job_id in self.jobs:
            self._write_metrics(job_id, seconds)
            self._write_log(job_id, seconds // LOG_S)
            job = self._store.get(job_id)
            step = 5 * self._lines[job_id]
            self._store.note_progress(job, {"step": step, "steps": 10**6, "samples_per_s": 812.0, "seconds_left": 9e5})

    def _write_metrics(self, job: str, seconds: float) -> None:
        first, last = self._lines[job], self._lines[job] + int(seconds / LINE_S)
        lines = [json.dumps(scenes.metrics_line(5 * number, self._noise)) for number in range(first, last)]
        name = f"{self._chunks[job]:06d}.jsonl"
        write_bytes(join(run_folder(self._root, job), "metrics", name), ("\n".join(lines) + "\n").encode())
        self._lines[job], self._chunks[job] = last, self._chunks[job] + 1

    def _write_log(self, job: str, lines: int) -> None:
        text = "".join(scenes.log_line(self._lines[job] + number) + "\n" for number in range(lines)).encode()
        write_bytes(join(JobFolder(self._root, job).logs(1), f"{self._offsets[job]:016d}.log"), text)
        self._offsets[job] += len(text)


def replay(recording: Recording, seconds: int, wait: Callable[[float], object]) -> None:
    """Advance the recording at 60 times real speed."""
    began = time.monotonic()
    for done in range(PROGRESS_S, seconds + 1, PROGRESS_S):
        recording.advance(PROGRESS_S)
        wait(max(0.0, began + done / SPEED - time.monotonic()))


def measure_memory(browser: Browser, service: MeasuredService) -> None:
    recording = Recording(service)
    chosen = ("jobs", "job", "log", "sweep")
    pages = {name: service.sign_in(browser) for name in chosen}
    for name, page in pages.items():
        path, selector = PAGES[name]
        open_page(page, f"{service.url}/console{path}", selector)
    stop = threading.Event()
    heaps: list[dict[str, float]] = []
    for seconds in (WARM_UP_S, HOUR_S):
        replaying = threading.Thread(target=replay, args=(recording, seconds, stop.wait))
        replaying.start()
        while replaying.is_alive():
            pages["jobs"].wait_for_timeout(200)
        heaps.append({name: _heap_bytes(page) for name, page in pages.items()})
    print("\n| page | heap after the warm-up, MB | an hour later, MB | growth |")
    print("|---|---:|---:|---:|")
    for name in chosen:
        before, after = heaps[0][name], heaps[1][name]
        print(f"| {name} | {before / 1e6:.2f} | {after / 1e6:.2f} | {after / before - 1:+.1%} |")


def _heap_bytes(page: Page) -> float:
    """Return the smallest of three JavaScript heap sizes of a page, because a refresh may be in progress."""
    session = page.context.new_cdp_session(page)
    sizes = []
    for _ in range(3):
        page.wait_for_timeout(1500)
        session.send("HeapProfiler.collectGarbage")
        sizes.append(float(session.send("Runtime.getHeapUsage")["usedSize"]))
    session.detach()
    return min(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="Visits per page after the first; reports medians.")
    parser.add_argument("--only", choices=["pages", "memory"], help="Measurement to run. Default: both.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        if options.only != "memory":
            with serving(Path(name) / "large", LARGE) as large, serving(Path(name) / "small", SMALL) as small:
                measure_pages(browser, large, small, options.repeats)
        if options.only != "pages":
            with serving(Path(name) / "hour", SMALL._replace(jobs=150, points=0, log_lines=0)) as service:
                measure_memory(browser, service)
        browser.close()


if __name__ == "__main__":
    main()
