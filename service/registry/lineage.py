"""Lineage of an encoder in stages: teacher, initial weights and data; run; encoder; aliases; deployments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from amd.artifacts.discovery import encoder_folder
from service.auth.sessions import PREFIX
from service.db.models import Deployment
from service.registry.schemas import EncoderDetail
from tune_spaces.ledger import sweep_of


class LineageNode(NamedTuple):
    """One object of an encoder's lineage."""

    what: str
    name: str
    path: str | None = None
    """Path of the console page that shows the object."""
    own: bool = False
    """Whether the object is the encoder itself."""


def source_encoders(encoder: EncoderDetail, root: str) -> dict[str, str]:
    """Return the IDs of the encoders that were the teacher (`teacher`) or the initial weights (`start`)."""
    origins = {"teacher": encoder.lineage.teacher, "start": encoder.lineage.start}
    found = {name: _encoder_id(origin, root) for name, origin in origins.items() if origin}
    return {name: encoder_id for name, encoder_id in found.items() if encoder_id}


def lineage(
    encoder: EncoderDetail, serving: Sequence[Deployment], root: str, visible: Collection[str] = ()
) -> list[list[LineageNode]]:
    """Return an encoder's lineage in stages, each of which leads to the next.

    `serving`: deployments of the encoder. `visible`: IDs of the source encoders whose pages exist.
    """
    aliases = [LineageNode("alias", one.name, f"#moves-{one.project}-{one.name}") for one in encoder.aliases]
    deployments = [
        LineageNode(_role(one, encoder), one.name, f"{PREFIX}/deployments/{quote(one.name)}") for one in serving
    ]
    stages = [
        _sources(encoder, root, visible),
        *([node] for node in _runs(encoder)),
        [LineageNode("encoder", encoder.id, own=True)],
        aliases,
        deployments,
    ]
    return [stage for stage in stages if stage]


def _sources(encoder: EncoderDetail, root: str, visible: Collection[str]) -> list[LineageNode]:
    origin, ids = encoder.lineage, source_encoders(encoder, root)
    paths = {name: f"{PREFIX}/encoders/{quote(one)}" for name, one in ids.items() if one in visible}
    nodes = []
    if origin.teacher:
        name = ids.get("teacher") or origin.teacher.get("preset") or origin.teacher.get("weights") or "unknown"
        nodes.append(LineageNode("teacher", str(name), paths.get("teacher")))
    if origin.start:
        name = ids.get("start") or next(iter(origin.start.values()), "weights")
        nodes.append(LineageNode("initial weights", str(name), paths.get("start")))
    if origin.data.get("train"):
        samples = f" ({origin.data['samples']} samples)" if "samples" in origin.data else ""
        nodes.append(LineageNode("data", f"{origin.data['train']}{samples}"))
    return nodes


def _runs(encoder: EncoderDetail) -> list[LineageNode]:
    """Return the job that published the encoder, and its run if that is another one, such as a trial of a sweep."""
    job, run = encoder.lineage.job, encoder.lineage.run
    is_trial = run is not None and job is not None and sweep_of(run) == job
    nodes = []
    if job:
        nodes.append(LineageNode("sweep" if is_trial else "job", job, f"{PREFIX}/jobs/{quote(job)}"))
    if run and run != job:
        nodes.append(LineageNode("trial" if is_trial else "run", run))
    return nodes


def _role(deployment: Deployment, encoder: EncoderDetail) -> str:
    if deployment.serving.get("main") != encoder.id:
        return f"candidate, {deployment.share:.0%} of requests"
    return "deployment" if deployment.encoder == encoder.id else f"deployment, follows {deployment.encoder}"


def _encoder_id(origin: Mapping[str, Any], root: str) -> str | None:
    """Return the ID of the encoder that is the origin of weights; None if they are from outside the registry."""
    if origin.get("id"):
        return str(origin["id"])
    weights = str(origin.get("weights") or "").rstrip("/")
    name = weights.rpartition("/")[2]
    return name if name and encoder_folder(root, name) == weights else None
