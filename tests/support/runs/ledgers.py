"""Deterministic synthetic sweep ledgers: scores are a known function plus per-seed noise, and ASHA is simulated."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from amd.presets.pretraining import PRESETS
from amd.storage import join, write_json
from tune_spaces.config import SearchConfig
from tune_spaces.ledger import Ledger, Rung, TrialRecord, TrialState

METRIC = "eval/knn_top1"


def search(**fields: Any) -> SearchConfig:
    """Return the config of an ASHA sweep over the mask ratios of the demo student, with 3 rungs and 3 seeds."""
    values = {
        "train": PRESETS["demo-image-amd"].config.model_dump(mode="json"),
        "space": {"use": ["masking"]},
        "seeds": 3,
        "name": "a-sweep",
    }
    return SearchConfig.model_validate(values | fields)


def rung(fraction: float, scores: Sequence[float], *, seconds: float = 10.0, clips: int = 3000) -> Rung:
    return Rung(
        fraction=fraction,
        step=round(500 * fraction),
        score=mean(scores),
        figures={METRIC: tuple(scores), "eval/top1": tuple(score + 2 for score in scores)},
        clips=round(clips * fraction) * len(scores),
        seconds=seconds * fraction,
        time=1000.0 + fraction,
    )


def trial(
    number: int,
    point: Mapping[str, Any],
    rungs: Sequence[Rung],
    state: TrialState = "succeeded",
    *,
    overrides: Mapping[str, Any] | None = None,
    **fields: Any,
) -> TrialRecord:
    """Return a trial's record. Parameters of the `masking` space become `mask` overrides."""
    if overrides is None:
        overrides = {name.replace("masking.", "mask."): value for name, value in point.items() if name != "variant"}
    return TrialRecord(
        number=number,
        point=dict(point),
        overrides=dict(overrides),
        rungs=tuple(rungs),
        state=state,
        began=0.0,
        **fields,
    )


def write_sweep(folder: str, config: SearchConfig, records: Sequence[TrialRecord]) -> str:
    write_json(join(folder, "config.json"), config.model_dump(mode="json"))
    ledger = Ledger(folder)
    for record in records:
        ledger.write(record)
    return folder


def ratios(student: float, teacher: float) -> dict[str, float]:
    return {"masking.student_ratio": student, "masking.teacher_ratio": teacher}


def asha(config: SearchConfig, points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], float, float]]) -> list[
    TrialRecord
]:  # fmt: skip
    """Simulate trials given as (point, overrides, true score, relative cost); the best third continues at each rung.

    The first trial is the baseline and is never stopped, as in a real sweep.
    """
    draw, fractions = random.Random(0), config.fractions()
    scores: list[list[list[float]]] = []
    for _, _, truth, _ in points:
        noise = [draw.gauss(0, 0.4) for _ in range(config.seeds)]
        scores.append([
            [truth - 9 * (1 - fraction**0.35) + bias + draw.gauss(0, 0.25) for bias in noise] for fraction in fractions
        ])  # fmt: skip
    continuing, reached = list(range(len(points))), [0] * len(points)
    if config.stopping == "none":
        reached = [len(fractions) - 1] * len(points)
    else:
        for level in range(len(fractions) - 1):
            kept = max(1, -(-len(continuing) // config.reduction))
            continuing = sorted(continuing, key=lambda at: -mean(scores[at][level]))[:kept]
            continuing += [0] if 0 not in continuing else []
            for at in continuing:
                reached[at] = level + 1
    records = []
    for number, (point, overrides, _, work) in enumerate(points):
        last = reached[number]
        speed = 6.0 + 9.0 * work + draw.uniform(0, 0.6)
        rungs = [rung(fractions[level], scores[number][level], seconds=speed) for level in range(last + 1)]
        records.append(
            trial(
                number,
                point,
                rungs,
                "succeeded" if last == len(fractions) - 1 else "stopped",
                overrides=overrides,
                baseline=number == 0,
                costs={"teacher_gflops": 0.08 * work, "step_gflops": 0.08 * work + 0.05},
                runs=tuple(f"a-sweep-{number}-{seed}" for seed in range(config.seeds)),
            )
        )
    return records


def masking_truth(student: float, teacher: float) -> float:
    return 90 - 60 * (student - 0.8) ** 2 - 14 * (teacher - 0.45) ** 2


def masking_sweep(config: SearchConfig, trials: int) -> list[TrialRecord]:
    """Simulate a sweep over the `masking` space: first the points of a grid, then random points."""
    draw = random.Random(1)
    grid = [(0.75, 0.5)] + [
        (student, teacher)
        for student in (0.6, 0.75, 0.9)
        for teacher in (0.0, 0.3, 0.5, 0.75, 0.9)
        if teacher <= student and (student, teacher) != (0.75, 0.5)
    ]
    while len(grid) < trials:
        student = draw.uniform(0.5, 0.95)
        grid.append((student, draw.uniform(0.0, student - 0.05)))
    points = [
        (ratios(student, teacher), {"mask.student_ratio": student, "mask.teacher_ratio": teacher})
        for student, teacher in grid[:trials]
    ]
    truths = [masking_truth(point["masking.student_ratio"], point["masking.teacher_ratio"]) for point, _ in points]
    return asha(
        config,
        [
            (point, overrides, truth, 1 - point["masking.teacher_ratio"])
            for (point, overrides), truth in zip(points, truths, strict=True)
        ],
    )
