"""/v1/presets, /v1/schemas, /v1/validate: what can be asked for, and what a request comes to."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from amd.config import TrainConfig
from amd.presets.detection import DETECTION_PRESETS
from amd.presets.finetuning import FINETUNE_PRESETS
from amd.presets.pretraining import PRESETS
from service.auth.authentication import Reader, Submitter
from service.jobs.estimate import estimate
from service.jobs.execution.ray_jobs import Capacity, Cluster
from service.jobs.kinds import KINDS, JobKind, need, uris
from service.jobs.routes import Config, Uris, project_of, resolved
from service.jobs.schemas import JobRequest, ValidateView, Wire
from service.web.errors import ClusterUnavailable, NotFound
from tune_spaces.config import SearchConfig

router = APIRouter(tags=["catalog"])


class PresetView(Wire):
    """A named recipe."""

    name: str
    kind: JobKind
    summary: str
    source: str
    """Where its values come from: a paper's row, or "our default"."""
    hardware: str
    gpu_hours_estimate: float | None


class PresetDetail(PresetView):
    config: dict[str, Any]
    """What stands behind `unset:` is left to you."""


def _presets() -> dict[str, PresetDetail]:
    tables: dict[JobKind, Any] = {"train": PRESETS, "finetune": FINETUNE_PRESETS, "detect": DETECTION_PRESETS}
    return {
        name: PresetDetail(
            name=name,
            kind=kind,
            summary=preset.summary,
            source=preset.source,
            hardware=preset.hardware,
            gpu_hours_estimate=getattr(preset, "gpu_hours", None),
            config=preset.config.model_dump(mode="json"),
        )
        for kind, table in tables.items()
        for name, preset in table.items()
    }


@router.get("/presets", summary="The named recipes")
def list_presets(caller: Reader) -> list[PresetView]:
    return [PresetView(**preset.model_dump(exclude={"config"})) for preset in _presets().values()]


@router.get("/presets/{name}", summary="A recipe whole")
def get_preset(name: str, caller: Reader) -> PresetDetail:
    found = _presets().get(name)
    if found is None:
        raise NotFound(f"there is no preset {name!r}; GET /v1/presets lists them")
    return found


@router.get("/schemas/{kind}", summary="The JSON schema of a kind's config")
def get_schema(kind: JobKind, caller: Reader) -> dict[str, Any]:
    return KINDS[kind].config.model_json_schema()


@router.post("/validate", summary="What a job would come to, without running it")
def validate_request(
    body: JobRequest, caller: Submitter, settings: Config, policy: Uris, request: Request
) -> ValidateView:
    """The resolved config, warnings and an estimate; the same errors as a submission."""
    project_of(caller, body.project)
    config: BaseModel = resolved(body, policy, settings.root)
    warnings, capacity = list[str](), None
    cluster: Cluster = request.app.state.cluster
    try:
        capacity = cluster.capacity()
    except ClusterUnavailable as error:
        warnings.append(f"whether the cluster can run it is not known: {error.message}")
    run = config.train if isinstance(config, SearchConfig) else config
    figures = estimate(run, body.preset, capacity) if isinstance(run, TrainConfig) else None
    if capacity is not None:
        warnings += _of_capacity(config, capacity)
    if figures is not None and figures.memory_fits is False:
        warnings.append(
            f"a worker needs about {figures.memory_per_worker_bytes / 1e9:.0f} GB; lower scaling.micro_batch, which "
            "keeps the batch by accumulating gradients"
        )
    warnings += [
        f"{field}: a path on the nodes; every node must have it" for field, uri in uris(config) if uri[0] == "/"
    ]
    return ValidateView(kind=body.kind, config=config.model_dump(mode="json"), warnings=warnings, estimate=figures)


def _of_capacity(config: BaseModel, capacity: Capacity) -> list[str]:
    asked = need(config)
    told = []
    if asked.cpus > capacity.cpus:
        told.append(
            f"scaling.workers need {asked.cpus:g} CPUs; the cluster has {capacity.cpus:g}: it waits until it grows"
        )
    if asked.device == "cuda" and asked.workers > capacity.gpus:
        told.append(
            f"scaling.workers need {asked.workers} GPUs; the cluster has {capacity.gpus:g}: it waits until it grows"
        )
    if asked.device == "auto" and capacity.gpus < asked.workers:
        told.append(f"it trains on CPUs: the cluster has {capacity.gpus:g} GPUs for {asked.workers} workers")
    return told
