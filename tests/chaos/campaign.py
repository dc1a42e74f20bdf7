"""Train identical jobs on a real stack while killing its processes at random, and check that nothing is lost.

Run as `python tests/chaos/campaign.py --kills 12 --seed 0`. A separate stack (`amd up` with a temporary data directory)
first trains one job undisturbed. Then identical jobs run, a few at a time, while processes are killed with `kill -9` in
an order determined by the seed. Parts of the stack are restarted as systemd or Kubernetes would restart them. At the
end, each job must have succeeded without ever running twice at the same time, its last checkpoint and encoder must be
bitwise equal to the undisturbed ones, and a deployed encoder must still be served if replicas were killed. Prints a
table of kills and jobs; the exit code is 1 if a check fails. Stops everything that it started, and removes its folder
unless a check fails or --keep is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import psutil
from PIL import Image

from amd.storage import exists, join
from amd.training.checkpoints.listing import newest_step
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.run_folder import BAD_SAMPLES, run_folder
from service.client import ApiError, Client, NoAnswer
from service.jobs.schemas import ENDED, JobDetail, JobRequest
from service.serving.schemas import DeploymentRequest
from tests.support.chaos.exclusivity import ExclusivityObserver
from tests.support.chaos.stack import SupervisedStack, environment
from tests.support.chaos.victims import ROLES, Role, job_of, with_role
from tests.support.encoders.published_encoders import picture, publish
from tests.support.runs.tiny_runs import final_state, tiny_run, tiny_teacher

STEPS, LOG_EVERY = 600, 10
PICTURES, PICTURE_PX = 24, 192  # large enough that decoding takes most of a step's time
RECOVERY_S = 900.0  # the campaign fails if no job commits a checkpoint for this long
JOB_S = 3600.0
MAX_RETRIES = 20  # a job may be hit many times before its next checkpoint; the default of 3 is too low here
SERVED = "served"


class Kill(NamedTuple):
    """A planned kill."""

    role: Role
    choice: float
    """Which process with this role to kill, as a fraction of their number."""
    after_recovery: bool
    """Whether to wait until the stack has recovered from the previous kill."""
    delay_s: float


class Observed(NamedTuple):
    """A kill that was carried out."""

    kill: Kill
    at_s: float
    victim: str
    running: dict[str, int]
    """Newest checkpoint step of each running job."""


class Violation(Exception):
    """Raised when a campaign or soak cannot continue because the system under test does not recover."""


def plan(kills: int, seed: int, roles: Sequence[Role]) -> list[Kill]:
    """Return the kills in order. Each round contains every role once; a third of the kills happen during a recovery."""
    shuffled, rng = random.Random(f"roles {seed}"), random.Random(f"kills {seed}")  # more kills only extend the plan
    order: list[Role] = []
    while len(order) < kills:
        order += shuffled.sample(roles, len(roles))
    planned: list[Kill] = []
    for role in order[:kills]:
        waits = not planned or not planned[-1].after_recovery or rng.random() < 0.5
        planned.append(Kill(role, rng.random(), waits, round(rng.uniform(0.0, 8.0), 2)))
    return planned


class Campaign:
    """A stack under test, with the submitted jobs and the observed kills and violations."""

    def __init__(self, folder: Path, planned: Sequence[Kill], at_once: int) -> None:
        self.folder, self.planned, self.at_once = folder, planned, at_once
        self.stack = SupervisedStack(folder, cpus=at_once + 2)
        self.root = str(self.stack.storage)
        self.serves = any(kill.role == "replica" for kill in planned)
        self.observed: list[Observed] = []
        self.violations: list[str] = []
        self.running: list[str] = []  # jobs that had not ended when last checked
        self.found: dict[str, JobDetail] = {}
        self.digests: dict[str, str] = {}
        self.began = time.monotonic()

    def run(self) -> None:
        self.stack.start()
        with closing(self.stack.client()) as client:
            say(f"the stack in {self.folder} is up; training a job undisturbed")
            if self.serves:
                self._deploy(client)
            self.request = self._request()
            undisturbed = self._submit(client)
            self._wait(client, undisturbed)
            with ExclusivityObserver(self.stack.storage) as observer:
                try:
                    for kill in self.planned:
                        self._carry_out(client, kill)
                    say("no more kills; waiting for the remaining jobs")
                    for job in client.jobs.list():  # including one whose submission was interrupted
                        self._wait(client, job.id)
                except (Violation, TimeoutError) as violation:
                    self.violations.append(str(violation))
            self.violations += observer.violations
            self.found = {job.id: client.jobs.get(job.id) for job in client.jobs.list()}
            self._check_jobs(undisturbed)
            if self.serves:
                self._check_serving(client)

    # Setup

    def _deploy(self, client: Client) -> None:
        publish(self.stack.storage / "encoders" / SERVED)
        until = time.monotonic() + RECOVERY_S
        while not list(client.encoders.list()):
            _check_time(until, "the published encoder was not discovered")
            time.sleep(1)
        client.deployments.put(SERVED, DeploymentRequest(encoder=SERVED))
        client.deployments.wait(SERVED, RECOVERY_S)
        self.expected = client.embeddings(SERVED, [picture()])[0].embedding

    def _request(self) -> JobRequest:
        images, weights = self.folder / "images", self.folder / "teacher.safetensors"
        write_pictures(images)
        tiny_teacher(weights)
        config = tiny_run(
            self.folder,
            schedule__steps=STEPS,
            schedule__warmup_steps=10,
            checkpoint__every_steps=20,
            tracking__log_every_steps=LOG_EVERY,
            data__loader_workers=1,
        )
        config_values = {**config.model_dump(mode="json"), "storage": None}
        return JobRequest(kind="train", config=config_values, max_retries=MAX_RETRIES)

    def _submit(self, client: Client) -> str:
        return client.jobs.submit(self.request).id

    # Kills

    def _carry_out(self, client: Client, kill: Kill) -> None:
        if kill.after_recovery:
            self._await_recovery(client)
        else:
            self._keep_busy(client)
        time.sleep(kill.delay_s)
        victim = self._find_and_kill(client, kill)
        steps = self._newest_steps()
        self.observed.append(Observed(kill, time.monotonic() - self.began, victim, steps))
        say(f"kill {len(self.observed)} of {len(self.planned)}: {kill.role} {victim}; checkpoints {[*steps.values()]}")

    def _await_recovery(self, client: Client) -> None:
        """Wait until the stack is up and a job has committed a checkpoint since the last kill."""
        until, before = time.monotonic() + RECOVERY_S, self.observed[-1].running if self.observed else {}
        while True:
            self._keep_busy(client)
            steps = self._newest_steps()
            if self.stack.is_up and any(step > before.get(job, 0) for job, step in steps.items()):
                return
            _check_time(until, f"no job has made progress for {RECOVERY_S:g} s after {self._last_kill()}: {steps}")
            time.sleep(0.5)

    def _find_and_kill(self, client: Client, kill: Kill) -> str:
        """Wait for a suitable process, then kill it. Returns its PID and, if known, its job."""
        until = time.monotonic() + RECOVERY_S
        while True:
            if found := with_role(kill.role, self.stack.processes()):
                victim = found[int(kill.choice * len(found))]
                job = job_of(victim)
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
                    return f"{victim.pid}" + (f" of {job}" if job else "")
            self._keep_busy(client)
            _check_time(until, f"there was no {kill.role} process for {RECOVERY_S:g} s after {self._last_kill()}")
            time.sleep(0.2)

    def _keep_busy(self, client: Client) -> None:
        """Submit a new job for each job that has ended."""
        self.running = [job for job in self.running if client.jobs.get(job).state not in ENDED]
        while len(self.running) < self.at_once:
            self.running.append(self._submit(client))

    def _newest_steps(self) -> dict[str, int]:
        """Return the newest checkpoint step of each running job."""
        return {job: newest_step(run_folder(self.root, job)) for job in self.running}

    def _wait(self, client: Client, job: str) -> JobDetail:
        ended = client.jobs.wait(job, JOB_S)
        say(f"{job} {ended.state} in attempt {ended.attempt}")
        return ended

    def _last_kill(self) -> str:
        return f"the kill of the {self.observed[-1].kill.role}" if self.observed else "the start"

    # Checks

    def _check_jobs(self, undisturbed: str) -> None:
        self.digests = {job: digest_of(self.root, job) for job in self.found}
        expected = self.digests[undisturbed]
        steps = list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
        for job, found in self.found.items():
            if found.state != "succeeded":
                self.violations.append(f"{job} {found.state} ({found.reason}): {found.message}")
                continue
            if self.digests[job] != expected:
                self.violations.append(f"{job}: its weights differ from those of the undisturbed job {undisturbed}")
            if exists(join(run_folder(self.root, job), BAD_SAMPLES)):
                self.violations.append(f"{job}: reports bad samples, although all files are good")
            lines = [line for line in read_metrics(run_folder(self.root, job)) if "loss/total" in line]
            if [line["step"] for line in lines] != steps:
                self.violations.append(f"{job}: its metrics do not contain each step once: {lines}")

    def _check_serving(self, client: Client) -> None:
        try:
            client.deployments.wait(SERVED, RECOVERY_S)
            found = client.embeddings(SERVED, [picture()])[0].embedding
        except (ApiError, NoAnswer, TimeoutError) as error:
            self.violations.append(f"the deployed encoder is not served: {error}")
            return
        if not np.allclose(found, self.expected, atol=1e-5):
            self.violations.append("the deployed encoder returns different embeddings than before")

    # Report

    def report(self) -> Iterator[str]:
        yield f"\n{'kill':>4}  {'time':>6}  {'role':13}  {'waits':5}  victim"
        for number, one in enumerate(self.observed, 1):
            waits = "yes" if one.kill.after_recovery else "no"
            yield f"{number:>4}  {one.at_s:>5.0f}s  {one.kill.role:13}  {waits:5}  {one.victim}"
        yield f"\n{'job':34}  {'state':9}  {'attempts':>8}  {'steps':>5}  weights"
        for job, found in sorted(self.found.items(), key=lambda item: item[1].created_at):
            steps = (found.result or {}).get("steps", 0)
            yield f"{job:34}  {found.state:9}  {found.attempt:>8}  {steps:>5}  {self.digests.get(job, '')[:16]}"
        restarts = ", ".join(f"{part} {count}" for part, count in self.stack.restarts.items())
        yield f"\n{len(self.observed)} of {len(self.planned)} kills in {time.monotonic() - self.began:.0f} s"
        yield f"restarts by the supervisor: {restarts}"
        yield from (f"VIOLATION: {violation}" for violation in self.violations)
        yield f"{len(self.violations)} violations"


def write_pictures(folder: Path) -> None:
    """Write PNG files of random noise to two folders."""
    noise = np.random.default_rng(0)
    for i in range(PICTURES):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (PICTURE_PX, PICTURE_PX, 3), dtype=np.uint8)).save(path)


def digest_of(root: str, job: str) -> str:
    """Return a digest of all tensors in a run's last checkpoint and encoder, or "" if it has no encoder."""
    from safetensors.numpy import load_file

    encoder = Path(root) / "encoders" / job / "encoder.safetensors"
    if not encoder.exists():
        return ""
    from amd.config import TrainConfig

    config = TrainConfig.model_validate(json.loads((Path(root) / "runs" / job / "config.json").read_text()))
    tensors: dict[str, Any] = {
        name: value.numpy() for name, value in final_state(run_folder(root, job), config).items()
    }
    tensors |= {f"encoder/{name}": value for name, value in load_file(encoder).items()}
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.tobytes())
    return digest.hexdigest()


def _check_time(until: float, message: str) -> None:
    if time.monotonic() > until:
        raise Violation(message)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run_campaign(folder: Path, planned: Sequence[Kill], at_once: int = 2) -> Campaign:
    """Run a campaign in a folder, then stop everything that it started."""
    (folder / "tmp").mkdir()
    variables = {
        "TMPDIR": str(folder / "tmp"),  # killed processes leave their temporary files
        "AMD_ALLOWED_URIS": str(folder),
        "AMD_SILENCE_S": "15",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_worker_niceness": "0",  # relative to the campaign; Ray's default of 15 starves workers on a busy machine
        "OMP_NUM_THREADS": "1",
    }
    with environment(**variables):
        campaign = Campaign(folder, planned, at_once)
        try:
            campaign.run()
        finally:
            campaign.stack.stop()
    return campaign


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="number of processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of kills and the choice of processes")
    parser.add_argument("--at-once", type=int, default=2, help="number of jobs to run at the same time")
    parser.add_argument(
        "--roles", nargs="+", choices=get_args(Role), default=ROLES, help="roles of the processes to kill"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with the stack's logs and runs")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stack is stopped
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    planned = plan(options.kills, options.seed, options.roles)
    for number, kill in enumerate(planned, 1):
        when = "after recovery" if kill.after_recovery else "immediately"
        print(f"{number:>4}  {kill.role:13}  {when:14}  +{kill.delay_s} s")
    folder = Path(tempfile.mkdtemp(prefix="amd-chaos-"))
    failed = True
    try:
        campaign = run_campaign(folder, planned, options.at_once)
        print("\n".join(campaign.report()))
        failed = bool(campaign.violations)
    finally:
        if failed or options.keep:
            print(f"the stack's folder is {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
