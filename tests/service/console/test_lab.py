"""Tests for the mask lab page, and for the forms that it fills in."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode

import pytest
from sqlalchemy import Engine

from service.auth.sessions import csrf_token
from service.jobs.store import JobFilter
from tests.service.console.conftest import new_app
from tests.support.browser import scenes
from tests.support.browser.console_client import ConsoleClient
from tests.support.encoders.encoder_cards import index_encoder
from tests.support.runs.pictures import write_pictures
from tests.support.service.apps import key_to
from tests.support.service.local_lab import LocalLab

DECODER = {"network": {}, "mask_strategy": "random", "mask_ratio": 0.75, "pixels": "unit"}


@pytest.fixture(scope="module")
def app(database: Engine, folder: Any) -> Any:
    app = new_app(database, folder)
    scenes.populate(database, app.state.settings.root)
    index_encoder(database, "rebuilds", decoder=DECODER)
    index_encoder(database, "named-by-its-job", run=scenes.FAILED, decoder=DECODER)
    index_encoder(database, "bare")
    return app


def options(page: str) -> list[str]:
    (select,) = re.findall(r'<select id="lab-source">(.*?)</select>', page, re.DOTALL)
    return re.findall(r'<option value="([^"]+)"', select)


def shown(page: str) -> tuple[str, str]:
    """Return the selected source of the settings and the job that supplies the samples."""
    (job,) = re.findall(r'data-job="([^"]*)" data-job-preset', page)
    (source,) = re.findall(r'<select id="lab-source">(.*?)</select>', page, re.DOTALL)
    selected = re.findall(r'<option value="([^"]+)"[^>]*selected>', source)
    return (selected[0] if selected else options(page)[0]), job


def test_the_page_offers_presets_and_encoders_that_can_reconstruct_pixels(console: ConsoleClient) -> None:
    found = options(console.get("/console/lab?preset=demo-image-amd").text)
    assert "encoder:rebuilds" in found
    assert "encoder:bare" not in found
    assert "preset:demo-image-amd" in found
    assert not [one for one in found if one.startswith("job:")]


def test_a_training_job_links_to_the_lab_with_a_sample_of_its_data(console: ConsoleClient) -> None:
    link = f"/console/lab?job={scenes.RUNNING}&amp;record=0"
    assert link in console.get(f"/console/jobs/{scenes.RUNNING}").text
    page = console.get(link.replace("&amp;", "&")).text
    assert options(page)[0] == f"job:{scenes.RUNNING}"
    assert 'id="lab-record"' in page
    assert 'name="alignment" type="checkbox"' in page  # it has checkpoints and a teacher
    assert 'name="alignment"' not in console.get(f"/console/lab?job={scenes.SUCCEEDED}").text
    assert console.get("/console/lab?job=train-nothing").status_code == 404


def test_jobs_have_the_same_name_in_both_lists(console: ConsoleClient, app: Any) -> None:
    job = app.state.jobs.get(scenes.FAILED)
    page = console.get(f"/console/lab?job={job.id}").text
    assert f"selected>{job.name}</option>" in page
    assert f'<option value="job:{job.id}">{job.name}, this job</option>' in page
    sources = page.partition('<select id="lab-source">')[2]
    (text,) = re.findall(r'<option value="encoder:named-by-its-job"[^>]*>([^<]*)<', sources)
    assert text == f"{job.name} (named-by-its-job)"


def test_the_wipe_is_explained(console: ConsoleClient) -> None:
    assert "The slider moves the line: the first layer is left of it" in console.get("/console/lab").text


def test_a_single_checkpoint_or_picture_needs_no_slider(console: ConsoleClient, app: Any) -> None:
    sliders = r'<input id="(?:lab-checkpoint|pictures-step)"[^>]*>'
    several = re.findall(sliders, console.get(f"/console/lab?job={scenes.RUNNING}").text)
    scenes.write_checkpoints(app.state.settings.root, scenes.DISTILLED, (500,))
    write_pictures(app.state.settings.root, scenes.DISTILLED, (500,))
    single = re.findall(sliders, console.get(f"/console/lab?job={scenes.DISTILLED}").text)
    assert [" hidden" in slider for slider in (*several, *single)] == [False, False, True, True]


def test_training_jobs_are_offered_newest_first(console: ConsoleClient, app: Any) -> None:
    page = console.get(f"/console/lab?job={scenes.SUCCEEDED}").text
    (select,) = re.findall(r'<select id="lab-job">(.*?)</select>', page, re.DOTALL)
    offered = re.findall(r'value="([^"]*)"( selected)?', select)
    newest = [job.id for job in app.state.jobs.list(JobFilter(None, kinds=("train",)), limit=50).jobs]
    assert [job for job, _ in offered] == ["", *newest]
    assert [job for job, selected in offered if selected] == [scenes.SUCCEEDED]


def test_the_page_shows_the_pictures_that_a_job_wrote(console: ConsoleClient) -> None:
    page = console.get(f"/console/lab?job={scenes.RUNNING}").text
    assert f'data-url="/console/jobs/{scenes.RUNNING}/media" data-steps="500,1000"' in page
    assert "No pictures yet" in console.get(f"/console/lab?job={scenes.SUCCEEDED}").text
    assert "No pictures yet" not in console.get("/console/lab?preset=demo-image-amd").text  # no job


def test_without_parameters_the_page_shows_the_newest_distilled_encoder_and_its_job(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    assert shown(console.get("/console/lab?preset=demo-image-amd").text) == ("preset:demo-image-amd", "")
    assert shown(console.get("/console/lab").text) == (f"job:{scenes.RUNNING}", scenes.RUNNING)  # no encoder has a job
    index_encoder(database, "deleted", hours=9, run="train-deleted", decoder=DECODER)
    index_encoder(database, "undistilled", hours=9, objective="mae", run=scenes.SUCCEEDED, decoder=DECODER)
    assert shown(console.get("/console/lab").text) == ("encoder:undistilled", scenes.SUCCEEDED)
    index_encoder(database, "distilled", run=scenes.DISTILLED, decoder=DECODER)
    assert shown(console.get("/console/lab").text) == ("encoder:distilled", scenes.DISTILLED)
    assert shown(console.get("/console/lab?encoder=undistilled").text) == ("encoder:undistilled", scenes.SUCCEEDED)
    assert shown(console.get("/console/lab?encoder=deleted").text) == ("encoder:deleted", "")
    index_encoder(database, "imported", run=scenes.SWEEP, decoder=DECODER)  # by a job that is not a training job
    assert shown(console.get("/console/lab?encoder=imported").text) == ("encoder:imported", "")
    other = ConsoleClient(app)
    other.sign_in(key_to(database, "read", project="other")["Authorization"])
    assert shown(other.get("/console/lab").text) == ("preset:demo-image-amd", "")


def test_masks_are_drawn_only_with_the_pages_csrf_token(console: ConsoleClient, app: Any) -> None:
    lab = LocalLab(app)
    url = "/console/lab/masks?preset=demo-image-amd"
    assert console.post(url).status_code == 403
    headers = {"X-CSRF-Token": csrf_token(console.session), "HX-Request": "true"}
    assert console.post(url, headers=headers).json()["layers"].keys() == {"student", "teacher", "roles", "masked"}
    problem = console.post(f"{url}&student_ratio=0.1&teacher_ratio=0.5", headers=headers)
    assert problem.status_code == 422
    assert "mask.teacher_ratio=0.5 must not be above" in problem.text
    assert "<html" not in problem.text
    lab.engine.close()


def test_query_parameters_fill_in_the_form_for_a_new_job(console: ConsoleClient) -> None:
    given = {"o.mask.student_ratio": "0.6", "o.mask.strategy": "tube", "o.evil": '"><script>'}
    for path in ("/console/new?kind=train&preset=demo-image-amd&", f"/console/jobs/{scenes.RUNNING}/clone?"):
        page = console.get(path + urlencode(given)).text
        assert re.search(r'name="o\.mask\.student_ratio" value="0\.6"', page)
        assert "<option selected>tube</option>" in page
        assert '<details class="body" open>' in page, "a field that is filled in must be visible"
        assert "<script>" not in page
    dimensions = '{"masking.student_ratio":[0.5,0.6]}'
    page = console.get("/console/new?" + urlencode({"kind": "search", "o.space.dimensions": dimensions})).text
    assert 'name="o.space.dimensions" value="{&#34;masking.student_ratio&#34;:[0.5,0.6]}"' in page
