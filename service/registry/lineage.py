"""Lineage of an encoder as steps: teacher, initial weights, data, run, encoder, aliases and deployments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from service.auth.sessions import PREFIX
from service.db.models import Deployment
from service.registry.schemas import EncoderDetail


class LineageNode(NamedTuple):
    """One step of an encoder's lineage."""

    what: str
    name: str
    path: str | None
    """Path of the console page that shows this step."""
    own: bool = False


def lineage(encoder: EncoderDetail, serving: Sequence[Deployment]) -> list[LineageNode]:
    """Return an encoder's lineage, in the order in which the steps happened. `serving`: its deployments."""
    nodes = []
    origin = encoder.lineage
    if origin.teacher:
        source = str(origin.teacher.get("preset") or origin.teacher.get("weights") or "teacher")
        nodes.append(LineageNode("teacher", source, None))
    if origin.start:
        nodes.append(LineageNode("started from", str(next(iter(origin.start.values()), "weights")), None))
    if origin.data.get("train"):
        samples = f" ({origin.data['samples']} samples)" if "samples" in origin.data else ""
        nodes.append(LineageNode("data", f"{origin.data['train']}{samples}", None))
    if origin.job or origin.run:
        job = origin.job or origin.run
        nodes.append(LineageNode("run", str(job), f"{PREFIX}/jobs/{origin.job}" if origin.job else None))
    nodes.append(LineageNode("encoder", encoder.id, None, own=True))
    nodes += [LineageNode("alias", alias.name, None) for alias in encoder.aliases]
    nodes += [LineageNode("deployment", one.name, f"{PREFIX}/deployments/{one.name}") for one in serving]
    return nodes
