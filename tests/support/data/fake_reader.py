"""Fake manifest, and fake readers whose frames depend only on the record number."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from amd.config import DataConfig
from amd.data.dataset.record import Record
from amd.data.decoding.reader import BadSample
from amd.data.faults import LoaderCrash

FRAMES = 20


class FakeManifest:
    """Manifest of `count` records, labelled with their numbers. The records in `bad` are unreadable."""

    def __init__(self, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Record:
        assert 0 <= number < self.count
        return Record(f"{'bad' if number in self.bad else 'clip'}-{number}", number, "video")


class FakeReader:
    """Reader that returns noise seeded by the record number."""

    def __init__(self, data: DataConfig) -> None:
        self.reads: list[str] = []

    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        assert record.location not in self.reads or not record.location.startswith("bad"), (
            "an unreadable sample was read again"
        )
        self.reads.append(record.location)
        kind, number = record.location.split("-")
        if kind == "bad":
            raise BadSample(record, "truncated")
        frames = np.random.default_rng(int(number)).integers(0, 256, (FRAMES, 24, 32, 3), dtype=np.uint8)
        return frames[choose(FRAMES)]

    def close(self) -> None:
        pass


class DyingReader(FakeReader):
    """Reader that kills its process at record 5."""

    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        if record.label == 5:
            os.kill(os.getpid(), 9)
        return super().read_clip(record, choose)


class SlowReader(FakeReader):
    """Reader that takes 0.2 s per record."""

    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        time.sleep(0.2)
        return super().read_clip(record, choose)


class EnvironmentReader(FakeReader):
    """Reader that requires an environment variable set in the training process."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        assert os.environ["AMD_TEST_CREDENTIAL"] == "secret"


class BuggyReader(FakeReader):
    """Reader that raises an unexpected error."""

    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        raise ZeroDivisionError("a bug")


class StarvedReader(FakeReader):
    """Reader whose decoding process cannot start."""

    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        raise LoaderCrash("no decoding process")
