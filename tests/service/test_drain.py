"""Tests for stopping a control plane: requests in progress complete, and streaming clients are asked to reconnect."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import httpx
import pytest
import uvicorn
from sqlalchemy import Engine

from service.__main__ import DrainingServer, LoopThreads
from service.app import create_app
from service.db.engine import open_engine
from service.db.leases import holders
from service.settings import Settings
from service.stack.ports import free_ports
from tests.support.service.apps import key_to
from tests.support.service.control_plane import ControlPlane, wait_for
from tests.support.service.fake_cluster import FakeCluster, queued


@pytest.mark.timeout(60)  # a stream would otherwise last until the drain ends
def test_streams_reconnect_and_requests_complete_when_a_control_plane_stops(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    app = create_app(Settings(data_dir=tmp_path, storage=str(tmp_path)), engine=sqlite_engine, cluster=FakeCluster())
    started, finish = threading.Event(), asyncio.Event()

    @app.get("/slow")
    async def slow() -> str:
        started.set()
        await finish.wait()
        return "done"

    job, (port,) = queued(app.state.jobs), free_ports(1)
    config = uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=600)
    server = DrainingServer(config, app.state.stream_limits, LoopThreads([], lambda stop: True))

    async def scenario() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        headers = key_to(sqlite_engine, "read")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
            answering = asyncio.create_task(client.get("/slow"))
            while not started.is_set():
                await asyncio.sleep(0.01)
            async with client.stream("GET", f"/v1/jobs/{job.id}/events") as stream:
                lines = stream.aiter_lines()
                while "created" not in await anext(lines):
                    pass
                server.should_exit = True
                assert "event: reconnect" in [line async for line in lines]
            finish.set()
            assert (await answering).json() == "done"
        await serving

    asyncio.run(scenario())


def test_a_control_plane_that_is_terminated_releases_its_leases(tmp_path: Path) -> None:
    plane = ControlPlane(tmp_path, "http://127.0.0.1:1").start()
    assert plane.process is not None
    engine = open_engine(f"sqlite:///{tmp_path}/control-plane.db")
    try:
        wait_for(lambda: holders(engine).keys() == {"reconciler", "deployer", "discovery", "storage-meter"})
        plane.process.terminate()
        plane.process.wait(60)
        assert holders(engine) == {}
    finally:
        plane.kill()
        engine.dispose()
