"""Routes /v1/presets, /v1/schemas and /v1/validate: available presets, config schemas and request validation."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel

from amd.config import TrainConfig
from amd.presets.load import PRESETS_BY_KIND
from service.auth.authentication import Reader, Submitter
from service.jobs.estimate import estimate
from service.jobs.execution.ray_jobs import Capacity, Cluster
from service.jobs.kinds import KINDS, JobKind, resources_of, uris
from service.jobs.routes import Config, Locations, project_of, resolved
from service.jobs.schemas import JobRequest, ValidateView
from service.web.bounded_calls import BoundedCalls
from service.web.errors import ClusterUnavailable, NotFound
from service.web.formats import plural
from service.web.schemas import ApiModel
from tune_spaces.config import SearchConfig

router = APIRouter(tags=["catalog"])


class PresetView(ApiModel):
    """A preset."""

    name: str
    kind: JobKind
    summary: str
    source: str
    """Source of the preset's values: a row of a table in the paper, or "our default"."""
    hardware: str
    gpu_hours_estimate: float | None


class PresetDetail(PresetView):
    """A preset with its full config."""

    config: dict[str, Any]
    """Config of the preset. Values that start with `unset:` must be set by the caller."""


def _presets() -> dict[str, PresetDetail]:
    return {
        name: PresetDetail(
            name=name,
            kind=kind,
            summary=preset.summary,
            source=preset.source,
            hardware=preset.hardware,
            gpu_hours_estimate=preset.gpu_hours,
            config=preset.config.model_dump(mode="json"),
        )
        for kind, table in PRESETS_BY_KIND.items()
        for name, preset in table.items()
    }


@router.get("/presets", summary="List the presets")
def list_presets(caller: Reader) -> list[PresetView]:
    return [PresetView(**preset.model_dump(exclude={"config"})) for preset in _presets().values()]


@router.get("/presets/{name}", summary="Get a preset with its config")
def get_preset(name: Annotated[str, Path(description="Name of the preset.")], caller: Reader) -> PresetDetail:
    found = _presets().get(name)
    if found is None:
        raise NotFound(f"there is no preset {name!r}; GET /v1/presets lists them")
    return found


@router.get("/schemas/{kind}", summary="Get the JSON schema of the config for a job kind")
def get_schema(kind: Annotated[JobKind, Path(description="Job kind.")], caller: Reader) -> dict[str, Any]:
    return KINDS[kind].config.model_json_schema()


@router.post("/validate", summary="Validate a job without running it")
def validate_request(
    body: JobRequest, caller: Submitter, settings: Config, policy: Locations, request: Request
) -> ValidateView:
    """Return the resolved config, warnings and an estimate. Fails with the same errors as submitting the job."""
    config: BaseModel = resolved(body, policy, settings, project_of(caller, body.project))
    warnings, capacity = list[str](), None
    cluster: Cluster = request.app.state.cluster
    calls: BoundedCalls = request.app.state.ray_calls
    try:
        capacity = calls.run_from_thread(cluster.capacity)
    except ClusterUnavailable as error:
        warnings.append(f"cannot check whether the cluster can run the job: {error.message}")
    run = config.train if isinstance(config, SearchConfig) else config
    figures = estimate(run, body.source_preset, capacity) if isinstance(run, TrainConfig) else None
    if capacity is not None:
        warnings += _capacity_warnings(config, capacity)
    if figures is not None and figures.memory_fits is False:
        warnings.append(
            f"a worker needs about {figures.memory_per_worker_bytes / 1e9:.0f} GB; lower scaling.micro_batch "
            "(gradients are accumulated, so the batch size stays the same)"
        )
    warnings += [
        f"{field} is a local path; it must exist on every node" for field, uri in uris(config) if uri[0] == "/"
    ]
    return ValidateView(kind=body.kind, config=config.model_dump(mode="json"), warnings=warnings, estimate=figures)


def _capacity_warnings(config: BaseModel, capacity: Capacity) -> list[str]:
    request = resources_of(config)
    warnings = []
    if request.cpus > capacity.cpus:
        warnings.append(
            f"scaling.workers: the job needs {plural(request.cpus, 'CPU')}, but the cluster has {capacity.cpus:g}; "
            "the job will wait until the cluster grows"
        )
    if request.device == "cuda" and request.workers > capacity.gpus:
        warnings.append(
            f"scaling.workers: the job needs {plural(request.workers, 'GPU')}, but the cluster has {capacity.gpus:g}; "
            "the job will wait until the cluster grows"
        )
    if request.device == "auto" and request.device_with(capacity.gpus) == "cpu":
        warnings.append(
            f"the job will use CPUs: the cluster has only {plural(capacity.gpus, 'GPU')} "
            f"for {plural(request.workers, 'worker')}"
        )
    return warnings
