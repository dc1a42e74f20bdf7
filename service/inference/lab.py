"""The mask lab's engine: decode a file or sample, draw its masks, reconstruct it, and align a student with its teacher.

One request runs at a time, in a thread; a few more may wait. Decoded clips, the last model and the last teacher are
cached, so that a request that changes only the mask settings decodes nothing. Does not import FastAPI or Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amd.artifacts.card import Card
from amd.config import ConfigError, DataConfig, TrainConfig, validate
from amd.data.dataset.open import open_manifest
from amd.data.decoding.limits import FileLimits
from amd.data.decoding.reader import BadSample, DecodedFrames, SampleReader
from amd.device import use_threads
from amd.downstream.embedding.features import cut_clips, file_chooser
from amd.exchange.load import load_teacher
from amd.lab.layers import sprite_columns, sprite_sheet
from amd.lab.view import Autoencoder, Distillation, MaskView, sample_clip_sets, view_masks
from amd.models.student import Student
from amd.models.teachers.frozen import Teacher
from amd.storage import StorageUnreachable, join, resolve_root
from amd.training.checkpoints.store import CheckpointStore, DamagedCheckpoint
from amd.training.runs.teachers import with_trained_teacher
from service.inference.decoders import MIB
from service.inference.images import png_bytes
from service.inference.model import LoadedEncoder
from service.inference.options import RequestLimits
from service.web.errors import Refusal, invalid_item

MAX_WAITING = 8
CACHED_CLIPS = 8
CPU = torch.device("cpu")


class LabModel(NamedTuple):
    """A published encoder or a run's student, and the card that defines how its input is cut into clips."""

    source: str
    """Folder of the encoder or checkpoint."""
    autoencoder: Autoencoder | None
    """Part that reconstructs pixels; None if the student has no decoder."""
    card: Card
    student: Student | None = None
    """Student of a checkpoint; a published encoder lacks the projections and generators."""


class LabTeacher(NamedTuple):
    """The teacher of a run."""

    run: str
    teacher: Teacher


class LabEngine:
    """Draws masks for one request at a time."""

    def __init__(self, limits: RequestLimits | None = None) -> None:
        self._limits = limits = limits or RequestLimits()
        self._file_limits = FileLimits(
            limits.bytes_mib * MIB, limits.pixels, limits.frames, limits.duration_s, limits.decoded_mib * MIB
        )
        uploads = DataConfig(
            train="",
            read_timeout_s=limits.decode_timeout_s,
            read_memory_mib=limits.memory_mib,
            retries=1,
            damage="strict",
        )
        self._reader = SampleReader(uploads, self._file_limits)
        self._clips: OrderedDict[str, Tensor] = OrderedDict()
        self._model: LabModel | None = None
        self._teacher: LabTeacher | None = None
        self._executor = ThreadPoolExecutor(1, "lab", initializer=use_threads, initargs=(1,))
        self._waiting = 0

    async def view(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Draw the masks requested by `call` (see `service.lab.gateway`). Raises Refusal."""
        if self._waiting > MAX_WAITING:
            raise Refusal("overloaded", f"{self._waiting} requests are waiting for the lab; try again in a second")
        self._waiting += 1
        deadline_s = call["deadline_s"]
        until = time.monotonic() + deadline_s
        work = asyncio.get_running_loop().run_in_executor(self._executor, self._view, call, until)
        try:
            async with asyncio.timeout(deadline_s):
                return await work
        except TimeoutError:
            raise Refusal("deadline_exceeded", f"the lab did not finish within {deadline_s:g} s") from None
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Wait for the current request and stop the decoding process."""
        self._executor.shutdown(cancel_futures=True)
        self._reader.close()

    def _view(self, call: Mapping[str, Any], until: float) -> dict[str, Any]:
        try:
            config = validate(TrainConfig, call["config"])
            model = self._load(call["model"]) if call["model"] is not None else None
            distillation = self._distillation(call["model"], model) if model is not None else None
            frames = self._frames(call, model.card if model is not None else _unpublished_card(config))
            sets = sample_clip_sets(config, call["step"], call["position"])
        except BadSample as error:
            raise invalid_item(0, error.reason) from None
        except StorageUnreachable as error:
            raise Refusal("input_unavailable", str(error)) from None
        except ConfigError as error:
            raise Refusal("not_possible", "; ".join(error.problems)) from None
        if time.monotonic() > until:
            raise Refusal("deadline_exceeded", "the file was decoded too late to draw its masks")
        autoencoder = model.autoencoder if model is not None else None
        view = view_masks(config, sets, frames, autoencoder, distillation)
        return {**_reply(view), "columns": sprite_columns(config.clip.frames)}

    def _load(self, wanted: Mapping[str, Any]) -> LabModel:
        """Return a published encoder or a student in a run's checkpoint. Raises ConfigError or Refusal."""
        source = wanted["encoder"] if "encoder" in wanted else f"{wanted['run']}/checkpoints/{wanted['checkpoint']}"
        if self._model is None or self._model.source != source:
            self._model = None  # frees its memory first
            loaded = _load_encoder(source) if "encoder" in wanted else _load_checkpoint(source, wanted)
            self._model = loaded
        if self._model.autoencoder is None and not wanted["alignment"]:
            message = "objective.weights.reconstruction=0: the job's student has no decoder; omit `checkpoint`"
            raise Refusal("not_possible", f"{message}, or set `alignment`")
        return self._model

    def _distillation(self, wanted: Mapping[str, Any], model: LabModel) -> Distillation | None:
        """Return a checkpoint's student and its run's teacher, or None if the request does not need them.

        Raises ConfigError if the teacher cannot be loaded.
        """
        if model.student is None or not wanted["alignment"]:
            return None
        if self._teacher is None or self._teacher.run != wanted["run"]:
            self._teacher = None  # frees its memory first
            config = validate(TrainConfig, wanted["config"])
            resolved = with_trained_teacher(config, resolve_root(config.storage))
            self._teacher = LabTeacher(wanted["run"], load_teacher(resolved))
        return Distillation(model.student, self._teacher.teacher)

    def _frames(self, call: Mapping[str, Any], card: Card) -> Tensor | None:
        """Return the clip (3, T, H, W) of an upload, a URI or a sample; None if the call has no input."""
        item = call["item"]
        if item is None:
            return None
        key = _key(item, card)
        if key not in self._clips:
            decoded = self._decode_sample(item, card) if "record" in item else self._decode_file(item, card)
            self._clips[key] = cut_clips(decoded, card)[0].contiguous()
            if len(self._clips) > CACHED_CLIPS:
                self._clips.popitem(last=False)
        self._clips.move_to_end(key)
        return self._clips[key]

    def _decode_file(self, item: Mapping[str, Any], card: Card) -> DecodedFrames:
        content, uri = item.get("content"), item.get("uri")
        return self._reader.read_file(uri or "the upload", file_chooser(card), content, self._limits.fetch_timeout_s)

    def _decode_sample(self, item: Mapping[str, Any], card: Card) -> DecodedFrames:
        """Decode the middle clip of a record of a run's data. Raises BadSample, ConfigError or Refusal."""
        data = validate(DataConfig, item["data"])
        manifest = open_manifest(data)
        if item["record"] >= len(manifest):
            raise Refusal(
                "not_possible",
                f"record={item['record']} must be below {len(manifest)}, the number of records in the run's data",
            )
        with closing(SampleReader(data, self._file_limits)) as reader:
            pixels = reader.read_clip(manifest[item["record"]], file_chooser(card))
        return DecodedFrames(pixels, np.arange(len(pixels)))


def _load_encoder(url: str) -> LabModel:
    loaded = LoadedEncoder(url, CPU, "fp32")
    if loaded.decoder is None or loaded.card.decoder is None:
        message = f"{loaded.id} was published without its decoder, so it cannot reconstruct pixels; omit `encoder`"
        raise Refusal("not_possible", message)
    return LabModel(url, Autoencoder(loaded.encoder, loaded.decoder, loaded.card.decoder.pixels), loaded.card)


def _load_checkpoint(source: str, wanted: Mapping[str, Any]) -> LabModel:
    # The run's own config, because the masks that a request chooses can change which parts a student has.
    config = validate(TrainConfig, wanted["config"])
    store = CheckpointStore(join(wanted["run"], "checkpoints"), config.checkpoint)
    try:
        snapshot = store.load(wanted["checkpoint"])
    except DamagedCheckpoint as error:
        raise Refusal("not_possible", f"checkpoint={wanted['checkpoint']}: {error}") from None
    student = Student(config).eval().requires_grad_(False)
    student.load_state_dict(snapshot.tensors["model"])
    autoencoder = None
    if student.decoder is not None:
        autoencoder = Autoencoder(student.encoder, student.decoder, config.objective.pixels)
    return LabModel(source, autoencoder, _unpublished_card(config), student)


def _unpublished_card(config: TrainConfig) -> Card:
    """Return a card that describes the input of a training config."""
    return Card(id="lab", encoder=config.student.encoder, clip=config.clip, interpolation=config.data.interpolation)


def _key(item: Mapping[str, Any], card: Card) -> str:
    """Return a digest of an input and of the settings used to cut a clip from it."""
    source = item["content"] if "content" in item else repr(sorted(item.items())).encode()
    digest = hashlib.sha256(source)
    digest.update(f"{card.clip!r} {card.interpolation}".encode())
    return digest.hexdigest()


def _reply(view: MaskView) -> dict[str, Any]:
    rebuilt, alignment = view.rebuilt, view.alignment
    return {
        "token_sets": {name: index[0].tolist() for name, index in view.sets._asdict().items()},
        "layers": {
            name: png_bytes(Image.fromarray(sprite_sheet(layer).numpy())) for name, layer in view.layers.items()
        },
        "loss": None if rebuilt is None else rebuilt.loss,
        "errors": None if rebuilt is None else rebuilt.errors.tolist(),
        "alignment": None if alignment is None else {name: part.tolist() for name, part in alignment._asdict().items()},
    }
