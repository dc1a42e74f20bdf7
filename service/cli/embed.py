"""`amd embed`: vectors of single files, or of a whole data set as Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from amd.config import ConfigError, EmbedConfig, overridden, parse_overrides, validate
from amd.presets.pretraining import read_config_file
from service.cli.submission import Submission, submittable

out = Console()
err = Console(stderr=True)
OF_CONFIG = re.compile(rf"(?:{'|'.join(EmbedConfig.model_fields)})(?:\.\w+)*=.*", re.DOTALL)


@submittable
def embed(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]… | [KEY=VALUE]…",
            help="Images or videos; or data.train=…, scaling.workers=…, normalize=true for all of a data set.",
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", "-e", help="A published encoder: id, folder or URL.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Of a data set, as JSON or YAML: file or URL.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Of a data set: a folder or URL; default: below --storage.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Root of the encoder ids; default: AMD_STORAGE.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Embed a data set in this process, without Ray.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs: a line per file.")] = False,
    job: Submission | None = None,
) -> None:
    """Embed files with a published encoder; or a data set (`data.train=…`) into Parquet files, resumable."""
    overrides = parse_overrides([word for word in words or [] if OF_CONFIG.fullmatch(word)])
    files = [word for word in words or [] if not OF_CONFIG.fullmatch(word)]
    if files and (overrides or config):
        raise ConfigError([f"{files[0]}: files or a data set; with data.train=… there are no files besides"])
    if files:
        if encoder is None or job is not None or output is not None:
            asked = "--encoder: required" if encoder is None else "--submit, --output: of a data set (data.train=…)"
            raise ConfigError([asked])
        _embed_files(files, encoder, storage, as_json)
        return
    if "data" in overrides:
        overrides["data.train"] = overrides.pop("data")
    options = {"encoder": encoder, "output": output, "storage": storage}
    overrides |= {name: value for name, value in options.items() if value is not None}
    if job is not None:
        job.send("embed", None, config, overrides, as_json=as_json)
    chosen = validate(EmbedConfig, overridden(read_config_file(config) if config else {}, overrides))

    from amd.downstream.embedding.bulk import embed_all

    result = embed_all(chosen, local=local, say=lambda line: err.print(line, style="dim", markup=False, soft_wrap=True))
    if as_json:
        print(result.model_dump_json())
    elif result.state == "succeeded":
        told = f"{result.output}: {result.samples} samples" + (f", {result.bad} left out" if result.bad else "")
        out.print(told, markup=False, highlight=False, soft_wrap=True)
    else:
        _stop([result.message])
    raise typer.Exit(result.exit_code)


def _embed_files(files: Sequence[str], encoder: str, storage: str | None, as_json: bool) -> None:
    from amd.artifacts.discovery import encoder_url
    from amd.data.dataset.open import BadSample
    from amd.downstream.embedding.features import embed_file
    from amd.storage import resolve_root

    url, bad = encoder_url(resolve_root(storage), encoder), []
    for file in files:
        try:
            vector: list[Any] = embed_file(url, file).tolist()
        except BadSample as error:
            bad.append(f"{file}: {error}")
            continue
        if as_json:
            print(json.dumps({"file": file, "encoder": encoder, "embedding": vector}))
        else:
            head = ", ".join(f"{value:.4f}" for value in vector[:4])
            out.print(f"{file}: {len(vector)} values [{head}, …]", markup=False, highlight=False)
    if bad:
        _stop(bad)


def _stop(problems: Sequence[str]) -> NoReturn:
    for problem in problems:
        err.print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
