"""Tests for encoders served by a real Ray Serve and control plane, under load and with failures."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image

from amd.downstream.embedding.features import embed_file
from service.client import Client
from service.inference.lab import LabEngine
from service.lab.gateway import NAME as LAB
from service.serving.protocol import CANDIDATE, pack, unpack
from service.serving.requests import RequestOptions
from service.stack.ports import free_ports
from tests.support.data.videos import pictures, write_video
from tests.support.encoders.published_encoders import IMAGE, VIDEO, publish
from tests.support.ray_cluster import RayCluster
from tests.support.runs.configs import tiny_image_config
from tests.support.runs.published_students import publish_student
from tests.support.service.control_plane import ControlPlane, wait_for

pytestmark = pytest.mark.ray
START_S = 300
ARROW = "application/vnd.apache.arrow.stream"


class ServedEncoders(NamedTuple):
    """A control plane with encoders deployed on Ray Serve."""

    plane: ControlPlane
    folder: Path
    """Folder with files under an allowed prefix."""
    key: str

    def offline(self, encoder: str, file: Path) -> np.ndarray[Any, Any]:
        return embed_file(f"{self.plane.data}/root/encoders/{encoder}", str(file))

    def post(self, encoder: str, client: httpx.Client | None = None, **args: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}", **args.pop("headers", {})}
        url = f"{self.plane.url}/v1/encoders/{encoder}/embeddings"
        return (client or httpx).post(url, headers=headers, timeout=120, **args)

    def deploy(self, name: str, **body: Any) -> None:
        self.plane.request("PUT", f"/deployments/{name}", json=body)
        wait_for(lambda: self.state(name)["state"] == "healthy", START_S)

    def state(self, name: str) -> Any:
        found = self.plane.request("GET", f"/deployments/{name}")
        assert found["state"] != "failed", found
        return found


@pytest.fixture(scope="module")
def served(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedEncoders]:
    folder = tmp_path_factory.mktemp("serving")
    port = str(free_ports(1)[0])
    plane = ControlPlane(
        folder / "data", ray_cluster.dashboard, AMD_ALLOWED_URIS=str(folder / "files"), AMD_SERVE_PORT=port
    )
    for seed, name in enumerate(("first", "second")):
        publish(plane.data / "root" / "encoders" / name, IMAGE, seed=seed)
    publish(plane.data / "root" / "encoders" / "moving", VIDEO)
    publish_student(tiny_image_config(), plane.data / "root", "student")
    files = folder / "files"
    files.mkdir()
    noise = np.random.default_rng(0)
    for number in range(4):
        pixels = noise.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(files / f"{number}.png")
    write_video(files / "clip.mp4", pictures(24, 64, 48))
    plane.start()
    served = ServedEncoders(plane, files, plane.key)
    try:
        wait_for(lambda: len(plane.request("GET", "/encoders")["items"]) == 4)
        plane.request("PUT", "/encoders/aliases/production", json={"encoder": "first"})
        served.deploy("images", encoder="production")
        served.deploy("videos", encoder="moving")
        yield served
    finally:
        for name in ("images", "videos"):
            plane.request("DELETE", f"/deployments/{name}")
        wait_for(lambda: _applications(ray_cluster).keys() <= {LAB}, 120)
        httpx.delete(f"{ray_cluster.dashboard}/api/serve/applications/", timeout=60).raise_for_status()
        wait_for(lambda: not _applications(ray_cluster), 120)
        plane.kill()


def test_the_cluster_lists_deployments_on_the_node_of_their_replicas(served: ServedEncoders) -> None:
    nodes = served.plane.request("GET", "/cluster")["nodes"]
    assert [node["deployments"] for node in nodes if node["state"] == "alive"] == [["images", "videos"]]


@pytest.mark.timeout(900)
def test_every_request_format_returns_the_same_vector(served: ServedEncoders) -> None:
    for encoder, name, file, media in (
        ("first", "production", served.folder / "0.png", "image/png"),
        ("moving", "videos", served.folder / "clip.mp4", "video/mp4"),
    ):
        expected, content = served.offline(encoder, file), file.read_bytes()
        text = base64.b64encode(content).decode()
        requests = {
            "the file as the body": {"content": content, "headers": {"Content-Type": media}},
            "a body of unspecified type": {
                "content": content, "headers": {"Content-Type": "application/octet-stream"},
            },
            "a form": {"files": {"file": (file.name, content, media)}},
            "base64": {"json": {"input": {"base64": text}}},
            "a data URL": {"json": {"input": f"data:{media};base64,{text}"}},
            "a URI": {"json": {"input": {"uri": str(file)}}},
            "base64 both ways": {"json": {"input": {"uri": str(file)}, "encoding_format": "base64"}},
        }  # fmt: skip
        for form, args in requests.items():
            response = served.post(name, **args)
            assert response.status_code == 200, (form, response.text)
            found = response.json()
            assert found["encoder"] == response.headers["X-Encoder"] == encoder
            vector = found["embedding"]
            if isinstance(vector, str):
                vector = np.frombuffer(base64.b64decode(vector), "<f4")
            np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5, err_msg=form)


def test_batches_keep_their_order_in_every_response_format(served: ServedEncoders) -> None:
    import pyarrow as pa

    files = sorted(served.folder.glob("*.png"))
    expected = np.stack([served.offline("first", file) for file in files])
    body = {"input": [{"uri": str(file)} for file in files]}
    found = served.post("production", json=body).json()
    assert [item["index"] for item in found["data"]] == [0, 1, 2, 3]
    np.testing.assert_allclose([item["embedding"] for item in found["data"]], expected, atol=1e-5)
    form = served.post("first", files=[("file", (file.name, file.read_bytes())) for file in files]).json()
    np.testing.assert_allclose([item["embedding"] for item in form["data"]], expected, atol=1e-5)
    array = np.load(io.BytesIO(served.post("first", json=body, headers={"Accept": "application/x-npy"}).content))
    np.testing.assert_allclose(array, expected, atol=1e-5)
    table = pa.ipc.open_stream(served.post("first", json=body, headers={"Accept": ARROW}).content).read_all()
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, atol=1e-5)
    assert table.schema.metadata == {b"encoder": b"first"}
    tokens = served.post("first", json={**body, "tokens": "patch"}).json()
    with Client(served.plane.url, served.key) as client:
        received = client.embeddings("first", list(map(str, files)), tokens="patch")
    np.testing.assert_allclose(
        [view.tokens for view in received], [item["tokens"] for item in tokens["data"]], atol=1e-5
    )
    normal = served.post("first", json={**body, "normalize": True}).json()
    lengths = np.linalg.norm([item["embedding"] for item in normal["data"]], axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-5)


def test_the_openai_client_lists_models_and_embeds_images(served: ServedEncoders) -> None:
    from openai import OpenAI  # takes seconds, which each pytest process would spend on collecting this file

    client = OpenAI(base_url=f"{served.plane.url}/openai/v1", api_key=served.key)
    assert {"production", "first", "moving"} <= {model.id for model in client.models.list()}
    file = served.folder / "1.png"
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    found = client.embeddings.create(model="production", input=[url, str(file)])
    for item in found.data:
        np.testing.assert_allclose(item.embedding, served.offline("first", file), atol=1e-5)


def test_each_invalid_request_returns_an_error_code(served: ServedEncoders) -> None:
    key = {"Authorization": f"Bearer {served.key}"}
    base = f"{served.plane.url}/v1/encoders"
    png = (served.folder / "0.png").read_bytes()
    picture = {"content": png, "headers": {"Content-Type": "image/png"}}
    plain = {"content": png, "headers": {"Content-Type": "text/plain"}}
    text_upload = {"content": b"text", "headers": {"Content-Type": "image/png"}}
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("nobody/embeddings", picture, 409, "encoder_not_deployed"),
        ("second/embeddings", picture, 409, "encoder_not_deployed"),
        ("first/embeddings", text_upload, 422, "item_invalid"),
        ("first/embeddings", plain, 415, "unsupported_media_type"),
        ("first/embeddings", {"json": {"input": "/etc/passwd"}}, 422, "uri_not_allowed"),
        ("first/embeddings", {"json": {"input": {"base64": "?"}}}, 422, "request_invalid"),
        ("first/embeddings", {"json": {"input": []}}, 422, "request_invalid"),
        ("first/embeddings", {"json": {"input": [{"uri": str(served.folder / "missing.png")}]}}, 422, "item_invalid"),
        ("first/classifications", picture, 422, "not_possible"),
        ("first/reconstructions", picture, 422, "not_possible"),
    ]
    for path, args, status, code in cases:
        args = {**args, "headers": {**key, **args.get("headers", {})}}
        response = httpx.post(f"{base}/{path}", timeout=60, **args)
        assert (response.status_code, response.json()["code"]) == (status, code), (path, response.text)


@pytest.mark.timeout(900)
def test_no_request_fails_while_an_alias_moves_twenty_times_under_load(served: ServedEncoders) -> None:
    file = served.folder / "2.png"
    expected = {name: served.offline(name, file) for name in ("first", "second")}
    with under_load(served, "production", [file]) as responses:
        for number in range(20):
            to = ("second", "first")[number % 2]
            served.plane.request("PUT", "/encoders/aliases/production", json={"encoder": to})
            wait_for(lambda to=to: responses[-1].json().get("encoder") == to, 60)
    assert {response.status_code for response in responses} == {200}
    for response in responses:
        found = response.json()
        np.testing.assert_allclose(found["embedding"], expected[found["encoder"]], atol=1e-5)


@pytest.mark.timeout(900)
def test_no_request_fails_while_a_candidate_is_added_and_removed_under_load(served: ServedEncoders) -> None:
    files = sorted(served.folder.glob("*.png"))
    with under_load(served, "production", files) as responses:
        served.deploy("images", encoder="production", candidate="second", share=0.5)
        assert served.state("images")["serving"] == {"main": "first", "candidate": "second"}
        began = len(responses)
        wait_for(lambda: len(responses) > began + 100)
        counts = Counter(response.json().get("encoder") for response in responses[began:])
        drift = served.plane.request("GET", "/deployments/images/drift")
        served.deploy("images", encoder="production")  # a single call removes the candidate
        assert served.state("images")["serving"] == {"main": "first"}
        removed = len(responses) + 4  # includes up to four requests in flight
        wait_for(lambda: len(responses) > removed + 20)
    assert {
        (response.status_code, response.text[:200]) for response in responses if response.status_code != 200
    } == set()
    assert 0.2 < counts["second"] / counts.total() < 0.8, "a healthy candidate serves its share"
    assert drift["items"] > 5
    assert -1 <= drift["cosine_min"] <= drift["cosine_mean"] < 0.999
    assert 0 <= drift["neighbours_kept"] <= 1
    assert {response.json()["encoder"] for response in responses[removed:]} == {"first"}
    # Replicas unload asynchronously, so a late request for the candidate must fall back to the main encoder.
    options = RequestOptions().for_engine("embedding")
    call = {"slot": CANDIDATE, "items": [{"content": files[0].read_bytes()}], "want": options, "deadline_s": 60}
    late = httpx.post(f"http://127.0.0.1:{served.plane.environment['AMD_SERVE_PORT']}/images", content=pack(call))
    assert (late.status_code, unpack(late.content)["encoder"]) == (200, "first")


@pytest.mark.timeout(900)
def test_a_killed_replica_is_replaced_and_its_requests_fail_with_a_retryable_error(served: ServedEncoders) -> None:
    file = served.folder / "3.png"
    with under_load(served, "production", [file]) as responses:
        wait_for(lambda: len(responses) > 50)
        killed = replicas_of("images")
        assert killed
        for process in killed:
            os.kill(process, signal.SIGKILL)
        count = len(responses)
        wait_for(lambda: any(response.status_code == 200 for response in responses[count + 10 :]), START_S)
    problems = [response.json() for response in responses if response.status_code != 200]
    assert {(problem["code"], problem["retryable"]) for problem in problems} <= {("encoder_unavailable", True)}
    wait_for(lambda: served.state("images")["state"] == "healthy", START_S)


def test_a_deployment_without_replicas_starts_one_on_the_first_request(served: ServedEncoders) -> None:
    served.deploy("sleeping", encoder="second", replicas={"min": 0, "max": 1})
    assert replicas_of("sleeping") == []
    file = served.folder / "0.png"
    response = served.post("sleeping", content=file.read_bytes(), headers={"Content-Type": "image/png"})
    assert response.status_code == 200, response.text
    np.testing.assert_allclose(response.json()["embedding"], served.offline("second", file), rtol=0, atol=1e-5)
    assert len(replicas_of("sleeping")) == 1
    served.plane.request("DELETE", "/deployments/sleeping")


@contextmanager
def under_load(served: ServedEncoders, encoder: str, files: Sequence[Path]) -> Iterator[list[httpx.Response]]:
    """Send requests from four clients without pausing, and yield the growing list of responses."""
    responses: list[httpx.Response] = []
    stop = threading.Event()
    contents, headers = [file.read_bytes() for file in files], {"Content-Type": "image/png"}

    def send_requests() -> None:
        with httpx.Client() as client:
            for content in itertools.cycle(contents):
                if stop.is_set():
                    return
                responses.append(served.post(encoder, client, content=content, headers=headers))
                if responses[-1].status_code != 200:
                    time.sleep(0.2)

    clients = [threading.Thread(target=send_requests) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        wait_for(lambda: bool(responses))
        yield responses
    finally:
        stop.set()
        for client in clients:
            client.join()


def replicas_of(deployment: str) -> list[int]:
    """Return the PIDs of a deployment's replicas, found by the process title that Ray sets."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if title.startswith("ray::ServeReplica:amd-" + deployment):
            found.append(int(process.name))
    return found


@pytest.mark.timeout(900)
def test_the_mask_lab_starts_on_the_first_request_and_draws_the_same_masks_as_offline(served: ServedEncoders) -> None:
    folder, config = f"{served.plane.data}/root/encoders/student", tiny_image_config(mask__teacher_ratio=0.25)
    content = (served.folder / "0.png").read_bytes()
    call = {"config": config.model_dump(mode="json"), "step": 7, "position": 0, "deadline_s": 120}
    engine = LabEngine()
    expected = asyncio.run(engine.view({**call, "model": {"encoder": folder}, "item": {"content": content}}))
    engine.close()

    def view(**options: Any) -> Any:
        query = {"encoder": "student", "step": 7, "teacher_ratio": 0.25, "deadline_s": START_S, **options}
        headers = {"Authorization": f"Bearer {served.key}", "Content-Type": "image/png"}
        url = f"{served.plane.url}/v1/lab/masks"
        response = httpx.post(url, params=query, headers=headers, content=content, timeout=START_S)
        assert response.status_code == 200, response.text
        return response.json()

    with under_load(served, "production", [served.folder / "1.png"]) as responses:
        found = view()
    assert {response.status_code for response in responses} == {200}, "deployments do not wait for the lab's replica"
    assert found["token_sets"] == expected["token_sets"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    drawn = {name: base64.b64decode(url.partition(",")[2]) for name, url in found["layers"].items()}
    assert drawn == expected["layers"]
    assert view(seed=1)["token_sets"] != found["token_sets"]


def _applications(cluster: RayCluster) -> Any:
    return httpx.get(f"{cluster.dashboard}/api/serve/applications/", timeout=60).json().get("applications")
