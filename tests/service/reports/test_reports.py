"""Tests for run and sweep reports: self-contained, escaped, bounded, isolated, and consistent with the console."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from amd.artifacts.discovery import encoder_folder
from amd.config import parse_overrides
from amd.storage import join, write_bytes, write_json
from amd.training.run_folder import FACTS, run_folder
from service.app import create_app
from service.db.engine import open_engine
from service.db.models import Job
from service.jobs.details.changes import portable_config
from service.jobs.kinds import named, resolve
from service.reports.run import MAX_CHARTS, MAX_POINTS
from service.reports.sections import MAX_DIFFERENCES
from service.reports.sweep_content import MAX_TRIALS
from service.settings import Settings
from tests.support.browser import scenes
from tests.support.browser.console_client import ConsoleClient, text_of
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import FakeCluster, queued

NASTY = "</title></style><script>alert(1)</script>\"'><img src=https://evil.example/x onerror=alert(1)>{{ 7 * 7 }}"
LOADING = {"src", "href", "srcset", "action", "formaction", "poster", "data", "background", "ping", "xlink:href"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "section", "footer", "div", "p", "h1", "h2", "h3"),
    *("span", "strong", "code", "pre", "dl", "dt", "dd", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "br"),
    *("figure", "figcaption", "i", "details", "summary"),
    *("svg", "line", "text", "polyline", "circle", "rect"),
}
LIMIT = 2 * 2**20


class ReportService:
    """An application without a cluster, populated with the console's test data."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        settings = Settings(data_dir=folder, storage=str(folder / "root"), serve_url="http://127.0.0.1:1")
        self.engine, self.app = engine, create_app(settings, engine=engine, cluster=FakeCluster())
        self.root, self.jobs = self.app.state.settings.root, self.app.state.jobs
        scenes.populate(engine, self.root)
        self.client = TestClient(self.app)

    def get(self, job_id: str, project: str | None = None) -> Any:
        return self.client.get(f"/v1/jobs/{job_id}/report", headers=key_to(self.engine, "read", project=project))

    def report(self, job_id: str) -> str:
        response = self.get(job_id)
        assert response.status_code == 200, response.text
        assert len(response.content) < LIMIT
        assert_self_contained(response.text)
        return str(response.text)

    def add(self, **fields: Any) -> Job:
        job = queued(self.jobs, **fields)
        scenes.start(self.jobs, job)
        return job

    def add_sweep(self, count: int, text: str = "") -> Job:
        """Add a sweep with this text in its name and in each trial's point and message."""
        config = resolve("search", "demo-image-amd", {"space": {"use": ["masking"]}}, {})
        job = self.add(kind="search", name=text or "a sweep", preset="demo-image-amd", config={})
        folder = run_folder(self.root, job.id)
        write_json(join(folder, "config.json"), named("search", config, job.id, self.root))
        rung = {"fraction": 1.0, "step": 9, "figures": {}, "clips": 8, "seconds": 1.0, "time": 0.0}
        for number in range(count):
            trial = {
                "number": number,
                "point": {"a": f"{text}{number}"},
                "overrides": {"mask.student_ratio": 0.8},
                "baseline": number == 0,
                "state": "failed" if number == 1 else "succeeded",
                "reason": None,
                "message": text,
                "runs": [],
                "rungs": [{**rung, "score": number / 10}],
                "costs": {},
                "began": 0.0,
                "ended": 1.0,
            }
            write_json(join(folder, "trials", f"{number:04d}.json"), trial)
        return job


def assert_self_contained(page: str) -> None:
    """Assert that a page consists of known elements, and that none of them loads or runs anything."""
    found: list[str] = []

    class Collector(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.extend([tag] * (tag not in ALLOWED))
            found.extend(name for name, _ in attributes if name in LOADING or name.startswith("on") or name == "style")

    Collector().feed(page)
    assert [name for name in found if name not in ("title",)] == []
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    assert not re.search(r"url\(|@import|expression|https?:|//", style)
    assert "default-src &#39;none&#39;" in page


@pytest.fixture(scope="module")
def service(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReportService]:
    folder = tmp_path_factory.mktemp("reports")
    shutil.copy(sqlite_template, folder / "control-plane.db")
    engine = open_engine(f"sqlite:///{folder / 'control-plane.db'}")
    yield ReportService(engine, folder)
    engine.dispose()


def test_a_report_is_a_file_that_loads_no_resources_and_runs_no_code(service: ReportService) -> None:
    response = service.get(scenes.RUNNING)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-disposition"] == f'attachment; filename="{scenes.RUNNING}.html"'
    assert response.headers["x-content-type-options"] == "nosniff"
    assert (
        response.headers["content-security-policy"]
        == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
    )


@pytest.mark.parametrize("job_id", [scenes.RUNNING, scenes.SUCCEEDED, scenes.FAILED, scenes.QUEUED, scenes.SWEEP])
def test_a_job_in_any_state_has_a_report(service: ReportService, job_id: str) -> None:
    job, text = service.jobs.get(job_id), text_of(service.report(job_id))
    assert str(job.name) in text
    assert job.state in text
    assert ("has not ended" in text) == (job.state in ("running", "queued"))


def test_a_page_that_loads_resources_is_detected() -> None:
    with pytest.raises(AssertionError):
        assert_self_contained(f"<style></style>default-src &#39;none&#39;{NASTY}")


def test_a_run_report_has_curves_of_losses_learning_rate_probe_and_throughput(service: ReportService) -> None:
    page = service.report(scenes.RUNNING)
    titles = re.findall(r"<h3[^>]*>([^<]+)</h3>\s*<svg", page)
    assert titles == [
        *("Loss", "Nearest-neighbour top-1, %", "Gradient norm", "Learning rate", "Throughput, samples per second")
    ]
    assert len(re.findall('<polyline class="line', page)) == 4 + 4
    assert "812 samples/s" in text_of(page)


def test_the_last_values_match_the_metrics_route(service: ReportService) -> None:
    headers = key_to(service.engine, "read")
    found = service.client.get(f"/v1/jobs/{scenes.RUNNING}/metrics", headers=headers).json()["series"]
    last = {one["name"]: one["values"][-1] for one in found}
    text = text_of(service.report(scenes.RUNNING))
    for name in ("loss/total", "loss/direct", "loss/generation", "loss/reconstruction", "optim/lr", "eval/knn_top1"):
        assert f"{name} {last[name]:.4g}" in text


def test_a_report_on_a_published_run_shows_its_scores_lineage_licence_data_and_versions(service: ReportService) -> None:
    job = service.add(name="published", preset="demo-image-amd")
    folder = encoder_folder(service.root, scenes.ENCODER)
    scenes.finish(service.jobs, job.id, "succeeded", result={"encoder_folder": folder, "figures": {"loss/total": 0.5}})
    facts = {"data": {"digest": "5ad1e5", "samples": 1397}, "versions": {"torch": "9.9.9"}, "host": {"user": "secret"}}
    write_json(join(run_folder(service.root, job.id), FACTS), facts)
    text = re.sub(r"\s+", " ", text_of(service.report(job.id)))
    scores = "knn demo:digits eval/knn_top1 96.4"
    for fact in (scores, "teacher demo-image-teacher", "Apache-2.0", "203 k parameters", "5ad1e5", "torch 9.9.9"):
        assert fact in text
    assert "secret" not in text
    other = service.add(name="unlicensed", preset="demo-image-amd")
    folder = encoder_folder(service.root, scenes.OTHER_ENCODER)
    scenes.finish(service.jobs, other.id, "succeeded", result={"encoder_folder": folder})
    assert re.search(r"Licence\s+not stated", text_of(service.report(other.id)))
    gone = service.add(name="unpublished")
    scenes.finish(service.jobs, gone.id, "succeeded", result={"encoder_folder": encoder_folder(service.root, "gone")})
    assert "which is not in the registry" in text_of(service.report(gone.id))


@pytest.mark.parametrize("job_id", [scenes.RUNNING, scenes.SUCCEEDED])
def test_the_commands_in_a_report_reproduce_the_job(service: ReportService, job_id: str) -> None:
    job = service.jobs.get(job_id)
    found = re.findall("<pre>(.*?)</pre>", service.report(job_id), re.DOTALL)
    first, second, content = map(html.unescape, found)
    program, kind, flag, preset, *overrides, submit = shlex.split(first)
    assert (program, kind, flag, submit) == ("amd", "train", "--preset", "--submit")
    repeated = resolve("train", preset, None, parse_overrides(overrides)).model_dump(mode="json")
    assert portable_config(repeated) == portable_config(job.config)
    assert second == "amd train --config config.json --submit"
    assert json.loads(content) == portable_config(job.config)


def test_a_sweep_report_has_a_verdict_map_front_trials_cost_and_commands(service: ReportService) -> None:
    page, console = service.report(scenes.SWEEP), ConsoleClient(service.app)
    console.sign_in(key_to(service.engine, "read")["Authorization"])
    data = console.get(f"/console/sweeps/{scenes.SWEEP}/charts.json").json()
    shown = text_of(console.get(f"/console/sweeps/{scenes.SWEEP}").text)
    (verdict,) = re.findall(r"Best so far: [^<]+significant\.", page)
    assert html.unescape(verdict) in shown
    assert re.findall(r"<h3[^>]*>([^<]+)</h3>\s*<svg", page) == [
        *("Student × teacher mask ratio", "Score against training speed", "Score by rung")
    ]
    assert page.count('<rect class="cell"') == len(data["map"]["cells"])
    best = next(trial for trial in data["trials"] if trial["best"])
    rows = re.findall(r'<td class="num">(\d+)</td><td>(\w+)</td>', page)
    assert rows[0] == (str(best["number"]), "succeeded")
    assert sorted(int(number) for number, _ in rows) == [trial["number"] for trial in data["trials"]]
    assert f"{best['score']:.4g} % ± {best['spread']:.2g}" in text_of(page)
    assert "amd search --config config.json --submit" in page
    assert "amd train --preset demo-image-amd mask.student_ratio=0.8 mask.teacher_ratio=0.6 --submit" in page
    assert "851 k" in page


def test_a_sweep_without_scores_has_a_report(service: ReportService) -> None:
    assert "No trial has been scored yet" in text_of(service.report(service.add_sweep(0).id))


def test_hostile_text_in_a_sweep_is_escaped(service: ReportService) -> None:
    page = service.report(service.add_sweep(4, NASTY).id)
    assert "alert(1)" in page
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|>49<", page)


def test_hostile_text_in_a_run_is_escaped(service: ReportService) -> None:
    config: dict[str, Any] = {"data": {"train": NASTY}, "seed": 1, NASTY: NASTY}
    job = service.add(name=NASTY, labels={"a": NASTY}, preset=NASTY, message=NASTY, config=config)
    scenes.finish(service.jobs, job.id, "failed", reason="unknown", message=NASTY, result={"figures": {NASTY: 1.0}})
    lines = "".join(json.dumps({"step": step, f"loss/{NASTY}": 1.0, f"eval/{NASTY}": 2.0}) + "\n" for step in range(3))
    write_bytes(join(run_folder(service.root, job.id), "metrics", "000000.jsonl"), lines.encode())
    write_json(join(run_folder(service.root, job.id), FACTS), {"data": {"digest": NASTY}, "versions": {NASTY: NASTY}})
    assert NASTY.partition("<img")[0][-10:] not in service.report(job.id)


def test_the_size_of_a_report_is_bounded(service: ReportService) -> None:
    sweep = service.report(service.add_sweep(MAX_TRIALS + 3).id)
    assert len(re.findall(r'<td class="num">\d+</td><td>\w+</td>', sweep)) == MAX_TRIALS
    assert "3 further trials not shown" in text_of(sweep)
    config = {f"key{number}": "x" * 9000 for number in range(MAX_DIFFERENCES + 7)}
    job = service.add(name="x" * 200, preset="demo-image-amd", config=config)
    names = [f"eval/{number}" for number in range(MAX_CHARTS + 20)]
    lines = "".join(json.dumps({"step": step, **dict.fromkeys(names, float(step))}) + "\n" for step in range(1500))
    write_bytes(join(run_folder(service.root, job.id), "metrics", "000000.jsonl"), lines.encode())
    page = service.report(job.id)
    series = re.findall('<polyline class="line[^"]*" points="([^"]*)"', page)
    assert len(series) == MAX_CHARTS
    assert max(len(points.split()) for points in series) <= MAX_POINTS
    assert "20 further charts" in text_of(page)
    assert "further differences not shown" in text_of(page)
    assert "config.json is too long" in text_of(page)


def test_a_report_in_another_project_is_not_found(service: ReportService) -> None:
    for job_id in (scenes.RUNNING, scenes.SWEEP):
        assert service.get(job_id, project="other").status_code == 404
        assert service.get(job_id, project="default").status_code == 200
    assert service.client.get(f"/v1/jobs/{scenes.RUNNING}/report").status_code == 401


def test_an_encoder_in_another_project_is_not_shown(service: ReportService) -> None:
    job = service.add(name="theirs", project="other")
    folder = encoder_folder(service.root, scenes.ENCODER)  # which belongs to the project default
    scenes.finish(service.jobs, job.id, "succeeded", result={"encoder_folder": folder})
    text = service.get(job.id, project="other").text
    assert "which is not in the registry" in text
    assert "96.4" not in text


def test_the_console_downloads_the_same_report(service: ReportService) -> None:
    console = ConsoleClient(service.app)
    console.sign_in(key_to(service.engine, "read")["Authorization"])
    for job_id, path in ((scenes.RUNNING, f"jobs/{scenes.RUNNING}"), (scenes.SWEEP, f"sweeps/{scenes.SWEEP}")):
        (link,) = re.findall(r'id="download-report" href="([^"]+)"', console.get(f"/console/{path}").text)
        downloaded = console.get(link)
        assert downloaded.headers["content-disposition"] == f'attachment; filename="{job_id}.html"'
        assert "sandbox" in downloaded.headers["content-security-policy"]
        pages = (downloaded.text, service.report(job_id))
        console_page, rest_page = (re.sub(r"(Created|Duration</dt><dd>)[^<]*", "", page) for page in pages)
        assert console_page == rest_page
