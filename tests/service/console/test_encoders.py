"""Tests for the pages of an encoder."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from amd.artifacts.discovery import encoder_folder
from amd.config import TrainConfig
from amd.presets.load import load_config
from service.auth.sessions import csrf_token
from service.db.models import RegisteredEncoder
from service.registry.discovery import EncoderDiscovery
from service.serving.deployments import new_deployment
from service.serving.gateway import EncoderReply
from service.serving.schemas import ServingSettings
from service.web.errors import invalid_item
from tests.support.browser.console_client import ConsoleClient, plain_text_of, text_of
from tests.support.encoders.encoder_cards import index_encoder, score
from tests.support.runs.published_students import publish_student
from tests.support.service.fake_cluster import queued


def test_the_code_for_python_embeds_clips(console: ConsoleClient, app: Any) -> None:
    root = app.state.settings.root
    _, url = publish_student(load_config(TrainConfig, "demo-image-mae", None, {}), Path(root), "embeds")
    EncoderDiscovery(app.state.encoders, root).register(url)
    page = console.get("/console/encoders/embeds").text
    (code,) = re.findall(r'<pre id="python-code"[^>]*>(.*?)</pre>', page, re.DOTALL)
    names: dict[str, Any] = {"clips": torch.zeros(2, 3, 1, 32, 32, dtype=torch.uint8)}
    exec(html.unescape(code), names)
    assert names["vectors"].shape == (2, 64)


def listed(page: str) -> list[tuple[str, list[str]]]:
    """Return the ID and the scores of each encoder in the list."""
    rows = re.findall(r'<tr><td class="full lead">.*?</tr>', page, re.DOTALL)
    score_cell = r'<td class="num[^"]*"[^>]*?(?:data-label="[^"]*")?>(–|<span [^>]*>[\d.]+ %</span>)</td>'
    return [
        (
            re.findall(r'name="encoder" value="(.*?)"', row)[0],
            [text_of(cell).strip() for cell in re.findall(score_cell, row)],
        )
        for row in rows
    ]


def test_the_list_names_encoders_by_their_id_with_aliases_as_tags(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    index_encoder(database, "named", hours=1)
    app.state.encoders.move_alias("default", "best", "named", "test")
    page = console.get("/console/encoders").text
    link = '<a class="job-name" href="/console/encoders/named">named</a> <span class="tag accent">best</span>'
    assert link in page


def test_the_name_of_the_job_that_published_an_encoder_is_shown(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    job = queued(app.state.jobs, name="cats, long").id
    index_encoder(database, job, run=job)
    for page in ("/console/encoders", f"/console/encoders/{job}"):
        assert "cats, long" in console.get(page).text


def test_the_list_has_a_column_for_each_benchmark_and_sorts_by_the_chosen_one(
    console: ConsoleClient, database: Engine
) -> None:
    plain: dict[str, Any] = {"objective": "detection"}
    index_encoder(database, "a", hours=3, scores=(score("knn", 94.0), score("linear", 86.75)), **plain)
    index_encoder(database, "b", hours=2, scores=(score("knn", 95.0), score("knn", 99.0, data="other")), **plain)
    index_encoder(database, "c", hours=1, **plain)
    page = console.get("/console/encoders?objective=detection").text
    heads = "Parameters FLOPs/clip knn demo:digits linear demo:digits knn other Licence"
    assert heads in plain_text_of(page)
    expected = [("a", ["94.00 %", "86.75 %", "–"]), ("b", ["95.00 %", "–", "99.00 %"]), ("c", ["–", "–", "–"])]
    assert listed(page) == expected
    assert re.findall(r'class="best" title="[^"]*">([^<]*)<', page) == ["95.00 %"]
    query = {"objective": "detection", "score": "knn, eval/top1, demo:digits"}
    page = console.get("/console/encoders", params=query).text
    assert listed(page) == [("b", ["95.00 %"]), ("a", ["94.00 %"]), ("c", ["–"])]
    assert '<option value="knn, eval/top1, demo:digits" selected>' in page
    assert 'aria-sort="descending"' in page
    assert '<option value="" >any</option>' in page, "the filter can be removed"
    page = console.get("/console/encoders?objective=&score=unknown").text
    assert "Show" in page
    assert '<option value="" selected>any</option>' in page


def test_a_licence_that_is_not_stated_is_shown_as_such(console: ConsoleClient, database: Engine) -> None:
    index_encoder(database, "licensed", weights_license="Apache-2.0")
    index_encoder(database, "silent")
    assert "Licence not stated" in plain_text_of(console.get("/console/encoders/silent").text)
    assert "Licence Apache-2.0" in plain_text_of(console.get("/console/encoders/licensed").text)
    assert "not stated" in plain_text_of(console.get("/console/encoders").text)
    page = console.get("/console/compare?encoder=licensed&encoder=silent").text
    assert 'aria-current="page">Encoders</a>' in page
    comparison = plain_text_of(page)
    assert "weights_license Apache-2.0 not stated" in comparison.replace('"', "")


def test_scores_are_listed_from_the_strictest_protocol(console: ConsoleClient, database: Engine) -> None:
    found = (score("knn", 94.0, data="b"), score("knn", 93.0, data="a"), score("test", 1.5, "eval/loss"))
    index_encoder(database, "sorted", scores=(*found, score("linear", 86.75), score("few_shot", 50.0)))
    text = plain_text_of(console.get("/console/encoders/sorted").text)
    table = text.partition("Samples test")[2].partition("Facts")[0]
    rows = ["demo:digits eval/loss 1.5 400", "linear demo:digits eval/top1 86.75 % 400", "knn a eval/top1 93.00 % 400"]
    rows += ["knn b eval/top1 94.00 % 400", "few-shot demo:digits eval/top1 50.00 % 400"]
    assert table.strip() == " ".join(rows)


def test_the_comparison_lists_each_difference_once(console: ConsoleClient, app: Any, database: Engine) -> None:
    teacher = {"preset": "demo-image-teacher", "weights": None}
    index_encoder(database, "distilled", teacher=teacher, config={"teacher": teacher, "seed": 0, "start": None})
    index_encoder(database, "alone", config={"teacher": None, "seed": 0, "mask": {"teacher_ratio": 0.5}})
    app.state.encoders.move_alias("default", "teacherless", "alone", "test")
    page = console.get("/console/compare?encoder=distilled&encoder=alone").text
    cell = r'<td class="mono text right"[^>]*>([^<]*)</td>'
    rows = re.findall(rf'<th scope="row" class="mono text">([^<]*)</th>{cell}{cell}', page)
    assert rows == [("config.mask.teacher_ratio", "–", "0.5"), ("config.teacher.preset", "demo-image-teacher", "–")]
    assert page.count('href="/console/encoders/alone">alone</a> <span class="tag accent">teacherless</span>') == 3


def test_several_encoders_are_compared_in_columns_and_the_best_scores_are_named(
    console: ConsoleClient, database: Engine
) -> None:
    for number, (knn, loss) in enumerate(((90.0, 0.5), (92.5, 0.25), (92.5, 0.75), (80.0, 1.0))):
        index_encoder(database, f"wide-{number}", scores=(score("knn", knn), score("test", loss, "eval/loss")))
    query = "&".join(f"encoder=wide-{number}" for number in range(4))
    page = console.get(f"/console/compare?{query}").text
    text = plain_text_of(page)
    assert "the small numbers are each encoder's score minus that of wide-0" in text
    assert "eval/top1 90.00 % best 92.50 % +2.50 best 92.50 % +2.50 80.00 % -10.00" in text
    assert "eval/loss 0.5 best 0.25 -0.25 0.75 +0.25 1 +0.50" in text
    assert 'aria-label="Remove wide-3 from the comparison"' in page
    assert 'href="/console/compare?encoder=wide-0&amp;encoder=wide-1&amp;encoder=wide-2"' in page
    assert "Remove" not in console.get("/console/compare?encoder=wide-0&encoder=wide-1").text


def test_a_list_with_further_pages_says_what_its_scores_cover(
    console: ConsoleClient, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "objective=imported&score=knn, eval/top1, demo:digits"
    for number in range(4):
        index_encoder(database, f"paged-{number}", hours=number, objective=None, scores=(score("knn", 90.0 - number),))
    assert "Older" not in console.get(f"/console/encoders?{query}").text
    monkeypatch.setattr("service.console.pages.encoders.MAX_LISTED", 2)
    page = console.get(f"/console/encoders?{query}").text
    assert "Sorting and the best scores cover the 2 encoders of this page." in page
    (older,) = re.findall(r'href="(/console/encoders[^"]*)">Older', page)
    assert "objective=imported" in older
    first, second = listed(page), listed(console.get(html.unescape(older)).text)
    assert [name for name, _ in first] == ["paged-2", "paged-3"], "the newest, best first"
    assert [name for name, _ in second] == ["paged-0", "paged-1"]


def test_encoders_to_compare_with_are_listed_with_alias_and_score_and_the_scored_ones_first(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    for number, scores in enumerate(((score("knn", 90.0), score("linear", 91.5)), (), (score("knn", 92.5),), ())):
        index_encoder(database, f"option-{number}", hours=100 + number, scores=scores)
    index_encoder(database, "other-option", hours=104)
    app.state.encoders.move_alias("default", "stable", "option-0", "test")
    for path in ("/console/encoders/option-3", "/console/compare?encoder=option-3&encoder=other-option"):
        page = console.get(path).text
        options = [text for text in re.findall(r"<option[^>]*>([^<]*)</option>", page) if text.startswith("option-")]
        assert options == ["option-2, knn 92.50 %", "option-0, stable, linear 91.50 %", "option-1"]


@pytest.mark.parametrize("names", [[], ["wide-0"], ["wide-0", "wide-0"], [f"wide-{number}" for number in range(7)]])
def test_fewer_than_two_and_more_than_six_encoders_are_not_compared(console: ConsoleClient, names: list[str]) -> None:
    response = console.get("/console/compare", params={"encoder": names})
    assert response.status_code == 422
    assert "select 2 to 6" in response.text


def lineage_of(page: str) -> list[list[tuple[str, str, str | None]]]:
    """Return the stages of a page's lineage, with the kind, name and link of each object."""
    (section,) = re.findall(r'<ol class="lineage">(.*?)</ol>', page, re.DOTALL)
    item = r'<span class="small muted">(.*?)</span><br>(?:<a class="text" href="(.*?)">|<span class="text">)(.*?)</'
    stages = re.findall(r"<ul>(.*?)</ul>", section, re.DOTALL)
    return [[(what, name, link or None) for what, link, name in re.findall(item, stage)] for stage in stages]


def test_the_lineage_leads_from_the_teacher_to_the_deployments_and_links_them(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    teacher = {"preset": "demo-image-teacher", "weights": encoder_folder(app.state.settings.root, "teacher-1")}
    job = "search-20260101-000000-0000abcd"
    index_encoder(database, "taught", run=job, teacher=teacher, start={"weights": "timm:vit_small_patch16_224"})
    assert lineage_of(console.get("/console/encoders/taught").text)[0] == [
        ("teacher", "teacher-1", None),
        ("initial weights", "timm:vit_small_patch16_224", None),
        ("data", "demo:digits (1397 samples)", None),
    ]
    index_encoder(database, "teacher-1")
    with Session(database) as session, session.begin():
        session.execute(update(RegisteredEncoder).where(RegisteredEncoder.id == "taught").values(job_id=job))
        card = session.scalars(select(RegisteredEncoder.card).where(RegisteredEncoder.id == "taught")).one()
        trial = {**card, "run": f"{job}-0003-s0"}
        session.execute(update(RegisteredEncoder).where(RegisteredEncoder.id == "taught").values(card=trial))
    app.state.encoders.move_alias("default", "live", "taught", "test")
    for name, encoder, candidate in (
        ("by-alias", "live", None),
        ("by-id", "taught", None),
        ("tested", "other", "live"),
    ):
        desired = new_deployment(
            name, "default", "test", encoder=encoder, candidate=candidate, share=0.1, settings=ServingSettings()
        )
        serving = {"main": "taught"} if candidate is None else {"main": "other", "candidate": "taught"}
        stored, _ = app.state.deployments.put(desired, resolved=serving)
        app.state.deployments.record_status(stored, "healthy", "", serving)
    page = console.get("/console/encoders/taught").text
    sources, *stages = lineage_of(page)
    assert sources[0] == ("teacher", "teacher-1", "/console/encoders/teacher-1")
    assert stages == [
        [("sweep", job, f"/console/jobs/{job}")],
        [("trial", f"{job}-0003-s0", None)],
        [("encoder", "taught", None)],
        [("alias", "live", "#moves-default-live")],
        [
            ("deployment, follows live", "by-alias", "/console/deployments/by-alias"),
            ("deployment", "by-id", "/console/deployments/by-id"),
            ("candidate, 10% of requests", "tested", "/console/deployments/tested"),
        ],
    ]
    assert page.count('class="arrow"') == 5
    assert 'id="moves-default-live"' in page
    for name in ("by-alias", "by-id", "tested"):
        app.state.deployments.delete(name, None, "test")


def test_the_request_for_a_video_encoder_sends_a_video(console: ConsoleClient, database: Engine) -> None:
    index_encoder(database, "films", clip={"frames": 4, "size": 32, "patch": 4, "tubelet": 2})
    index_encoder(database, "pictures")
    films, pictures = (text_of(console.get(f"/console/encoders/{name}").text) for name in ("films", "pictures"))
    assert '"Content-Type: video/mp4"' in films
    assert "@clip.mp4" in films
    assert '"Content-Type: image/png"' in pictures
    assert "@picture.png" in pictures


def test_only_a_deployed_encoder_can_be_tried(
    console: ConsoleClient, reader: ConsoleClient, app: Any, database: Engine
) -> None:
    index_encoder(database, "tried")
    button = '<button class="primary" id="try-button" disabled>'
    page = console.get("/console/encoders/tried").text
    assert button in page
    assert "Deploy this encoder to try it." in page
    assert 'data-opens="deploy"' in page
    assert 'data-opens="deploy"' not in reader.get("/console/encoders/tried").text
    desired = new_deployment(
        "tries", "default", "test", encoder="tried", candidate=None, share=0.0, settings=ServingSettings()
    )
    stored, _ = app.state.deployments.put(desired, resolved={"main": "tried"})
    app.state.deployments.record_status(stored, "healthy", "", {"main": "tried"})
    page = console.get("/console/encoders/tried").text
    assert button not in page
    assert "Deploy this encoder to try it." not in page
    app.state.deployments.delete("tries", None, "test")


def test_a_file_that_cannot_be_encoded_is_named(
    console: ConsoleClient, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*args: Any, **options: Any) -> Any:
        raise invalid_item(0, "is neither an image nor a video")

    monkeypatch.setattr(app.state.gateway, "infer", refuse)
    headers = {"X-CSRF-Token": csrf_token(console.session), "HX-Request": "true"}
    response = console.post("/console/encoders/any/try", files={"file": ("<notes>.txt", b"text")}, headers=headers)
    assert response.status_code == 422
    assert "&lt;notes&gt;.txt: is neither an image nor a video" in response.text
    assert "input 0" not in response.text


def test_the_values_of_a_vector_are_rounded(console: ConsoleClient, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def infer(*args: Any, **options: Any) -> EncoderReply:
        item = {"embedding": [0.123456789, 5.551115123125783e-17, -1e-9], "labels": [], "scores": []}
        return EncoderReply("any", [item], None, 0)

    monkeypatch.setattr(app.state.gateway, "infer", infer)
    headers = {"X-CSRF-Token": csrf_token(console.session), "HX-Request": "true"}
    page = console.post("/console/encoders/any/try", files={"file": ("one.png", b"image")}, headers=headers).text
    assert ">[0.123457, 0.0, 0.0]</pre>" in page
    assert "rounded to 6 decimals" in page
