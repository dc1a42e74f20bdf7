"""`amd search`: a sweep over masking ratios, alignment layers, generators or recipes, and its report."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from amd.config import ConfigError, parse_overrides
from service.cli.submission import Submission, submittable

out = Console()
RUN = "run"


class _RunByDefault(TyperGroup):
    """`amd search --space masking …` is `amd search run --space masking …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Search masking ratios, alignment layers, generators or recipes: `amd search --space masking --preset …`.",
    no_args_is_help=True,
)


@app.command(RUN)
@submittable
def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Of the run (optim.base_lr=…, probe.data.test=…) or the sweep."),
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", "-p", help="The recipe to vary; see `amd presets`.")] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="A sweep as JSON or YAML: file or URL.")] = None,
    space: Annotated[
        str | None,
        typer.Option(help="masking, alignment, generator, recipe, with commas; or a YAML or JSON file of your own."),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="asymmetry, serial, layers, distance, generator_depth or reduction.")
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="grid, random, tpe or pbt; default: random.")] = None,
    stopping: Annotated[str | None, typer.Option(help="none, asha or hyperband; default: asha.")] = None,
    trials: Annotated[
        int | None, typer.Option(help="Points tried at most, for pbt the population; default: 20.")
    ] = None,
    hours: Annotated[float | None, typer.Option(help="Wall time at most.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each trial; default: 1.")] = None,
    at_once: Annotated[int | None, typer.Option(help="Trials side by side; default: as many as fit.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The sweep's id; the same name continues it. Of a job: for people.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be done, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON at the end, for programs.")] = False,
    job: Submission | None = None,
) -> None:
    """Run a sweep, or go on with one, on the cluster that RAY_ADDRESS names or on this machine."""
    from tune_spaces.load_config import load_search

    overrides: dict[str, Any] = parse_overrides(words or [])
    options = {
        "algorithm": algorithm,
        "stopping": stopping,
        "budget.trials": trials,
        "budget.hours": hours,
        "seeds": seeds,
        "at_once": at_once,
        "name": name if job is None else None,  # of a job it is for people; its id is the sweep's
    }
    overrides |= {key: value for key, value in options.items() if value is not None}
    if space is not None and study is not None:
        raise ConfigError(["--space and --study: a study is a space of its own; give one of them"])
    if space is not None:
        from tune_spaces.spaces.space import read_space

        overrides["space"] = read_space(space).model_dump(mode="json")
    if study is not None:
        overrides["space"] = {"study": study}
    if job is not None and not plan:
        job.send("search", preset, config, overrides, as_json=as_json)
    chosen = load_search(preset, config, overrides)
    from tune_spaces.search.run import preview, search

    if plan:
        shown = preview(chosen)
        print(json.dumps(shown._asdict())) if as_json else print("\n".join(shown.lines()))
        return
    result = search(chosen, quiet=as_json)
    if as_json:
        print(result.model_dump_json())
    raise typer.Exit(result.exit_code)


@app.command()
def report(
    sweep: Annotated[str, typer.Argument(metavar="RUN", help="A sweep: its id, or its folder.")],
    storage: Annotated[str | None, typer.Option(help="Root of the ids; default: AMD_STORAGE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a sweep's report anew: table, pictures, verdict, best.json. Also while it runs."""
    from amd.training.run_folder import find_run
    from tune_spaces.report import show, write_report

    written = write_report(find_run(sweep, storage))
    if as_json:
        print(written.model_dump_json())
    else:
        out.print(show(written))
