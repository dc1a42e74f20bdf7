"""The demo's runs as jobs, and its encoder deployed: by a stack of its own below the demo's storage, over REST."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from amd.config import FinetuneConfig, TrainConfig
from amd.storage import is_remote
from amd.training.run_folder import RunResult
from service.client import Client, DeploymentRequest, JobRequest, NoAnswer, Patience
from service.jobs.schemas import ENDED, JobView
from service.settings import default_data_dir
from service.stack import Stack, down, find_stack, up

LABEL = "demo"  # holds the run's name, by which a demo that was interrupted finds its jobs again
LOOK_S = 1.0
DEPLOYMENT = "demo"
DEPLOY_S = 600.0  # a cold machine takes its time


class DemoService:
    """What the demo asks of a service that may still be starting."""

    def __init__(self, starting: Future[Stack], console: Console) -> None:
        self._starting, self._console = starting, console
        self.serves = False
        """Whether it is to go on after the demo."""

    def run(self, configs: Sequence[TrainConfig | FinetuneConfig]) -> list[RunResult]:
        """Runs as jobs, side by side as the cluster has room."""
        stack = self._starting.result()
        if not configs:
            return []
        with self._client(stack) as client:
            jobs = [submit_once(client, config) for config in configs]
            return [result_of(job) for job in follow(client, jobs, self._console)]

    def serve(self, encoder_folder: str, file: str) -> dict[str, str]:
        """Deploy an encoder, have it embed a file, and tell how to ask it; it goes on answering."""
        stack, encoder = self._starting.result(), encoder_folder.rstrip("/").rpartition("/")[2]
        self._console.print(f"\nDeploying the encoder on Ray Serve as [bold]{DEPLOYMENT}[/bold]")
        with self._client(stack) as client:
            deploy(client, DEPLOYMENT, DeploymentRequest(encoder=encoder))
            (found,) = client.embeddings(DEPLOYMENT, [file])
        self.serves = True
        media = "video/mp4" if file.endswith(".mp4") else "image/png"
        command = (
            f'curl -H "Authorization: Bearer $(cat {stack.key_file})" -H "Content-Type: {media}" \\\n'
            f"       --data-binary @{file} {stack.url}/v1/encoders/{DEPLOYMENT}/embeddings"
        )
        head = ", ".join(f"{value:.4f}" for value in found.embedding[:4])
        for line in (
            f"It answers requests, and says [{head}, …] of the file above:",
            f"  {command}",
            f"The service goes on ({stack.url}/docs) until: amd down --data-dir {stack.data_dir}",
        ):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        return {"url": stack.url, "key_file": str(stack.key_file), "deployment": DEPLOYMENT, "encoder": encoder}

    def _client(self, stack: Stack) -> Client:
        return Client(stack.url, stack.key_file.read_text().strip(), patience=Patience(tries=16))


@contextmanager
def demo_service(root: str, console: Console) -> Iterator[DemoService]:
    """A stack that starts meanwhile. It ends with the demo that started it, unless it serves what came of it."""
    data_dir = default_data_dir() / "demo" if is_remote(root) else Path(root) / "service"
    found = find_stack(data_dir)
    said = "Found the service of an earlier demo" if found else "Starting the service on this machine: Ray and the API"
    console.print(f"{said}, its data in {data_dir}", soft_wrap=True)
    with ThreadPoolExecutor(1) as background:
        starting = background.submit(up, data_dir, port=0, storage=root)
        service = DemoService(starting, console)
        try:
            yield service
        finally:
            if found is None and not service.serves:
                starting.exception()  # it must not start parts while they are stopped
                down(data_dir)


def submit_once(client: Client, config: TrainConfig | FinetuneConfig) -> JobView:
    """The job of a run: the one of an earlier demo, gone on with where it was stopped, or a new one."""
    name = str(config.name)
    for job in client.jobs.list(labels={LABEL: name}):
        if job.state == "paused":
            return client.jobs.resume(job.id)
        return client.jobs.retry(job.id) if job.state in ("failed", "cancelled") else job
    values = config.model_dump(mode="json", exclude={"name", "storage"})  # the service gives both
    kind = "finetune" if isinstance(config, FinetuneConfig) else "train"
    return client.jobs.submit(JobRequest(kind=kind, config=values, name=name, labels={LABEL: name}))


def deploy(client: Client, name: str, request: DeploymentRequest) -> None:
    """Raises NoAnswer where it does not come to answer requests."""
    client.deployments.put(name, request)
    found = client.deployments.wait(name, DEPLOY_S)
    if found.state != "healthy":
        raise NoAnswer(f"the encoder cannot be deployed: {found.message}")


def follow(client: Client, jobs: Sequence[JobView], console: Console) -> list[JobView]:
    """The jobs once all have ended; shown while they run, as bars on a terminal and as lines elsewhere."""
    seen = list(jobs)
    columns = TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[told]}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        rows = [bars.add_task(str(job.name), total=None, told="") for job in seen]
        lines = [""] * len(seen)
        while True:
            for place, job in enumerate(seen):
                if job.state not in ENDED or not lines[place]:
                    seen[place] = client.jobs.get(job.id)
                    _move(bars, rows[place], seen[place])
                    lines[place] = _line(console, seen[place], lines[place])
            if all(job.state in ENDED for job in seen):
                return seen
            time.sleep(LOOK_S)


def _move(bars: Progress, row: TaskID, job: JobView) -> None:
    progress, told = job.progress, f"{job.state} {job.message}" if job.state != "running" else ""
    if progress is not None and progress.steps:
        bars.update(row, total=progress.steps, completed=progress.step or 0)
        left = f", {progress.seconds_left:.0f} s left" if progress.seconds_left else ""
        told = told or f"step {progress.step or 0} of {progress.steps}{left}"
    bars.update(row, told=told or job.state)


def _line(console: Console, job: JobView, before: str) -> str:
    """Where there are no bars: a line for a new state, and for every quarter of the steps."""
    progress, line = job.progress, f"{job.name}: {job.state}"
    if job.state == "running" and progress is not None and progress.steps:
        line += f", {25 * (4 * (progress.step or 0) // progress.steps)} % of {progress.steps} steps"
    if line != before and not console.is_terminal:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return line


def result_of(job: JobView) -> RunResult:
    """What the run itself said; where it could not, what the service knows."""
    if job.result is not None and job.result.get("state") == job.state:
        return RunResult.model_validate(job.result)
    state = "cancelled" if job.state == "cancelled" else "failed"
    return RunResult(state=state, reason=job.reason, message=job.message, run_id=job.id, run_folder=job.run_folder)
