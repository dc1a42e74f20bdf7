"""Measure the cost of writing pictures during training by alternating complete runs with and without them.

Run as `python -m tests.benchmarks.training_pictures [--preset NAME] [--steps N] [--pictures N] [--turns N]`. Runs
train in this process on a preset's demo data; every second run writes pictures at N evenly spaced steps. Prints one
line of JSON per turn with the CPU time of both runs and the total size of the pictures, then two medians: `ratio`, the
CPU time with pictures divided by the CPU time without, and `share`, the CPU time of writing the same pictures on their
own, as a share of the run without pictures. The noise in `ratio` may exceed the cost. CPU time includes decoding
processes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time

from amd.config import TrainConfig, with_overrides
from amd.data.dataset.open import open_manifest
from amd.models.student import Student
from amd.presets.load import find_preset
from amd.training.reporting.media_files import media_steps
from amd.training.reporting.media_writer import MediaWriter
from amd.training.runs import launch


def cpu_seconds() -> float:
    """Return the CPU time of this process and its finished child processes, in seconds."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(config: TrainConfig, name: str, every_steps: int | None) -> tuple[float, float, int]:
    """Train a run; return its CPU time and wall time in seconds, and the size of its pictures in bytes."""
    media = {"media.samples": 0} if every_steps is None else {"media.every_steps": every_steps}
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = launch.train(with_overrides(config, {"name": name, **media}), local=True, quiet=True)
    assert result.state == "succeeded", result.message
    size = sum(sum(step.sizes.values()) for step in media_steps(result.run_folder))
    return cpu_seconds() - cpu, time.perf_counter() - wall, size


def picture_seconds(config: TrainConfig, folder: str, pictures: int) -> float:
    """Return the CPU seconds needed to decode the samples and write pictures at the given number of steps."""
    student = Student(config)
    cpu = cpu_seconds()
    writer = MediaWriter(folder, config, student, open_manifest(config.data), lambda images: None)
    for step in range(pictures):
        writer.write(step, student)
        writer.close(wait=True)
    assert writer.written == pictures, writer.warnings()
    return cpu_seconds() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo-image-teacher")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=4, help="number of steps with pictures")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = {"schedule.steps": options.steps, "schedule.warmup_steps": 1, "storage": folder}
        config = with_overrides(find_preset(TrainConfig, options.preset).config, overrides)
        measure(with_overrides(config, {"schedule.steps": 2}), "first", None)  # trains the teacher
        ratios, shares = [], []
        for turn in range(options.turns):
            plain = measure(config, f"plain-{turn}", None)
            pictured = measure(config, f"pictured-{turn}", options.steps // options.pictures)
            alone = picture_seconds(config, f"{folder}/alone-{turn}", options.pictures)
            ratios.append(pictured[0] / plain[0])
            shares.append(alone / plain[0])
            cpu = {"without": plain[0], "with": pictured[0], "pictures_alone": alone}
            figures = {"cpu_s": cpu, "wall_s": [plain[1], pictured[1]], "bytes": pictured[2]}
            print(json.dumps({"turn": turn, **figures}), flush=True)
    medians = {"ratio": statistics.median(ratios), "share": statistics.median(shares)}
    print(json.dumps({"pictures": options.pictures, **medians}))


if __name__ == "__main__":
    main()
