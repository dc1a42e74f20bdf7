"""Measure job throughput on a real Ray cluster.

Run as `python tests/benchmarks/jobs_on_ray.py [--jobs 1000]`. Each job's driver is a shell script that immediately
reports success, so this measures accepting and queueing jobs, starting drivers in Ray, and detecting their exit. It
also checks that each job runs exactly once.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx

from tests.support.ray_cluster import end_head, start_head
from tests.support.service.control_plane import ControlPlane

# Runs instead of the Python interpreter, with the arguments -m service.jobs.runner JOB ATTEMPT ROOT.
STUB = """#!/bin/sh
folder="$5/jobs/$3/attempts"; mkdir -p "$folder"
echo "$3 $4" >> "$5/began"
printf '{"at": 0, "outcome": {"state": "succeeded"}}' > "$folder/.heartbeat"
mv "$folder/.heartbeat" "$folder/000$4.json"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    count = parser.parse_args().jobs
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    stub = folder / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    cluster, head, ray_folder = start_head(dict(os.environ))
    plane = ControlPlane(
        folder / "data", cluster.dashboard, AMD_RAY_PYTHON=str(stub), AMD_RATE_LIMIT="1000000/minute"
    ).start()
    try:
        headers, body = {"Authorization": f"Bearer {plane.key}"}, {"kind": "train", "preset": "demo-image-amd"}
        with httpx.Client(base_url=f"{plane.url}/v1", headers=headers, timeout=60) as client:
            began = time.perf_counter()
            ids = [client.post("/jobs", json=body).raise_for_status().json()["id"] for _ in range(count)]
            accepted = time.perf_counter() - began
            waiting = {"limit": 1, "state": ["queued", "starting", "running", "retrying"]}
            while client.get("/jobs", params=waiting).json()["items"]:
                time.sleep(1.0)
            drained = time.perf_counter() - began
            states = Counter(client.get(f"/jobs/{job}").json()["state"] for job in ids)
        starts = Counter((plane.data / "root" / "began").read_text().splitlines())
    finally:
        plane.kill()
        end_head(head, ray_folder)
    assert states == {"succeeded": count}, states
    assert starts == Counter(f"{job} 1" for job in ids), "each job must start exactly once"
    print(f"{count} jobs: accepted in {accepted:.1f} s ({count / accepted:.0f}/s), all ended after {drained:.0f} s")


if __name__ == "__main__":
    main()
