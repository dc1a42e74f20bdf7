"""Tests for the nodes of a Ray cluster, without a cluster."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.util import LoadMetricsSummary
from ray.util.state.common import ActorState, NodeState

from service.jobs.execution.ray_jobs import RayJobs
from service.jobs.execution.ray_nodes import Node, parse_nodes

NOW = 1_800_000_000.0


def row(node_id: str, ip: str, **facts: Any) -> dict[str, Any]:
    total = {"CPU": 4.0, "memory": 2.0**33, f"node:{ip}": 1.0}
    values = {"node_id": node_id, "node_ip": ip, "node_name": ip, "is_head_node": False, "state": "ALIVE"}
    return {**values, "resources_total": total, "end_time_ms": 0, "state_message": None, **facts}


def usage(**used: dict[str, list[float]]) -> dict[str, Any]:
    return {"loadMetricsReport": {"usageByNode": used}}


def test_programs_are_listed_on_the_nodes_of_their_processes() -> None:
    rows = [row("b", "10.0.0.2"), row("a", "10.0.0.1", is_head_node=True, node_name="head")]
    actors = [
        {
            "node_id": "a",
            "job_id": "03000000",
            "name": "_ray_internal_job_actor_train-1",
            "class_name": "JobSupervisor",
        },
        {"node_id": "b", "job_id": "02000000", "name": "", "class_name": "RayTrainWorker"},
        {"node_id": "b", "job_id": "09000000", "name": "of a program that the service did not start"},
        {"node_id": "b", "job_id": "01000000", "name": "SERVE_REPLICA::amd-digits#Replica#x1y2"},
        {"node_id": None, "job_id": "02000000", "name": None},
        {"node_id": "c", "job_id": "02000000", "name": "on a node that has just started"},
    ]
    used = usage(**{"a": {"CPU": [1.0, 4.0]}, "10.0.0.2": {"CPU": [2.5, 4.0], "GPU": [1.0, 1.0]}})
    head, worker = parse_nodes(rows, used, actors, {"02000000": "train-1"}, NOW)
    assert (head.name, head.address, head.is_head, head.used_cpus, head.used_gpus) == ("head", "10.0.0.1", True, 1, 0)
    assert (head.submissions, head.applications) == ({"train-1"}, set())
    assert (worker.cpus, worker.gpus, worker.memory, worker.used_cpus, worker.used_gpus) == (4, 0, 2.0**33, 2.5, 1)
    assert (worker.submissions, worker.applications) == ({"train-1"}, {"amd-digits"})


def test_usage_is_unknown_for_nodes_that_share_an_address_or_are_not_reported() -> None:
    rows = [row("a", "127.0.0.1"), row("b", "127.0.0.1"), row("c", "10.0.0.3")]
    used = usage(**{"127.0.0.1": {"CPU": [2.0, 4.0]}})
    for status in (used, None, {}, {"loadMetricsReport": None}, {"loadMetricsReport": {"usageByNode": None}}):
        assert [node.used_cpus for node in parse_nodes(rows, status, [], {}, NOW)] == [None] * 3


def test_a_lost_node_is_listed_for_an_hour_with_its_reason() -> None:
    def lost(minutes: float) -> list[Node]:
        ended = {"state": "DEAD", "end_time_ms": int((NOW - 60 * minutes) * 1000), "state_message": "preempted"}
        return parse_nodes([row("a", "10.0.0.1", **ended), row("b", "10.0.0.1")], None, [], {}, NOW)

    assert [(node.state, node.message) for node in lost(59)] == [("alive", ""), ("lost", "preempted")]
    assert [node.state for node in lost(61)] == ["alive"]


def test_rays_state_api_has_the_fields_that_are_read() -> None:
    nodes = {"node_id", "node_ip", "node_name", "is_head_node", "state", "state_message", "resources_total"}
    assert nodes | {"end_time_ms"} <= NodeState.columns()
    assert {"node_id", "job_id", "name"} <= ActorState.base_columns()
    assert "usage_by_node" in LoadMetricsSummary.__dataclass_fields__


def test_a_submissions_ray_job_is_looked_up_once(monkeypatch: Any) -> None:
    lookups: list[str] = []

    class JobInfoClient:
        def get_job_info(self, submission_id: str) -> Any:
            lookups.append(submission_id)
            if submission_id == "unknown":
                raise RuntimeError("Request failed with status code 404: Job unknown does not exist")
            return type("JobDetails", (), {"job_id": "02000000" if len(lookups) > 2 else None})

    rows, actors = [row("a", "10.0.0.1")], [{"node_id": "a", "job_id": "02000000", "name": ""}]
    cluster = RayJobs("http://127.0.0.1:1", None, "python")
    monkeypatch.setattr(cluster, "_client", JobInfoClient)
    answers = {"/api/v0/nodes": {"result": {"result": rows}}, "/api/v0/actors": {"result": {"result": actors}}}
    monkeypatch.setattr(cluster, "_get", lambda path: answers.get(path.partition("?")[0], {}))
    assert [node.submissions for node in cluster.nodes(["train-1", "unknown"])] == [set()]
    for _ in range(2):
        assert [node.submissions for node in cluster.nodes(["train-1"])] == [{"train-1"}]
    assert lookups == ["train-1", "unknown", "train-1"]
