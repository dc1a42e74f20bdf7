"""`amd embed`: embed individual files, or embed a whole data set and write the embeddings to Parquet files."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from amd.config import ConfigError, EmbedConfig, parse_overrides, with_overrides
from amd.presets.load import load_file
from service.cli.console import fail, out, print_plain, print_progress
from service.cli.encoder_source import published_encoder, stored_encoder
from service.cli.options import ConfigUrl, EncoderName, LocalEmbed, Storage
from service.cli.submission import Submission, submittable

OVERRIDE = re.compile(rf"(?:{'|'.join(EmbedConfig.model_fields)})(?:\.\w+)*=.*", re.DOTALL)


@submittable
def embed(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]… | [KEY=VALUE]…",
            help="Images or videos; or, for a whole data set, overrides such as data.train=… and scaling.workers=…",
        ),
    ] = None,
    encoder: EncoderName = None,
    config: ConfigUrl = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder or URL for a data set's embeddings; default: under --storage."),
    ] = None,
    storage: Storage = None,
    local: LocalEmbed = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON, one line per file.")] = False,
    job: Submission | None = None,
) -> None:
    """Embed files with a published encoder, or embed a data set (`data.train=…`) and write Parquet files. Resumable."""
    overrides = parse_overrides([text for text in inputs or [] if OVERRIDE.fullmatch(text)])
    files = [text for text in inputs or [] if not OVERRIDE.fullmatch(text)]
    if files and (overrides or config):
        raise ConfigError([f"{files[0]}: pass files or a data set (data.train=…), not both"])
    if files:
        if encoder is None:
            raise ConfigError(["--encoder: required"])
        if job is not None or output is not None:
            raise ConfigError(["--submit, --output: apply only to a data set (data.train=…)"])
        _embed_files(files, encoder, storage, as_json)
        return
    if "data" in overrides:
        overrides["data.train"] = overrides.pop("data")
    options = {"encoder": encoder, "output": output, "storage": storage}
    overrides |= {name: value for name, value in options.items() if value is not None}
    if job is not None:
        job.send("embed", None, config, overrides, as_json=as_json)
    resolved = load_file(EmbedConfig, config, overrides)
    resolved = with_overrides(resolved, {"encoder": stored_encoder(resolved.encoder, resolved.storage)})

    from amd.downstream.embedding.bulk import embed_all

    result = embed_all(resolved, local=local, log=print_progress)
    if as_json:
        print(result.model_dump_json())
    elif result.state == "succeeded":
        bad = f", {result.bad} skipped" if result.bad else ""
        damaged = f", {result.damaged} damaged and partly used" if result.damaged else ""
        print_plain(f"{result.output}: {result.samples} samples{bad}{damaged}")
    else:
        fail(result.message)
    raise typer.Exit(result.exit_code)


def _embed_files(files: Sequence[str], encoder: str, storage: str | None, as_json: bool) -> None:
    from amd.data.dataset.open import BadSample
    from amd.downstream.embedding.features import embed_file

    bad = list[str]()
    with published_encoder(encoder, storage, as_json=as_json) as url:
        name = encoder if url == encoder else posixpath.basename(url)
        for file in files:
            try:
                vector: list[Any] = embed_file(url, file).tolist()
            except BadSample as error:
                bad.append(f"{file}: {error.reason}")
                continue
            if as_json:
                print(json.dumps({"file": file, "encoder": name, "embedding": vector}))
            else:
                head = ", ".join(f"{value:.4f}" for value in vector[:4])
                out.print(f"{file}: {len(vector)} values [{head}, …]", markup=False, highlight=False)
    if bad:
        fail(*bad)
