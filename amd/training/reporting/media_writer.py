"""Write pictures of fixed training samples while a run trains: input, student-visible tokens and reconstruction.

Samples and mask are the same at every step. The pictures are rendered from a CPU copy of the student in a separate
thread, which uses neither the training modules nor the global random generator, so training waits only while the
weights are copied. Slow or failing storage costs pictures, never the run.
Shapes: S samples, T frames, H height, W width.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from amd.config import ClipConfig, DataConfig, TrainConfig
from amd.data.decoding.reader import BadSample, SampleReader
from amd.data.loading.clip_dataset import Records
from amd.data.loading.frame_sampling import middle_chooser
from amd.data.loading.transforms import center, clip_view
from amd.models.student import Student
from amd.reconstruction import Reconstruction, draw_mask, reconstruct
from amd.storage import join, remove, write_bytes
from amd.training.checkpoints.listing import stored_steps
from amd.training.checkpoints.state import host_copy
from amd.training.reporting.media_files import (
    MAX_BYTES,
    MEDIA,
    PICTURES,
    evenly_spaced,
    media_folder,
    step_url,
)
from amd.training.reporting.metrics import StepImages
from amd.training.reporting.prober import probed_steps
from amd.visualization import as_bytes, sample_sheet, webp_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_WAITING = 2  # maximum number of steps that wait while another one is written
TRACKED_SIDE = 1024  # maximum width and height of images for trackers

M = TypeVar("M", bound=nn.Module)
logger = logging.getLogger(__name__)


class _Weights(NamedTuple):
    """Weights of the student after a step, in host memory."""

    step: int
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]


def picture_steps(config: TrainConfig, steps: int, steps_per_epoch: int) -> list[int]:
    """Return the steps after which a run of `steps` steps writes pictures, ascending; none without a decoder.

    If there are more steps than the limit, returns an evenly spaced subset.
    """
    media, probe = config.media, config.probe
    if not media.samples or not config.objective.weights.reconstruction:
        return []
    due = {step for step in config.checkpoint.pin_steps if 0 < step <= steps}
    if probe is not None:
        due |= probed_steps(steps, steps_per_epoch, probe.every_epochs)
    if media.every_steps is not None:
        due |= {*range(media.every_steps, steps + 1, media.every_steps)}
    return evenly_spaced(sorted(due))


class MediaWriter:
    """Writes the pictures of one run. The thread exits whenever nothing is left to write."""

    CLOSE_S = 20.0

    def __init__(
        self,
        run_folder: str,
        config: TrainConfig,
        student: Student,
        manifest: Records,
        track: Callable[[StepImages], None],
    ) -> None:
        """Create a writer. `track` is called on the writer's thread with images for the trackers."""
        assert student.decoder is not None, "pictures need a decoder"
        self._folder, self._config, self._manifest, self._track = run_folder, config, manifest, track
        self._encoder, self._decoder = _cpu_copy(student.encoder), _cpu_copy(student.decoder)
        self._clips: Tensor | None = None
        self._waiting: deque[_Weights] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._warnings: list[str] = []
        self._closed = False
        self.written, self.failed = 0, 0  # steps of this attempt

    def write(self, step: int, student: Student) -> None:
        """Queue the pictures of a step. Drops the oldest waiting step if too many wait."""
        assert student.decoder is not None, "pictures need a decoder"
        weights = _Weights(step, host_copy(student.encoder), host_copy(student.decoder))
        with self._lock:
            if len(self._waiting) == MAX_WAITING:
                self._fail(self._waiting.popleft().step, "earlier pictures are still being written")
            self._waiting.append(weights)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="media", daemon=True)
                self._thread.start()

    def warnings(self) -> list[str]:
        """Return the warnings since the last call."""
        with self._lock:
            found, self._warnings = self._warnings, []
        return found

    def close(self, wait: bool) -> None:
        """Stop after the current step. With `wait`, first wait up to CLOSE_S seconds for all queued steps."""
        with self._lock:
            thread = self._thread
            if not wait:
                self._waiting.clear()
        if thread is not None and wait:
            thread.join(self.CLOSE_S)
        with self._lock:
            self._closed = True
            while self._waiting:
                self._fail(self._waiting.popleft().step, f"storage took more than {self.CLOSE_S:g} s")

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                weights = self._waiting.popleft()
            try:
                self._write(weights)
                self.written += 1
            except Exception as error:  # pictures never stop a run
                logger.debug("pictures of step %d", weights.step, exc_info=True)
                with self._lock:
                    self._fail(weights.step, f"{type(error).__name__}: {error}")

    def _fail(self, step: int, reason: str) -> None:
        self.failed += 1
        self._warnings.append(
            f"step {step}: pictures were not written ({reason}); {self.failed} steps without pictures so far. "
            "Training continues"
        )

    def _write(self, weights: _Weights) -> None:
        if self._clips is None:
            self._clips = read_samples(self._manifest, self._config.data, self._config.clip, self._config.media.samples)
        self._encoder.load_state_dict(weights.encoder)
        self._decoder.load_state_dict(weights.decoder)
        found = self._reconstruct(self._clips)
        sheets = [sample_sheet(clips) for clips in (self._clips, found.masked, as_bytes(found.reconstructed))]
        url = step_url(self._folder, weights.step)
        for name, sheet in zip(PICTURES, sheets, strict=True):
            write_bytes(join(url, name), webp_bytes(sheet, MAX_BYTES))
        self._thin()
        if not self._closed:
            self._track(StepImages(weights.step, self._tracked(sheets)))

    def _tracked(self, sheets: list[Image]) -> dict[str, Image]:
        """Return smaller copies for trackers, which keep every image: pictures that never change are sent only once."""
        images: dict[str, Image] = {}
        for name, sheet in zip(PICTURES, sheets, strict=True):
            if name == "rebuilt.webp" or not self.written:
                images[f"{MEDIA}/{name.removesuffix('.webp')}"] = small = sheet.copy()
                small.thumbnail((TRACKED_SIDE, TRACKED_SIDE))
        return images

    @torch.inference_mode()
    def _reconstruct(self, clips: Tensor) -> Reconstruction:
        """Reconstruct one clip at a time, which limits memory."""
        config = self._config
        mask = draw_mask(config.mask.strategy, config.mask.student_ratio, config.clip.grid, config.seed)
        parts = [
            reconstruct(self._encoder, self._decoder, clip, mask, config.clip, config.objective.pixels)
            for clip in clips.split(1)
        ]
        return Reconstruction(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _thin(self) -> None:
        """Remove steps beyond the limit, which exist only if the run resumed with different settings."""
        steps = sorted(stored_steps(media_folder(self._folder)))
        for step in set(steps) - set(evenly_spaced(steps)):
            remove(step_url(self._folder, step))


def read_samples(manifest: Records, data: DataConfig, clip: ClipConfig, count: int) -> Tensor:
    """Decode the middle clips of evenly spaced records: (S, 3, T, H, W) uint8. Unreadable samples are skipped.

    Raises BadSample if none can be read.
    """
    numbers = np.linspace(0, len(manifest) - 1, min(count, len(manifest))).round().astype(int).tolist()
    clips: list[Tensor] = []
    with closing(SampleReader(data)) as reader:
        for number in numbers:
            try:
                frames = torch.from_numpy(reader.read_clip(manifest[number], middle_chooser(clip)))  # type: ignore[arg-type]
            except BadSample:
                if number == numbers[-1] and not clips:
                    raise
                continue
            clips.append(clip_view(center(frames, data, clip)))
    return torch.stack(clips).contiguous()


def _cpu_copy(module: M) -> M:
    return copy.deepcopy(module).cpu().eval().requires_grad_(False)
