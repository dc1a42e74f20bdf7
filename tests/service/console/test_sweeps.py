"""Tests for the sweep pages, and for stopping a sweep's trial through the REST API and on the sweep page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from amd.storage import join, read_json, write_json
from amd.training.run_folder import run_folder
from service.jobs.actions import act
from tests.service.console.conftest import new_app
from tests.support.browser import scenes
from tests.support.browser.console_client import ConsoleClient, plain_text_of, text_of
from tests.support.service.apps import key_to
from tests.support.service.fake_cluster import queued
from tune_spaces.stop_requests import requested_stops

RUNNING_TRIAL, ENDED_TRIAL = 17, 3
TRIALS = f"/v1/jobs/{scenes.SWEEP}/trials"
STOP = f"/console/sweeps/{scenes.SWEEP}/trials/{RUNNING_TRIAL}/stop"


@pytest.fixture(scope="module")
def app(database: Engine, folder: Path) -> Any:
    app = new_app(database, folder)
    scenes.populate(database, app.state.settings.root)
    return app


def test_the_page_shows_the_best_trial_with_its_settings_and_command(console: ConsoleClient, database: Engine) -> None:
    page = console.get(f"/console/sweeps/{scenes.SWEEP}").text
    text = plain_text_of(page)
    assert "Best trial so far: trial 8" in text
    assert "mask.student_ratio 0.8 base config: 0.75 mask.teacher_ratio 0.6 base config: 0.5" in text
    assert "amd train --preset demo-image-amd mask.student_ratio=0.8 mask.teacher_ratio=0.6 --submit" in text
    assert "Cost so far" in text
    assert f'hx-post="/console/sweeps/{scenes.SWEEP}/trials/8/train"' in page[: page.index('id="charts"')]
    trials = console.get(TRIALS, headers=key_to(database, "read")).json()
    assert trials[8]["overrides"] == {"mask.student_ratio": 0.8, "mask.teacher_ratio": 0.6}


def test_each_setting_has_a_column_unless_there_are_many(
    console: ConsoleClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/console/sweeps/{scenes.ENDED_SWEEP}"
    heads = "Trial State student_ratio teacher_ratio lr_scale weight_decay depth Rung Score, % Clips/s"
    assert heads in plain_text_of(console.get(path).text)
    monkeypatch.setattr("service.console.pages.sweeps.MAX_COLUMNS", 4)
    text = plain_text_of(console.get(path).text)
    assert "Trial State Settings Rung Score, % Clips/s" in text
    assert "student_ratio 0.8, teacher_ratio 0.5, lr_scale 2.19, weight_decay 0.05, depth 2" in text


def test_scores_at_different_rungs_are_told_apart(console: ConsoleClient) -> None:
    data = console.get(f"/console/sweeps/{scenes.SWEEP}/charts.json").json()
    assert data["top"] == 3
    assert {cell["rung"] for cell in data["map"]["cells"]} == {1, 2, 3}


def test_the_importance_of_the_settings_comes_from_the_report(
    console: ConsoleClient, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is estimated when the sweep ends" in plain_text_of(console.get(f"/console/sweeps/{scenes.SWEEP}").text)
    path = f"/console/sweeps/{scenes.ENDED_SWEEP}"
    text = plain_text_of(console.get(path).text)
    assert "student_ratio 58 % teacher_ratio 27 % lr_scale 11 %" in text
    assert "estimated from 24 trials at rung 1, a rough guide below 50 trials" in text
    report = join(run_folder(app.state.settings.root, scenes.ENDED_SWEEP), "report", "report.json")
    written = read_json(report)
    write_json(report, {"verdict": "by an older version"})
    text = plain_text_of(console.get(path).text)
    write_json(report, written)
    assert "cannot be estimated: it needs at least 4 trials at the same rung" in text


def test_the_head_shows_the_progress_once_and_no_throughput(console: ConsoleClient) -> None:
    text = plain_text_of(console.get(f"/console/sweeps/{scenes.SWEEP}").text)
    assert "Progress 90 % 18 / 20 trials Time left" in text
    assert (text.count("18 / 20"), text.count("Throughput")) == (1, 0)


def test_the_trials_show_the_differences_and_intervals_of_the_report(console: ConsoleClient, app: Any) -> None:
    path = f"/console/sweeps/{scenes.ENDED_SWEEP}"
    assert "To baseline" not in console.get(path).text
    report = join(run_folder(app.state.settings.root, scenes.ENDED_SWEEP), "report", "report.json")
    written = read_json(report)
    plain = {"title": "", "state": "succeeded", "rung": 3, "difference_rung": 3}
    rows = [
        {"number": 0, "baseline": True, **plain},
        {"number": 4, "difference": 3.69, "interval": [1.24, 6.14], **plain},
        {"number": 1, "difference": -0.5, "interval": None, **plain, "difference_rung": 2},
    ]
    write_json(report, {**written, "rows": rows})
    page = console.get(path).text
    write_json(report, written)
    cells = re.findall(r'data-label="to baseline" (?:data-value="([^"]*)")?>([^<]*)<', page)
    assert ("3.69", "+3.7 [+1.2, +6.1]") in cells
    assert ("-0.5", "-0.5 at rung 2") in cells
    assert ("", "baseline") in cells
    assert len(cells) == 24
    assert 'title="Standard deviation over seeds">±' in page


def test_the_list_shows_the_best_score_of_an_ended_sweep(console: ConsoleClient) -> None:
    text = plain_text_of(console.get("/console/sweeps").text)
    assert "24 / 24 trials 97.36 trial 4" in text
    assert "18 / 20 trials –" in text


@pytest.mark.parametrize(
    ("state", "message"), [("running", "appear once the first trial"), ("failed", "The sweep ended before a trial")]
)
def test_a_sweep_without_scores_says_so_once(console: ConsoleClient, app: Any, state: str, message: str) -> None:
    job = queued(app.state.jobs, kind="search", name="fresh")
    app.state.jobs.change(job, state, state=state)
    text = plain_text_of(console.get(f"/console/sweeps/{job.id}").text)
    assert text.count("No trial has been scored yet.") == 1
    assert message in text


def test_a_running_trial_can_be_stopped_once(console: ConsoleClient, app: Any, database: Engine) -> None:
    headers, folder = key_to(database, "submit"), run_folder(app.state.settings.root, scenes.SWEEP)
    assert console.post(f"{TRIALS}/{RUNNING_TRIAL}/stop", headers=key_to(database, "read")).status_code == 403
    other = key_to(database, "submit", project="other")
    assert console.post(f"{TRIALS}/{RUNNING_TRIAL}/stop", headers=other).status_code == 404
    page = console.get(f"/console/sweeps/{scenes.SWEEP}").text
    assert page.count(f'hx-post="{STOP}"') == 1
    assert page.count("/stop") == 1  # no other trial is running
    assert requested_stops(folder) == set()

    for _ in range(2):
        response = console.post(f"{TRIALS}/{RUNNING_TRIAL}/stop", headers=headers)
        assert response.status_code == 202
        assert response.json()["stop_requested"] is True
    assert requested_stops(folder) == {RUNNING_TRIAL}
    shown = {trial["number"]: trial["stop_requested"] for trial in console.get(TRIALS, headers=headers).json()}
    assert [number for number, requested in shown.items() if requested] == [RUNNING_TRIAL]
    page = console.get(f"/console/sweeps/{scenes.SWEEP}").text
    assert STOP not in page
    assert "saving a checkpoint" in page
    history = text_of(console.get(f"/console/jobs/{scenes.SWEEP}/history").text)
    assert history.count(f"Stop requested for trial {RUNNING_TRIAL}") == 1


def test_a_trial_can_be_stopped_on_the_sweep_page(console: ConsoleClient, reader: ConsoleClient) -> None:
    assert console.submit(STOP).headers["HX-Redirect"] == f"/console/sweeps/{scenes.SWEEP}"
    assert reader.submit(STOP).status_code == 403


@pytest.mark.parametrize(
    ("job", "trial", "status", "message"),
    [
        (scenes.SWEEP, ENDED_TRIAL, 409, f"cannot stop trial {ENDED_TRIAL} of {scenes.SWEEP}: it is succeeded"),
        (scenes.SWEEP, 900, 404, "has no trial 900"),
        (scenes.SWEEP, -1, 422, ""),
        (scenes.SWEEP, 10**30, 422, ""),
        (scenes.RUNNING, 0, 409, "the job is not a sweep"),
    ],
)
def test_only_a_running_trial_can_be_stopped(
    console: ConsoleClient, database: Engine, job: str, trial: int, status: int, message: str
) -> None:
    response = console.post(f"/v1/jobs/{job}/trials/{trial}/stop", headers=key_to(database, "submit"))
    assert response.status_code == status
    assert message in response.text


def test_trials_of_a_sweep_that_is_not_running_cannot_be_stopped(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    job = act(app.state.jobs, scenes.SWEEP, None, "pause", "test")
    app.state.jobs.change(job, "paused", state="paused")
    response = console.post(f"{TRIALS}/{RUNNING_TRIAL}/stop", headers=key_to(database, "submit"))
    assert response.status_code == 409
    assert "because the sweep is paused" in response.json()["detail"]
