"""Job kinds: how a request becomes a complete config, which resources it needs, and which program runs it.

Does not use HTTP, the database, Ray or torch; a config is checked as far as possible without reading data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

from pydantic import BaseModel

from amd.config import (
    ConfigError,
    ConfigLocation,
    DetectionConfig,
    EmbedConfig,
    ExportConfig,
    FinetuneConfig,
    ImportConfig,
    PrepareConfig,
    ProbeConfig,
    RunConfig,
    Section,
    TaskConfig,
    TrainConfig,
    locations,
    locations_in,
    overridden,
    validate,
)
from amd.config.locations import LocationRole
from amd.presets.load import check_complete, find_preset
from amd.presets.preset import UNSET
from amd.presets.teachers import teacher_recipe
from service.jobs.execution.protocol import JobFolder
from tune_spaces.config import SearchConfig
from tune_spaces.load_config import search_from

JobKind = Literal["train", "finetune", "detect", "probe", "embed", "search", "import", "export", "prepare"]


OWN_ROLES: tuple[LocationRole, ...] = ("storage", "output")
"""Roles of the locations that the service chooses for a job."""


class ResourceRequest(NamedTuple):
    """Minimum resources that a job needs."""

    workers: int
    cpus: float
    """Total number of CPUs across all workers."""
    device: str
    """Device: cpu, cuda, or auto, which uses one GPU per worker if the cluster has enough GPUs."""

    def device_with(self, gpus: float) -> str:
        """Return the device that the job uses on a cluster with this many GPUs."""
        if self.device == "auto":
            return "cuda" if gpus >= self.workers else "cpu"
        return self.device


Resolve = Callable[[str | None, Mapping[str, Any] | None, Mapping[str, Any]], BaseModel]


class JobKindSpec(NamedTuple):
    """Purpose, config and program of a job kind."""

    summary: str
    """What a job of this kind does, in one sentence for users."""
    config: type[Section]
    resolve: Resolve
    """Function (preset, config, overrides) -> complete config. Raises ConfigError."""
    module: tuple[str, ...]
    """Arguments to `python -m`; the program must accept `--config URL`."""
    args: tuple[str, ...] = ("--json",)
    """Additional arguments for the program."""


def _with_presets(config: type[RunConfig], *, complete: bool = False) -> Resolve:
    def resolve(preset: str | None, values: Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> BaseModel:
        chosen = values if values is not None else find_preset(config, str(preset)).config.model_dump(mode="json")
        resolved = validate(config, overridden(chosen, overrides))
        if complete:
            check_complete(resolved)
        return resolved

    return resolve


def _without_presets(kind: JobKind, config: type[Section]) -> Resolve:
    def resolve(preset: str | None, values: Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> BaseModel:
        if preset is not None:
            raise ConfigError([f"preset={preset}: kind={kind} has no presets; set `config` instead"])
        return validate(config, overridden(values or {}, overrides))

    return resolve


def _search(preset: str | None, values: Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> BaseModel:
    config = search_from(preset, values or {}, overrides)
    check_complete(config.train)
    return config


KINDS: dict[JobKind, JobKindSpec] = {
    "train": JobKindSpec(
        "Pre-train a small encoder on unlabelled images or videos, with or without distillation from a larger encoder.",
        TrainConfig,
        _with_presets(TrainConfig, complete=True),
        ("amd.training",),
    ),
    "finetune": JobKindSpec(
        "Fine-tune an encoder on labelled images or videos, test its best checkpoint, and publish it.",
        FinetuneConfig,
        _with_presets(FinetuneConfig),
        ("amd.downstream", "finetune"),
    ),
    "detect": JobKindSpec(
        "Fine-tune an encoder to detect the actions of people in videos, score it by frame-mAP, and publish it.",
        DetectionConfig,
        _with_presets(DetectionConfig),
        ("amd.downstream", "detect"),
    ),
    "probe": JobKindSpec(
        "Score a published encoder on labelled data without training the encoder, and add the scores to its card.",
        ProbeConfig,
        _without_presets("probe", ProbeConfig),
        ("amd.downstream", "probe"),
        args=(),
    ),
    "embed": JobKindSpec(
        "Embed a data set with a published encoder, for example for a map or a search for similar samples.",
        EmbedConfig,
        _without_presets("embed", EmbedConfig),
        ("amd.downstream", "embed"),
        args=(),
    ),
    "search": JobKindSpec(
        "Pre-train many encoders with different settings, compare their scores, and report the best settings.",
        SearchConfig,
        _search,
        ("tune_spaces",),
    ),
    "import": JobKindSpec(
        "Publish third-party weights, such as those of a timm model, as an encoder.",
        ImportConfig,
        _without_presets("import", ImportConfig),
        ("amd.tasks", "import"),
        args=(),
    ),
    "export": JobKindSpec(
        "Convert a published encoder to another format, such as Hugging Face's.",
        ExportConfig,
        _without_presets("export", ExportConfig),
        ("amd.tasks", "export"),
        args=(),
    ),
    "prepare": JobKindSpec(
        "Convert images or videos to tar shards with smaller frames, which jobs read faster.",
        PrepareConfig,
        _without_presets("prepare", PrepareConfig),
        ("amd.tasks", "prepare"),
        args=(),
    ),
}


def resolve(
    kind: JobKind, preset: str | None, config: Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> BaseModel:
    """Return the complete config for a request. Raises ConfigError with one line per problem."""
    if preset is not None and config is not None and kind != "search":
        raise ConfigError(
            ["preset, config: specify only one of them; use `overrides` to change individual values of either"]
        )
    if preset is None and config is None:
        raise ConfigError(
            ["preset, config: specify one of them (`amd presets` or `GET /v1/presets` lists the presets)"]
        )
    resolved = KINDS[kind].resolve(preset, config, overrides)
    if unset := [
        f"{key}: must be set, because the preset has no value for it ({value})" for key, value in _unset(resolved)
    ]:
        raise ConfigError(unset)
    return resolved


def named(kind: JobKind, config: BaseModel, job_id: str, root: str) -> dict[str, Any]:
    """Return the config that the job runs, with the job's ID as its name and the service's storage root."""
    values = config.model_dump(mode="json")
    values["storage"] = root
    if "name" in values:
        values["name"] = job_id
    if "output" in values:
        values["output"] = JobFolder(root, job_id).output
    if kind == "search":
        values["train"] |= {"storage": root, "name": None}
    return values


def resources_of(config: BaseModel) -> ResourceRequest:
    """Return the minimum resources that a config needs."""
    if isinstance(config, TaskConfig):
        return ResourceRequest(1, config.cpus, "cpu")
    run = config.train if isinstance(config, SearchConfig) else config
    scaling = run.scaling  # type: ignore[attr-defined]  # every kind that is not a TaskConfig has one
    trials = (config.at_once or 1) if isinstance(config, SearchConfig) else 1
    workers = scaling.workers[0] * trials
    return ResourceRequest(workers, workers * scaling.cpus_per_worker, scaling.device)


def locations_of(config: BaseModel) -> Iterator[ConfigLocation]:
    """Yield every location in a job's config and in the recipe that trains its teacher.

    Locations in the recipe that differ from the student's are reported as `teacher.overrides.…`, the keys that can
    change them. Raises ConfigError if the recipe is invalid.
    """
    yield from locations(config)
    prefix, run = ("train.", config.train) if isinstance(config, SearchConfig) else ("", config)
    if isinstance(run, TrainConfig) and run.trains_teacher:
        own = set(locations(run))
        for location in locations(teacher_recipe(run)):
            if location not in own:
                yield location._replace(field=f"{prefix}teacher.overrides.{location.field}")


def uris(config: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, value) for each location in a job's config, except its storage root and output folder.

    Includes the choices of every sweep dimension, and the teacher's recipe. Raises ConfigError if the recipe is
    invalid.
    """
    return _uris(locations_of(config))


def uris_in(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Like `uris`, but takes a config of any version as plain values, and omits the teacher's recipe."""
    return _uris(locations_in(KINDS[cast(JobKind, kind)].config, values))


def _uris(found: Iterator[ConfigLocation]) -> Iterator[tuple[str, str]]:
    return iter(dict.fromkeys((field, value) for field, value, role in found if role not in OWN_ROLES))


def _unset(config: BaseModel) -> Iterator[tuple[str, str]]:
    return ((field, value) for field, value, _ in locations(config) if value.startswith(UNSET))
