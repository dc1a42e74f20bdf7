"""Bulk embedding from its config to its files: all of a data set through a published encoder, over the cluster.

The work is cut into spans of consecutive records, and each span's file is written whole: an interrupted run goes on
with the spans that are missing, so each record is embedded into exactly one file. The span workers of probes do it:
Ray Data would be a second way to read samples, and no more.
Knows nothing of how a vector comes about, nor of jobs.
Shapes: r readable records of a span, D width.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from amd.artifacts.weights import WEIGHTS, Card, encoder_url, load_card, load_encoder
from amd.config import ConfigError, DataConfig, EmbedConfig
from amd.data.dataset.manifest import NO_LABEL, Manifest
from amd.data.dataset.open import open_manifest
from amd.data.faults import Bad, BadSampleLedger
from amd.downstream.embedding.cache import FeatureKey, Part
from amd.downstream.embedding.features import Embedder, absolute, embed_spans
from amd.downstream.embedding.files import (
    EmbeddingIndex,
    SpanFile,
    index_url,
    parquet_url,
    plan,
    read_index,
    span_name,
    unit,
    write_index,
    write_rows,
)
from amd.storage import (
    exists,
    filesystem,
    is_remote,
    join,
    listdir,
    local_path,
    patiently,
    read_bytes,
    remove_leftovers,
    resolve_root,
    write_bytes,
)
from amd.training.failures import judge
from amd.training.reporting.progress import note_progress
from amd.training.stop_signals import StopSignals

logger = logging.getLogger(__name__)
Say = Callable[[str], None]
FOOTER = b"amd"  # key of our own words in a Parquet file's footer
FOOTERS_AT_ONCE = 16
TOLD_S = 5.0  # between two lines about how far it is


class EmbedResult(BaseModel):
    """What a bulk embedding came to; the last line of `python -m amd.downstream embed`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None
    """Why it did not succeed, from a closed list (failures.Reason)."""
    message: str = ""
    output: str
    """The folder of the files."""
    encoder: str
    samples: int
    """Embedded so far."""
    bad: int
    """Samples that could not be read."""
    seconds: float
    """Wall time of this call."""

    @property
    def exit_code(self) -> int:
        return 0 if self.state == "succeeded" else 1


class Done(NamedTuple):
    """A span whose file is written."""

    rows: int
    width: int
    bad: list[Bad]


def embed_all(
    config: EmbedConfig, *, local: bool = False, say: Say = logger.info, stop: threading.Event | None = None
) -> EmbedResult:
    """Embed a data set into Parquet files; the same config again goes on where it was interrupted.

    `local` embeds in this process, without Ray. SIGTERM and SIGINT end it between two spans. `stop`: set by the caller,
    ends it as SIGTERM does. Raises ConfigError for what the user can mend; everything else is told by the result.
    """
    with StopSignals(stop) as signals:
        return _Bulk(config, say).run(local, signals)


class _Bulk:
    def __init__(self, config: EmbedConfig, say: Say) -> None:
        """Raises ConfigError."""
        self.began = time.monotonic()
        self.config, self.say = config, say
        root = resolve_root(config.storage)
        url = encoder_url(root, config.encoder)
        self.url = url if is_remote(url) else str(local_path(url))
        self.card: Card = load_card(self.url)
        self.data: DataConfig = absolute(config.data).model_copy(update={"interpolation": self.card.interpolation})
        self.manifest: Manifest = open_manifest(self.data)
        self.sha256 = self.card.sha256 or hashlib.sha256(read_bytes(join(self.url, WEIGHTS))).hexdigest()
        output = config.output or join(root, "embeddings", self.card.id, self.manifest.digest()[:16])
        self.output = output.rstrip("/") if is_remote(output) else str(local_path(output))
        self.plan = plan(len(self.manifest), config.rows_per_file)
        self.key = self._key()
        self.done: dict[range, Done] = {}
        self.ledger = BadSampleLedger()

    def _key(self) -> dict[str, Any]:
        """All that decides the files: a folder holds those of one key."""
        key = FeatureKey(
            encoder=self.sha256,
            data=self.data.train,
            digest=self.manifest.digest(),
            clip=self.card.clip,
            interpolation=self.data.interpolation,
            center_fraction=self.data.center_fraction,
            pooling=self.card.pooling,
            precision=self.config.scaling.precision,
        )
        own = {"normalize": self.config.normalize, "rows_per_file": self.config.rows_per_file}
        return {**key.model_dump(mode="json"), **own}

    def run(self, local: bool, signals: StopSignals) -> EmbedResult:
        try:
            if self._is_complete():
                self.say(f"{self.output} is complete")
                index = read_index(self.output)
                return self._result("succeeded", samples=index.count, bad=len(index.bad))
            self._find_done()
            left = [span for span in self.plan if span not in self.done]
            if self.done:
                self.say(f"goes on: {len(self.done)} of {len(self.plan)} files are there")
            if left:
                self._embed(left, local, signals)
            if len(self.done) < len(self.plan):
                message = (
                    f"stopped after {self._seen()} of {len(self.manifest)} samples; the same command goes on there"
                )
                return self._result("cancelled", reason="cancelled_by_user", message=message)
            self._check_faults()
            self._finish()
            return self._result("succeeded")
        except ConfigError:
            raise
        except Exception as error:
            verdict = judge([error])
            if verdict.reason == "user_code_error":
                traceback.print_exc()
            self.say(f"failed ({verdict.reason}): {verdict.message}")
            return self._result("failed", reason=verdict.reason, message=verdict.message)

    # What is there

    def _is_complete(self) -> bool:
        if not exists(index_url(self.output)):
            return False
        found = read_index(self.output).made_of
        if found != self.key:
            raise self._foreign("its index.json", found)
        return True

    def _find_done(self) -> None:
        """Take up the spans that an interrupted run has left."""
        folder, search = join(self.output, "embeddings"), join(self.output, "search")
        remove_leftovers(folder)
        remove_leftovers(search)
        beside = set(listdir(search))
        planned = {f"{span_name(span)}.parquet": span for span in self.plan}
        names = [name for name in listdir(folder) if name.endswith(".parquet")]
        for name in names:
            if name not in planned:
                raise self._foreign(name, {})
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            for name, footer in zip(names, pool.map(_footer, (join(folder, name) for name in names)), strict=True):
                if footer is None:
                    logger.warning("%s is damaged; it is made again", join(folder, name))
                elif footer["made_of"] != self.key:
                    raise self._foreign(name, footer["made_of"])
                elif f"{span_name(planned[name])}.npz" in beside:
                    self.done[planned[name]] = Done(footer["rows"], footer["width"], footer["bad"])
        bad = BadSampleLedger(sample for done in self.done.values() for sample in done.bad)
        if bad.over(self.data.max_bad_fraction, len(self.manifest)):  # it failed of them; they may be mended by now
            self.done = {span: done for span, done in self.done.items() if not done.bad}
        for done in self.done.values():
            self.ledger.add(done.bad)

    def _foreign(self, name: str, found: dict[str, Any]) -> ConfigError:
        differs = [field for field in self.key if field in found and found[field] != self.key[field]]
        told = f" ({', '.join(differs)} differ)" if differs else ""
        return ConfigError(
            [
                f"output={self.output} holds embeddings of another encoder, data set or config: {name}{told}; give "
                "another output, or remove it"
            ]
        )

    # What is missing

    def _embed(self, left: list[range], local: bool, signals: StopSignals) -> None:
        pace = _Pace(self.output, len(self.manifest), self._seen(), self.say)
        with self._workers(local, signals) as compute:
            for part in compute(self.data, self.manifest, left):
                self._take(part)
                pace.tell(self._seen())
                if signals.stop.is_set():
                    return

    @contextmanager
    def _workers(
        self, local: bool, signals: StopSignals
    ) -> Iterator[Callable[[DataConfig, Manifest, Iterable[range]], Iterable[Part]]]:
        if local:
            encoder, _ = load_encoder(self.url)
            yield partial(embed_spans, Embedder(encoder, self.card.clip, self.card.pooling, self.config.scaling))
            return
        from amd.downstream.embedding import ray_features

        with ray_features.workers(self.config.scaling, self.url, self.card.pooling, self.say, signals.stop) as (
            compute,
            _,
        ):
            signals.listen()
            yield compute

    def _take(self, part: Part) -> None:
        """Write the files of a span. The Parquet file comes last: where it is, the span is done."""
        span = self.plan[part.start // self.config.rows_per_file]
        if sorted([*part.records.tolist(), *(bad["record"] for bad in part.bad)]) != list(span):
            raise RuntimeError(f"records {span.start} to {span.stop - 1} did not come back once each")
        if not np.isfinite(part.values).all():
            raise ConfigError([f"encoder={self.config.encoder}: its vectors are not all finite; it has diverged"])
        for bad in self.ledger.add(part.bad):
            logger.warning("left out: %s: %s", bad["location"], bad["reason"])
        names = [self.manifest[number].name for number in part.records.tolist()]
        labels = self.manifest.labels[part.records]
        write_rows(self.output, span, part.values, part.records, labels, names)
        done = Done(len(part.records), part.values.shape[1], part.bad)
        footer = {"made_of": self.key, "encoder": self.card.id, "rows": done.rows, "width": done.width, "bad": done.bad}
        values = unit(part.values) if self.config.normalize else part.values
        write_bytes(parquet_url(self.output, span), _parquet(part._replace(values=values), names, labels, footer))
        self.done[span] = done
        self._check_faults()

    def _check_faults(self) -> None:
        limit, samples = self.data.max_bad_fraction, len(self.manifest)
        if self.ledger.over(limit, samples) or len(self.ledger) == samples:
            raise self.ledger.fault(limit, samples)

    def _finish(self) -> None:
        spans = sorted(self.done.items(), key=lambda item: item[0].start)
        files = [
            SpanFile(
                start=span.start,
                stop=span.stop,
                rows=done.rows,
                file=parquet_url(self.output, span).removeprefix(f"{self.output}/"),
            )
            for span, done in spans
        ]
        write_index(
            self.output,
            EmbeddingIndex(
                encoder=self.card.id,
                sha256=self.sha256,
                data=self.data.train,
                digest=self.manifest.digest(),
                samples=len(self.manifest),
                count=sum(done.rows for done in self.done.values()),
                width=spans[0][1].width,
                normalize=self.config.normalize,
                bad=tuple({**bad} for _, done in spans for bad in done.bad),
                files=tuple(files),
                made_of=self.key,
            ),
        )

    def _seen(self) -> int:
        return sum(len(span) for span in self.done)

    def _result(self, state: Any, samples: int | None = None, bad: int | None = None, **facts: Any) -> EmbedResult:
        return EmbedResult(
            state=state,
            output=self.output,
            encoder=self.card.id,
            samples=sum(done.rows for done in self.done.values()) if samples is None else samples,
            bad=len(self.ledger) if bad is None else bad,
            seconds=round(time.monotonic() - self.began, 3),
            **facts,
        )


class _Pace:
    """How far it is, for people now and then, for programs after each span."""

    def __init__(self, output: str, samples: int, seen: int, say: Say) -> None:
        self._output, self._samples, self._first, self._say = output, samples, seen, say
        self._began, self._told = time.monotonic(), float("-inf")
        self._note(seen, None)

    def tell(self, seen: int) -> None:
        now = time.monotonic()
        speed = (seen - self._first) / max(now - self._began, 1e-9)
        self._note(seen, speed)
        if now - self._told >= TOLD_S or seen == self._samples:
            self._told = now
            self._say(f"{seen} of {self._samples} samples, {speed:.1f} a second")

    def _note(self, seen: int, speed: float | None) -> None:
        left = (self._samples - seen) / speed if speed else None
        progress = {"run": self._output, "step": seen, "steps": self._samples, "samples_per_s": speed}
        note_progress({**progress, "seconds_left": left})


def _parquet(part: Part, names: list[str], labels: Any, footer: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array(np.ascontiguousarray(part.values, np.float32).reshape(-1))
    # A name that is no UTF-8 has marks in the place of its odd bytes; the record's number tells it all the same.
    plain = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    table = pa.table(
        {
            "record": pa.array(part.records, pa.int64()),
            "location": pa.array(plain, pa.string()),
            "label": pa.array(labels, pa.int64(), mask=labels == NO_LABEL),
            "embedding": pa.FixedSizeListArray.from_arrays(values, part.values.shape[1]),
        }
    ).replace_schema_metadata({FOOTER: json.dumps(footer)})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", use_dictionary=False)
    return out.getvalue()


def _footer(url: str) -> dict[str, Any] | None:
    """Our words of a Parquet file; none where it is damaged or not ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = filesystem(url)

    def read() -> Any:
        with fs.open(path, "rb") as file:
            return pq.read_schema(file).metadata

    try:
        found: dict[str, Any] = json.loads((patiently(url, read) or {})[FOOTER])
        return found
    except (pa.ArrowInvalid, KeyError, ValueError):
        return None
