"""Measure the benefit of distillation and of asymmetry: train small students on Fashion-MNIST and compare them by seed.

    python -m tests.benchmarks.value_study run OUT --phase select --seeds 0-2 [--arms A;B] [--processes 2] [--minutes M]
    python -m tests.benchmarks.value_study run OUT --phase confirm --seeds 10-14
    python -m tests.benchmarks.value_study run OUT --phase select --steps 3200    (a table of its own)
    python -m tests.benchmarks.value_study tables OUT [--seeds 10-14]
    python -m tests.benchmarks.value_study.chart OUT/confirm IMAGE.svg

Requires the package for the data set `fashion-mnist` (see `amd dataset`). Optimizer steps run the training code
(`Distiller`) on images in memory. Each seed has its own teacher. All arms for a seed share the data order, masks and
initial weights. Each finished run is a JSON file in OUT, so the same command continues an interrupted study. Settings
are chosen with `--phase select`, which scores the split `select`; `--phase confirm` scores `test`, with seeds fixed
beforehand. Time is measured as the CPU time of one thread, so that two processes and other programs do not distort it.
"""

from __future__ import annotations

import argparse
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from tests.benchmarks.value_study.arms import ARMS, HEADLINE, Variant
from tests.benchmarks.value_study.scoring import PROBES
from tests.benchmarks.value_study.seed_study import PHASES, run_seed
from tests.benchmarks.value_study.tables import tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "tables"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--phase", choices=PHASES, default="select")
    parser.add_argument("--seeds", help="first and last seed, separated by a hyphen; default: 0-2, or all in tables")
    parser.add_argument("--arms", default=";".join(HEADLINE), help="names of the arms to run, separated by semicolons")
    parser.add_argument("--probes", default=",".join(PROBES))
    parser.add_argument("--steps", type=int, default=Variant().steps, help="training steps of the students")
    parser.add_argument("--teacher-steps", type=int, default=Variant().teacher_steps)
    parser.add_argument("--patch", type=int, default=Variant().patch, help="patch size in pixels; 2 makes 196 tokens")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=480, help="minutes after which no new run starts")
    args = parser.parse_args()
    if args.action == "run":
        arms, until = tuple(args.arms.split(";")), time.time() + 60 * args.minutes
        if unknown := set(arms) - set(ARMS):
            sys.exit(f"--arms: {', '.join(unknown)} do not exist; choose from {'; '.join(ARMS)}")
        variant, probes = Variant(args.steps, args.teacher_steps, args.patch), tuple(args.probes.split(","))
        tasks = [(args.folder, args.phase, seed, variant, arms, probes, until) for seed in _seeds(args.seeds or "0-2")]
        args.folder.mkdir(parents=True, exist_ok=True)
        with get_context("spawn").Pool(args.processes) as pool:
            pool.map(run_seed, tasks, chunksize=1)
    print(tables(args.folder, _seeds(args.seeds) if args.seeds else None))


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    main()
