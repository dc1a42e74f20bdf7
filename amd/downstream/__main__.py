"""`python -m amd.downstream COMMAND …`: the entry points for `ray job submit`.

    probe --config FILE_OR_URL key=value…                      probe the features of a published encoder
    embed --config FILE_OR_URL key=value…                      embed a data set with a published encoder
    finetune --config FILE_OR_URL | --preset NAME key=value…   train a classifier on a pre-trained encoder
    detect --config FILE_OR_URL | --preset NAME key=value…     train an action detector on a pre-trained encoder
    probe-checkpoint --run FOLDER [--step N] key=value…        probe a checkpoint of a run in progress

Exit code 0: succeeded; 1: failed or stopped; 2: invalid input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from amd.config import EmbedConfig, ProbeConfig, overridden, parse_overrides, validate
from amd.entry_point import run_entry_point
from amd.presets.detection import detection_config
from amd.presets.finetuning import finetune_config
from amd.presets.pretraining import read_config_file
from amd.training.run_folder import RunResult


def probe(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m amd.downstream probe")
    parser.add_argument("--config", help="config as a JSON or YAML file or URL")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(args)
    values = read_config_file(options.config) if options.config else {}
    config = validate(ProbeConfig, overridden(values, parse_overrides(options.overrides)))
    from amd.downstream.probing.run import run_probe  # imports torch: only after the config is validated

    print(run_probe(config, log=_log).model_dump_json(), flush=True)
    return 0


def embed(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m amd.downstream embed")
    parser.add_argument("--config", help="config as a JSON or YAML file or URL")
    parser.add_argument("--local", action="store_true", help="embed in this process, without Ray")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(args)
    values = read_config_file(options.config) if options.config else {}
    config = validate(EmbedConfig, overridden(values, parse_overrides(options.overrides)))
    from amd.downstream.embedding.bulk import embed_all

    result = embed_all(config, local=options.local, log=_log)
    print(result.model_dump_json(), flush=True)
    return result.exit_code


def probe_checkpoint(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m amd.downstream probe-checkpoint")
    parser.add_argument("--run", required=True, help="folder or id of the run")
    parser.add_argument("--step", type=int, help="step of a committed checkpoint; default: the newest")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the section `probe` in the run's config"
    )
    options = parser.parse_args(args)
    overrides = parse_overrides(options.overrides)
    from amd.downstream.probing.checkpoint_probe import probe_checkpoint

    print(json.dumps(probe_checkpoint(options.run, options.step, overrides)), flush=True)
    return 0


def finetune(args: Sequence[str]) -> int:
    options = _run_options("finetune", args)
    config = finetune_config(options.preset, options.config, parse_overrides(options.overrides))
    # imports torch: only after the config is validated
    from amd.downstream.supervised.classification.run import finetune as run

    return _print_result(run(config, local=options.local), options)


def detect(args: Sequence[str]) -> int:
    options = _run_options("detect", args)
    config = detection_config(options.preset, options.config, parse_overrides(options.overrides))
    from amd.downstream.supervised.detection.run import detect as run

    return _print_result(run(config, local=options.local), options)


def _run_options(command: str, args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m amd.downstream {command}")
    parser.add_argument("--config", help="config as a JSON or YAML file or URL")
    parser.add_argument("--preset", help="named recipe instead of a config")
    parser.add_argument("--local", action="store_true", help="train in this process, without Ray")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line on standard output")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(args)


def _print_result(result: RunResult, options: argparse.Namespace) -> int:
    if options.json:
        print(result.model_dump_json(), flush=True)
    return result.exit_code


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "probe": probe,
    "embed": embed,
    "finetune": finetune,
    "detect": detect,
    "probe-checkpoint": probe_checkpoint,
}


def main(args: Sequence[str] | None = None) -> int:
    name, *rest = list(sys.argv[1:] if args is None else args) or [""]
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; use one of {', '.join(COMMANDS)}\n\n{__doc__}", file=sys.stderr)
        return 2
    return run_entry_point(lambda: COMMANDS[name](rest), "resumes from finished work")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
