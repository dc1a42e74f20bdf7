"""Tests for stopping a sweep's trial, through the REST API and on the sweep page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from amd.training.run_folder import run_folder
from service.jobs.actions import act
from tests.service.console.conftest import new_app
from tests.support.browser import scenes
from tests.support.browser.console_client import ConsoleClient, text_of
from tests.support.service.apps import key_to
from tune_spaces.stop_requests import requested_stops

RUNNING_TRIAL, ENDED_TRIAL = 17, 3
TRIALS = f"/v1/jobs/{scenes.SWEEP}/trials"
STOP = f"/console/sweeps/{scenes.SWEEP}/trials/{RUNNING_TRIAL}/stop"


@pytest.fixture(scope="module")
def app(database: Engine, folder: Path) -> Any:
    app = new_app(database, folder)
    scenes.populate(database, app.state.settings.root)
    return app


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
