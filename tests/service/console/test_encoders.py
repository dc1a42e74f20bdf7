"""Tests for the pages of an encoder."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine

from amd.config import TrainConfig
from amd.presets.load import load_config
from service.auth.sessions import csrf_token
from service.registry.discovery import EncoderDiscovery
from service.serving.deployments import new_deployment
from service.serving.schemas import ServingSettings
from service.web.errors import invalid_item
from tests.support.browser.console_client import ConsoleClient, text_of
from tests.support.encoders.encoder_cards import index_encoder, score
from tests.support.runs.published_students import publish_student


def test_the_code_for_python_embeds_clips(console: ConsoleClient, app: Any) -> None:
    root = app.state.settings.root
    _, url = publish_student(load_config(TrainConfig, "demo-image-mae", None, {}), Path(root), "embeds")
    EncoderDiscovery(app.state.encoders, root).register(url)
    page = console.get("/console/encoders/embeds").text
    (code,) = re.findall(r'<pre id="python-code"[^>]*>(.*?)</pre>', page, re.DOTALL)
    names: dict[str, Any] = {"clips": torch.zeros(2, 3, 1, 32, 32, dtype=torch.uint8)}
    exec(html.unescape(code), names)
    assert names["vectors"].shape == (2, 64)


def plain_text_of(page: str) -> str:
    return " ".join(text_of(page).split())


def test_the_list_shows_the_alias_and_the_score_of_the_strictest_protocol(
    console: ConsoleClient, app: Any, database: Engine
) -> None:
    index_encoder(database, "scored", hours=1, scores=(score("knn", 94.0), score("linear", 86.75)))
    index_encoder(database, "plain", hours=2)
    app.state.encoders.move_alias("default", "best", "scored", "test")
    page = console.get("/console/encoders").text
    assert '<a class="job-name" href="/console/encoders/scored">best</a><span class="job-id">scored</span>' in page
    assert '<a class="job-name" href="/console/encoders/plain">plain</a>' in page
    assert "linear 86.8 %" in plain_text_of(page)
    assert "not scored" in page


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
    page = console.get("/console/encoders/distilled/compare?other=alone").text
    rows = re.findall(r'<td class="mono text">([^<]*)</td>.*?right">([^<]*)</td>.*?right">([^<]*)</td>', page)
    assert rows == [("config.mask.teacher_ratio", "–", "0.5"), ("config.teacher.preset", "demo-image-teacher", "–")]
    assert page.count('<a href="/console/encoders/alone">teacherless</a><span class="job-id">alone</span>') == 3


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
