"""The demo: train a teacher and its students on digits, probe them on held-out digits, print a table and save images.

The demo uses the same components as real runs: files on disk, readers and published encoders. The caller chooses how
runs are executed (`Runner`): one after another in this process, or as service jobs. An interrupted demo can be resumed,
because runs resume by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console

from amd.artifacts.weights import load_card, load_encoder
from amd.config import ConfigError, FinetuneConfig, TrainConfig, validate
from amd.data.dataset.demo import ensure_demo
from amd.data.dataset.open import open_manifest
from amd.demo import arms
from amd.demo.arms import TITLES, DemoPlan, Modality
from amd.demo.images import draw_run
from amd.demo.report import DemoReport, DemoSection, table
from amd.demo.scores import DemoSamples, DemoScores
from amd.downstream.embedding.features import embed_file, read_labelled
from amd.downstream.supervised.classification.run import finetune
from amd.models.encoder import Encoder
from amd.storage import resolve_root
from amd.training.reporting.metrics_reader import read_metrics
from amd.training.run_folder import RunResult, run_folder
from amd.training.runs.launch import train
from amd.training.stop_signals import StopSignals

Runner = Callable[[Sequence[TrainConfig | FinetuneConfig]], list[RunResult]]
"""Executes independent runs to completion, possibly in parallel."""


class DemoFailed(Exception):
    """Raised when a demo run does not succeed."""


def run_demo(
    storage: str | None = None,
    *,
    runner: Runner | None = None,
    seeds: int = 1,
    full: bool = False,
    finetuned: bool = False,
    image: bool = True,
    video: bool = True,
    overrides: dict[str, Any] | None = None,
    teacher_overrides: dict[str, Any] | None = None,
    split: str = "test",
    console: Console | None = None,
) -> DemoReport:
    """Train and score all arms, print the table to `console` and return the report.

    `runner`: executes the runs; by default one after another in this process, without Ray. `seeds`: number of
    repetitions, each with a separate teacher. `full`: adds the control arms: an undistilled student trained for as long
    as AMD takes, a teacher that sees no more than the student, and a student with only direct alignment. `finetuned`:
    fine-tunes the AMD student, the undistilled student and random weights on few labels. `overrides` and
    `teacher_overrides`: overrides for every student's and teacher's config, by dotted key. `split`: data to score;
    settings were tuned on `select`. Raises DemoFailed if a run does not succeed, or ConfigError for invalid overrides.
    """
    started = time.monotonic()
    console = console or Console()
    root = resolve_root(storage)
    modalities = [modality for modality, on in ((arms.IMAGE, image), (arms.VIDEO, video)) if on]
    if not modalities:
        raise ConfigError(["images and video are both disabled, so the demo has nothing to train; enable one of them"])
    _print_introduction(console, root, seeds)
    demo = _Demo(root, range(seeds), overrides or {}, teacher_overrides or {}, split, console, runner or in_process)
    for modality in modalities:
        demo.prepare(modality)
    demo.train(demo.main_arms())
    demo.train([*(demo.finetuning_arms() if finetuned else ()), *(demo.control_arms() if full else ())])
    sections = tuple(demo.section(modality) for modality in modalities)
    embedded = demo.embed_one(modalities[-1], sections[-1])
    report = DemoReport(
        storage=root,
        seeds=tuple(range(seeds)),
        sections=sections,
        embedded=embedded,
        seconds=time.monotonic() - started,
    )
    _print_results(console, report)
    return report


def in_process(configs: Sequence[TrainConfig | FinetuneConfig]) -> list[RunResult]:
    """Execute runs one after another. After SIGTERM or SIGINT, the current run stops and no further runs start.

    Raises DemoFailed if a run was stopped.
    """
    results = list[RunResult]()
    with StopSignals() as signals:
        for config in configs:
            if isinstance(config, FinetuneConfig):
                results.append(finetune(config, local=True, stop=signals.stop))
            else:
                results.append(train(config, local=True, stop=signals.stop))
            if signals.stop.is_set():
                raise _stopped(config)
    return results


class Arm(NamedTuple):
    """A demo run, with the arm and plan that it belongs to."""

    key: str
    plan: DemoPlan
    config: TrainConfig | FinetuneConfig

    @property
    def title(self) -> str:
        title = TITLES[self.key].strip()
        return f"{title}, fine-tuned" if isinstance(self.config, FinetuneConfig) else title


@dataclass(frozen=True)
class _Demo:
    root: str
    seeds: Sequence[int]
    overrides: dict[str, Any]
    teacher_overrides: dict[str, Any]
    split: str
    console: Console
    runner: Runner
    scores: dict[str, DemoScores] = field(default_factory=dict)
    """Scores by modality."""

    def plan(self, modality: Modality, seed: int) -> DemoPlan:
        return DemoPlan(modality, seed, self.root, self.overrides, self.teacher_overrides)

    def plans(self) -> list[DemoPlan]:
        return [self.plan(modality, seed) for seed in self.seeds for modality in self._modalities()]

    def _modalities(self) -> Iterator[Modality]:
        return (modality for modality in (arms.IMAGE, arms.VIDEO) if modality.key in self.scores)

    def prepare(self, modality: Modality) -> None:
        """Write the data, read the probe's samples and score the arms that need no training."""
        self.console.print(
            f"Preparing {modality.data} from handwritten digits (on first use) and reading the probe samples"
        )
        config = arms.undistilled(self.plan(modality, self.seeds[0]))
        ensure_demo(modality.data, "train")

        def samples(split: str) -> DemoSamples:
            url = f"demo:{modality.data}/{split}"
            data = config.data.model_copy(update={"train": url})
            return DemoSamples(read_labelled(data, config.clip), url, open_manifest(data).digest())

        scores = self.scores[modality.key] = DemoScores(samples("probe"), samples(self.split))
        scores.add_pixels()
        grid, values = config.clip.grid, config.clip.token_values
        for seed in self.seeds:
            torch.manual_seed(seed)
            scores.add("random", Encoder(config.student.encoder, grid, values).eval(), config.clip)

    def main_arms(self) -> list[Arm]:
        """Return the AMD and undistilled arms, longer runs first, so that parallel runs finish together."""
        plans = self.plans()
        distilled = [Arm("amd", plan, arms.distilled(plan)) for plan in plans]
        return distilled + [Arm("mae", plan, arms.undistilled(plan)) for plan in plans]

    def finetuning_arms(self) -> Iterator[Arm]:
        """Yield runs that fine-tune the main arms and random weights, scored on the same held-out samples."""
        for plan in self.plans():
            rows, test = self.scores[plan.modality.key], f"demo:{plan.modality.data}/{self.split}"
            for key in ("random", "mae", "amd"):
                weights = None if key == "random" else rows.row(key).encoders[plan.seed]
                yield Arm(key, plan, arms.finetuned(plan, key, weights, test))

    def control_arms(self) -> Iterator[Arm]:
        """Yield ablations of the main arms: equal time, equal ratios, and only direct alignment."""
        for plan in self.plans():
            amd, mae = (self.scores[plan.modality.key].row(key) for key in ("amd", "mae"))
            time_ratio = amd.seconds[plan.seed] / max(mae.seconds[plan.seed], 1e-6)
            steps = max(1, round(mae.steps[plan.seed] * time_ratio))
            yield Arm("mae-time", plan, arms.undistilled(plan, steps))
            yield Arm("symmetric", plan, arms.symmetric(plan))
            yield Arm("direct", plan, arms.direct_only(plan))

    def train(self, queue: Sequence[Arm]) -> None:
        """Execute runs and score the encoders they publish."""
        for arm in queue:
            distilled = arm.key == "amd" and isinstance(arm.config, TrainConfig)
            with_teacher = " (its teacher first)" if distilled else ""
            self.console.print(f"[bold]{arm.title}[/bold]{with_teacher}: {arm.config.name}")
        results = self.runner([arm.config for arm in queue])
        for arm, result in zip(queue, results, strict=True):
            if result.state == "cancelled":
                raise _stopped(arm.config)
            if result.state != "succeeded" or result.encoder_folder is None:
                raise DemoFailed(f"{arm.config.name} ended in state {result.state}: {result.message or result.reason}")
            if isinstance(arm.config, FinetuneConfig):
                self.scores[arm.plan.modality.key].add_finetuned(arm.key, result.figures["test/top1"])
            else:
                self._score(arm, arm.config, result.run_folder, result.encoder_folder)

    def section(self, modality: Modality) -> DemoSection:
        scores = self.scores[modality.key]
        return DemoSection(
            key=modality.key,
            title=modality.title,
            chance=modality.chance,
            samples=len(scores.test.clips.labels),
            rows=scores.rows(),
        )

    def _score(self, arm: Arm, config: TrainConfig, run: str, folder: str) -> None:
        if arm.key == "amd":
            self._score_teacher(arm, folder)
        encoder, card = load_encoder(folder)
        self.scores[arm.plan.modality.key].add(
            arm.key,
            encoder,
            card.clip,
            steps=card.steps,
            seconds=training_seconds(run),
            folder=folder,
            picture=self._picture(arm, config, run, arm.plan.modality.note) if arm.key in ("amd", "mae") else None,
        )

    def _score_teacher(self, arm: Arm, student: str) -> None:
        source = str((load_card(student).teacher or {})["weights"])
        encoder, card = load_encoder(source)
        run, config = run_folder(self.root, str(card.run)), validate(TrainConfig, card.config)
        self.scores[arm.plan.modality.key].add(
            "teacher",
            encoder,
            card.clip,
            steps=card.steps,
            seconds=training_seconds(run),
            folder=source,
            picture=self._picture(arm, config, run, note=""),
        )

    def _picture(self, arm: Arm, config: TrainConfig, run: str, note: str) -> str | None:
        """Render the run's picture for the first seed; other seeds have none."""
        if arm.plan.seed != self.seeds[0]:
            return None
        clips = self.scores[arm.plan.modality.key].test.clips.clips
        return draw_run(self.root, run, config, clips, note)

    def embed_one(self, modality: Modality, section: DemoSection) -> dict[str, Any]:
        """Embed one held-out file with the published AMD student."""
        student = section.row("amd").encoders[0]
        config = arms.undistilled(self.plan(modality, self.seeds[0]))
        file = open_manifest(config.data, ensure_demo(modality.data, self.split))[0].location
        values = embed_file(student, file)
        return {
            "file": file,
            "encoder": student,
            "width": len(values),
            "values": [round(float(v), 4) for v in values[:6]],
        }


def _stopped(config: TrainConfig | FinetuneConfig) -> DemoFailed:
    return DemoFailed(f"{config.name} was stopped; run the same command to continue")


def training_seconds(folder: str) -> float:
    """Sum a run's step times in seconds, excluding start-up, teacher training, the final checkpoint and probes."""
    seconds, last_step = 0.0, 0
    for line in read_metrics(folder):
        if "time/step_s" in line:
            seconds += line["time/step_s"] * (line["step"] - last_step)
            last_step = line["step"]
    return seconds


def _print_introduction(console: Console, root: str, seeds: int) -> None:
    console.print("[bold]AMD demo[/bold]: a small student learns from a larger teacher that sees more of the input.")
    repeated = f", with {seeds} seeds" if seeds > 1 else ""
    console.print(
        f"A teacher, an AMD student and the same student without distillation are trained from scratch{repeated}."
    )
    console.print(f"All files are stored in {root}; run the same command to resume an interrupted demo.\n")


def _print_results(console: Console, report: DemoReport) -> None:
    console.print()
    console.print(table(report))
    console.print(
        "[dim]kNN and linear: probes on frozen features, trained on labelled samples from the training pool and "
        "scored once on held-out samples. Seconds: training only; a student's time excludes its teacher's.[/dim]"
    )
    pictures = [path for section in report.sections for row in section.rows for path in row.pictures]
    if pictures:
        console.print("\nPictures (student's view, teacher's view and reconstruction):")
        for path in pictures:
            console.print(f"  {path}", soft_wrap=True)
    if report.embedded:
        embedded = report.embedded
        console.print(f"\nEmbedding of one file: {embedded['file']}", soft_wrap=True)
        console.print(f"  encoder: {embedded['encoder']}", soft_wrap=True)
        console.print(f"  {embedded['width']} values: {embedded['values']} …")
    console.print(f"\nRuns: {report.storage}/runs   published encoders: {report.storage}/encoders", soft_wrap=True)
    console.print(f"Took {report.seconds / 60:.1f} minutes.")
