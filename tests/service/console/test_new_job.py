"""Tests for the form for a new job: its fields, the estimate, and the equivalent commands."""

from __future__ import annotations

import html
import json
import re
import shlex
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli.main import app as cli
from service.console.schema_fields import COMMON, ConfigField, config_fields
from service.jobs.details.schemas import CloneRequest
from service.jobs.kinds import KINDS, JobKind
from service.jobs.schemas import JobRequest
from tests.support.browser.console_client import ConsoleClient

METADATA = {"name": "Digits' teacher, 2", "labels": "team=vision, note=two words", "priority": "7"}


def check(console: ConsoleClient, **values: str) -> str:
    return console.submit("/console/new/check", **{"kind": "train", "preset": "demo-image-amd", **values}).text


def submit(console: ConsoleClient, **values: str) -> str:
    """Submit the form, and return the ID of the new job."""
    response = console.submit("/console/new", **{"kind": "train", **values})
    return response.headers["hx-redirect"].rpartition("/")[2]


def commands(page: str) -> list[list[str]]:
    """Return the arguments of each equivalent command in the result of a check."""
    return [shlex.split(text) for text in re.findall(r'<pre id="code-\d"[^>]*>(.*?)</pre>', html.unescape(page), re.S)]


def shown(page: str) -> set[str]:
    """Return the keys of the fields that the form shows at first."""
    fields = re.findall(r'<div class="field" data-text="[^"]*"([^>]*)>\s*<label for="f-([^"]+)"', page)
    return {key for attributes, key in fields if "hidden" not in attributes}


def test_the_form_for_a_sweep_has_its_own_title(console: ConsoleClient) -> None:
    for path, title in (("", "New job"), ("?kind=search", "New sweep")):
        page = console.get(f"/console/new{path}").text
        assert f"<title>{title} · AMD</title>" in page
        assert f"<h1>{title}</h1>" in page


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_says_what_a_job_of_the_kind_does(console: ConsoleClient, kind: JobKind) -> None:
    page = html.unescape(console.get(f"/console/new?kind={kind}").text)
    assert f'<p id="kind-summary">{KINDS[kind].summary}</p>' in page


@pytest.mark.parametrize("kind", COMMON)
def test_the_fields_that_a_job_needs_are_shown_first(kind: JobKind) -> None:
    first = [field.key for field in config_fields(kind) if field.common]
    assert first == list(COMMON[kind])
    required = set(KINDS[kind].config.model_json_schema()["required"]) - {"train"}  # the preset sets it for sweeps
    assert required <= {key.split(".")[0] for key in first}


def test_a_value_that_a_preset_leaves_open_is_shown_as_required(console: ConsoleClient) -> None:
    page = console.get("/console/new?preset=in1k-vit-s").text
    assert 'placeholder="required"' in page
    assert 'placeholder="required: MAE ViT-L pre-trained on IN1K' in page
    assert 'placeholder="unset' not in page


@pytest.mark.parametrize(("query", "name"), [("new", "Jobs"), ("new?kind=search", "Sweeps")])
def test_the_navigation_marks_the_list_that_the_form_belongs_to(console: ConsoleClient, query: str, name: str) -> None:
    page = console.get(f"/console/{query}").text
    assert re.findall(r'aria-current="page">([^<]*)</a>', page.partition("</nav>")[0]) == [name]


def test_values_of_another_preset_or_kind_are_kept(console: ConsoleClient) -> None:
    page = console.get("/console/new?kind=finetune&name=mine&labels=a%3Db&priority=7&project=films&o.seed=3").text
    for name, value in (("name", "mine"), ("labels", "a=b"), ("priority", "7"), ("project", "films"), ("o.seed", "3")):
        assert re.search(rf'<input [^>]*name="{name}"[^>]* value="{value}"', page), name


def test_the_form_for_a_sweep_offers_the_named_spaces(console: ConsoleClient) -> None:
    page = html.unescape(console.get("/console/new?kind=search").text)
    options = re.search(r'<datalist id="s-space.use">(.*?)</datalist>', page)
    assert options
    found = re.findall(r'<option value="(\[.*?\])">', options[1])
    assert found == ['["masking"]', '["alignment"]', '["generator"]', '["recipe"]']
    for use in found[:2]:
        assert "This job can be submitted" in check(console, kind="search", **{"o.space.use": use})


@pytest.mark.parametrize(
    ("query", "is_checked"),
    [("", True), ("kind=search", False), ("kind=probe", False), ("kind=search&o.space.use=x", True)],
)
def test_a_form_without_required_values_is_checked_only_once_the_user_types(
    console: ConsoleClient, query: str, is_checked: bool
) -> None:
    page = console.get(f"/console/new?{query}").text
    assert ('hx-trigger="load, input from:#new-job' in page) is is_checked
    assert ("The fields are checked while you type." in page) is not is_checked


@pytest.mark.parametrize(
    ("query", "missing"),
    [
        ("preset=in1k-vit-s", ["data.train", "teacher.weights"]),
        ("kind=search&preset=in1k-vit-s", ["train.data.train", "train.teacher.weights"]),
        ("preset=demo-image-amd", []),
    ],
)
def test_the_form_names_the_required_fields_before_the_user_types(
    console: ConsoleClient, query: str, missing: list[str]
) -> None:
    page = console.get(f"/console/new?{query}").text
    keys = re.search(r"Still required: (.*?)\. The fields are checked while you type\.", page)
    assert re.findall("<code>(.*?)</code>", keys[1] if keys else "") == missing
    assert ('hx-trigger="load, input from:#new-job' in page) is (not missing)


def test_a_label_without_a_value_is_reported(console: ConsoleClient) -> None:
    page = check(console, labels="team=vision, urgent")
    assert "labels: &#39;urgent&#39; is not a label; write key=value" in page
    assert console.submit("/console/new", kind="train", preset="demo-image-amd", labels="urgent").status_code == 422


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"priority": "500"}, "priority=500: must be less than or equal to 100"),
        ({"priority": "high"}, "priority=high: must be a valid integer, unable to parse string as an integer"),
        ({"name": "x" * 201}, "name: must have at most 200 characters"),
        ({"labels": "-a=1"}, "labels.-a=-a: must match pattern '^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$'"),
    ],
)
def test_an_invalid_value_is_reported_with_its_rule(
    console: ConsoleClient, values: dict[str, str], problem: str
) -> None:
    assert f">{problem}</li>" in html.unescape(check(console, **values))


def test_a_fork_names_its_checkpoint(console: ConsoleClient) -> None:
    original = submit(console, preset="demo-image-mae")
    fork = console.get(f"/console/jobs/{original}/clone?o.start=/runs/a/checkpoints/step-00000500").text
    assert "<h1>Fork with changes</h1>" in fork
    assert re.search(r"starts from its checkpoint <code[^>]*>step-00000500</code>", fork)
    assert "starts from the beginning" in console.get(f"/console/jobs/{original}/clone").text


def test_code_in_help_texts_is_marked_up_and_escaped(console: ConsoleClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not re.search(r'class="hint"[^>]*>[^<]*`', console.get("/console/new?kind=detect").text)
    field = ConfigField("seed", "integer", (), "0", "A `<script>` and <b>text</b>.", True)
    monkeypatch.setattr("service.console.pages.new_job.config_fields", lambda kind: (field,))
    page = console.get("/console/new").text
    assert "A <code>&lt;script&gt;</code> and &lt;b&gt;text&lt;/b&gt;." in page


@pytest.mark.parametrize("preset", ["demo-image-amd", "demo-image-mae"])
def test_a_presets_summary_ends_with_one_full_stop(console: ConsoleClient, preset: str) -> None:
    assert ".;" not in console.get(f"/console/new?preset={preset}").text


@pytest.mark.parametrize(("device", "is_shown"), [("cpu", False), ("cuda", True)])
def test_the_estimated_duration_on_gpus_is_shown_only_for_jobs_that_may_use_them(
    console: ConsoleClient, device: str, is_shown: bool
) -> None:
    values = {"o.scaling.device": device, "o.schedule.steps": "100000"}
    page = console.submit("/console/new/check", kind="train", preset="demo-image-amd", **values).text
    assert "This job can be submitted" in page
    assert ("on one H100 per worker" in page) is is_shown


def test_a_job_on_cpus_has_no_duration_beside_the_one_in_the_presets_summary(console: ConsoleClient, app: Any) -> None:
    assert app.state.cluster.capacity().gpus == 0
    page = check(console, **{"o.scaling.device": "auto"})
    assert "the job will use CPUs" in page
    assert "<dt>Compute</dt>" in page
    assert "<dt>Duration</dt>" not in page


def test_the_estimate_says_that_the_teacher_is_trained_first(console: ConsoleClient) -> None:
    trained = check(console)
    assert "2\u202f000 steps of training first, unless it exists already" in trained
    loaded = check(console, **{"o.teacher.weights": "timm:one", "o.teacher.preset": ""})
    assert "parameters</dd>" in loaded
    assert "steps of training first" not in loaded


@pytest.mark.parametrize(
    ("query", "is_shown"),
    [
        ("preset=demo-image-amd", True),
        ("preset=demo-image-mae", False),
        ("preset=demo-image-mae&o.objective.kind=amd", True),
        ("kind=search&preset=demo-image-mae", False),
    ],
)
def test_fields_that_need_a_teacher_are_shown_only_for_jobs_that_have_one(
    console: ConsoleClient, query: str, is_shown: bool
) -> None:
    page = console.get(f"/console/new?{query}").text
    prefix = "train." if "search" in query else ""
    for key in ("teacher.weights", "teacher.encoder.size", "student.generator.depth", "objective.weights.direct"):
        assert (f"{prefix}{key}" in shown(page)) is is_shown, key
        assert f'id="f-{prefix}{key}"' in page  # a search finds it
    assert f"{prefix}objective.weights.reconstruction" in shown(page)


def test_a_field_with_a_given_value_is_always_shown(console: ConsoleClient) -> None:
    assert "teacher.weights" in shown(console.get("/console/new?preset=demo-image-mae&o.teacher.weights=x").text)


def test_every_condition_names_a_field_of_the_same_form() -> None:
    for kind in ("train", "search"):
        fields = {field.key: field for field in config_fields(kind)}
        conditions = {field.only_with for field in fields.values() if field.only_with is not None}
        assert conditions
        assert all(value in fields[key].choices for key, value in conditions)


def test_the_equivalent_commands_submit_the_same_job(console: ConsoleClient, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[JobRequest] = []
    monkeypatch.setattr("service.cli.submission.connected", lambda *args, **options: NoService(sent))
    page = check(console, project="vision", **METADATA, **{"o.seed": "5"})
    curl, amd, ray = commands(page)
    expected = {
        "kind": "train",
        "preset": "demo-image-amd",
        "overrides": {"seed": 5},
        "project": "vision",
        "name": METADATA["name"],
        "labels": {"team": "vision", "note": "two words"},
        "priority": 7,
    }
    assert json.loads(curl[-1]) == expected
    CliRunner().invoke(cli, amd[1:])
    assert [request.model_dump(exclude_defaults=True) for request in sent] == [expected]
    assert {"seed=5", "name=digits-teacher-2"} < set(ray)
    assert "labels, priority, project and retries do not apply" in page


def test_the_ray_command_writes_to_the_storage_root_of_the_service(console: ConsoleClient, app: Any) -> None:
    _, _, ray = commands(check(console))
    assert f"storage={app.state.settings.root}" in ray
    assert not [argument for argument in ray if argument.startswith("name=")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"labels": "a=2", "name": "my copy", "priority": "0"},
            {"name": "my copy", "labels": {"a": "2"}, "priority": 0},
        ),
        ({"labels": ""}, {"labels": {}}),
    ],
)
def test_the_commands_for_a_copy_send_the_same_changes(
    console: ConsoleClient, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], expected: dict[str, Any]
) -> None:
    original = submit(console, preset="demo-image-mae", priority="-9", labels="a=1")
    sent: list[CloneRequest] = []
    monkeypatch.setattr("service.cli.jobs.connected", lambda *args, **options: NoService(sent))
    curl, amd = commands(check(console, original=original, **values, **{"o.seed": "5"}))
    expected = {"overrides": {"seed": 5}, **expected}
    assert json.loads(curl[-1]) == expected
    assert amd[:4] == ["amd", "jobs", "clone", original]
    CliRunner().invoke(cli, amd[1:])
    assert [request.model_dump(exclude_none=True) for request in sent] == [expected]


def test_the_command_for_a_copy_names_only_changes(console: ConsoleClient) -> None:
    original = submit(console, preset="demo-image-mae", labels="a=1")
    _, amd = commands(check(console, original=original, labels="a=1"))
    assert amd == ["amd", "jobs", "clone", original]


def test_a_copy_keeps_the_priority(console: ConsoleClient, app: Any) -> None:
    original = submit(console, preset="demo-image-mae", priority="-9", labels="a=1")
    assert 'placeholder="-9"' in console.get(f"/console/jobs/{original}/clone").text
    copy = app.state.jobs.get(submit(console, original=original, labels="a=2", name="copy"))
    assert (copy.name, copy.labels, copy.priority) == ("copy", {"a": "2"}, -9)


class NoService:
    """A connection whose client records the requests."""

    def __init__(self, sent: list[Any]) -> None:
        self.jobs, self._sent = self, sent

    def submit(self, request: JobRequest | CloneRequest) -> Any:
        self._sent.append(request)
        raise SystemExit

    def get(self, job_id: str) -> Any:
        return SimpleNamespace(id=job_id)

    def clone(self, job_id: str, request: CloneRequest) -> Any:
        return self.submit(request)

    def __enter__(self) -> NoService:
        return self

    def __exit__(self, *error: object) -> None:
        pass
