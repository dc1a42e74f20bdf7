"""Measure the benefit of distillation and of asymmetry: train small students on Fashion-MNIST and compare them by seed.

    python -m tests.benchmarks.value_study run OUT --phase select --seeds 0-2 [--arms A;B] [--processes 2] [--minutes M]
    python -m tests.benchmarks.value_study run OUT --phase confirm --seeds 10-14
    python -m tests.benchmarks.value_study run OUT --phase select --steps 3200    (students; a table of its own)
    python -m tests.benchmarks.value_study tables OUT

Requires the package for the data set `fashion-mnist` (see `amd dataset`). Optimizer steps run the training code
(`Distiller`) on images in memory. Each seed has its own teacher. All arms for a seed share the data order, masks and
initial weights. Each finished run is a JSON file in OUT, so the same command continues an interrupted study. Settings
are chosen with `--phase select`, which scores the split `select`; `--phase confirm` scores `test`, with seeds fixed
beforehand. Time is measured as the CPU time of one thread, so that two processes and other programs do not distort it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amd.artifacts.weights import encode, whole_clips
from amd.config import AttentiveConfig, TrainConfig, validate, with_overrides
from amd.data.loading.loader import Batch
from amd.data.packaged.catalog import CATALOG
from amd.data.packaged.photos import FASHION_SELECT, read_idx
from amd.data.packaged.source import locate
from amd.downstream.arrays import Features
from amd.downstream.embedding.features import LabelledClips
from amd.downstream.probing.attentive import attentive_batch_size, classify, collect_tokens, train_attentive
from amd.downstream.probing.classifiers import knn, linear, top1
from amd.downstream.probing.linear import shuffled
from amd.models.encoder import Encoder
from amd.models.teachers.frozen import Teacher
from amd.training.checkpoints.state import stream_seed
from amd.training.process_group import ProcessGroup
from amd.training.trainer.distiller import Distiller
from amd.training.trainer.optimizer import cosine_lr
from tune_spaces.report.figures import difference

PRETRAINED, LABELLED, SELECTED, TESTED = 20_000, 5_000, 2_000, 10_000  # images
PHASES = {"select": "select", "confirm": "test"}  # split that a phase scores
PROBES = ("knn", "linear", "attentive")
ENCODER = {"positions": "sincos_2d", "position_base": 100.0, "init": "trunc_normal"}
PIXEL_MEAN, PIXEL_STD = (0.286,) * 3, (0.353,) * 3  # of Fashion-MNIST

TEACHER_STEPS, STUDENT_STEPS = 2000, 800
BASE: dict[str, Any] = {
    "clip": {"frames": 1, "size": 28, "patch": 4, "tubelet": 1, "mean": PIXEL_MEAN, "std": PIXEL_STD},
    "student": {
        "encoder": {"size": "demo-student", **ENCODER},
        "decoder": {"width": 48, "depth": 2, "heads": 3},
        "generator": {"depth": 1, "heads": 4},
    },
    "data": {"train": "unused"},
    "mask": {"strategy": "random", "student_ratio": 0.85, "teacher_ratio": 0.6},
    "optim": {"batch_size": 64, "base_lr": 2e-3 * 4, "min_lr": 2e-5 * 4, "clip_norm": 1.0},
    "scaling": {"device": "cpu", "threads_per_worker": 1},
}
TEACHER_ENCODER = {"size": "demo-teacher", **ENCODER}
PAIRS = [{"student": 2, "teacher": 3}, {"student": 4, "teacher": 6}]
UNDISTILLED: dict[str, Any] = {"objective": {"kind": "mae", "pixels": "normalized"}}
DISTILLED: dict[str, Any] = {
    "teacher": {"encoder": TEACHER_ENCODER, "weights": "unused"},
    "objective": {"kind": "amd", "pixels": "normalized", "target_norm": "layer_norm", "layers": PAIRS},
}


class StudyArm(NamedTuple):
    """One way to train the student for a seed."""

    values: dict[str, Any]
    overrides: dict[str, Any]
    as_long_as: tuple[str, ...] = ()
    """Arms (or `teacher`) whose total CPU time this arm trains for. Empty: the usual number of steps."""


ARMS: dict[str, StudyArm] = {
    "undistilled": StudyArm(UNDISTILLED, {}),
    "asymmetric": StudyArm(DISTILLED, {}),
    "symmetric": StudyArm(DISTILLED, {"mask.teacher_ratio": 0.85}),
    "full view": StudyArm(DISTILLED, {"mask.teacher_ratio": 0.0}),
    "undistilled, student's time": StudyArm(UNDISTILLED, {}, ("asymmetric",)),
    "undistilled, symmetric's time": StudyArm(UNDISTILLED, {}, ("symmetric",)),
    "undistilled, all time": StudyArm(UNDISTILLED, {}, ("asymmetric", "teacher")),
    "direct only": StudyArm(DISTILLED, {"objective.weights.generation": 0.0}),
    "generation only": StudyArm(DISTILLED, {"objective.weights.direct": 0.0}),
    "last layer": StudyArm(DISTILLED, {"objective.layers": [PAIRS[1]]}),
    "middle layer": StudyArm(DISTILLED, {"objective.layers": [PAIRS[0]]}),
    "asymmetric, 0.75 and 0.5": StudyArm(DISTILLED, {"mask.student_ratio": 0.75, "mask.teacher_ratio": 0.5}),
    "symmetric, 0.75": StudyArm(DISTILLED, {"mask.student_ratio": 0.75, "mask.teacher_ratio": 0.75}),
    "asymmetric, 0.9 and 0.6": StudyArm(DISTILLED, {"mask.student_ratio": 0.9, "mask.teacher_ratio": 0.6}),
    "symmetric, 0.9": StudyArm(DISTILLED, {"mask.student_ratio": 0.9, "mask.teacher_ratio": 0.9}),
}
HEADLINE = tuple(ARMS)[:6]


class StudyData(NamedTuple):
    images: Tensor  # (n, 3, 1, 28, 28) uint8, for pre-training
    labelled: LabelledClips  # the first of these images, for probes
    held_out: LabelledClips


def read_data(split: str) -> StudyData:
    source = locate("fashion-mnist", CATALOG["fashion-mnist"])
    pixels, labels = (read_idx(source / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    if split == "test":
        held, held_labels = (read_idx(source / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        held, held_labels = held[:TESTED], held_labels[:TESTED]
    else:
        held, held_labels = (part[-FASHION_SELECT:][:SELECTED] for part in (pixels, labels))
    images = _clips(pixels[:PRETRAINED])
    labelled = LabelledClips(images[:LABELLED], labels[:LABELLED].astype(np.int64))
    return StudyData(images, labelled, LabelledClips(_clips(held), held_labels.astype(np.int64)))


def _clips(pixels: Any) -> Tensor:
    return torch.from_numpy(pixels.copy())[:, None, None].expand(-1, 3, -1, -1, -1).contiguous()


def config_of(arm: StudyArm, seed: int, steps: int) -> TrainConfig:
    schedule = {"schedule": {"steps": steps, "warmup_steps": steps // 10}}
    return with_overrides(validate(TrainConfig, {**BASE, **arm.values, **schedule, "seed": seed}), arm.overrides)


def teacher_config(seed: int) -> TrainConfig:
    overrides = {
        "student.encoder": TEACHER_ENCODER,
        "mask.student_ratio": 0.75,
        "mask.teacher_ratio": 0.75,
        "optim.base_lr": 1.5e-3 * 4,
    }
    return config_of(StudyArm(UNDISTILLED, overrides), seed, TEACHER_STEPS)


def pretrain(config: TrainConfig, images: Tensor, teacher: Teacher | None) -> tuple[Encoder, float]:
    """Train on images in memory. Return the encoder and the CPU time of the steps in seconds."""
    learner = Distiller(config, ProcessGroup(), teacher)
    order, batch = torch.Generator().manual_seed(stream_seed(config.seed, "order")), config.optim.batch_size
    steps, warmup = config.schedule.steps or 0, config.schedule.warmup_steps or 0
    none = torch.zeros(batch, dtype=torch.int64)
    started = time.process_time()
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=order)
        lr = cosine_lr(step, peak=config.optim.lr, final=config.optim.final_lr, steps=steps, warmup=warmup)
        learner.learn(step, [Batch(images[rows], none, none, [])], lr)
        if step % 50 == 0:
            learner.recent_losses.clear()
    assert learner.health.first_bad_step() is None, "the loss is not finite"
    return learner.student.encoder.eval(), time.process_time() - started


@torch.inference_mode()
def score(encoder: Encoder, config: TrainConfig, data: StudyData, probes: Iterable[str], seed: int) -> dict[str, float]:
    """Return the top-1 accuracy of each probe, in percent."""
    clip, found = config.clip, {}
    train, test = (
        Features(torch.cat([encode(encoder, clip, part) for part in set_.clips.split(500)]).numpy(), set_.labels)
        for set_ in (data.labelled, data.held_out)
    )
    if "knn" in probes:
        found["knn"] = top1(knn(train, test.values), test.labels)
    if "linear" in probes:
        found["linear"] = top1(linear(train, test.values), test.labels)
    if "attentive" in probes:
        found["attentive"] = _attentive(encoder, config, data, seed)
    return found


def _attentive(encoder: Encoder, config: TrainConfig, data: StudyData, seed: int) -> float:
    probe = AttentiveConfig()

    def tokens(labelled: LabelledClips) -> Iterator[tuple[Tensor, Tensor]]:
        for clips, labels in zip(labelled.clips.split(500), torch.from_numpy(labelled.labels).split(500), strict=True):
            final = encoder(*whole_clips(encoder, config.clip, clips)).final
            assert final is not None
            yield final, labels

    with torch.inference_mode(False), torch.no_grad():
        train = collect_tokens(tokens(data.labelled), len(data.labelled.labels), probe)
    batch = attentive_batch_size(probe, len(train.labels))
    with torch.inference_mode(False):
        head = train_attentive(
            shuffled(train, batch, probe.epochs, seed),
            probe,
            width=encoder.config.width,
            heads=encoder.config.heads,
            classes=10,
            steps_per_epoch=len(train.labels) // batch,
            seed=seed,
        )
    scores, labels = classify(head, tokens(data.held_out))
    return top1(scores.argmax(axis=1), labels)


class SeedStudy:
    """Runs the arms for one seed in order, and stores each finished run in a file."""

    def __init__(self, folder: Path, phase: str, seed: int, steps: int, probes: tuple[str, ...], until: float) -> None:
        self.folder, self.phase, self.seed, self.steps = folder, phase, seed, steps
        self.probes, self.until = probes, until
        self.data = read_data(PHASES[phase])

    def run(self, arms: Iterable[str]) -> None:
        self._teacher_weights()
        if self._result("random") is None:
            config = config_of(ARMS["undistilled"], self.seed, 1)
            self._store("random", Distiller(config, ProcessGroup(), None).student.encoder.eval(), config, 0.0)
        for name in arms:
            if time.time() > self.until:
                return
            if self._result(name) is None:
                self._run(name, ARMS[name])

    def _run(self, name: str, arm: StudyArm) -> None:
        steps = self.steps
        if arm.as_long_as:
            own, others = self._result("undistilled"), [self._result(other) for other in arm.as_long_as]
            if own is None or None in others:
                return  # the arms that determine its length are not finished
            steps = round(steps * sum(other["seconds"] for other in others if other) / own["seconds"])
        config = config_of(arm, self.seed, steps)
        teacher = None
        if config.teacher is not None:
            encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
            encoder.load_state_dict(self._teacher_weights())
            teacher = Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers))
        encoder, seconds = pretrain(config, self.data.images, teacher)
        self._store(name, encoder, config, seconds)

    def _teacher_weights(self) -> dict[str, Tensor]:
        path = self.folder / f"teacher-{self.seed}.safetensors"
        if not path.exists() or self._result("teacher") is None:
            config = teacher_config(self.seed)
            encoder, seconds = pretrain(config, self.data.images, None)
            save_file(encoder.state_dict(), path)
            self._store("teacher", encoder, config, seconds)
        return load_file(path)

    def _store(self, name: str, encoder: Encoder, config: TrainConfig, seconds: float) -> None:
        scores = score(encoder, config, self.data, self.probes, self.seed)
        facts = {"arm": name, "seed": self.seed, "phase": self.phase, "steps": config.schedule.steps}
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({**facts, "seconds": seconds, "scores": scores}))
        os.replace(part, path)
        print(f"{self.phase} seed {self.seed} {name}: {scores}, {seconds:.0f} s", flush=True)

    def _result(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def _path(self, name: str) -> Path:
        # A teacher and random weights do not depend on the length of the students' training.
        steps = STUDENT_STEPS if name in ("teacher", "random") else self.steps
        return results_folder(self.folder, self.phase, steps) / f"{self.seed}-{name.replace(' ', '_')}.json"


def results_folder(folder: Path, phase: str, steps: int) -> Path:
    return folder / (phase if steps == STUDENT_STEPS else f"{phase}-{steps}")


def run_seed(task: tuple[Path, str, int, int, tuple[str, ...], tuple[str, ...], float]) -> None:
    folder, phase, seed, steps, arms, probes, until = task
    torch.set_num_threads(1)
    if time.time() < until:
        SeedStudy(folder, phase, seed, steps, probes, until).run(arms)


# Tables


def tables(folder: Path) -> str:
    """Return the results of all phases as Markdown."""
    return "\n\n".join(
        table(path.name, [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))])
        for path in sorted(folder.iterdir())
        if path.is_dir()
    )


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
        cells = [_spread([run["scores"][probe] for run in runs]) for probe in probes]
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


COMPARISONS = (
    ("asymmetric", "undistilled"),
    ("asymmetric", "undistilled, student's time"),
    ("asymmetric", "undistilled, all time"),
    ("asymmetric", "symmetric"),
    ("symmetric", "undistilled, symmetric's time"),
    ("asymmetric", "full view"),
    ("asymmetric, 0.75 and 0.5", "symmetric, 0.75"),
    ("asymmetric, 0.9 and 0.6", "symmetric, 0.9"),
    ("asymmetric", "direct only"),
    ("asymmetric", "generation only"),
    ("asymmetric", "last layer"),
    ("asymmetric", "middle layer"),
)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def _difference(pair: list[list[float]]) -> str:
    found = difference(pair[0], pair[1])
    interval = f" ({found.interval[0]:+.1f} to {found.interval[1]:+.1f})" if found.interval else ""
    return f"{found.value:+.1f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "tables"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--phase", choices=PHASES, default="select")
    parser.add_argument("--seeds", default="0-2", help="first and last seed, separated by a hyphen")
    parser.add_argument("--arms", default=";".join(HEADLINE), help="names of the arms to run, separated by semicolons")
    parser.add_argument("--probes", default=",".join(PROBES))
    parser.add_argument("--steps", type=int, default=STUDENT_STEPS, help="training steps of the students")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=480, help="minutes after which no new run starts")
    args = parser.parse_args()
    if args.action == "run":
        first, _, last = args.seeds.partition("-")
        arms, until = tuple(args.arms.split(";")), time.time() + 60 * args.minutes
        if unknown := set(arms) - set(ARMS):
            sys.exit(f"--arms: {', '.join(unknown)} do not exist; choose from {'; '.join(ARMS)}")
        probes = tuple(args.probes.split(","))
        tasks = [
            (args.folder, args.phase, seed, args.steps, arms, probes, until)
            for seed in range(int(first), int(last or first) + 1)
        ]
        args.folder.mkdir(parents=True, exist_ok=True)
        with get_context("spawn").Pool(args.processes) as pool:
            pool.map(run_seed, tasks, chunksize=1)
    print(tables(args.folder))


if __name__ == "__main__":
    main()
