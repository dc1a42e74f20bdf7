"""The demo's flow: digits, a teacher, the student with and without it, probes on held-out digits, one table, pictures.

All parts are those of real runs: files on disk, readers, Ray Train workers, published encoders. A demo that was
interrupted goes on where it was, since runs continue by name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule

from amd.artifacts import load_card, load_encoder
from amd.config import ConfigError, ScalingConfig, TrainConfig, validate
from amd.data.demo import ensure_demo
from amd.data.records import open_manifest
from amd.demo import arms
from amd.demo.arms import TITLES, Modality, Plan
from amd.demo.pictures import draw_run
from amd.demo.report import DemoReport, Section, table
from amd.demo.scores import Scores
from amd.downstream.features import embed_file, read_labelled
from amd.downstream.finetune.run import finetune
from amd.models.encoder import Encoder
from amd.storage import resolve_root
from amd.training.launch import train
from amd.training.metrics import read_metrics
from amd.training.run import run_folder


class DemoFailed(Exception):
    """A run of the demo did not succeed."""


def run_demo(
    storage: str | None = None,
    *,
    seeds: int = 1,
    full: bool = False,
    finetuned: bool = False,
    image: bool = True,
    video: bool = True,
    local: bool = False,
    overrides: dict[str, Any] | None = None,
    teacher_overrides: dict[str, Any] | None = None,
    split: str = "test",
    console: Console | None = None,
) -> DemoReport:
    """Train and score everything; prints to `console`, returns the figures.

    `seeds`: how many times over, each with its own teacher. `full`: also what tells the whole truth: the undistilled
    student given AMD's time, a teacher that sees no more than the student, direct alignment alone. `finetuned`:
    fine-tune the student on few labels, from AMD, from the undistilled one and from scratch. `local`: without Ray.
    `overrides` and `teacher_overrides`: dotted keys put over every student's and teacher's config.
    `split`: what is scored; settings were chosen on `select`.
    Raises DemoFailed when a run does not succeed, ConfigError for overrides that break a rule.
    """
    started = time.monotonic()
    console = console or Console()
    root = resolve_root(storage)
    _greet(console, root, seeds)
    demo = _Demo(root, range(seeds), full, finetuned, local, overrides or {}, teacher_overrides or {}, split, console)
    wanted = [modality for modality, on in ((arms.IMAGE, image), (arms.VIDEO, video)) if on]
    if not wanted:
        raise ConfigError(["the demo has nothing to show without images and without video; leave one of them on"])
    with demo.machine():
        demo.warm_up(wanted[0])
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


@dataclass(frozen=True)
class _Demo:
    root: str
    seeds: Sequence[int]
    full: bool
    finetuned: bool
    local: bool
    overrides: dict[str, Any]
    teacher_overrides: dict[str, Any]
    split: str
    console: Console

    def plan(self, modality: Modality, seed: int) -> Plan:
        return Plan(modality, seed, self.root, self.overrides, self.teacher_overrides)

    def machine(self) -> AbstractContextManager[None]:
        """One Ray for all runs: each would start its own."""
        if self.local:
            return nullcontext()
        from amd.training.ray_train import cluster

        self.console.print("Starting Ray on this machine")
        return cluster(self._scaling(arms.IMAGE), self.console.print)

    def warm_up(self, modality: Modality) -> None:
        """Workers start while data is written; the same ones train all arms."""
        if not self.local:
            from amd.training.ray_train import warm_up

            warm_up(self._scaling(modality))

    def _scaling(self, modality: Modality) -> ScalingConfig:
        return arms.undistilled(self.plan(modality, 0)).scaling

    def section(self, modality: Modality) -> Section:
        self.console.print(Rule(f"[bold]{modality.title}", align="left"))
        self.console.print(f"Writing real handwritten digits as {modality.data} (once) and reading the probe's samples")
        config = arms.undistilled(self.plan(modality, self.seeds[0]))
        ensure_demo(modality.data, "train")
        known, asked = (
            read_labelled(config.data.model_copy(update={"train": ensure_demo(modality.data, split)}), config.clip)
            for split in ("probe", self.split)
        )
        scores = Scores(known, asked)
        scores.add_pixels()
        for seed in self.seeds:
            self._seed(modality, seed, scores)
        return Section(
            key=modality.key,
            title=modality.title,
            chance=modality.chance,
            samples=len(asked.labels),
            rows=scores.rows(),
        )

    def _seed(self, modality: Modality, seed: int, scores: Scores) -> None:
        plan = self.plan(modality, seed)
        undistilled = arms.undistilled(plan)
        torch.manual_seed(seed)
        grid, values = undistilled.clip.grid, undistilled.clip.token_values
        scores.add("random", Encoder(undistilled.student.encoder, grid, values).eval(), undistilled.clip)
        self._train("amd", arms.distilled(plan), scores, picture=seed == self.seeds[0])
        self._train("mae", undistilled, scores, picture=seed == self.seeds[0])
        if self.finetuned:
            self._finetune("random", plan, None, scores)
            for key in ("mae", "amd"):
                self._finetune(key, plan, scores.last(key).encoders[-1], scores)
        if self.full:
            amd, mae = scores.last("amd"), scores.last("mae")
            steps = round(mae.steps[-1] * amd.seconds[-1] / max(mae.seconds[-1], 1e-6))
            self._train("mae-time", arms.undistilled(plan, max(1, steps)), scores)
            self._train("symmetric", arms.symmetric(plan), scores)
            self._train("direct", arms.direct_only(plan), scores)

    def _train(self, key: str, config: TrainConfig, scores: Scores, picture: bool = False) -> None:
        with_teacher = " (and its teacher first)" if key == "amd" else ""
        self.console.print(f"\n[bold]{TITLES[key]}[/bold]{with_teacher}: {config.name}")
        result = train(config, local=self.local)
        if result.state == "cancelled":
            raise DemoFailed(f"{config.name} was stopped; the same command goes on from there")
        if result.state != "succeeded" or result.encoder_folder is None:
            raise DemoFailed(f"{config.name} ended as {result.state}: {result.message or result.reason}")
        if key == "amd":
            self._score_teacher(result.encoder_folder, scores, picture)
        encoder, card = load_encoder(result.encoder_folder)
        scores.add(
            key,
            encoder,
            card.clip,
            steps=card.steps,
            seconds=training_seconds(result.run_folder),
            folder=result.encoder_folder,
            picture=draw_run(self.root, result.run_folder, config, scores.asked.clips) if picture else None,
        )

    def _finetune(self, key: str, plan: Plan, weights: str | None, scores: Scores) -> None:
        """Fine-tune an arm of this seed; scored on the same held-out samples as all else."""
        config = arms.finetuned(plan, key, weights, f"demo:{plan.modality.data}/{self.split}")
        self.console.print(f"\n[bold]{TITLES[key]}[/bold], fine-tuned: {config.name}")
        result = finetune(config, local=self.local)
        if result.state != "succeeded":
            raise DemoFailed(f"{config.name} ended as {result.state}: {result.message or result.reason}")
        scores.add_finetuned(key, result.figures["test/top1"])

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
