"""`amd demo`: compare a teacher, an AMD student and an undistilled student on real digits, then serve the student."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from service.cli.console import err, fail, out, print_plain
from service.cli.options import AsJson, Local, Storage

if TYPE_CHECKING:
    from service.cli.demo_jobs import DemoService


def demo(
    storage: Storage = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds per run.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Add all baselines, e.g. symmetric masking.")] = False,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Fine-tune the students on 10 labels per class.")
    ] = False,
    image: Annotated[bool, typer.Option(help="Include digits as images.")] = True,
    video: Annotated[bool, typer.Option(help="Include moving digits as H.264 clips.")] = True,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Compare a teacher, an AMD student and an undistilled student on digits, in about 5 minutes on two CPU cores.

    The runs are jobs on a service that the demo starts on this machine; the service then serves the distilled student.
    """
    from amd.storage import resolve_root

    console = err if as_json else out
    root = resolve_root(storage)
    with _demo_service(root, console, local) as service:
        from amd.demo.report import pictures_url
        from amd.demo.run import DemoFailed, run_demo  # imports torch while the service starts

        try:
            report = run_demo(
                root,
                runner=service.run if service is not None else None,
                seeds=seeds,
                full=full,
                finetuned=finetune,
                image=image,
                video=video,
                console=console,
            )
        except DemoFailed as error:
            fail(str(error))
        if service is not None:
            served = service.serve(str(report.embedded["encoder"]), str(report.embedded["file"]), pictures_url(root))
            report = report.model_copy(update={"served": served})
        else:
            print_plain(f"Look:  pictures in {pictures_url(root)}", console)
            print_plain(f"Try:   amd encoders list --storage {root}", console)
    if as_json:
        print(report.model_dump_json())


@contextmanager
def _demo_service(root: str, console: Console, local: bool) -> Iterator[DemoService | None]:
    """Yield the service that executes the runs, or None with --local, which executes them in this process."""
    if local:
        yield None
        return
    from service.cli.demo_jobs import demo_service
    from service.client import ApiError, NoAnswer
    from service.stack import StackError

    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the service, as Ctrl-C does
    try:
        with demo_service(root, console) as service:
            yield service
    except (StackError, ApiError, NoAnswer) as error:
        fail(str(error))
    finally:
        signal.signal(signal.SIGTERM, handler)
