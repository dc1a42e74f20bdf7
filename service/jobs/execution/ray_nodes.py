"""The nodes of a Ray cluster and the programs on them, parsed from the rows of Ray's state API. Does not call Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

LOST_S = 3600.0  # time for which a node that ended is still listed
_DRIVER = "_ray_internal_job_actor_"  # actor that runs the driver of a submission
_REPLICA = "SERVE_REPLICA::"  # followed by application#deployment#ID


class Node(NamedTuple):
    """A node of the cluster."""

    name: str
    address: str
    is_head: bool
    state: Literal["alive", "lost"]
    message: str
    """Reason why the node was lost."""
    cpus: float
    gpus: float
    memory: float
    """Memory in bytes that Ray may allocate."""
    used_cpus: float | None = None
    """CPUs in use; None if Ray does not report it for this node."""
    used_gpus: float | None = None
    submissions: frozenset[str] = frozenset()
    """Submissions with a process on the node."""
    applications: frozenset[str] = frozenset()
    """Serve applications with a replica on the node."""


def parse_nodes(
    rows: Iterable[Mapping[str, Any]],
    status: Mapping[str, Any] | None,
    actors: Iterable[Mapping[str, Any]],
    submissions: Mapping[str, str],
    now: float,
) -> list[Node]:
    """Return the live nodes and those that ended recently; the head first, then by name.

    `status`: Ray's cluster status. `actors`: live actors. `submissions`: submission IDs by Ray job ID.
    """
    rows = [row for row in rows if row["state"] == "ALIVE" or now - (row.get("end_time_ms") or 0) / 1000 < LOST_S]
    usage = ((status or {}).get("loadMetricsReport") or {}).get("usageByNode") or {}
    addresses = Counter(row["node_ip"] for row in rows if row["state"] == "ALIVE")
    programs: dict[str, tuple[set[str], set[str]]] = {row["node_id"]: (set(), set()) for row in rows}
    for actor in actors:
        running, serving = programs.get(actor.get("node_id") or "", (set(), set()))
        name = str(actor.get("name") or "")
        if name.startswith(_DRIVER):
            running.add(name.removeprefix(_DRIVER))
        elif name.startswith(_REPLICA):
            serving.add(name.removeprefix(_REPLICA).partition("#")[0])
        elif submission := submissions.get(str(actor.get("job_id"))):
            running.add(submission)
    found = []
    for row in rows:
        # Ray reports usage by node ID or by address, depending on its autoscaler; nodes may share an address.
        by_address = usage.get(row["node_ip"]) if addresses[row["node_ip"]] == 1 else None
        found.append(_node(row, usage.get(row["node_id"]) or by_address, *programs[row["node_id"]]))
    return sorted(found, key=lambda node: (node.state == "lost", not node.is_head, node.name))


def parse_bytes(value: Any) -> float:
    """Parse a memory size from Ray's state API: a number, or text such as `12.5 GiB`."""
    if isinstance(value, int | float):
        return float(value)
    number, _, unit = str(value).partition(" ")
    return float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}.get(unit, 1)


def _node(row: Mapping[str, Any], usage: Mapping[str, Any] | None, running: set[str], serving: set[str]) -> Node:
    total, alive = row.get("resources_total") or {}, row["state"] == "ALIVE"
    used = {name: float(amounts[0]) for name, amounts in (usage or {}).items()} if alive else {}
    return Node(
        name=row.get("node_name") or row["node_ip"],
        address=row["node_ip"],
        is_head=bool(row.get("is_head_node")),
        state="alive" if alive else "lost",
        message="" if alive else str(row.get("state_message") or ""),
        cpus=float(total.get("CPU", 0)),
        gpus=float(total.get("GPU", 0)),
        memory=parse_bytes(total.get("memory", 0)),
        used_cpus=used.get("CPU", 0.0) if used else None,
        used_gpus=used.get("GPU", 0.0) if used else None,
        submissions=frozenset(running),
        applications=frozenset(serving),
    )
