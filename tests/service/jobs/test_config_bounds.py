"""Tests for the bounds on numbers in a job's config."""

from __future__ import annotations

import pytest

from amd.config import ConfigError
from amd.presets.load import PRESETS_BY_KIND
from service.jobs.config_bounds import BOUNDS, check_bounds
from service.jobs.kinds import KINDS, resolve

SWEEP = {"space": {"use": ["masking"]}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scaling.cpus_per_worker", 1e300),
        ("scaling.threads_per_worker", 10**9),
        ("student.generator.depth", 10**9),
        ("schedule.steps", 10**12),
        ("data.prefetch_batches", 10**9),
        ("data.read_timeout_s", 1e12),
        ("checkpoint.every_steps", 10**30),
        ("scaling.retries.infrastructure", 10**30),
    ],
)
def test_an_implausibly_large_number_is_rejected_with_its_bound(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=.*: must be at most .*; lower it$"):
        check_bounds(resolve("train", "demo-image-amd", None, {field: value}))


def test_search_dimensions_have_the_same_bounds_as_their_fields() -> None:
    for dimension in ({"choices": [1, 10**9]}, {"low": 1, "high": 10**9}):
        config = {"space": {"dimensions": {"student.generator.depth": dimension}}}
        with pytest.raises(ConfigError, match=r"space.dimensions.student.generator.depth.*must be at most 1024"):
            check_bounds(resolve("search", "demo-image-amd", config, {}))


def test_workers_are_counted_across_all_concurrent_trials() -> None:
    many = {**SWEEP, "at_once": 4000}
    check_bounds(resolve("search", "demo-image-amd", many, {}))
    with pytest.raises(ConfigError, match="the job needs 8000 workers for all concurrent trials"):
        check_bounds(resolve("search", "demo-image-amd", many, {"train.scaling.workers": 2}))


def test_more_workers_than_the_project_may_use_are_rejected() -> None:
    config = resolve("train", "demo-image-amd", None, {"scaling.workers": 8})
    check_bounds(config, 8)
    message = r"needs 8 workers, but a project may use at most 4 \(AMD_PROJECT_MAX_WORKERS\)"
    with pytest.raises(ConfigError, match=message):
        check_bounds(config, 4)


def test_every_preset_is_within_the_bounds() -> None:
    for table in PRESETS_BY_KIND.values():
        for preset in table.values():
            check_bounds(preset.config)


def test_every_bound_belongs_to_a_field() -> None:
    schemas = " ".join(str(spec.config.model_json_schema()) for spec in KINDS.values())
    assert [name for name in BOUNDS if f"'{name}'" not in schemas] == []
