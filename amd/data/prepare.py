"""Prepare a raw data set for fast reading: small frames, short GOPs, indexed tar shards.

Resumable: the plan, written first, assigns records to shards; a shard's index, written last, marks the shard as
complete. A restart keeps complete shards and produces identical bytes for the remaining ones. Each worker is a thread
that drives a separate decoding process (isolation.py), so a broken file or hung decoder does not stop other workers.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from amd.config import ConfigError, DataConfig
from amd.data.dataset.manifest import Manifest, ManifestError, capped
from amd.data.dataset.open import open_manifest
from amd.data.dataset.shards import INDEX_SUFFIX, ShardWriter, shard_url, write_index
from amd.data.decoding.damage import Damage
from amd.data.decoding.reader import BadSample, SampleReader
from amd.storage import create, exists, join, read_json, remove_leftovers, write_bytes, write_json

PLAN, REPORT = "prepare.json", "report.json"
TRIAL_SAMPLES = 8  # samples transcoded to estimate the number of samples per shard
log = logging.getLogger(__name__)


class ShardCancelled(Exception):
    """Raised to abandon an unfinished shard after another shard failed or the run was interrupted."""


class PrepareReport(BaseModel):
    """Result of `prepare`, also written to report.json next to the shards."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    url: str
    samples: int = 0
    """Number of samples written; each segment of a video counts as one sample."""
    shards: int = 0
    shards_kept: int = 0
    """Number of shards completed by an earlier run."""
    bytes_written: int = 0
    frames: int = 0
    shards_missing: int = 0
    """Number of shards that other parts have not completed yet; all other counts cover only the complete shards."""
    seconds: float = 0.0
    bad: list[dict[str, Any]] = Field(default_factory=list)
    """Record number and location of each skipped sample, and the reason."""
    damaged: list[dict[str, Any]] = Field(default_factory=list)
    """Record number and location of each damaged video, and the reason; only its decodable frames were written."""

    def __str__(self) -> str:
        size = f"{self.bytes_written / 2**20:.1f} MiB"
        lines = [f"{self.samples} samples in {self.shards} shards, {size}, {self.seconds:.0f} s: {self.url}"]
        if self.shards_kept:
            lines.append(f"shards that were already complete: {self.shards_kept}")
        if self.shards_missing:
            lines.append(f"shards that are left for other parts: {self.shards_missing}")
        if self.bad:
            lines.append(f"could not be read and were skipped: {len(self.bad)}")
            lines += capped([f"  {bad['location']} {bad['reason']}" for bad in self.bad])
        if self.damaged:
            lines.append(f"damaged, written as far as they decode: {len(self.damaged)}")
            lines += capped([f"  {damaged['location']} {damaged['reason']}" for damaged in self.damaged])
        return "\n".join(lines)


def prepare(
    data: DataConfig,
    output_url: str,
    *,
    short_side: int = 320,
    gop: int = 12,
    crf: int = 23,
    frame_rate: float | None = None,
    quality: int = 90,
    segment_s: float | None = None,
    shard_mib: int = 128,
    workers: int = 2,
    part: str = "1/1",
    limit: int | None = None,
    sample_timeout_s: float = 600.0,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Write `data` to tar shards under `output_url`.

    `limit`: maximum number of samples to prepare, starting with the first. `segment_s`: approximate duration of the
    samples that videos are cut into, in seconds. `part`: "k/n" writes every n-th shard, starting with the k-th; n
    calls, possibly on different machines, write all shards. `progress(done, total)` is called with record counts after
    each shard of this part.
    Raises ManifestError if the data cannot be read, the output was prepared from different data or settings, or the
    samples are frame folders (already small files), and ConfigError for an invalid part.
    """
    first, parts = _parse_part(part)
    started = time.monotonic()
    manifest = open_manifest(data)
    if manifest.frames is not None:
        raise ManifestError(["frame folders cannot be prepared; encode them as videos first"])
    count = len(manifest) if limit is None else min(limit, len(manifest))
    settings = {"short_side": short_side, "gop": gop, "crf": crf, "frame_rate": frame_rate, "quality": quality}
    settings["segment_s"] = segment_s
    job = _PrepareJob(data, manifest, output_url.rstrip("/"), settings, sample_timeout_s)
    plan = job.plan(count, shard_mib)
    per_shard = plan["samples_per_shard"]
    shards = range(-(-count // per_shard))
    own = shards[first - 1 :: parts]
    total = sum(min(count, (number + 1) * per_shard) - number * per_shard for number in own)
    report = PrepareReport(url=job.output)
    with ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(job.shard, number, per_shard, count) for number in own]
        for task in tasks:
            task.add_done_callback(lambda _: progress and progress(min(total, per_shard * _done(tasks)), total))
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:  # after Ctrl-C or a failed shard, the other workers stop after their current sample
            if not all(task.done() for task in tasks):
                job.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
    complete = [task.result() for task in sorted(tasks, key=_was_stopped)]
    others = [job.finished(number) for number in shards if number not in own]
    complete += [(facts, False) for facts in others if facts is not None]
    report.shards, report.shards_missing = len(complete), others.count(None)
    for facts, kept in complete:
        report.samples += facts["samples"]
        report.bytes_written += facts["size"]
        report.frames += facts["frames"]
        report.bad += facts["bad"]
        report.damaged += facts.get("damaged", [])  # absent in shards from older versions
        report.shards_kept += kept
    for samples in (report.bad, report.damaged):
        samples.sort(key=lambda sample: sample["record"])
    remove_leftovers(job.output)
    report.seconds = round(time.monotonic() - started, 1)
    if not report.shards_missing:
        write_json(join(job.output, REPORT), report.model_dump())
    return report


def _parse_part(part: str) -> tuple[int, int]:
    first, separator, parts = part.partition("/")
    if not (separator and first.isdecimal() and parts.isdecimal() and 1 <= int(first) <= int(parts)):
        raise ConfigError([f"part={part}: must be K/N with 1 <= K <= N, e.g. 2/4 for the second of four parts"])
    return int(first), int(parts)


def _was_stopped(task: Future[Any]) -> bool:
    """Return a sort key that puts the failed task before tasks that were cancelled because of the failure."""
    return task.cancelled() or isinstance(task.exception(), ShardCancelled)


def _samples_per_shard(mib: int, mean_bytes: float) -> int:
    return max(1, round(mib * 2**20 / mean_bytes))


def _done(tasks: list[Future[Any]]) -> int:
    return [task.done() for task in tasks].count(True)


@dataclass
class _PrepareJob:
    data: DataConfig
    manifest: Manifest
    output: str
    settings: dict[str, Any]
    limit_s: float
    stop: threading.Event = field(default_factory=threading.Event)

    def plan(self, count: int, shard_mib: int) -> dict[str, Any]:
        """Return the existing plan if there is one, else write a new plan. Raises ManifestError on a mismatch."""
        expected = {"data": self.manifest.digest(), "samples": count, "shard_mib": shard_mib, **self.settings}
        url = join(self.output, PLAN)
        if exists(url):
            found: dict[str, Any] = read_json(url)
            changed = [
                f"{key} was {found.get(key)!r}, is now {value!r}"
                for key, value in expected.items()
                if found.get(key) != value
            ]
            if changed:
                raise ManifestError(
                    [
                        f"{self.output} was prepared from different data or settings "
                        f"({'; '.join(changed)}); choose an empty folder"
                    ]
                )
            return found
        mean = self._mean_size(count)
        samples = _samples_per_shard(shard_mib, mean)
        plan = {**expected, "classes": self.manifest.classes, "samples_per_shard": samples}
        if not create(url, json.dumps(plan).encode()):  # another part wrote its plan first, perhaps with another mean
            return self.plan(count, shard_mib)
        return plan

    def _mean_size(self, count: int) -> float:
        """Return the mean transcoded size in bytes, measured on a few samples spread over the data."""
        sizes = []
        with closing(SampleReader(self.data)) as reader:
            for trial in range(min(TRIAL_SAMPLES, count)):
                record = self.manifest[trial * count // min(TRIAL_SAMPLES, count)]
                try:
                    whole = {**self.settings, "segment_s": None}
                    sizes.append(len(reader.transcode(record, whole, self.limit_s)[0]) + 2048)
                except BadSample as error:
                    log.warning("%s", error)
        return sum(sizes) / len(sizes) if sizes else 2.0**20

    def finished(self, number: int) -> dict[str, Any] | None:
        """Return the facts stored in a complete shard's index, or None if the shard is incomplete."""
        url = shard_url(self.output, number) + INDEX_SUFFIX
        return read_json(url)["facts"] if exists(url) else None

    def shard(self, number: int, samples: int, count: int) -> tuple[dict[str, Any], bool]:
        """Write one shard unless its index exists; return the shard's facts and whether it already existed."""
        url = shard_url(self.output, number)
        if (finished := self.finished(number)) is not None:
            return finished, True
        writer, bad, damaged, frames = ShardWriter(), [], [], 0
        with closing(SampleReader(self.data)) as reader:
            for i in range(number * samples, min(count, (number + 1) * samples)):
                if self.stop.is_set():
                    raise ShardCancelled
                record = self.manifest[i]
                damage: Damage | None = None
                segments = itertools.count() if self.settings["segment_s"] else range(1)
                for segment in segments:
                    try:
                        wanted = {**self.settings, "segment": segment}
                        content, suffix, facts = reader.transcode(record, wanted, self.limit_s)
                    except BadSample as error:
                        where = f"segment {segment} " if segment else ""
                        bad.append({"record": i, "location": record.name, "reason": where + error.reason})
                        log.warning("skipped: %s", error)
                        break
                    if reader.last_read is not None:
                        damage = reader.last_read.damage or damage
                    name = f"{i:09d}-{segment:04d}" if self.settings["segment_s"] else f"{i:09d}"
                    writer.add(name, suffix, content, record.label)
                    frames += facts["frames"]
                    if segment + 1 >= facts.get("segments", 1):
                        break
                if damage is not None:
                    damaged.append({"record": i, "location": record.name, "reason": str(damage)})
                    log.warning("wrote only the frames that decode: %s %s", record.name, damage)
        content = writer.finish()
        facts = {"samples": len(writer.members), "size": len(content), "frames": frames, "bad": bad, "damaged": damaged}
        write_bytes(url, content)
        write_index(url, len(content), writer.members, {"facts": facts})
        return facts, False
