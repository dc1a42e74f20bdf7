"""Bulk embedding: run a data set through a published encoder across the cluster and write Parquet files.

Records are split into consecutive spans and each span's file is written atomically. An interrupted run resumes with the
missing spans, so each record is embedded into exactly one file. The span workers are shared with probes; Ray Data would
only add a second code path that reads samples.
Shapes: r readable records in a span, D width.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from amd.artifacts.weights import WEIGHTS, Card, encoder_url, load_card, load_encoder
from amd.config import ConfigError, DataConfig, EmbedConfig
from amd.data.dataset.manifest import Manifest
from amd.data.dataset.open import open_manifest
from amd.data.faults import BadSampleLedger, DamagedSample, UnreadableSample
from amd.downstream.embedding.cache import FeatureKey, Part
from amd.downstream.embedding.features import Embedder, embed_spans, with_absolute_paths
from amd.downstream.embedding.files import (
    EmbeddingIndex,
    SpanFile,
    index_url,
    parquet_url,
    plan_spans,
    read_index,
    span_name,
    unit,
    write_index,
    write_rows,
)
from amd.downstream.embedding.layout import check_layout, compute_map
from amd.downstream.embedding.map_files import DamagedMap, read_map, write_map, write_thumbnails
from amd.downstream.embedding.parquet import encode_rows, read_footer
from amd.storage import (
    exists,
    is_remote,
    join,
    listdir,
    local_path,
    read_bytes,
    remove_leftovers,
    resolve_root,
    write_bytes,
)
from amd.training.failures import classify_failure
from amd.training.reporting.progress import write_progress
from amd.training.stop_signals import StopSignals

logger = logging.getLogger(__name__)
Log = Callable[[str], None]
FOOTER_READERS = 16
REPORT_INTERVAL_S = 5.0  # between progress lines


class EmbedResult(BaseModel):
    """Result of a bulk embedding, printed as the last line of `python -m amd.downstream embed`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None
    """Reason for a failure or cancellation: one of `failures.Reason`."""
    message: str = ""
    output: str
    """Folder that contains the embeddings."""
    encoder: str
    samples: int
    """Number of samples embedded so far."""
    bad: int
    """Number of samples that could not be read."""
    damaged: int = 0
    """Number of damaged videos for which only the decodable frames were used."""
    seconds: float
    """Wall time of this call, in seconds."""

    @property
    def exit_code(self) -> int:
        return 0 if self.state == "succeeded" else 1


class FinishedSpan(NamedTuple):
    """A span whose files have been written."""

    rows: int
    width: int
    bad: list[UnreadableSample]
    damaged: list[DamagedSample]


def embed_all(
    config: EmbedConfig, *, local: bool = False, log: Log = logger.info, stop: threading.Event | None = None
) -> EmbedResult:
    """Embed a data set into Parquet files; calling it again with the same config resumes an interrupted run.

    `local` embeds in this process, without Ray. SIGTERM, SIGINT or setting `stop` stops the run after the current span.
    Raises ConfigError for invalid input; all other failures are reported in the result.
    """
    with StopSignals(stop) as signals:
        return _Bulk(config, log).run(local, signals)


class _Bulk:
    def __init__(self, config: EmbedConfig, log: Log) -> None:
        """Open the encoder and the data. Raises ConfigError if either is missing or invalid."""
        self.started = time.monotonic()
        self.config, self.log = config, log
        check_layout(config.layout)
        root = resolve_root(config.storage)
        url = encoder_url(root, config.encoder)
        self.url = url if is_remote(url) else str(local_path(url))
        self.card: Card = load_card(self.url)
        data: DataConfig = with_absolute_paths(config.data)
        self.data = data.model_copy(update={"interpolation": self.card.interpolation})
        self.manifest: Manifest = open_manifest(self.data)
        self.sha256 = self.card.sha256 or hashlib.sha256(read_bytes(join(self.url, WEIGHTS))).hexdigest()
        output = config.output or join(root, "embeddings", self.card.id, self.manifest.digest()[:16])
        self.output = output.rstrip("/") if is_remote(output) else str(local_path(output))
        self.spans = plan_spans(len(self.manifest), config.rows_per_file)
        self.key = self._key()
        self.done: dict[range, FinishedSpan] = {}
        self.ledger = BadSampleLedger()

    def _key(self) -> dict[str, Any]:
        """Return everything that determines the files; all files in an output folder have the same key."""
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
        file_options = {"normalize": self.config.normalize, "rows_per_file": self.config.rows_per_file}
        return {**key.model_dump(mode="json"), **file_options}

    def run(self, local: bool, signals: StopSignals) -> EmbedResult:
        try:
            if self._is_complete():
                self.log(f"{self.output} is complete")
                index = read_index(self.output)
                self._write_map(index.count)
                return self._result("succeeded", samples=index.count, bad=len(index.bad), damaged=len(index.damaged))
            self._find_finished()
            missing = [span for span in self.spans if span not in self.done]
            if self.done:
                self.log(f"resuming: {len(self.done)} of {len(self.spans)} files exist")
            if missing:
                self._embed(missing, local, signals)
            if len(self.done) < len(self.spans):
                processed = f"{self._processed()} of {len(self.manifest)} samples"
                message = f"stopped after {processed}; run the same command to resume"
                return self._result("cancelled", reason="cancelled_by_user", message=message)
            self._check_faults()
            self._finish()
            return self._result("succeeded")
        except ConfigError:
            raise
        except Exception as error:
            verdict = classify_failure([error])
            if verdict.reason == "user_code_error":
                traceback.print_exc()
            self.log(f"failed ({verdict.reason}): {verdict.message}")
            return self._result("failed", reason=verdict.reason, message=verdict.message)

    # Existing files

    def _is_complete(self) -> bool:
        if not exists(index_url(self.output)):
            return False
        found = read_index(self.output).made_of
        if found != self.key:
            raise self._mismatch("its index.json", found)
        return True

    def _find_finished(self) -> None:
        """Collect the spans that an interrupted run has already finished."""
        folder, search, thumbnails = (join(self.output, name) for name in ("embeddings", "search", "thumbnails"))
        for written in (folder, search, thumbnails):
            remove_leftovers(written)
        searchable, illustrated = set(listdir(search)), set(listdir(thumbnails))
        planned = {f"{span_name(span)}.parquet": span for span in self.spans}
        names = [name for name in listdir(folder) if name.endswith(".parquet")]
        for name in names:
            if name not in planned:
                raise self._mismatch(name, {})
        with ThreadPoolExecutor(FOOTER_READERS) as pool:
            for name, footer in zip(names, pool.map(read_footer, (join(folder, name) for name in names)), strict=True):
                if footer is None:
                    logger.warning("%s is damaged; rewriting it", join(folder, name))
                elif footer["made_of"] != self.key:
                    raise self._mismatch(name, footer["made_of"])
                elif self.config.thumbnails and f"{span_name(planned[name])}.bin" not in illustrated:
                    logger.info("%s has no thumbnails; rewriting it", join(folder, name))
                elif f"{span_name(planned[name])}.npz" in searchable:
                    self.done[planned[name]] = FinishedSpan(
                        footer["rows"], footer["width"], footer["bad"], footer.get("damaged", [])
                    )
        bad = BadSampleLedger(sample for done in self.done.values() for sample in done.bad)
        if bad.exceeds(self.data.max_bad_fraction, len(self.manifest)):
            # The previous run failed because of these samples, which may be readable now.
            self.done = {span: done for span, done in self.done.items() if not done.bad}
        for done in self.done.values():
            self.ledger.add(done.bad)

    def _mismatch(self, name: str, found: dict[str, Any]) -> ConfigError:
        differs = [field for field in self.key if field in found and found[field] != self.key[field]]
        details = f" ({', '.join(differs)} differ)" if differs else ""
        return ConfigError(
            [
                f"output={self.output} contains embeddings of another encoder, data set or config: {name}{details}; "
                "set another output, or remove the folder"
            ]
        )

    # Missing spans

    def _embed(self, missing: list[range], local: bool, signals: StopSignals) -> None:
        progress = _ProgressReporter(self.output, len(self.manifest), self._processed(), self.log)
        with self._workers(local, signals) as compute:
            for part in compute(self.data, self.manifest, missing):
                self._write_span(part)
                progress.update(self._processed())
                if signals.stop.is_set():
                    return

    @contextmanager
    def _workers(
        self, local: bool, signals: StopSignals
    ) -> Iterator[Callable[[DataConfig, Manifest, Iterable[range]], Iterable[Part]]]:
        if local:
            encoder, _ = load_encoder(self.url)
            embedder = Embedder(encoder, self.card.clip, self.card.pooling, self.config.scaling)
            yield partial(embed_spans, embedder, thumbnails=self.config.thumbnails)
            return
        from amd.downstream.embedding import ray_features

        cluster_options = (self.config.scaling, self.url, self.card.pooling, self.log, signals.stop)
        with ray_features.workers(*cluster_options, thumbnails=self.config.thumbnails) as (compute, _):
            signals.install()
            yield compute

    def _write_span(self, part: Part) -> None:
        """Write the files of a span; the Parquet file comes last and marks the span as finished."""
        span = self.spans[part.start // self.config.rows_per_file]
        if sorted([*part.records.tolist(), *(bad["record"] for bad in part.bad)]) != list(span):
            raise RuntimeError(
                f"records {span.start} to {span.stop - 1} must each be returned exactly once, but were not"
            )
        if not np.isfinite(part.values).all():
            raise ConfigError(
                [
                    f"encoder={self.config.encoder}: produces NaN or infinite vectors; its training probably diverged; "
                    "choose another encoder"
                ]
            )
        for bad in self.ledger.add(part.bad):
            logger.warning("skipped: %s: %s", bad["location"], bad["reason"])
        names = [self.manifest[number].name for number in part.records.tolist()]
        labels = self.manifest.labels[part.records]
        write_rows(self.output, span, part.values, part.records, labels, names)
        if self.config.thumbnails:
            images = dict(zip(part.records.tolist(), part.thumbnails, strict=True))
            write_thumbnails(self.output, span, images)
        done = FinishedSpan(len(part.records), part.values.shape[1], part.bad, part.damaged)
        footer = {"made_of": self.key, "encoder": self.card.id, **done._asdict()}
        values = unit(part.values) if self.config.normalize else part.values
        write_bytes(parquet_url(self.output, span), encode_rows(part._replace(values=values), names, labels, footer))
        self.done[span] = done
        self._check_faults()

    def _check_faults(self) -> None:
        limit, samples = self.data.max_bad_fraction, len(self.manifest)
        if self.ledger.exceeds(limit, samples) or len(self.ledger) == samples:
            raise self.ledger.fault(limit, samples)

    def _write_map(self, count: int) -> None:
        """Lay out the embedded samples, unless the existing map was made with the same options."""
        layout, clusters = self.config.layout, self.config.clusters
        if layout == "none":
            return
        with suppress(FileNotFoundError, DamagedMap):
            found = read_map(self.output)
            if (found.requested_layout, found.clusters, found.samples) == (layout, clusters, count):
                return
        self.log(f"laying out {count} samples ({layout})")
        write_map(
            self.output,
            compute_map(self.output, self.spans, count, encoder=self.card.id, layout=layout, clusters=clusters),
        )

    def _finish(self) -> None:
        self._write_map(sum(done.rows for done in self.done.values()))
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
                damaged=tuple({**damaged} for _, done in spans for damaged in done.damaged),
                thumbnails=self.config.thumbnails,
                files=tuple(files),
                made_of=self.key,
            ),
        )

    def _processed(self) -> int:
        return sum(len(span) for span in self.done)

    def _result(self, state: Any, **facts: Any) -> EmbedResult:
        counts = {
            "samples": sum(done.rows for done in self.done.values()),
            "bad": len(self.ledger),
            "damaged": sum(len(done.damaged) for done in self.done.values()),
        }
        seconds = round(time.monotonic() - self.started, 3)
        return EmbedResult(state=state, output=self.output, encoder=self.card.id, seconds=seconds, **(counts | facts))


class _ProgressReporter:
    """Logs progress every few seconds and updates the progress file after each span."""

    def __init__(self, output: str, samples: int, processed: int, log: Log) -> None:
        self._output, self._samples, self._first, self._log = output, samples, processed, log
        self._started, self._last_report = time.monotonic(), float("-inf")
        self._write(processed, None)

    def update(self, processed: int) -> None:
        now = time.monotonic()
        speed = (processed - self._first) / max(now - self._started, 1e-9)
        self._write(processed, speed)
        if now - self._last_report >= REPORT_INTERVAL_S or processed == self._samples:
            self._last_report = now
            self._log(f"{processed} of {self._samples} samples, {speed:.1f} per second")

    def _write(self, processed: int, speed: float | None) -> None:
        seconds_left = (self._samples - processed) / speed if speed else None
        progress = {"run": self._output, "step": processed, "steps": self._samples, "samples_per_s": speed}
        write_progress({**progress, "seconds_left": seconds_left})
