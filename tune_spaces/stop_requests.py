"""Requests to stop individual trials: one file per trial in the sweep's folder, which the sweep's driver polls.

The service writes them. Imports neither torch nor Ray.
"""

from __future__ import annotations

import time

from amd.storage import join, listdir, read_json, write_json

FOLDER = "stop_requests"


def request_stop(run_folder: str, trial: int, actor: str) -> None:
    """Request that a running trial of this folder's sweep be stopped. `actor` is who requests it."""
    write_json(join(run_folder, FOLDER, f"{trial:04d}.json"), {"actor": actor, "time": time.time()})


def requested_stops(run_folder: str) -> set[int]:
    """Return the numbers of the trials for which a stop has been requested."""
    names = listdir(join(run_folder, FOLDER))
    return {int(name.removesuffix(".json")) for name in names if name.endswith(".json")}


def read_actor(run_folder: str, trial: int) -> str:
    """Return who requested that a trial be stopped."""
    return str(read_json(join(run_folder, FOLDER, f"{trial:04d}.json"))["actor"])
