"""Tests for loading from a remote store that stops responding: intact samples must not be reported as bad."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from amd.config import ClipConfig, DataConfig
from amd.data.dataset.open import open_manifest
from amd.data.dataset.record import BadSample
from amd.data.decoding.limits import FileLimits
from amd.data.decoding.reader import SampleReader
from amd.data.loading.frame_sampling import middle_chooser
from amd.data.loading.loader import Batch, ClipLoader
from amd.storage import StorageUnreachable, write_bytes
from tests.amd.downstream.embedding.test_features import write_images
from tests.support.s3 import S3Server
from tests.support.servers.outages import StallingProxy

CLIP = ClipConfig(frames=1, size=32, patch=16, tubelet=1)
LIMIT_S = 4.0  # time limit per sample that a stalled store exceeds; a busy machine must not


class Store:
    """An S3 server behind a proxy, with six images in `s3://images`."""

    def __init__(self, server: S3Server, proxy: StallingProxy) -> None:
        self.server, self.proxy = server, proxy
        self._timer: threading.Timer | None = None

    def interrupt(self, kind: str, seconds: float) -> None:
        """Refuse connections, or accept them without responding, for this many seconds in the background."""
        with ExitStack() as outage:
            if kind == "stopped":
                self.server.stop()
                outage.callback(self.server.start)
            else:
                outage.enter_context(self.proxy.outage())
            self._timer = threading.Timer(seconds, outage.pop_all().close)
            self._timer.start()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        self.server.stop()


@pytest.fixture
def store(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = S3Server()
    with StallingProxy(server.port) as proxy:
        write_images(tmp_path / "images", 6)
        for file in sorted((tmp_path / "images").rglob("*.png")):
            write_bytes(f"{s3_root}/images/{file.parent.name}/{file.name}", file.read_bytes())
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore pauses for up to 15 s between five attempts
        store = Store(server, proxy)
        yield store
        store.close()


def _data(root: str) -> DataConfig:
    return DataConfig(train=f"{root}/images", loader_workers=0, read_timeout_s=LIMIT_S, retries=1)


def _read(data: DataConfig, store: Store | None = None, kind: str = "", seconds: float = 0.0) -> list[Batch]:
    with ClipLoader(data, CLIP, open_manifest(data), batch_size=2, micro_batch=2, seed=1) as loader:
        steps = loader.steps(0, 6)
        batches = next(steps)
        if store is not None:
            store.interrupt(kind, seconds)
        return batches + [batch for step in steps for batch in step]


@pytest.mark.parametrize(("kind", "seconds"), [("stopped", 6.0), ("stalled", 3 * LIMIT_S)])
def test_an_outage_delays_samples_without_changing_them(kind: str, seconds: float, store: Store, s3_root: str) -> None:
    data = _data(s3_root)
    expected, found = _read(data), _read(data, store, kind, seconds)
    assert [batch.bad for batch in found] == [[]] * 6
    for before, after in zip(expected, found, strict=True):
        assert torch.equal(before.clips, after.clips)


@pytest.mark.parametrize("kind", ["stopped", "stalled"])
def test_a_long_outage_is_not_blamed_on_the_samples(
    kind: str, store: Store, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amd.storage.file_operations.OUTAGE_LIMIT_S", 0.5)
    with pytest.raises(StorageUnreachable, match="the store has not responded"):
        _read(_data(s3_root), store, kind, seconds=60)


def test_a_caller_does_not_wait_for_the_store_of_an_untrusted_file(store: Store, s3_root: str) -> None:
    data = _data(s3_root)
    location = open_manifest(data)[0].location
    reader = SampleReader(data, FileLimits(2**20, 2**20, 16, 60.0, 2**24))
    reader.start()
    store.interrupt("stopped", 120)
    with pytest.raises(StorageUnreachable, match=f"{location} could not be read after 2 attempts"):
        reader.read_file(location, middle_chooser(CLIP), fetch_limit_s=60.0)
    reader.close()


def test_a_download_that_takes_too_long_is_reported_as_an_outage(store: Store, s3_root: str) -> None:
    data = _data(s3_root)
    location = open_manifest(data)[0].location
    reader = SampleReader(data, FileLimits(2**20, 2**20, 16, 60.0, 2**24))
    reader.start()
    store.interrupt("stalled", 3 * LIMIT_S)
    with pytest.raises(StorageUnreachable, match=f"{location} could not be fetched within 1 s"):
        reader.read_file(location, middle_chooser(CLIP), fetch_limit_s=1.0)
    reader.close()


def test_a_missing_file_is_bad_although_its_store_responds(store: Store, s3_root: str) -> None:
    reader = SampleReader(_data(s3_root), FileLimits(2**20, 2**20, 16, 60.0, 2**24))
    with pytest.raises(BadSample, match="does not exist"):
        reader.read_file(f"{s3_root}/missing.png", middle_chooser(CLIP), fetch_limit_s=60.0)
    reader.close()
