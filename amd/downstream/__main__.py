"""`python -m amd.downstream COMMAND …`: the entry points for `ray job submit`.

    probe --config FILE_OR_URL key=value…             what a published encoder is worth
    embed --config FILE_OR_URL key=value…             all of a data set through a published encoder
    finetune --config FILE_OR_URL | --preset NAME key=value…   a classifier on a pre-trained encoder
    detect --config FILE_OR_URL | --preset NAME key=value…     what people in videos do, on a pre-trained encoder
    probe-checkpoint --run FOLDER [--step N] key=value…   what a run's encoder is worth on the way

Exit code 0: done; 1: failed or stopped; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from amd.config import EmbedConfig, ProbeConfig, overridden, parse_overrides, validate
from amd.entry_point import ended
from amd.presets.detection import detection_config
from amd.presets.finetuning import finetune_config
from amd.presets.pretraining import read_config_file
from amd.training.run_folder import RunResult


def probe(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m amd.downstream probe")
    parser.add_argument("--config", help="a file or URL, JSON or YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(words)
    values = read_config_file(options.config) if options.config else {}
    config = validate(ProbeConfig, overridden(values, parse_overrides(options.overrides)))
    from amd.downstream.probing.run import run_probe  # torch: only once the config is known to be good

    print(run_probe(config, say=_say).model_dump_json(), flush=True)
    return 0


def embed(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m amd.downstream embed")
    parser.add_argument("--config", help="a file or URL, JSON or YAML")
    parser.add_argument("--local", action="store_true", help="embed in this process, without Ray")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(words)
    values = read_config_file(options.config) if options.config else {}
    config = validate(EmbedConfig, overridden(values, parse_overrides(options.overrides)))
    from amd.downstream.embedding.bulk import embed_all

    result = embed_all(config, local=options.local, say=_say)
    print(result.model_dump_json(), flush=True)
    return result.exit_code


def probe_checkpoint(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m amd.downstream probe-checkpoint")
    parser.add_argument("--run", required=True, help="a run's folder or id")
    parser.add_argument("--step", type=int, help="of a committed checkpoint; default: the newest")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the section `probe` of the run's config")
    options = parser.parse_args(words)
    overrides = parse_overrides(options.overrides)
    from amd.downstream.probing.checkpoint_probe import probe_checkpoint

    print(json.dumps(probe_checkpoint(options.run, options.step, overrides)), flush=True)
    return 0


def finetune(words: Sequence[str]) -> int:
    options = _run_options("finetune", words)
    config = finetune_config(options.preset, options.config, parse_overrides(options.overrides))
    from amd.downstream.supervised.classification.run import (
        finetune as run,  # torch: only once the config is known to be good
    )

    return _ended(run(config, local=options.local), options)


def detect(words: Sequence[str]) -> int:
    options = _run_options("detect", words)
    config = detection_config(options.preset, options.config, parse_overrides(options.overrides))
    from amd.downstream.supervised.detection.run import detect as run

    return _ended(run(config, local=options.local), options)


def _run_options(command: str, words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m amd.downstream {command}")
    parser.add_argument("--config", help="a file or URL, JSON or YAML")
    parser.add_argument("--preset", help="a named recipe instead of a config")
    parser.add_argument("--local", action="store_true", help="train in this process, without Ray")
    parser.add_argument("--json", action="store_true", help="end with one JSON line on standard output")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(words)


def _ended(result: RunResult, options: argparse.Namespace) -> int:
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


def main(words: Sequence[str] | None = None) -> int:
    name, *rest = list(sys.argv[1:] if words is None else words) or [""]
    if name not in COMMANDS:
        print(f"error: {name!r} is no command; one of {', '.join(COMMANDS)}\n\n{__doc__}", file=sys.stderr)
        return 2
    return ended(lambda: COMMANDS[name](rest), "goes on from what was finished")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
