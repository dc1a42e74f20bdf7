"""Tests for reconstructions by a published student, in the engine and over HTTP with a replica in this process."""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from sqlalchemy import Engine as Database

from amd.artifacts.weights import load_card
from amd.config import ConfigError, DataConfig, TrainConfig
from amd.data.decoding.reader import SampleReader
from amd.downstream.embedding.features import cut_clips, file_chooser
from amd.losses import normalized_pixels, pixel_targets, reconstructed_pixels
from amd.masks import sample_token_sets
from amd.models.student import Student
from amd.reconstruction import HIDDEN
from amd.tokens import patchify, take_tokens, unpatchify
from service.client import Client
from service.inference.engine import (
    Engine,
    EngineSettings,
    InferenceOptions,
    InferenceResult,
    Item,
    RequestLimits,
)
from service.inference.replica import Replica
from service.serving.deployments import new_deployment
from service.serving.schemas import ServingSettings
from service.web.errors import Refusal
from tests.support.encoders.published_encoders import film, picture, publish, run
from tests.support.runs.configs import tiny_image_config, tiny_video_config
from tests.support.runs.published_students import publish_student
from tests.support.service.server import Server, serving

NO_TIME_LIMIT = RequestLimits(decode_timeout_s=30)
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with an image, a video, and an encoder without a decoder."""
    folder = tmp_path_factory.mktemp("reconstructions")
    publish(folder / "bare")
    (folder / "0.png").write_bytes(picture())
    film(folder / "0.mp4")
    return folder


@cache
def decode_clips(url: str, file: Path) -> torch.Tensor:
    """Return a file's clip as the encoder receives it: (1, 3, T, H, W) uint8."""
    card = load_card(url)
    with closing(SampleReader(DataConfig(train=""))) as reader:
        return cut_clips(reader.read_file(str(file), file_chooser(card)), card)


class PublishedStudent:
    """A student, and the folder with its published encoder."""

    def __init__(self, student: Student, config: TrainConfig, url: str) -> None:
        self.student, self.config, self.url = student.eval(), config, url

    @torch.inference_mode()
    def expected_reconstruction(self, file: Path, ratio: float, seed: int) -> dict[str, Any]:
        """Compute the reconstruction directly with the student and the mask sampler used in training."""
        config, clip = self.config, self.config.clip
        clips = decode_clips(self.url, file)
        mask = config.mask.model_copy(update={"student_ratio": ratio, "teacher_ratio": 0.0})
        sets = sample_token_sets(mask, clip.grid, 1, torch.Generator().manual_seed(seed))
        pixels = patchify(clips, clip.tubelet, clip.patch)
        predictions = self.student(
            normalized_pixels(take_tokens(pixels, sets.student_visible), clip), sets
        ).reconstructed
        hidden = take_tokens(pixels, sets.student_masked)
        unit, reconstructed = reconstructed_pixels(predictions, hidden, clip, config.objective.pixels), pixels / 255
        reconstructed[0, sets.student_masked[0]] = unit[0].clip(0, 1)
        return {
            "original": clips[0].numpy(),
            "visible": sets.student_visible[0].tolist(),
            "rebuilt": unpatchify(reconstructed, clip.grid, clip.tubelet, clip.patch)[0].numpy(),
            "loss": (predictions - pixel_targets(hidden, clip, config.objective.pixels)).square().mean().item(),
        }


def publish_run(config: TrainConfig, root: Path, name: str) -> PublishedStudent:
    student, url = publish_student(config, root, name)
    return PublishedStudent(student, config, url)


@pytest.fixture(scope="module")
def image(folder: Path) -> PublishedStudent:
    return publish_run(tiny_image_config(), folder, "image")


@pytest.fixture(scope="module")
def video(folder: Path) -> PublishedStudent:
    return publish_run(tiny_video_config(), folder, "video")


@pytest.fixture(scope="module")
def engine(folder: Path, image: PublishedStudent, video: PublishedStudent) -> Iterator[Engine]:
    """An engine with one slot for each kind of encoder."""
    engine = Engine(EngineSettings(device="cpu", threads=1, decoders=1, limits=NO_TIME_LIMIT))

    async def load() -> None:
        for slot, url in (("image", image.url), ("video", video.url), ("bare", str(folder / "bare"))):
            await engine.load(slot, url)

    run(load())
    yield engine
    run(engine.close())


def reconstruct(engine: Engine, slot: str, *files: Path, **options: Any) -> InferenceResult:
    items = [Item(file.read_bytes()) for file in files]
    return run(engine.infer(slot, items, InferenceOptions(task="reconstruction", **options), DEADLINE_S))


@pytest.mark.parametrize(("kind", "file"), [("image", "0.png"), ("image", "0.mp4"), ("video", "0.mp4")])
@pytest.mark.parametrize(("ratio", "seed"), [(None, 0), (0.5, 7)])
def test_reconstruction_matches_the_student(
    engine: Engine, folder: Path, request: pytest.FixtureRequest, kind: str, file: str, ratio: float | None, seed: int
) -> None:
    published: PublishedStudent = request.getfixturevalue(kind)
    expected = published.expected_reconstruction(folder / file, ratio or 0.75, seed)
    (found,) = reconstruct(engine, kind, folder / file, mask_ratio=ratio, seed=seed).items
    assert (found["mask_ratio"], found["seed"], found["visible"]) == (ratio or 0.75, seed, expected["visible"])
    np.testing.assert_array_equal(found["original"], expected["original"])
    np.testing.assert_allclose(found["rebuilt"], expected["rebuilt"], atol=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    clip = published.config.clip
    tokens = patchify(torch.from_numpy(found["masked"])[None], clip.tubelet, clip.patch)[0].unflatten(-1, (-1, 3))
    hidden = sorted(set(range(clip.grid.tokens)) - set(found["visible"]))
    assert (tokens[hidden] == torch.tensor(HIDDEN)).all()
    visible_tokens = patchify(torch.from_numpy(found["original"])[None], clip.tubelet, clip.patch)[0].unflatten(
        -1, (-1, 3)
    )
    assert torch.equal(tokens[found["visible"]], visible_tokens[found["visible"]])


def test_the_mask_depends_only_on_the_seed_and_ratio(engine: Engine, folder: Path) -> None:
    files = [folder / "0.png", folder / "0.mp4"]

    async def infer_all() -> list[InferenceResult]:
        items = [Item(file.read_bytes()) for file in files]
        options = [InferenceOptions(task="reconstruction", seed=seed) for seed in (1, 2, 1)] + [InferenceOptions()]
        return await asyncio.gather(*(engine.infer("image", items, options, DEADLINE_S) for options in options))

    one, other, again, vectors = run(infer_all())
    masks = [[item["visible"] for item in result.items] for result in (one, other, again)]
    assert masks[0][0] == masks[0][1] == masks[2][0] != masks[1][0]
    for first, second in zip(one.items, again.items, strict=True):
        np.testing.assert_allclose(first["rebuilt"], second["rebuilt"], atol=1e-5)
    assert all("embedding" in item for item in vectors.items)
    state = engine.state()
    assert state["in_flight"] == state["queued_tokens"] == state["queued_bytes"] == 0


@pytest.mark.parametrize(
    ("slot", "options", "reason"),
    [
        ("bare", {}, "bare was published without its decoder"),
        ("image", {"mask_ratio": 0.0}, "to reconstruct"),
        ("image", {"mask_ratio": 0.05}, "mask_ratio: a mask ratio of 0.05"),
        ("image", {"mask_ratio": 1.0}, "less than 1"),
        ("image", {"mask_ratio": -1.0}, "at least 0"),
        ("video", {"views": "2x1"}, "omit `views`"),
    ],
)
def test_unsupported_reconstructions_are_rejected_and_leave_the_queue_empty(
    engine: Engine, folder: Path, slot: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refusal, match=reason) as refused:
        reconstruct(engine, slot, folder / "0.png", **options)
    with pytest.raises(Refusal, match="17 items exceed the limit of 16") as too_many:
        reconstruct(engine, "image", *[folder / "0.png"] * 17)
    assert refused.value.code == too_many.value.code == "not_possible"
    assert engine.state()["queued_tokens"] == engine.state()["queued_bytes"] == 0


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"nothing")])
def test_an_encoder_with_a_damaged_decoder_is_not_loaded(
    engine: Engine, video: PublishedStudent, tmp_path: Path, damage: Any
) -> None:
    shutil.copytree(video.url, tmp_path / "torn")
    damage(tmp_path / "torn" / "decoder.safetensors")
    with pytest.raises(ConfigError, match=r"decoder\.safetensors"):
        run(engine.load("torn", str(tmp_path / "torn")))


# Over HTTP


class ReconstructionService:
    """A control plane with deployments whose replicas run in this process."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch, **urls: str) -> None:
        self.server, self.urls = server, urls
        self.replicas: dict[str, Any] = {}
        store = server.app.state.deployments
        for name in urls:
            deployment, _ = store.put(
                new_deployment(
                    name, "default", "test", encoder=name, candidate=None, share=0.0, settings=ServingSettings()
                )
            )
            store.record_status(deployment, "healthy", "", {"main": name})
        monkeypatch.setattr(server.app.state.gateway, "_exchange", self._exchange)
        monkeypatch.setattr("service.inference.replica.bind_to_node_address", lambda: None)  # Serve is not running

    async def _exchange(self, method: str, name: str, body: bytes, seconds: float) -> httpx.Response:
        if name not in self.replicas:
            settings = {"device": "cpu", "threads": 1, "decoders": 1, "limits": NO_TIME_LIMIT.model_dump()}
            self.replicas[name] = Replica.func_or_class(settings)
            await self.replicas[name].reconfigure({"main": self.urls[name]})

        class FakeRequest:
            method = "POST"

            async def body(self) -> bytes:
                return body

        reply = await self.replicas[name](FakeRequest())
        return httpx.Response(reply.status_code, content=bytes(reply.body))

    def reconstruct(self, name: str, query: str = "", **args: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.server.key}", **args.pop("headers", {})}
        url = f"{self.server.url}/v1/encoders/{name}/reconstructions{query}"
        return httpx.post(url, headers=headers, timeout=DEADLINE_S, **args)

    def close(self) -> None:
        for replica in self.replicas.values():
            run(replica._engine.close())


@pytest.fixture
def service(
    sqlite_engine: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    image: PublishedStudent,
    video: PublishedStudent,
) -> Iterator[ReconstructionService]:
    with serving(sqlite_engine, tmp_path) as server:
        service = ReconstructionService(
            server, monkeypatch, image=image.url, video=video.url, bare=str(folder / "bare")
        )
        yield service
        service.close()


def decode_png(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_reconstructions_are_returned_as_pngs_for_every_content_type(
    service: ReconstructionService, folder: Path, image: PublishedStudent, video: PublishedStudent
) -> None:
    png, mp4 = (folder / "0.png").read_bytes(), (folder / "0.mp4").read_bytes()
    expected = image.expected_reconstruction(folder / "0.png", 0.5, 3)
    forms: list[dict[str, Any]] = [
        {"query": "?mask_ratio=0.5&seed=3", "content": png, "headers": {"Content-Type": "image/png"}},
        {"files": {"file": ("0.png", png)}, "data": {"mask_ratio": "0.5", "seed": "3"}},
        {"json": {"input": {"base64": base64.b64encode(png).decode()}, "mask_ratio": 0.5, "seed": 3}},
    ]
    for form in forms:
        response = service.reconstruct("image", **form)
        assert response.status_code == 200, response.text
        found = response.json()
        assert found.keys() == {
            "encoder", "mask_ratio", "seed", "visible", "loss", "original", "masked", "rebuilt"
        }  # fmt: skip
        assert (found["encoder"], found["mask_ratio"], found["seed"]) == ("image", 0.5, 3)
        assert found["visible"] == expected["visible"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        np.testing.assert_array_equal(decode_png(found["original"]), expected["original"][:, 0].transpose(1, 2, 0))
        rebuilt = expected["rebuilt"][:, 0].transpose(1, 2, 0) * 255
        assert np.abs(decode_png(found["rebuilt"]) - rebuilt).max() < 0.51
    with Client(service.server.url, service.server.key) as client:
        film, again = client.reconstructions("video", [mp4, folder / "0.mp4"], seed=3)
    assert film.visible == again.visible == video.expected_reconstruction(folder / "0.mp4", 0.75, 3)["visible"]
    assert (film.encoder, film.index, again.index, film.rebuilt) == ("video", 0, 1, again.rebuilt)
    row = decode_png(film.original)
    assert row.shape == (16, 4 * 16, 3)
    frames = video.expected_reconstruction(folder / "0.mp4", 0.75, 3)["original"]
    np.testing.assert_array_equal(row[:, 16:32], frames[:, 1].transpose(1, 2, 0))


def test_a_single_item_can_be_returned_as_a_png_and_invalid_requests_return_error_codes(
    service: ReconstructionService, folder: Path
) -> None:
    png = (folder / "0.png").read_bytes()
    picture: dict[str, Any] = {"content": png, "headers": {"Content-Type": "image/png"}}
    accept = {"Accept": "image/png"}
    for name in ("image", "video"):
        response = service.reconstruct(name, content=png, headers=accept | picture["headers"])
        assert (response.status_code, response.headers["Content-Type"], response.headers["X-Encoder"]) == (
            200, "image/png", name,
        )  # fmt: skip
        page = Image.open(io.BytesIO(response.content))
        assert page.height > 3 * 192
    two = service.reconstruct("image", json={"input": [{"base64": base64.b64encode(png).decode()}] * 2}, headers=accept)
    cases = [
        (two, "not_possible", "one item"),
        (service.reconstruct("bare", **picture), "not_possible", "without its decoder"),
        (service.reconstruct("image", "?mask_ratio=0.01", **picture), "not_possible", "to reconstruct"),
        (service.reconstruct("image", "?mask_ratio=1", **picture), "request_invalid", ""),
        (service.reconstruct("image", "?seed=-1", **picture), "request_invalid", ""),
    ]
    for response, code, reason in cases:
        assert (response.status_code, response.json()["code"]) == (422, code), response.text
        assert reason in response.text
