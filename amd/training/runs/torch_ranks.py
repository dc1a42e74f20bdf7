"""Train on processes that torchrun or Slurm's srun started, without Ray.

Every process calls `launch`. Rank 0 checks the config, holds the lease, publishes the encoder, and sends each attempt
to the other ranks, which only train. A failed attempt ends all processes: torchrun (--max-restarts) or Slurm
(--requeue) starts them again, and the run continues from its newest checkpoint.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pkgutil import resolve_name
from typing import Any, NamedTuple, NoReturn

from amd.config import ConfigError, RunConfig, with_overrides
from amd.data.faults import DataFault
from amd.training.failures import RunError
from amd.training.rank_work import work_on_rank, work_path
from amd.training.reporting.progress import Event, NullWatcher, Watcher
from amd.training.run_folder import RunSpec
from amd.training.stop_signals import StopSignals

IDLE = timedelta(days=30)  # ranks wait for rank 0 while it checks data or publishes
PORT = 29500


class Place(NamedTuple):
    """Position of this process among all processes in the run."""

    rank: int
    world: int
    local_rank: int
    """Index of the process on its node, which selects its GPU."""
    local_world: int
    address: str
    """Host of rank 0."""
    port: int


def find_place(distributed: bool, environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return this process's position in the run, or None if no launcher started it.

    torchrun is always recognised. Other launchers are recognised only if `distributed` (option --distributed) is set,
    because a Slurm batch script has the same environment variables as its tasks. Raises ConfigError if `distributed` is
    set but there is no launcher.
    """
    if "TORCHELASTIC_RUN_ID" in environ or (distributed and {"RANK", "WORLD_SIZE"} <= environ.keys()):
        rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local_rank, local_world = int(environ.get("LOCAL_RANK", rank)), int(environ.get("LOCAL_WORLD_SIZE", world))
        address, port = environ.get("MASTER_ADDR", "127.0.0.1"), int(environ.get("MASTER_PORT", PORT))
        return Place(rank, world, local_rank, local_world, address, port)
    if not distributed:
        return None
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NODELIST" not in environ:
        raise ConfigError(
            [
                "--distributed: no launcher started this process; use `torchrun --nproc-per-node 8 -m amd.training …`, "
                "or `srun … python -m amd.training --distributed …`"
            ]
        )
    job = int(environ.get("SLURM_JOB_ID", 0))
    return Place(
        int(environ["SLURM_PROCID"]),
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_LOCALID"]),
        int(re.split(r"\D", environ["SLURM_STEP_TASKS_PER_NODE"])[0]),
        environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        int(environ.get("MASTER_PORT") or PORT + job % 1000),
    )


def first_host(hosts: str) -> str:
    """Return the first host in Slurm's compact list: `gpu[07-09,12],cpu1` -> `gpu07`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", hosts)
    assert found is not None, hosts
    return found[1] + (found[2] or "")


@contextmanager
def join_ranks(place: Place | None, config: RunConfig, stop: threading.Event | None) -> Iterator[TorchRanks | None]:
    """Connect a launcher's processes for the duration of the context. Yields None if no launcher started this process.

    Yields on rank 0 only: the other ranks train what rank 0 sends them, and then exit with rank 0's exit code. Raises
    ConfigError on rank 0 if the config does not suit the launcher.
    """
    if place is None:
        yield None
        return
    ranks = TorchRanks(place, config)
    if place.rank:
        with StopSignals(stop) as signals:
            ranks.follow(signals.stop)
    try:
        _check_restarts(config)
        ranks.config = _fit_workers(config, place.world)
        yield ranks
    finally:
        ranks.close()


class TorchRanks:
    """This process and its peers, all started by a launcher."""

    def __init__(self, place: Place, config: RunConfig) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        from amd.device import choose_device

        self.place, self.config = place, config
        self.exit_code = 2  # for all ranks; until there is a result, the code for an invalid config
        gpu = config.scaling.device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(place.local_rank)
        self.device = choose_device(config.scaling.device)
        # Served by torchrun's agent or by rank 0.
        url = f"tcp://{place.address}:{place.port}?rank={place.rank}&world_size={place.world}"
        self._store, _, _ = next(rendezvous(url))
        backend, store = "cpu:gloo,cuda:nccl" if gpu else "gloo", _fresh_store(self._store, place)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world)
        self._tasks: Any = dist.new_group(backend="gloo", timeout=IDLE)
        self._failed = False

    def attempt(self, work: Callable[..., Any], hooks: RankHooks, spec: RunSpec) -> dict[str, Any]:
        """Run one attempt on all ranks. Called on rank 0."""
        self._broadcast((work_path(work), spec))
        try:
            return self._work(work, hooks, spec)
        except BaseException:
            self._failed = True  # the other ranks fail too, and do not wait for a task
            atexit.register(exit_at_once, 1)
            raise

    def follow(self, stop: threading.Event) -> NoReturn:
        """Train the runs that rank 0 sends, then exit with rank 0's exit code. Called on all other ranks."""
        while not isinstance(task := self._broadcast(None), int):
            path, spec = task
            try:
                self._work(resolve_name(path), RankHooks(stop, NullWatcher()), spec)
            except (RunError, DataFault):  # rank 0 raises and reports the same error
                exit_at_once(1)
            except Exception:
                traceback.print_exc()
                exit_at_once(1)
        self._leave()
        sys.exit(task)

    def close(self) -> None:
        """Make the other ranks exit. Called on rank 0."""
        if not self._failed:
            self._broadcast(self.exit_code)
            self._leave()

    def _work(self, work: Callable[..., Any], hooks: RankHooks, spec: RunSpec) -> dict[str, Any]:
        rank, world, local_world = self.place.rank, self.place.world, self.place.local_world
        return work_on_rank(work, spec, hooks, rank=rank, world=world, local_world=local_world, device=self.device)

    def _broadcast(self, task: Any) -> Any:
        import torch.distributed as dist

        box = [task]
        dist.broadcast_object_list(box, src=0, group=self._tasks)
        return box[0]

    def _leave(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


def exit_at_once(code: int) -> NoReturn:
    """Exit without running process-group destructors, which would wait for peers that wait for this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fresh_store(store: Any, place: Place) -> Any:
    """Return a view of the store that excludes all keys written before a restart.

    torchrun's agent keeps one store across all restarts (torch 2.15), so a rank could read the address of a peer that
    has exited and fail to connect. Rank 0 chooses a new prefix, and sends it to each rank in reply to a random key.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    if place.rank:
        key = uuid.uuid4().hex
        store.set(f"amd/key/{place.rank}", key)
        prefix = store.get(f"amd/prefix/{key}").decode()  # waits until it is set
        store.set(f"amd/received/{prefix}/{place.rank}", "")
        return PrefixStore(prefix, store)
    prefix, waiting = uuid.uuid4().hex, {*range(1, place.world)}
    until = time.monotonic() + store.timeout.total_seconds()
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"amd/key/{rank}"]):  # a key left by an exited process changes later
                store.set(f"amd/prefix/{store.get(f'amd/key/{rank}').decode()}", prefix)
            if store.check([f"amd/received/{prefix}/{rank}"]):
                waiting.remove(rank)
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(waiting)} of {place.world} did not start")
        time.sleep(0.02)
    return PrefixStore(prefix, store)


class RankHooks:
    """Hooks for one rank: signals and events, but no preemption. A stalled rank exits, which the launcher detects."""

    def __init__(self, stop: threading.Event, watcher: Watcher) -> None:
        self._stop, self._watcher = stop, watcher

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def preempted(self) -> bool:
        return False

    def emit(self, event: Event) -> None:
        self._watcher.on_event(event)

    def stalled(self, report: str) -> None:
        print(report, file=sys.stderr, flush=True)
        os._exit(1)


def _fit_workers(config: RunConfig, world: int) -> RunConfig:
    """Return the config for `world` ranks. Raises ConfigError if they cannot share the batch evenly."""
    low, high = config.scaling.workers
    return config if low <= world <= high else with_overrides(config, {"scaling.workers": world})


def _check_restarts(config: RunConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if restarted processes would not find the run that they should continue."""
    if config.name is None and int(environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ConfigError(["name: required with torchrun's --max-restarts, which resumes a run by name; add name=NAME"])
