"""The demo's flow: digits, a teacher, the student with and without it, probes on held-out digits, one table, pictures.

All parts are those of real runs: files on disk, readers, published encoders. Who brings the runs to their ends is the
caller's choice (`Runner`): one after the other in this process, or as jobs of a service. A demo that was interrupted
goes on where it was, since runs continue by name.
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
from amd.demo.arms import TITLES, Modality, Plan
from amd.demo.images import draw_run
from amd.demo.report import DemoReport, Section, table
from amd.demo.scores import Scores
from amd.downstream.embedding.features import embed_file, read_labelled
from amd.downstream.supervised.classification.run import finetune
from amd.models.encoder import Encoder
from amd.storage import resolve_root
from amd.training.reporting.metrics import read_metrics
from amd.training.run_folder import RunResult, run_folder
from amd.training.runs.launch import train

Runner = Callable[[Sequence[TrainConfig | FinetuneConfig]], list[RunResult]]
"""Brings runs that do not need each other to their ends, as many side by side as it likes."""


class DemoFailed(Exception):
    """A run of the demo did not succeed."""


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
    """Train and score everything; prints to `console`, returns the figures.

    `runner`: none for one run after the other in this process, without Ray. `seeds`: how many times over, each with its
    own teacher. `full`: also what tells the whole truth: the undistilled student given AMD's time, a teacher that sees
    no more than the student, direct alignment alone. `finetuned`: fine-tune the student on few labels, from AMD, from
    the undistilled one and from scratch. `overrides` and `teacher_overrides`: dotted keys put over every student's and
    teacher's config. `split`: what is scored; settings were chosen on `select`.
    Raises DemoFailed when a run does not succeed, ConfigError for overrides that break a rule.
    """
    started = time.monotonic()
    console = console or Console()
    root = resolve_root(storage)
    wanted = [modality for modality, on in ((arms.IMAGE, image), (arms.VIDEO, video)) if on]
    if not wanted:
        raise ConfigError(["the demo has nothing to show without images and without video; leave one of them on"])
    _greet(console, root, seeds)
    demo = _Demo(root, range(seeds), overrides or {}, teacher_overrides or {}, split, console, runner or in_process)
    for modality in wanted:
        demo.prepare(modality)
    demo.train(demo.first())
    demo.train([*(demo.finetuned() if finetuned else ()), *(demo.others() if full else ())])
    sections = tuple(demo.section(modality) for modality in wanted)
    embedded = demo.embed_one(wanted[-1], sections[-1])
    report = DemoReport(
        storage=root,
        seeds=tuple(range(seeds)),
        sections=sections,
        embedded=embedded,
        seconds=time.monotonic() - started,
    )
    _conclude(console, report)
    return report


def in_process(configs: Sequence[TrainConfig | FinetuneConfig]) -> list[RunResult]:
    return [
        finetune(config, local=True) if isinstance(config, FinetuneConfig) else train(config, local=True)
        for config in configs
    ]


class Arm(NamedTuple):
    """A run of the demo, and where it belongs."""

    key: str
    plan: Plan
    config: TrainConfig | FinetuneConfig

    @property
    def title(self) -> str:
        what = TITLES[self.key].strip()
        return f"{what}, fine-tuned" if isinstance(self.config, FinetuneConfig) else what


@dataclass(frozen=True)
class _Demo:
    root: str
    seeds: Sequence[int]
    overrides: dict[str, Any]
    teacher_overrides: dict[str, Any]
    split: str
    console: Console
    runner: Runner
    scores: dict[str, Scores] = field(default_factory=dict)
    """By modality."""

    def plan(self, modality: Modality, seed: int) -> Plan:
        return Plan(modality, seed, self.root, self.overrides, self.teacher_overrides)

    def plans(self) -> list[Plan]:
        return [self.plan(modality, seed) for seed in self.seeds for modality in self._modalities()]

    def _modalities(self) -> Iterator[Modality]:
        return (modality for modality in (arms.IMAGE, arms.VIDEO) if modality.key in self.scores)

    def prepare(self, modality: Modality) -> None:
        """Its data, the probe's samples, and the figures of what needs no training."""
        self.console.print(f"Writing real handwritten digits as {modality.data} (once) and reading the probe's samples")
        config = arms.undistilled(self.plan(modality, self.seeds[0]))
        ensure_demo(modality.data, "train")
        known, asked = (
            read_labelled(config.data.model_copy(update={"train": ensure_demo(modality.data, split)}), config.clip)
            for split in ("probe", self.split)
        )
        scores = self.scores[modality.key] = Scores(known, asked)
        scores.add_pixels()
        grid, values = config.clip.grid, config.clip.token_values
        for seed in self.seeds:
            torch.manual_seed(seed)
            scores.add("random", Encoder(config.student.encoder, grid, values).eval(), config.clip)

    def first(self) -> list[Arm]:
        """What the demo compares. The longer ones first, so that those side by side end together."""
        plans = self.plans()
        distilled = [Arm("amd", plan, arms.distilled(plan)) for plan in plans]
        return distilled + [Arm("mae", plan, arms.undistilled(plan)) for plan in plans]

    def finetuned(self) -> Iterator[Arm]:
        """The first arms and none, fine-tuned; scored on the same held-out samples as all else."""
        for plan in self.plans():
            rows, test = self.scores[plan.modality.key], f"demo:{plan.modality.data}/{self.split}"
            for key in ("random", "mae", "amd"):
                weights = None if key == "random" else rows.row(key).encoders[plan.seed]
                yield Arm(key, plan, arms.finetuned(plan, key, weights, test))

    def others(self) -> Iterator[Arm]:
        """What tells the whole truth of the first arms."""
        for plan in self.plans():
            amd, mae = (self.scores[plan.modality.key].row(key) for key in ("amd", "mae"))
            longer = amd.seconds[plan.seed] / max(mae.seconds[plan.seed], 1e-6)
            steps = max(1, round(mae.steps[plan.seed] * longer))
            yield Arm("mae-time", plan, arms.undistilled(plan, steps))
            yield Arm("symmetric", plan, arms.symmetric(plan))
            yield Arm("direct", plan, arms.direct_only(plan))

    def train(self, wanted: Sequence[Arm]) -> None:
        """Bring runs to their ends and score what they publish."""
        for arm in wanted:
            taught = arm.key == "amd" and isinstance(arm.config, TrainConfig)
            with_teacher = " (and its teacher first)" if taught else ""
            self.console.print(f"[bold]{arm.title}[/bold]{with_teacher}: {arm.config.name}")
        results = self.runner([arm.config for arm in wanted])
        for arm, result in zip(wanted, results, strict=True):
            if result.state == "cancelled":
                raise DemoFailed(f"{arm.config.name} was stopped; the same command goes on from there")
            if result.state != "succeeded" or result.encoder_folder is None:
                raise DemoFailed(f"{arm.config.name} ended as {result.state}: {result.message or result.reason}")
            scores, picture = self.scores[arm.plan.modality.key], arm.plan.seed == self.seeds[0]
            if isinstance(arm.config, FinetuneConfig):
                scores.add_finetuned(arm.key, result.figures["test/top1"])
            else:
                self._score(arm.key, arm.config, result, result.encoder_folder, scores, picture)

    def section(self, modality: Modality) -> Section:
        scores = self.scores[modality.key]
        return Section(
            key=modality.key,
            title=modality.title,
            chance=modality.chance,
            samples=len(scores.asked.labels),
            rows=scores.rows(),
        )

    def _score(
        self, key: str, config: TrainConfig, result: RunResult, folder: str, scores: Scores, picture: bool
    ) -> None:
        if key == "amd":
            self._score_teacher(folder, scores, picture)
        encoder, card = load_encoder(folder)
        scores.add(
            key,
            encoder,
            card.clip,
            steps=card.steps,
            seconds=training_seconds(result.run_folder),
            folder=folder,
            picture=draw_run(self.root, result.run_folder, config, scores.asked.clips)
            if picture and key in ("amd", "mae")
            else None,
        )

    def _score_teacher(self, student: str, scores: Scores, picture: bool) -> None:
        source = str((load_card(student).teacher or {})["weights"])
        encoder, card = load_encoder(source)
        folder, config = run_folder(self.root, str(card.run)), validate(TrainConfig, card.config)
        page = draw_run(self.root, folder, config, scores.asked.clips) if picture else None
        seconds = training_seconds(folder)
        scores.add("teacher", encoder, card.clip, steps=card.steps, seconds=seconds, folder=source, picture=page)

    def embed_one(self, modality: Modality, section: Section) -> dict[str, Any]:
        """Embed one held-out file with the published student."""
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


def training_seconds(folder: str) -> float:
    """Time that a run's steps took, from its metrics: without start-up, teacher, checkpoints' end and probes."""
    seconds, before = 0.0, 0
    for line in read_metrics(folder):
        if "time/step_s" in line:
            seconds += line["time/step_s"] * (line["step"] - before)
            before = line["step"]
    return seconds


def _greet(console: Console, root: str, seeds: int) -> None:
    console.print("[bold]AMD demo[/bold]: a small student learns from a larger teacher that sees more of the picture.")
    again = f", {seeds} times over" if seeds > 1 else ""
    console.print(f"Teacher, AMD student, and the same student undistilled are trained here from nothing{again}.")
    console.print(f"Everything is kept below {root}; if you stop the demo, the same command goes on from there.\n")


def _conclude(console: Console, report: DemoReport) -> None:
    console.print()
    console.print(table(report))
    console.print(
        "[dim]kNN and linear: probes on frozen features, learnt on labelled digits of the training pool. Seconds are "
        "training alone; a student's do not contain its teacher's. Raw pixels are hard to beat on data this simple: "
        "what is shown is what a teacher adds to a short pre-training.[/dim]"
    )
    pictures = [path for section in report.sections for row in section.rows for path in row.pictures]
    if pictures:
        console.print("\nPictures (what each network saw, and what it made of it):")
        for path in pictures:
            console.print(f"  {path}", soft_wrap=True)
    if report.embedded:
        embedded = report.embedded
        console.print(f"\nOne file embedded: {embedded['file']}", soft_wrap=True)
        console.print(f"  by {embedded['encoder']}", soft_wrap=True)
        console.print(f"  {embedded['width']} numbers: {embedded['values']} …")
    console.print(f"\nRuns: {report.storage}/runs   published encoders: {report.storage}/encoders", soft_wrap=True)
    console.print(f"Took {report.seconds / 60:.1f} minutes.")
    console.print(
        "Next: `amd presets` lists complete recipes; `amd train --preset demo-image-amd mask.teacher_ratio=0.25` "
        "trains a variant; `amd train --preset in1k-vit-s data.train=FOLDER teacher.weights=FILE` is the real thing."
    )
