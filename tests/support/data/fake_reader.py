"""Ten-line doubles of a manifest and a reader: frames that tell which record and frame they are."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from amd.config import DataConfig
from amd.data.dataset.record import Record
from amd.data.decoding.reader import BadSample

FRAMES = 20


class FakeManifest:
    """`bad` records cannot be read; a record's label is its number."""

    def __init__(self, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Record:
        assert 0 <= number < self.count
        return Record(f"{'bad' if number in self.bad else 'clip'}-{number}", number, "video")


class FakeReader:
    """Every pixel of a frame is its number, except that the first row of the first column names the record."""

    def __init__(self, data: DataConfig) -> None:
        self.reads: list[str] = []

    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        assert record.location not in self.reads or not record.location.startswith("bad"), "a bad sample is read again"
        self.reads.append(record.location)
        kind, number = record.location.split("-")
        if kind == "bad":
            raise BadSample(record, "truncated")
        frames = np.random.default_rng(int(number)).integers(0, 256, (FRAMES, 24, 32, 3), dtype=np.uint8)
        return frames[choose(FRAMES)]

    def close(self) -> None:
        pass


class DyingReader(FakeReader):
    """Its process is killed at record 5."""

    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        if record.label == 5:
            os.kill(os.getpid(), 9)
        return super().read_clip(record, choose)


class SlowReader(FakeReader):
    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        time.sleep(0.2)
        return super().read_clip(record, choose)


class EnvironmentReader(FakeReader):
    """Cannot read where a variable of the training process is missing."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        assert os.environ["AMD_TEST_CREDENTIAL"] == "secret"


class BuggyReader(FakeReader):
    def read_clip(self, record: Record, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        raise ZeroDivisionError("a bug")
