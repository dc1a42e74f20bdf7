"""Validate a data set before spending GPU time (`amd validate`). Errors state file:line, the rule and the remedy.

The lines of a list file are checked when its manifest is opened; this module checks that files exist, finds duplicates,
and decodes samples: local images up to a limit, and a few samples of other data. Does not import training.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from amd.config import DataConfig
from amd.data.dataset.lists import line_numbers
from amd.data.dataset.manifest import MAX_PROBLEMS, NO_LABEL, Manifest, ManifestError, capped
from amd.data.dataset.open import list_url, open_manifest, text_blocks
from amd.data.dataset.record import BadSample, Record
from amd.data.decoding.reader import SampleReader
from amd.data.faults import BAD_SAMPLES_REMEDY
from amd.storage import StorageError, filesystem, is_remote, join

ALL_UP_TO = 20_000  # records up to which every file is checked; larger sets are sampled
ALL_REMOTE_UP_TO = 1_000
DECODED = 16
DECODED_IMAGES = 2_000  # local images decode in milliseconds; videos and remote files take longer
PROBED_FRAMES = 3  # frames read per sample: the first, the middle and the last
_CONCURRENT_CHECKS = 16
_READERS = 4
_SAMPLES_PER_READER = 250  # an interrupt waits for them; starting a reader takes as long as about 50 photographs


class DataReport(BaseModel):
    """Summary of a data set, with warnings."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    url: str
    samples: int
    kinds: dict[str, int]
    """Number of checked samples, by kind."""
    labelled: int
    classes: int
    """Number of distinct labels."""
    digest: str
    looked_for: int
    """Number of records whose files were checked for existence."""
    read: int
    """Number of decoded samples."""
    bad: list[str] = Field(default_factory=list)
    """Samples that could not be decoded, with the reason."""
    damaged: list[str] = Field(default_factory=list)
    """Partially decoded videos, with a description of the damage."""
    warnings: list[str] = Field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.kinds.items())
        lines = [
            f"{self.url}: {self.samples} samples ({kinds}), {self.labelled} labelled with {self.classes} classes",
            f"files checked: {self.looked_for}; {self._decoded()}; digest {self.digest[:16]}",
        ]
        if self.bad:
            lines.append(f"cannot be read, skipped in training: {len(self.bad)} of {self.read}")
            lines += capped([f"  {bad}" for bad in self.bad])
        if self.damaged:
            lines.append(f"damaged, used as far as they decode: {len(self.damaged)} of {self.read}")
            lines += capped([f"  {damaged}" for damaged in self.damaged])
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def _decoded(self) -> str:
        more = "" if self.read == self.samples else " (--all decodes every sample)"
        return f"samples decoded: {self.read} of {self.samples}{more}"


def validate_data(data: DataConfig, *, decode_all: bool = False) -> DataReport:
    """Check data.train and decode samples: `DECODED_IMAGES` local images, `DECODED` samples of other data, or all.

    Raises a ManifestError listing every error found, also if more of the decoded samples are unreadable than
    data.max_bad_fraction allows.
    """
    manifest = open_manifest(data)
    draws = random.Random(0)
    remote = is_remote(manifest[0].location)
    checked = len(manifest) if decode_all else ALL_REMOTE_UP_TO if remote else ALL_UP_TO
    numbers = _sample_indices(len(manifest), checked, draws)
    missing = _missing(manifest, numbers, data)
    if missing:
        scope = f" (of {len(numbers)} checked)" if len(numbers) < len(manifest) else ""
        problems = capped(_missing_messages(data, manifest, missing[:MAX_PROBLEMS]), len(missing))
        raise ManifestError([f"data.train: files that do not exist: {len(missing)}{scope}", *problems])
    kinds = Counter[str](manifest[i].kind for i in numbers)
    most = len(manifest) if decode_all else DECODED_IMAGES if set(kinds) == {"image"} and not remote else DECODED
    tried = _sample_indices(len(manifest), most, draws)
    bad, damaged = _try_reading(data, [manifest[i] for i in tried])
    _check_bad_fraction(data, bad, len(tried), len(manifest))
    labels = manifest.labels
    known = labels[labels != NO_LABEL]
    return DataReport(
        url=data.train,
        samples=len(manifest),
        kinds=kinds,
        labelled=len(known),
        classes=len(np.unique(known)),
        digest=manifest.digest(),
        looked_for=len(numbers),
        read=len(tried),
        bad=bad,
        damaged=damaged,
        warnings=[*manifest.notes, *_label_warnings(manifest), *_duplicate_warnings(data, manifest)],
    )


def _check_bad_fraction(data: DataConfig, bad: Sequence[str], decoded: int, samples: int) -> None:
    """Raise ManifestError if no decoded sample can be read, or if too many cannot be read to train on the data."""
    if bad and len(bad) == decoded:
        raise ManifestError([f"data.train: none of the {decoded} tested samples can be read", *capped(bad)])
    if len(bad) > data.max_bad_fraction * decoded:
        scope = "" if decoded == samples else f" (of {samples}; --all decodes every sample)"
        raise ManifestError(
            [
                f"data.train: {len(bad)} of {decoded} decoded samples{scope} cannot be read, more than "
                f"data.max_bad_fraction={data.max_bad_fraction} allows: {BAD_SAMPLES_REMEDY}",
                *capped(bad),
            ]
        )


def _sample_indices(count: int, most: int, draws: random.Random) -> list[int]:
    return list(range(count)) if count <= most else sorted(draws.sample(range(count), most))


def _missing(manifest: Manifest, numbers: Sequence[int], data: DataConfig) -> list[int]:
    """Return records whose file is missing, or a frame folder's first or last frame. Shards are checked when opened."""
    if manifest.shards is not None:
        return []

    def exists(i: int) -> bool:
        record = manifest[i]
        if record.kind != "frames":
            return _exists(record.location)
        ends = (1, record.frames or 1)
        return all(_exists(join(record.location, data.frame_name.format(n))) for n in ends)

    if not is_remote(manifest[0].location):
        return [i for i in numbers if not exists(i)]
    with ThreadPoolExecutor(_CONCURRENT_CHECKS) as pool:
        return [i for i, found in zip(numbers, pool.map(exists, numbers), strict=True) if not found]


def _exists(url: str) -> bool:
    try:
        fs, path = filesystem(url)
        return bool(fs.exists(path))
    except StorageError:
        return False


def _missing_messages(data: DataConfig, manifest: Manifest, records: Sequence[int]) -> list[str]:
    """Return messages for missing files: `list:line: file …` for records from a list file, else only the file."""
    url = list_url(data, manifest)
    lines = line_numbers(text_blocks(url), records) if url else {}
    messages = []
    for i in records:
        record = manifest[i]
        target = record.location
        if record.kind == "frames":
            first, last = (data.frame_name.format(n) for n in (1, record.frames or 1))
            target = f"{record.location}/{first} or {last}"
        where = f"{url}:{lines[i]}: " if url else ""
        fields = "total_frames, data.frame_name or data.root" if record.kind == "frames" else "or data.root"
        remedy = f"; fix the line, {fields}" if record.kind == "frames" else f"; fix the line {fields}"
        messages.append(f"{where}{target} does not exist{remedy if url else ''}")
    return messages


def _try_reading(data: DataConfig, records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Return one message per record that cannot be decoded, and one per damaged record."""
    starts = range(0, len(records), _SAMPLES_PER_READER)
    parts = [records[start : start + _SAMPLES_PER_READER] for start in starts]
    with ThreadPoolExecutor(_READERS) as pool:
        bad, damaged = zip(*pool.map(partial(_read_part, data), parts), strict=True)
    return list(chain.from_iterable(bad)), list(chain.from_iterable(damaged))


def _read_part(data: DataConfig, records: Sequence[Record]) -> tuple[list[str], list[str]]:
    bad, damaged = [], []
    with closing(SampleReader(data)) as reader:
        for record in records:
            try:
                reader.read_clip(record, lambda total: np.linspace(0, total - 1, PROBED_FRAMES).astype(np.int64))
                if reader.last_read is not None and reader.last_read.damage is not None:
                    damaged.append(f"{record.name} {reader.last_read.damage}")
            except BadSample as error:
                bad.append(str(error))
    return bad, damaged


def _label_warnings(manifest: Manifest) -> list[str]:
    labels = manifest.labels
    without = int((labels == NO_LABEL).sum())
    warnings = []
    if 0 < without < len(labels):
        warnings.append(f"{without} of {len(labels)} samples have no label")
    known = np.unique(labels[labels != NO_LABEL])
    if len(known) and known[-1] >= len(known):
        warnings.append(
            f"labels go up to {known[-1]}, but only {len(known)} distinct labels occur: classes may be missing"
        )
    return warnings


def _duplicate_warnings(data: DataConfig, manifest: Manifest) -> list[str]:
    """Warn about files listed more than once, found by 64-bit hashes so that millions of names fit in memory."""
    if manifest.shards is not None:
        return []
    _, first, counts = np.unique(manifest.name_hashes(), return_index=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    if not len(repeated):
        return []
    example = int(first[repeated[0]])
    url = list_url(data, manifest)
    where = f" ({url}:{line_numbers(text_blocks(url), [example])[example]})" if url else ""
    return [f"files that are listed more than once: {len(repeated)}, for example {manifest[example].name}{where}"]
