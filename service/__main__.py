"""`python -m service` runs the control plane; `python -m service migrate` brings the database schema up to date.

Configured entirely through the environment (`service.settings`). Several replicas may share a PostgreSQL database: all
of them serve requests, but only one reconciles jobs at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy import Engine
from sqlalchemy.exc import ArgumentError, OperationalError

from amd.config import broken_rule
from service.app import create_app
from service.auth.api_keys import ensure_admin_key
from service.auth.stream_limits import StreamLimits
from service.background import StepMonitor
from service.db.engine import is_migrated, migrate, open_engine
from service.db.leases import LeaseKeeper
from service.jobs.execution.external import ExternalRunDiscovery
from service.jobs.execution.reconciler import Reconciler
from service.logs import configure_logging
from service.operations.retention.collection import RetentionLoop
from service.operations.retention.policy import policy_of
from service.operations.storage_meter import StorageMeter
from service.registry.discovery import EncoderDiscovery
from service.registry.scanner import StorageScanner
from service.serving.deployments import Deployer
from service.serving.reservations import deployed_gpus, running_reservation
from service.settings import Settings
from service.webhooks.sender import WebhookSender

logger = logging.getLogger(__name__)

BAD_INPUT, FAILED = 2, 1
MIGRATION_POLL_S = 2.0
DRAIN_S = 5  # how long background loops may take to end
# Longer than clients and load balancers keep idle connections (httpx 5 s, AWS 60 s): a request on a connection that the
# server is closing fails.
KEEP_ALIVE_S = 75


class BackgroundLoop(Protocol):
    """A loop that a thread runs until it is stopped."""

    monitor: StepMonitor

    def run(self, stop: threading.Event) -> None: ...


class LoopThreads:
    """Runs each background loop in a thread, once the schema is up to date."""

    def __init__(self, loops: Sequence[BackgroundLoop], wait_for_schema: Callable[[threading.Event], bool]) -> None:
        """`wait_for_schema` returns False if its event is set before the schema is up to date."""
        self._stop = threading.Event()
        self._wait_for_schema = wait_for_schema
        self._threads = [threading.Thread(target=loop.run, args=(self._stop,), daemon=True) for loop in loops]
        self._starting = threading.Thread(target=self._start, daemon=True)

    def start(self) -> None:
        self._starting.start()

    def _start(self) -> None:
        if self._wait_for_schema(self._stop):
            for thread in self._threads:
                thread.start()

    def request_stop(self) -> None:
        """Ask the loops to end. Each one releases its lease, so that another control plane can take over."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the loops to end, for at most DRAIN_S each."""
        self.request_stop()
        for thread in (self._starting, *self._threads):
            if thread.is_alive():
                thread.join(DRAIN_S)


class DrainingServer(uvicorn.Server):
    """On shutdown, ends background loops and open streams, which would otherwise last for the entire drain period.

    The loops end here rather than after `run`: uvicorn raises the stop signal again at the end of `run`, which ends
    the process before leases are released.
    """

    def __init__(self, config: uvicorn.Config, streams: StreamLimits, loops: LoopThreads) -> None:
        super().__init__(config)
        self._streams, self._loops = streams, loops

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._loops.request_stop()
        self._streams.end_all()
        await super().shutdown(sockets)
        await asyncio.to_thread(self._loops.join)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("serve", "migrate"), default="serve")
    command = parser.parse_args(args).command
    try:
        settings = Settings()
    except ValidationError as error:
        for found in error.errors():
            print(f"error: AMD_{'_'.join(map(str, found['loc'])).upper()}: {broken_rule(found)}", file=sys.stderr)
        return BAD_INPUT
    configure_logging(settings.log_format)
    try:
        return serve(settings) if command == "serve" else _migrate(settings)
    except ArgumentError as error:
        print(f"error: AMD_DATABASE_URL: {error}", file=sys.stderr)
        return BAD_INPUT
    except OperationalError as error:
        print(f"error: the database does not respond: {error.orig}", file=sys.stderr)
        return FAILED


def _migrate(settings: Settings) -> int:
    migrate(open_engine(settings.database))
    return 0


def serve(settings: Settings) -> int:
    engine = open_engine(settings.database)
    if settings.migrate or engine.dialect.name == "sqlite":
        migrate(engine)
    is_ready = is_migrated(engine)
    if is_ready:
        _write_admin_key(engine, settings)
    else:
        logger.warning("the database schema is not up to date; waiting for `python -m service migrate`")
    try:
        app = create_app(settings, engine=engine)
    except ValueError as error:  # inconsistent settings
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    loops = LoopThreads(
        _background_loops(app, settings), lambda stop: is_ready or _wait_until_migrated(engine, settings, stop)
    )
    loops.start()
    try:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            access_log=False,  # AccessLogMiddleware logs requests
            log_config=None,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.drain_s),
        )
        DrainingServer(config, app.state.stream_limits, loops).run()
    finally:
        loops.join()
    _exit_if_hanging()
    return 0


def _exit_if_hanging() -> None:
    """Exit immediately if an unresponsive dependency blocks a thread; otherwise Python would wait for it."""
    until = time.monotonic() + DRAIN_S
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                logger.warning(
                    "%s is still waiting for a dependency that does not respond; exiting without it", thread.name
                )
                logging.shutdown()
                os._exit(0)


def _wait_until_migrated(engine: Engine, settings: Settings, stop: threading.Event) -> bool:
    """Wait until the schema is up to date. Returns False if `stop` is set first."""
    while not stop.wait(MIGRATION_POLL_S):
        try:
            if is_migrated(engine):
                _write_admin_key(engine, settings)
                return True
        except Exception as error:
            logger.warning("the database cannot be used yet; will retry: %s", error)
    return False


def _write_admin_key(engine: Engine, settings: Settings) -> None:
    if ensure_admin_key(engine, settings.admin_key_path):
        logger.info("the first admin key was written to %s", settings.admin_key_path)


def _background_loops(app: FastAPI, settings: Settings) -> Sequence[BackgroundLoop]:
    """Create the background loops for jobs, deployments and webhooks, and add their monitors to the app's state."""
    state, engine = app.state, app.state.engine
    encoders = EncoderDiscovery(state.encoders, settings.root)
    reserved, gpus = running_reservation(state.deployments), deployed_gpus(state.deployments)
    runs = ExternalRunDiscovery(state.jobs, state.cluster, settings.root)
    loops: tuple[BackgroundLoop, ...] = (
        Reconciler(state.jobs, state.cluster, settings, encoders, reserved=reserved, deployed_gpus=gpus),
        Deployer(state.deployments, state.encoders, LeaseKeeper(engine, "deployer"), state.serve_api, settings),
        StorageScanner(runs, encoders, LeaseKeeper(engine, "discovery")),
        StorageMeter(engine, settings.root),
        WebhookSender(engine, allow_http=settings.webhooks_http, retain_days=settings.retain_deliveries_days),
    )
    policy = policy_of(settings)
    if policy.removes_user_data:
        loops = (*loops, RetentionLoop(state.jobs, settings.root, policy))
    state.monitors += [loop.monitor for loop in loops]
    return loops


if __name__ == "__main__":
    sys.exit(main())
