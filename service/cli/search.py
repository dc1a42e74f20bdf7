"""`amd search`: search masking ratios, alignment layers, generators or recipes, and report on a sweep."""

from __future__ import annotations

import json
import posixpath
from typing import Annotated, Any

import typer

from amd.config import ConfigError, parse_overrides
from amd.storage import join
from service.cli.command_groups import default_command
from service.cli.console import out
from service.cli.ids import stored_id
from service.cli.options import AsJson, ConfigUrl, PresetName, Storage, SweepOverrides
from service.cli.submission import Submission, submittable

RUN = "run"

app = typer.Typer(
    cls=default_command(RUN),
    help="Search masking ratios, alignment layers, generators or recipes: `amd search --space masking --preset …`.",
    no_args_is_help=True,
)


@app.command(RUN)
@submittable
def run(
    overrides: SweepOverrides = None,
    preset: PresetName = None,
    config: ConfigUrl = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Search space: masking, alignment, generator, recipe (comma-separated), or a YAML or JSON file."
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Ablation: asymmetry, serial, layers, distance, generator_depth or reduction.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="Search algorithm: grid, random, tpe or pbt; default: random.")
    ] = None,
    stopping: Annotated[
        str | None, typer.Option(help="Early stopping: none, asha or hyperband; default: asha.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Maximum number of trials, or population size for pbt; default: 20.")
    ] = None,
    hours: Annotated[float | None, typer.Option(help="Maximum wall time in hours.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds per trial; default: 1.")] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Maximum number of parallel trials; default: as many as the resources allow.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Sweep ID; reusing it continues the sweep. With --submit: display name.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan without running it.")] = False,
    as_json: AsJson = False,
    job: Submission | None = None,
) -> None:
    """Run or continue a sweep, on the cluster at RAY_ADDRESS or on this machine."""
    from tune_spaces.load_config import load_search

    values: dict[str, Any] = parse_overrides(overrides or [])
    options = {
        "algorithm": algorithm,
        "stopping": stopping,
        "budget.trials": trials,
        "budget.hours": hours,
        "seeds": seeds,
        "at_once": at_once,
        "name": name if job is None else None,  # the name of a job is only displayed; its id is the sweep id
    }
    values |= {key: value for key, value in options.items() if value is not None}
    if space is not None and study is not None:
        raise ConfigError(["--space and --study: a study has its own space; pass only one of them"])
    if space is not None:
        from tune_spaces.spaces.space import read_space

        values["space"] = read_space(space).model_dump(mode="json")
    if study is not None:
        values["space"] = {"study": study}
    if job is not None and not plan:
        job.send("search", preset, config, values, as_json=as_json)
    resolved = load_search(preset, config, values)
    from tune_spaces.search.run import preview, search

    if plan:
        shown = preview(resolved)
        print(json.dumps(shown._asdict())) if as_json else print("\n".join(shown.lines()))
        return
    result = search(resolved, quiet=as_json)
    if as_json:
        print(result.model_dump_json())
    raise typer.Exit(result.exit_code)


@app.command()
def report(
    sweep: Annotated[str, typer.Argument(metavar="RUN", help="Sweep ID, ID prefix or folder.")],
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Regenerate the report for a running or finished sweep: table, plots, verdict, best.json."""
    from tune_spaces.report import show, write_report

    written = write_report(_sweep_folder(sweep, storage))
    if as_json:
        print(written.model_dump_json())
    else:
        out.print(show(written))


def _sweep_folder(sweep: str, storage: str | None) -> str:
    """Return the folder of a sweep that is given as a folder, an ID or an ID prefix."""
    from amd.training.run_folder import find_run

    folder = find_run(sweep, storage)
    if folder == sweep:
        return folder
    runs = posixpath.dirname(folder)
    return join(runs, stored_id(sweep, runs, "run"))
