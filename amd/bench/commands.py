"""Run the benchmarks of `amd bench` and `python -m amd.bench` with the given options and overrides.

Imports torch only after the config is validated; does not parse arguments or print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from amd.config import TrainConfig, data_config, parse_overrides
from amd.presets.load import load_config
from amd.presets.preset import UNSET

STEP_PRESET = "k400-vit-b"
BATCH, STEPS, SAMPLES = 8, 5, 40  # defaults
HELP = {
    "batch": "Clips per step.",
    "steps": "Number of measured steps.",
    "samples": "Number of samples to read.",
    "target": "Clips per second that a training worker consumes; if set, a number of loader workers is recommended.",
}


def step_figures(
    overrides: Sequence[str], preset: str | None, config: str | None, *, batch: int, steps: int
) -> dict[str, Any]:
    """Benchmark a training step for a preset or config, on a GPU if one is available.

    Raises ConfigError if the preset, config or overrides are invalid.
    """
    name = None if config else preset
    values = {"scaling.device": "auto", **parse_overrides(overrides)}
    resolved = load_config(TrainConfig, name, config, values, complete=False)
    from amd.bench.step import bench_step

    figures = bench_step(resolved, batch=batch, steps=steps)
    return {"preset": name, **figures} if name else figures


def data_figures(
    overrides: Sequence[str],
    preset: str | None,
    config: str | None,
    *,
    samples: int,
    target: float | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Benchmark data loading for a preset, a config or `data.…` overrides. Default: synthetic videos.

    Raises ConfigError if the preset, config or overrides are invalid.
    """
    values = parse_overrides(overrides, example="data=FOLDER")
    data = clip = None
    if preset is not None or config is not None:
        resolved = load_config(TrainConfig, preset, config, values, complete=False)
        clip = resolved.clip
        data = None if resolved.data.train.startswith(UNSET) else resolved.data
    elif values:
        data = data_config(values)
    from amd.bench.data import bench_data

    return bench_data(data, clip, samples=samples, target=target, log=log)
