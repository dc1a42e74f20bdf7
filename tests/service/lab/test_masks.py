"""Tests for the mask lab over HTTP, with its replica in this process."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ray.serve.schema import ServeApplicationSchema
from sqlalchemy import Engine

from amd.config import TrainConfig, validate, with_overrides
from amd.presets.load import PRESETS_BY_KIND
from amd.presets.teachers import teacher_recipe
from amd.training.checkpoints.state import stream_seed
from amd.training.process_group import ProcessGroup
from amd.training.runs.checks import check_data
from amd.training.runs.teachers import teacher_id
from amd.training.trainer.distiller import Distiller
from service.client import ApiError, AsyncClient, Client
from service.db.engine import open_engine
from service.inference.engine import Engine as InferenceEngine
from service.inference.engine import EngineSettings, InferenceOptions, Item
from service.lab.gateway import APPLICATION, FAILED, NAME
from service.lab.schemas import LabView
from service.registry.discovery import EncoderDiscovery
from service.serving.serve_api import ServeApplication
from tests.support.encoders.published_encoders import film, picture, publish, run
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config
from tests.support.runs.published_students import publish_student, save_checkpoint
from tests.support.service.apps import key_to
from tests.support.service.engines import NO_TIME_LIMIT
from tests.support.service.fake_cluster import queued
from tests.support.service.local_lab import LocalLab
from tests.support.service.server import Server, serving

PRESET = "demo-image-amd"
PNG = {"Content-Type": "image/png"}


class LabService:
    """A control plane whose lab runs in this process."""

    def __init__(self, server: Server) -> None:
        self.server, self.lab, self.client = server, LocalLab(server.app), httpx.Client(timeout=120)
        self.serve = self.lab.serve

    def post(self, query: str = "", **args: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.server.key}", **args.pop("headers", {})}
        return self.client.post(f"{self.server.url}/v1/lab/masks{query}", headers=headers, **args)

    def view(self, query: str = "", **args: Any) -> Any:
        response = self.post(query, **args)
        assert response.status_code == 200, response.text
        return response.json()

    def reject(self, query: str = "", **args: Any) -> tuple[int, str, str]:
        found = self.post(query, **args).json()
        return found["status"], found["code"], found["detail"]

    def submit(self, preset: str, **overrides: Any) -> str:
        """Submit a training job and return its ID."""
        headers = {"Authorization": f"Bearer {self.server.key}"}
        body = {"kind": "train", "preset": preset, "overrides": overrides}
        return str(self.client.post(f"{self.server.url}/v1/jobs", json=body, headers=headers).json()["id"])

    def close(self) -> None:
        self.client.close()
        self.lab.engine.close()


@pytest.fixture(scope="module")
def service(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabService]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "control-plane.db").write_bytes(sqlite_template.read_bytes())
    engine = open_engine(f"sqlite:///{folder / 'control-plane.db'}")
    root = folder / "root"
    publish_student(tiny_image_config(), root, "image")
    publish_student(tiny_video_config(), root, "video")
    publish(root / "encoders" / "bare")
    with serving(engine, folder) as server:
        EncoderDiscovery(server.app.state.encoders, str(root)).scan()
        service = LabService(server)
        yield service
        service.close()
    engine.dispose()


def pixels(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_first_request_declares_the_lab_application_and_keeps_the_others(service: LabService) -> None:
    theirs = {"name": "theirs", "import_path": "x:y", "deployments": []}
    service.serve.put([theirs])
    service.view()
    assert service.serve.apps.keys() == {"theirs", NAME}
    assert service.serve.apps[NAME].config.items() >= APPLICATION.items()
    service.serve.apps = {}
    service.serve.unreachable = True
    assert service.reject()[:2] == (503, "cluster_unavailable")
    service.serve.unreachable = False


def test_an_application_that_failed_to_start_is_declared_again(service: LabService) -> None:
    failed = ServeApplication(FAILED, "no module named torch", {"name": NAME}, 0)
    service.serve.apps, service.serve.status = {NAME: failed}, FAILED
    service.lab.is_running = False
    status, code, detail = service.reject()
    assert (status, code) == (503, "lab_unavailable")
    assert "failed to start and is being restarted" in detail
    assert service.serve.apps[NAME].config.items() >= APPLICATION.items()
    service.serve.status, service.lab.is_running = "RUNNING", True
    service.view()


def test_ray_serve_accepts_the_application() -> None:
    ServeApplicationSchema.model_validate(APPLICATION)
    module, _, name = APPLICATION["import_path"].partition(":")
    built = getattr(import_module(module), name)(APPLICATION["args"])
    assert built._bound_deployment.name == APPLICATION["deployments"][0]["name"]


def test_masks_are_drawn_without_a_file_and_compared_with_the_preset(service: LabService) -> None:
    found = service.view(f"?preset={PRESET}&teacher_ratio=0.25&seed=3")
    base = PRESETS_BY_KIND["train"][PRESET].config
    assert found["layers"].keys() == {"student", "teacher", "roles", "masked"}
    assert found["mask"]["teacher_ratio"] == 0.25
    assert found["mask"]["student_ratio"] == found["cost"]["baseline_student_ratio"] == base.mask.student_ratio
    assert found["cost"]["relative"] > 1.0
    assert found["encoder"] is found["loss"] is None
    sets = {name: set(tokens) for name, tokens in found["token_sets"].items()}
    assert sets["student_visible"] | sets["student_masked"] == set(range(16))
    assert sets["teacher_only"] < sets["student_masked"]
    assert pixels(found["layers"]["student"]).shape == (32, 32, 3)


def test_masks_match_training_for_any_seed_step_batch_and_position(service: LabService) -> None:
    config = mae(with_overrides(PRESETS_BY_KIND["train"]["demo-video-mae"].config, {"scaling.workers": 1}))
    learner = Distiller(config, ProcessGroup(), None)

    @settings(max_examples=10, deadline=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        values = {
            "student_ratio": data.draw(st.sampled_from([0.5, 0.75, 0.9])),
            "teacher_ratio": data.draw(st.sampled_from([0.0, 0.25])),
            "strategy": data.draw(st.sampled_from(["random", "tube"])),
            "seed": data.draw(st.integers(0, 2**31 - 1)),
            "batch_size": data.draw(st.integers(1, 9)),
        }
        step, row = data.draw(st.integers(0, 10**6)), data.draw(st.integers(0, values["batch_size"] * 4 - 1))
        found = service.view(params={**values, "preset": "demo-video-mae", "step": step, "position": row})
        mask = {f"mask.{name}": values[name] for name in ("student_ratio", "teacher_ratio", "strategy")}
        learner.config = with_overrides(
            config, {**mask, "seed": values["seed"], "optim.batch_size": values["batch_size"]}
        )
        trained = learner.token_sets(step).rows(row, row + 1)
        assert found["mask"]["clips_per_step"] == values["batch_size"] * 4
        assert found["token_sets"] == {name: index[0].tolist() for name, index in trained._asdict().items()}

    check()


@pytest.mark.parametrize(("name", "suffix"), [("image", "png"), ("video", "mp4")])
def test_reconstructed_pixels_match_a_reconstruction_request(
    service: LabService, tmp_path: Path, name: str, suffix: str
) -> None:
    content = picture() if suffix == "png" else film(tmp_path / "0.mp4").read_bytes()
    found = service.view(f"?encoder={name}&seed=5&step=7&batch_size=1", content=content, headers=PNG)
    engine = InferenceEngine(EngineSettings(device="cpu", threads=1, decoders=1, limits=NO_TIME_LIMIT))

    async def reconstruct() -> Any:
        await engine.load("main", f"{service.server.app.state.settings.root}/encoders/{name}")
        options = InferenceOptions(task="reconstruction", seed=stream_seed(5, "masks", 7))
        return (await engine.infer("main", [Item(content)], options, 120)).items[0]

    expected = run(reconstruct())
    run(engine.close())
    assert found["token_sets"]["student_visible"] == expected["visible"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert len(found["errors"]) == len(found["token_sets"]["reconstructed"])
    rebuilt = expected["rebuilt"].transpose(2, 1, 3, 0).reshape(16, -1, 3) * 255  # frames from left to right
    assert np.abs(pixels(found["layers"]["rebuilt"]) - rebuilt).max() < 0.51
    assert found["columns"] == expected["rebuilt"].shape[1]
    assert found["layers"].keys() >= {"input", "error"}


def test_every_content_type_returns_the_same_view(service: LabService) -> None:
    png = picture()
    text = base64.b64encode(png).decode()
    raw = service.view("?encoder=image&seed=2", content=png, headers=PNG)
    form = service.view(files={"file": ("0.png", png)}, data={"encoder": "image", "seed": "2"})
    body = service.view(json={"input": {"base64": text}, "encoder": "image", "seed": 2})
    assert raw == form == body
    assert "input" not in service.view(json={"encoder": "image"})["layers"]


def test_both_clients_draw_the_same_masks(service: LabService) -> None:
    async def draw() -> LabView:
        async with AsyncClient(service.server.url, service.server.key) as amd:
            return await amd.masks(picture(), encoder="image", seed=2)

    with Client(service.server.url, service.server.key) as amd:
        found = amd.masks(picture(), encoder="image", seed=2)
        plain = amd.masks(student_ratio=0.5, teacher_ratio=0.25)
        with pytest.raises(ApiError, match="less than 1"):
            amd.masks(student_ratio=1)
    assert found == asyncio.run(draw())
    assert found.model_dump(mode="json") == service.view("?encoder=image&seed=2", content=picture(), headers=PNG)
    assert (plain.mask.student_ratio, plain.preset) == (0.5, PRESET)
    assert "input" not in plain.layers


def test_a_sample_of_a_jobs_data_can_be_the_input(service: LabService) -> None:
    job = service.submit("demo-image-mae", **{"mask.student_ratio": 0.5})
    found = service.view(f"?job={job}&record=3")
    assert (found["job"], found["preset"]) == (job, None)
    assert found["mask"]["student_ratio"] == found["cost"]["baseline_student_ratio"] == 0.5
    assert pixels(found["layers"]["input"]).std() > 1
    assert service.view(f"?job={job}&record=4")["layers"]["input"] != found["layers"]["input"]
    assert pixels(service.view(f"?job={job}&record=3&encoder=image")["layers"]["input"]).shape == (16, 16, 3)
    assert "must be below 6000" in service.reject(f"?job={job}&record=6000")[2]


def test_a_jobs_checkpoint_reconstructs_like_the_encoder_published_from_it(service: LabService) -> None:
    root, job = Path(service.server.app.state.settings.root), service.submit("demo-image-mae")
    config = validate(TrainConfig, service.server.app.state.jobs.get(job).config)
    publish_student(config, root, job)
    EncoderDiscovery(service.server.app.state.encoders, str(root)).scan()
    found = service.view(f"?job={job}&checkpoint=1&record=3&seed=1")
    published = service.view(f"?job={job}&encoder={job}&record=3&seed=1")
    assert (found["checkpoint"], found["encoder"]) == (1, None)
    assert found["layers"] == published["layers"]
    assert found["layers"].keys() >= {"rebuilt", "error"}
    assert found["errors"] == published["errors"]
    assert "checkpoint=2: " in service.reject(f"?job={job}&checkpoint=2")[2]


def test_a_checkpoint_is_aligned_with_the_teacher_that_its_preset_trained(service: LabService) -> None:
    root, job = Path(service.server.app.state.settings.root), service.submit("demo-image-amd")
    config = validate(TrainConfig, service.server.app.state.jobs.get(job).config)
    save_checkpoint(config, root, job)
    query = f"?job={job}&checkpoint=1&record=3"
    assert "the teacher is not trained yet" in service.reject(f"{query}&alignment=true")[2]
    recipe = teacher_recipe(config)
    publish_student(recipe, root, "demo-image-teacher-another", "another digest")
    publish_student(recipe, root, teacher_id("demo-image-teacher", recipe), check_data(recipe).digest)
    found = service.view(f"{query}&alignment=true")
    sets, alignment = found["token_sets"], found["alignment"]
    assert found["layers"].keys() >= {"alignment", "rebuilt", "error"}
    assert len(alignment["direct_tokens"]) == len(sets["student_visible"])
    assert len(alignment["generation_tokens"]) == len(sets["teacher_only"])
    assert alignment["direct"] == pytest.approx(np.mean(alignment["direct_tokens"])) != 0
    assert alignment["generation"] == pytest.approx(np.mean(alignment["generation_tokens"])) != 0
    without = service.view(query)
    assert without["alignment"] is None
    assert "alignment" not in without["layers"]
    equal = service.view(f"{query}&alignment=true&teacher_ratio=0.75")
    assert equal["alignment"]["generation"] is None
    assert "alignment" not in service.view(f"?job={job}&checkpoint=1&alignment=true")["layers"]  # no input


def test_a_teacher_in_another_project_is_not_loaded(service: LabService) -> None:
    root = Path(service.server.app.state.settings.root)
    publish_student(mae(tiny_image_config()), root, "theirs")
    EncoderDiscovery(service.server.app.state.encoders, str(root)).scan()
    config = tiny_image_config(teacher__weights="theirs").model_dump(mode="json")
    job = queued(service.server.app.state.jobs, project="other", config=config)
    save_checkpoint(validate(TrainConfig, config), root, job.id)
    status, code, detail = service.reject(f"?job={job.id}&checkpoint=1&alignment=true&record=0")
    assert (status, code) == (404, "not_found")
    assert "teacher.weights=theirs" in detail


def test_a_student_without_a_teacher_is_not_aligned(service: LabService) -> None:
    job = service.submit("demo-image-mae")
    assert "the job has no teacher" in service.reject(f"?job={job}&checkpoint=1&alignment=true")[2]


@pytest.mark.parametrize(
    ("query", "code", "reason"),
    [
        ("?encoder=image&alignment=true", "not_possible", "which only checkpoints have; set checkpoint"),
        ("?alignment=sometimes", "request_invalid", "alignment"),
        ("?preset=demo-image", "config_invalid", "demo-image-"),
        ("?student_ratio=0.5&teacher_ratio=0.75", "config_invalid", "mask.teacher_ratio=0.75 must not be above"),
        ("?position=32", "not_possible", "position=32 must be from 0 to 31"),
        ("?student_ratio=1", "request_invalid", "less than 1"),
        ("?ratio=0.5", "request_invalid", "ratio"),
        ("?encoder=bare", "not_possible", "bare was published without its decoder"),
        ("?encoder=image&preset=demo-image-amd", "not_possible", "set one of them"),
        ("?record=1", "not_possible", "set job, too"),
        ("?checkpoint=1", "not_possible", "set job, and neither encoder nor preset"),
        ("?batch_size=16777216", "not_possible", "lower batch_size"),
    ],
)
def test_impossible_settings_are_rejected_with_a_reason(
    service: LabService, query: str, code: str, reason: str
) -> None:
    response = service.post(query)
    assert (response.status_code, response.json()["code"]) == (422, code)
    assert reason in response.text


def test_using_a_job_requires_the_read_scope(service: LabService) -> None:
    engine: Engine = service.server.app.state.engine
    headers = key_to(engine, "infer")
    assert service.post(headers=headers).status_code == 200
    assert service.reject("?job=train-1", headers=headers)[:2] == (403, "forbidden")
    other = key_to(engine, "infer", "read", project="other")
    assert service.reject("?job=train-1", headers=other)[:2] == (404, "not_found")


def test_a_file_that_is_not_an_image_is_rejected(service: LabService) -> None:
    status, code, detail = service.reject(content=b"not an image", headers=PNG)
    assert (status, code) == (422, "item_invalid")
    assert detail.startswith("input 0: ")
    assert service.reject(content=b"text", headers={"Content-Type": "text/plain"})[:2] == (
        415,
        "unsupported_media_type",
    )


def test_a_lab_that_does_not_start_in_time_is_reported_as_unavailable(
    service: LabService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.serve, "put", lambda applications: None)
    service.serve.apps = {}
    assert service.reject("?deadline_s=0.2")[:2] == (503, "lab_unavailable")
    service.lab.status = 500
    status, code, detail = service.reject()
    assert (status, code, detail) == (
        503,
        "lab_unavailable",
        "the lab's replica failed (Ray Serve returned 500); try again",
    )
    service.lab.status = 404
