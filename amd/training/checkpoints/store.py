"""Store a run's checkpoints: written in the background, committed by a manifest, verified when read.

    checkpoints/step-00000120/model.safetensors, optimizer.safetensors, state.json    written first, in any order
    checkpoints/step-00000120/manifest.json                                           written last, as the commit

A folder without a manifest was left by a writer that died: it is never read, and `sweep` removes it. The manifest
contains the size and sha256 of every file, so a damaged checkpoint is detected and the previous one is used.

Replaces `ray.train.report(checkpoint=…)` for four reasons: Ray tracks only checkpoints whose commit reached its
controller; a rank that dies between upload and commit leaves folders that nothing removes; such runs can resume only
through Ray; and Ray's checkpoints have no digests. Does not import Ray; stores named tensors and JSON for any model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from amd.config import CheckpointConfig
from amd.downloads import shared_copy
from amd.storage import (
    filesystem,
    is_remote,
    join,
    local_path,
    read_file_manifest,
    remove,
    remove_leftovers,
    retry_on_outage,
    write_json,
)
from amd.training.checkpoints.listing import MANIFEST, checkpoint_url, committed_steps, stored_steps
from amd.training.failures import UploadError

STATE = "state.json"
WEIGHTS = ".safetensors"

logger = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """The state of a run in host memory: tensors by file and name, and a JSON value."""

    tensors: dict[str, dict[str, Tensor]]  # {"model": {name: tensor}, "optimizer": {…}}
    state: dict[str, Any]


class DamagedCheckpoint(UploadError):
    """Raised for a committed checkpoint whose files are missing or do not match their digests."""


class CheckpointStore:
    """Checkpoints of one run. Supports one writer at a time and any number of readers."""

    def __init__(self, folder: str, policy: CheckpointConfig) -> None:
        self.folder = folder
        self.policy = policy
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    # Reading

    def committed(self) -> list[int]:
        """Return the steps of the committed checkpoints, ascending."""
        return committed_steps(self.folder)

    def load_newest(self) -> tuple[int, Snapshot] | None:
        """Load the newest intact checkpoint. Damaged ones are logged and skipped."""
        return self._load_first(reversed(self.committed()), "falling back to the checkpoint before it")

    def load_best(self) -> tuple[int, Snapshot] | None:
        """Load the intact checkpoint with the best metric, or the newest one if the metric was never measured."""
        return self._load_first(self.ranked(self.committed()), "using the next best checkpoint")

    def _load_first(self, steps: Iterable[int], otherwise: str) -> tuple[int, Snapshot] | None:
        for step in steps:
            try:
                return step, self.load(step)
            except DamagedCheckpoint as damage:
                logger.warning("%s; %s", damage, otherwise)
        return None

    def load(self, step: int) -> Snapshot:
        """Read a checkpoint and verify its digests. Raises DamagedCheckpoint if it is missing or damaged."""
        paths = self._fetch(step)
        try:
            tensors = {
                name.removesuffix(WEIGHTS): load_file(path) for name, path in paths.items() if name.endswith(WEIGHTS)
            }
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{self.url(step)}: {error}") from None
        return Snapshot(tensors, json.loads(paths[STATE].read_bytes()))

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics stored with a checkpoint. Raises DamagedCheckpoint if it has no valid manifest."""
        values: dict[str, float] = self._manifest(step).get("metrics", {})
        return values

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Add metrics to a committed checkpoint."""
        manifest = self._manifest(step)
        updated = {**manifest, "metrics": {**manifest.get("metrics", {}), **metrics}}
        write_json(join(self.url(step), MANIFEST), updated)

    def _manifest(self, step: int) -> dict[str, Any]:
        url = self.url(step)
        try:
            manifest = read_file_manifest(join(url, MANIFEST), {"sha256"})
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{url}: checkpoint not found") from None
        if manifest is None:
            raise DamagedCheckpoint(f"{url}: {MANIFEST} is corrupt")
        return manifest

    def _fetch(self, step: int) -> dict[str, Path]:
        """Return the local paths of a checkpoint's verified files, keyed by name.

        Remote files are downloaded once per node.
        """
        url = self.url(step)
        paths = {}
        for name, facts in self._manifest(step)["files"].items():
            file = join(url, name)
            try:
                path = retry_on_outage(url, partial(shared_copy, file))
                digest = _sha256(path)
            except FileNotFoundError:
                raise DamagedCheckpoint(f"{url}: {name} is missing") from None
            if digest != facts["sha256"]:
                if is_remote(url):
                    path.unlink(missing_ok=True)  # perhaps damaged while it was downloaded
                raise DamagedCheckpoint(f"{url}: {name} is corrupt: its sha256 does not match the manifest")
            paths[name] = path
        return paths

    # Writing

    def save(
        self,
        step: int,
        snapshot: Snapshot,
        metrics: dict[str, float],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint in the background. Waits for the previous write, and raises its error if it failed.

        `before`: called before anything is written; if it fails, so does the checkpoint.
        """
        self.wait()
        self._writer = threading.Thread(
            target=self._write_safely, args=(step, snapshot, metrics, before), name=f"checkpoint-{step}", daemon=True
        )
        self._writer.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the pending write; return whether it has finished. Raises UploadError if it failed."""
        if self._writer is not None:
            self._writer.join(timeout_s)
            if self._writer.is_alive():
                return False
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise UploadError(f"checkpoint could not be written to {self.folder}: {type(error).__name__}: {error}")
        return True

    def _write_safely(
        self, step: int, snapshot: Snapshot, metrics: dict[str, float], before: Callable[[], None]
    ) -> None:
        try:
            before()
            self._write(step, snapshot, metrics)
            self.prune()
        except Exception as error:  # raised by wait(), on the training thread
            self._error = error

    def _write(self, step: int, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        url = self.url(step)
        remove(join(url, MANIFEST))  # a checkpoint that exists here is damaged or incomplete
        fs, folder = filesystem(url)
        with tempfile.TemporaryDirectory(prefix="amd-checkpoint-") as scratch:
            # Local files need no staging: without a manifest they are not a checkpoint.
            target = Path(scratch) if is_remote(url) else local_path(url)
            target.mkdir(parents=True, exist_ok=True)
            files: dict[str, dict[str, Any]] = {}
            for path in _to_files(snapshot, target):
                files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                if is_remote(url):
                    retry_on_outage(url, partial(fs.put_file, str(path), f"{folder}/{path.name}"))
        manifest = {"step": step, "written": time.time(), "metrics": metrics, "files": files}
        write_json(join(url, MANIFEST), manifest)

    # Retention

    def prune(self) -> None:
        """Remove checkpoints except those that the policy keeps: the last k, the best k by metric, and pinned steps."""
        steps = self.committed()
        keep = {*steps[-self.policy.keep_last :], *self.policy.pin_steps}
        if self.policy.keep_best:
            keep |= set(self.ranked(steps)[: self.policy.keep_best])
        for step in steps:
            if step not in keep:
                # Manifest first: an interruption then leaves an uncommitted folder, not an incomplete checkpoint.
                remove(join(self.url(step), MANIFEST))
                remove(self.url(step))

    def ranked(self, steps: list[int]) -> list[int]:
        """Sort committed steps by the policy's metric, best first and unmeasured ones last."""
        metric, sign = self.policy.best_metric, -1 if self.policy.higher_is_better else 1
        scores = {step: self._score(step, metric) for step in steps}
        worst = float("inf")
        return sorted(steps, key=lambda step: (worst if (s := scores[step]) is None else sign * s, -step))

    def _score(self, step: int, metric: str) -> float | None:
        try:
            return self.metrics(step).get(metric)
        except DamagedCheckpoint:
            return None

    def sweep(self) -> list[int]:
        """Remove uncommitted folders and return their steps. Only the run's writer may call this."""
        self.wait()
        orphans = sorted(set(stored_steps(self.folder)) - set(self.committed()))
        for step in orphans:
            remove(self.url(step))
        for step in self.committed():
            remove_leftovers(self.url(step))
        return orphans

    def url(self, step: int) -> str:
        return checkpoint_url(self.folder, step)


def _to_files(snapshot: Snapshot, folder: Path) -> list[Path]:
    paths = []
    for name, tensors in snapshot.tensors.items():
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        paths.append(path)
    path = folder / STATE
    path.write_text(json.dumps(snapshot.state, indent=2))
    return [*paths, path]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
