"""Tables of the value study's results, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from statistics import mean
from typing import Any

from tests.benchmarks.value_study.arms import ARMS, COMPARISONS
from tests.benchmarks.value_study.scoring import PROBES
from tests.benchmarks.value_study.seed_study import PHASES
from tune_spaces.report.figures import difference
from tune_spaces.report.formatting import spread


def tables(folder: Path, seeds: Container[int] | None = None) -> str:
    """Return the results of all phases, of all seeds or of these."""
    found = []
    for path in sorted(folder.iterdir()):
        results = [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))] if path.is_dir() else []
        if results := [result for result in results if seeds is None or result["seed"] in seeds]:
            found.append(table(path.name, results))
    return "\n\n".join(found)


def table(name: str, results: list[dict[str, Any]]) -> str:
    """Return one row per arm: scores, and paired differences with 95 % intervals.

    Scores are given as mean ± standard deviation across seeds.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    probes = [probe for probe in PROBES if all(probe in result["scores"] for result in results)]
    names = [name for name in ("random", "teacher", *ARMS) if name in by_arm]
    lines = [
        f"Phase {name}, split {PHASES[name.partition('-')[0]]}:",
        "",
        "| arm | seeds | steps | CPU s | " + " | ".join(f"{probe} %" for probe in probes) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(probes),
    ]
    for name in names:
        runs = by_arm[name].values()
        cells = [spread([run["scores"][probe] for run in runs]) for probe in probes]
        facts = [len(runs), round(mean(run["steps"] for run in runs)), round(mean(run["seconds"] for run in runs))]
        lines.append("| " + " | ".join([name, *map(str, facts), *cells]) + " |")
    lines += ["", "Paired differences (95 % interval):", ""]
    lines += ["| first | second | seeds | " + " | ".join(probes) + " |", "|---|---|---:|" + "---:|" * len(probes)]
    for first, second in COMPARISONS:
        seeds = sorted(set(by_arm.get(first, {})) & set(by_arm.get(second, {})))
        if seeds:
            cells = [
                _difference([[by_arm[arm][seed]["scores"][probe] for seed in seeds] for arm in (first, second)])
                for probe in probes
            ]
            lines.append("| " + " | ".join([first, second, str(len(seeds)), *cells]) + " |")
    return "\n".join(lines)


def _difference(pair: list[list[float]]) -> str:
    found = difference(pair[0], pair[1])
    interval = f" ({found.interval[0]:+.1f} to {found.interval[1]:+.1f})" if found.interval else ""
    return f"{found.value:+.1f}{interval}"
