"""Config fields for a form: dotted key, type, choices, default and description, taken from the config's schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from amd.config import flatten
from amd.presets.preset import UNSET
from service.jobs.details.changes import CHOSEN_BY_SERVICE
from service.jobs.kinds import KINDS, JobKind
from service.web.formats import compact

COMMON: dict[str, tuple[str, ...]] = {
    "train": (
        *("data.train", "teacher.weights", "schedule.epochs", "schedule.steps", "optim.batch_size", "optim.base_lr"),
        *("mask.student_ratio", "mask.teacher_ratio", "scaling.workers", "scaling.device", "seed"),
    ),
    "finetune": (
        *("data.train", "data.val", "weights", "schedule.epochs", "optim.batch_size", "optim.base_lr"),
        *("scaling.workers", "scaling.device", "seed"),
    ),
    "detect": ("data.train", "data.val", "weights", "schedule.epochs", "optim.base_lr", "scaling.workers"),
    "probe": ("encoder", "data.train", "kinds", "scaling.workers", "scaling.device", "seed"),
    "embed": ("encoder", "data.train", "layout", "clusters", "scaling.workers", "scaling.device"),
    "search": (
        *("space.use", "space.study", "algorithm", "stopping", "budget.trials", "budget.hours", "seeds", "at_once"),
        *("metric", "train.data.train", "train.schedule.steps", "train.scaling.workers"),
    ),
    "import": ("weights", "id", "license"),
    "export": ("encoder", "format"),
    "prepare": ("data.train", "short_side", "shard_mib", "workers"),
}
"""Fields that users change most often, by kind. They include the fields without which a job cannot run."""

REQUIRED = "required"  # start of the values that a preset leaves to the user


class ConfigField(NamedTuple):
    """One field of a config."""

    key: str
    kind: str
    """Human-readable type, such as `integer or null`."""
    choices: tuple[str, ...]
    """Permitted values, if there are only a few."""
    value: str
    """Value from the preset, or else the default; empty if there is neither."""
    description: str
    common: bool
    only_with: tuple[str, str] | None = None
    """Another field and its value without which a job does not use this field."""
    is_used: bool = True
    suggestions: tuple[str, ...] = ()
    """Values to offer for a list whose items have few permitted values."""

    @property
    def is_missing(self) -> bool:
        """Whether the preset leaves the field's value to the user."""
        return self.value == REQUIRED or self.value.startswith(f"{REQUIRED}: ")


@cache
def config_fields(kind: JobKind) -> tuple[ConfigField, ...]:
    """Return the fields of a kind's config, with those in COMMON first."""
    schema = KINDS[kind].config.model_json_schema()
    found = {field.key: field for field in _fields(schema, schema.get("$defs", {}), "")}
    common = [found[key]._replace(common=True) for key in COMMON.get(kind, ())]
    return (*common, *(field for key, field in found.items() if key not in {one.key for one in common}))


def with_values(fields: tuple[ConfigField, ...], values: Mapping[str, Any]) -> list[ConfigField]:
    """Return the fields with values from a preset or another job."""
    flat = flatten(values)
    return [field._replace(value=_shown(flat[field.key])) if field.key in flat else field for field in fields]


def with_use(fields: Sequence[ConfigField], given: Mapping[str, str]) -> list[ConfigField]:
    """Return the fields, those that the job does not use marked as such. `given`: values that replace the fields' own.

    Fields with a given value always count as used, so that the form shows them.
    """
    values = {field.key: field.value for field in fields} | dict(given)
    marked = []
    for field in fields:
        is_used = field.only_with is None or field.key in given or values[field.only_with[0]] == field.only_with[1]
        marked.append(field._replace(is_used=is_used, common=field.common and is_used))
    return marked


def _fields(
    schema: Mapping[str, Any], defs: Mapping[str, Any], prefix: str, only_with: tuple[str, str] | None = None
) -> Iterator[ConfigField]:
    for name, raw in schema.get("properties", {}).items():
        key = f"{prefix}{name}"
        if key in CHOSEN_BY_SERVICE or key.removeprefix("train.") in CHOSEN_BY_SERVICE:
            continue
        condition = _condition(raw, prefix) or only_with
        own = _resolved(raw, defs)
        section = next((one for one in (own, *_alternatives(own, defs)) if "properties" in one), None)
        if section is not None:
            yield from _fields(section, defs, f"{key}.", condition)
            continue
        alternatives = _alternatives(own, defs) or [own]
        choices = tuple(str(value) for one in alternatives for value in one.get("enum", ()))
        kinds = dict.fromkeys(str(one.get("type", "value")) for one in alternatives)
        if any(one.get("type") == "boolean" for one in alternatives):
            choices = ("true", "false")
        default = _shown(raw["default"]) if "default" in raw else ""
        items = [value for one in alternatives for value in _resolved(one.get("items", {}), defs).get("enum", ())]
        yield ConfigField(
            key,
            " or ".join(kinds),
            choices,
            default,
            str(raw.get("description", "")),
            False,
            condition,
            suggestions=tuple(json.dumps([value]) for value in items),
        )


def _condition(schema: Mapping[str, Any], prefix: str) -> tuple[str, str] | None:
    """Return the field and the value that the schema's `x-only-with` names, or None."""
    run = "train." if prefix.startswith("train.") else ""  # a sweep's run
    return next(((f"{run}{key}", value) for key, value in schema.get("x-only-with", {}).items()), None)


def _resolved(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref", "")
    return defs[reference.rpartition("/")[2]] if reference else schema


def _alternatives(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [_resolved(one, defs) for one in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))]


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith(UNSET):
        return f"{REQUIRED}: {value.removeprefix(UNSET).strip()}".removesuffix(": ")
    return "" if value is None else compact(value)
