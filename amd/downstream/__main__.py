"""`python -m amd.downstream COMMAND …`: the entry points for `ray job submit`.

    probe --config FILE_OR_URL key=value…                      probe the features of a published encoder
    embed --config FILE_OR_URL key=value…                      embed a data set with a published encoder
    finetune --config FILE_OR_URL | --preset NAME key=value…   train a classifier on a pre-trained encoder
    detect --config FILE_OR_URL | --preset NAME key=value…     train an action detector on a pre-trained encoder
    probe-checkpoint --run FOLDER [--step N] key=value…        probe a checkpoint of a run in progress

Exit code 0: succeeded; 1: failed or stopped; 2: invalid input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

from amd.commands import CONFIG, LOCAL_EMBED, PROBE_OVERRIDES
from amd.config import EmbedConfig, ProbeConfig, parse_overrides
from amd.entry_point import argument_parser, print_progress, run_named_command, run_training
from amd.presets.load import load_file


def probe(args: Sequence[str]) -> int:
    options = argument_parser("amd.downstream probe", CONFIG, overrides=PROBE_OVERRIDES).parse_args(args)
    config = load_file(ProbeConfig, options.config, parse_overrides(options.overrides))
    from amd.downstream.probing.run import run_probe  # imports torch: only after the config is validated

    print(run_probe(config, log=print_progress).model_dump_json(), flush=True)
    return 0


def embed(args: Sequence[str]) -> int:
    parser = argument_parser(
        "amd.downstream embed", CONFIG, LOCAL_EMBED, overrides="Overrides: data.train=…, scaling.workers=…, …"
    )
    options = parser.parse_args(args)
    config = load_file(EmbedConfig, options.config, parse_overrides(options.overrides))
    from amd.downstream.embedding.bulk import embed_all

    result = embed_all(config, local=options.local, log=print_progress)
    print(result.model_dump_json(), flush=True)
    return result.exit_code


def probe_checkpoint(args: Sequence[str]) -> int:
    parser = argument_parser(
        "amd.downstream probe-checkpoint", overrides="Overrides of the section `probe` in the run's config."
    )
    parser.add_argument("--run", required=True, help="Run folder or run ID.")
    parser.add_argument("--step", type=int, help="Step of a committed checkpoint. Default: the newest one.")
    options = parser.parse_args(args)
    overrides = parse_overrides(options.overrides)
    from amd.downstream.probing.checkpoint_probe import probe_checkpoint

    print(json.dumps(probe_checkpoint(options.run, options.step, overrides)), flush=True)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "probe": probe,
    "embed": embed,
    "finetune": partial(run_training, "finetune", "amd.downstream finetune"),
    "detect": partial(run_training, "detect", "amd.downstream detect"),
    "probe-checkpoint": probe_checkpoint,
}


def main(args: Sequence[str] | None = None) -> int:
    return run_named_command(COMMANDS, args, __doc__, "resumes from finished work")


if __name__ == "__main__":
    sys.exit(main())
