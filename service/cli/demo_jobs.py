"""Run the demo through the service: submit its runs as jobs, and deploy its encoder.

The service is a local stack, which is used only through the REST API.
"""

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
from service.cli.connection import PERSISTENT_TRIES
from service.cli.console import print_plain
from service.cli.open_console import command_prefix, console_link, link_note
from service.cli.times import duration
from service.client import Client, DeploymentRequest, JobRequest, NoAnswer, Patience
from service.jobs.schemas import ENDED, JobView
from service.settings import default_data_dir
from service.stack import Stack, down, find_stack, up

LABEL = "demo"  # label of the demo's jobs; its value is the run name, so that a repeated demo finds them again
POLL_INTERVAL_S = 1.0
DEPLOYMENT = "demo"
DEPLOY_TIMEOUT_S = 600.0  # a cold machine is slow


class DemoService:
    """Runs the demo's jobs on a service that may still be starting."""

    def __init__(self, starting: Future[Stack], console: Console) -> None:
        self._starting, self._console = starting, console
        self.keep_running = False
        """Whether the service outlives the demo."""

    def run(self, configs: Sequence[TrainConfig | FinetuneConfig]) -> list[RunResult]:
        """Execute runs as jobs, in parallel if the cluster has enough resources."""
        stack = self._starting.result()
        if not configs:
            return []
        with self._client(stack) as client:
            jobs = [submit_once(client, config) for config in configs]
            results = [run_result(job) for job in follow(client, jobs, self._console)]
            for config, result in zip(configs, results, strict=True):
                if result.encoder_folder is not None:  # encoders are named after jobs, runs and pictures after configs
                    client.aliases.move(str(config.name), encoder_id(result.encoder_folder))
            return results

    def serve(self, encoder_folder: str, file: str, pictures: str) -> dict[str, str]:
        """Deploy an encoder, embed a file with it, and print links, an example request, and how to stop the service.

        Keeps the service running.
        """
        stack, encoder = self._starting.result(), encoder_id(encoder_folder)
        self._console.print(f"\nDeploying the encoder on Ray Serve as [bold]{DEPLOYMENT}[/bold]")
        with self._client(stack) as client:
            deploy(client, DEPLOYMENT, DeploymentRequest(encoder=encoder))
            (found,) = client.embeddings(DEPLOYMENT, [file])
            link = console_link(client, stack.url)
        self.keep_running = True
        media = "video/mp4" if file.endswith(".mp4") else "image/png"
        command = (
            f'curl -H "Authorization: Bearer $(cat {stack.key_file})" -H "Content-Type: {media}" '
            f"--data-binary @{file} {stack.url}/v1/encoders/{DEPLOYMENT}/embeddings"
        )
        amd = command_prefix(stack.data_dir)
        head = ", ".join(f"{value:.4f}" for value in found.embedding[:4])
        for line in (
            f"It is healthy, and embeds the same file as [{head}, …]\n",
            f"Look:  pictures in {pictures}, the console at {link} ({link_note(amd)})",
            f"Try:   {command}",
            f"Stop:  {amd} down",
        ):
            print_plain(line, self._console)
        return {"url": stack.url, "key_file": str(stack.key_file), "deployment": DEPLOYMENT, "encoder": encoder}

    def _client(self, stack: Stack) -> Client:
        return Client(stack.url, stack.key_file.read_text().strip(), patience=Patience(tries=PERSISTENT_TRIES))


@contextmanager
def demo_service(root: str, console: Console) -> Iterator[DemoService]:
    """Start a stack in the background. On exit, stop it if this call started it and it serves no encoder."""
    data_dir = default_data_dir() / "demo" if is_remote(root) else Path(root) / "service"
    found = find_stack(data_dir)
    message = "Found the service from an earlier demo" if found else "Starting Ray and the API on this machine"
    console.print(f"{message}; data in {data_dir}", soft_wrap=True)
    with ThreadPoolExecutor(1) as background:
        starting = background.submit(up, data_dir, port=0, storage=root)
        service = DemoService(starting, console)
        try:
            yield service
        finally:
            if found is None and not service.keep_running:
                starting.exception()  # wait, so that no part starts while parts are being stopped
                down(data_dir)


def encoder_id(folder: str) -> str:
    """Return the ID of the encoder in `folder`."""
    return folder.rstrip("/").rpartition("/")[2]


def submit_once(client: Client, config: TrainConfig | FinetuneConfig) -> JobView:
    """Return the job for a run: a job from an earlier demo, resumed if it was stopped, or a new job."""
    name = str(config.name)
    for job in client.jobs.list(labels={LABEL: name}):
        if job.state == "paused":
            return client.jobs.resume(job.id)
        return client.jobs.retry(job.id) if job.state in ("failed", "cancelled") else job
    values = config.model_dump(mode="json", exclude={"name", "storage"})  # the service sets both
    kind = "finetune" if isinstance(config, FinetuneConfig) else "train"
    return client.jobs.submit(JobRequest(kind=kind, config=values, name=name, labels={LABEL: name}))


def deploy(client: Client, name: str, request: DeploymentRequest) -> None:
    """Deploy an encoder and wait until it is healthy. Raises NoAnswer if it fails."""
    client.deployments.put(name, request)
    found = client.deployments.wait(name, DEPLOY_TIMEOUT_S)
    if found.state != "healthy":
        raise NoAnswer(f"the encoder could not be deployed: {found.message}")


def follow(client: Client, jobs: Sequence[JobView], console: Console) -> list[JobView]:
    """Wait until all jobs end, showing their progress as bars on a terminal, otherwise as lines."""
    current = list(jobs)
    columns = TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[status]}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        rows = [bars.add_task(str(job.name), total=None, status="") for job in current]
        lines = [""] * len(current)
        while True:
            for index, job in enumerate(current):
                if job.state not in ENDED or not lines[index]:
                    current[index] = client.jobs.get(job.id)
                    _update_bar(bars, rows[index], current[index])
                    lines[index] = _print_change(console, current[index], lines[index])
            if all(job.state in ENDED for job in current):
                return current
            time.sleep(POLL_INTERVAL_S)


def _update_bar(bars: Progress, row: TaskID, job: JobView) -> None:
    progress, status = job.progress, f"{job.state} {job.message}" if job.state != "running" else ""
    if progress is not None and progress.steps:
        bars.update(row, total=progress.steps, completed=progress.step or 0)
        left = f", {duration(progress.seconds_left)} left" if progress.seconds_left else ""
        trained = "teacher, " if progress.teacher else ""
        status = status or f"{trained}step {progress.step or 0} of {progress.steps}{left}"
    bars.update(row, status=status or job.state)


def _print_change(console: Console, job: JobView, previous: str) -> str:
    """Print a line for each new state or completed quarter of the steps, unless bars are shown. Returns the line."""
    progress, line = job.progress, f"{job.name}: {job.state}"
    if job.state == "running" and progress is not None and progress.steps:
        whose = "of its teacher's" if progress.teacher else "of"
        line += f", {25 * (4 * (progress.step or 0) // progress.steps)} % {whose} {progress.steps} steps"
    if line != previous and not console.is_terminal:
        print_plain(line, console)
    return line


def run_result(job: JobView) -> RunResult:
    """Return the result that the run reported, or one derived from the job."""
    if job.result is not None and job.result.get("state") == job.state:
        return RunResult.model_validate(job.result)
    state = "cancelled" if job.state == "cancelled" else "failed"
    return RunResult(state=state, reason=job.reason, message=job.message, run_id=job.id, run_folder=job.run_folder)
