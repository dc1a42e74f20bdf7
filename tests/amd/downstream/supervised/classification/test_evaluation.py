"""Scoring by one, two and three ranks: the same figures, every sample once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from amd.config import FinetuneConfig, ViewsConfig, validate
from amd.downstream.supervised.classification.data import open_splits
from amd.downstream.supervised.classification.evaluation import ClassificationScores, ViewPredictions, predict, score
from amd.downstream.supervised.classification.learner import new_classifier
from amd.models.classifier import Classifier
from amd.training.process_group import ProcessGroup
from amd.training.trainer.loop import Interrupted
from tests.support.runs.finetuning import shades, tiny_finetuning

VIEWS = ViewsConfig(segments=1, crops=3)
SAMPLES = 11  # divides by neither rank count, batch size nor micro-batch


def classifier_of(config: FinetuneConfig) -> Classifier:
    torch.manual_seed(0)
    return new_classifier(config)


def scored(
    config: FinetuneConfig, group: ProcessGroup, views: ViewsConfig = VIEWS
) -> tuple[ViewPredictions, ClassificationScores]:
    split = open_splits(config)["data.val"]
    predictions = predict(classifier_of(config), config, split, views, group, "fp32")
    return predictions, score(predictions, split, config, group)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """Eleven samples to score, one of them unreadable."""
    folder = tmp_path_factory.mktemp("scored")
    shades(folder / "val", SAMPLES, seed=1)
    shades(folder / "train", 8)
    (folder / "val" / "dark" / "004.png").write_bytes(b"not a picture")
    return tiny_finetuning(folder)


def two_then_three(rank: int, config: dict[str, Any], folder: str) -> None:
    """In a process: what each of two ranks, then each of three, makes of the same data."""
    torch.set_num_threads(1)
    for world in (2, 3):
        if rank < world:
            meeting = f"file://{folder}/meeting-{world}"
            torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
            ends = scored(validate(FinetuneConfig, config), ProcessGroup(rank, world))
            torch.save(ends, f"{folder}/{rank}-of-{world}")
            torch.distributed.destroy_process_group()


def test_any_number_of_ranks_predicts_each_sample_once_and_gives_the_same_figures(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    _, alone = scored(config, ProcessGroup())
    torch.multiprocessing.spawn(two_then_three, args=(config.model_dump(mode="json"), str(tmp_path)), nprocs=3)
    for world in (2, 3):
        ends = [torch.load(tmp_path / f"{rank}-of-{world}", weights_only=False) for rank in range(world)]
        rows = [
            tuple(row)
            for predictions, _ in ends
            for row in np.stack([predictions.records, predictions.views], axis=1).tolist()
        ]
        assert len(rows) == len(set(rows)) == 10 * 3, "no padding, nothing twice"
        assert all(predictions.records.size for predictions, _ in ends), "every rank works"
        for _, end in ends:
            assert end.merged.records.tolist() == alone.merged.records.tolist()
            assert end.merged.views.tolist() == [3] * 10
            assert end.merged.probabilities == pytest.approx(alone.merged.probabilities, abs=1e-6)
            assert end.figures == pytest.approx(alone.figures, abs=1e-4)
            assert end.bad == alone.bad


def test_an_unreadable_sample_is_named_and_counts_as_wrong(config: FinetuneConfig) -> None:
    _, end = scored(config, ProcessGroup())
    assert [Path(sample["location"]).name for sample in end.bad] == ["004.png"]
    assert end.figures["eval/unreadable"] == 1
    assert end.figures["eval/top5"] == pytest.approx(100 * 10 / 11), "two classes: all but the unreadable one"
    right = (end.merged.probabilities.argmax(axis=1) == end.truth).sum()
    assert end.figures["eval/top1"] == pytest.approx(100 * right / 11)


def test_data_without_one_readable_sample_scores_nothing(tmp_path: Path) -> None:
    config = tiny_finetuning(tmp_path)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"not a picture")
    _, end = scored(config, ProcessGroup())
    assert end.figures == {"eval/top1": 0, "eval/top5": 0, "eval/unreadable": 10}


@pytest.mark.parametrize("training", [True, False])
def test_a_classifier_is_scored_in_eval_mode_and_left_as_it_was(config: FinetuneConfig, training: bool) -> None:
    classifier, split = classifier_of(config).train(training), open_splits(config)["data.val"]
    modes: list[bool] = []
    classifier.encoder.blocks[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    first = predict(classifier, config, split, VIEWS, ProcessGroup(), "fp32")
    assert set(modes) == {False}
    assert classifier.training is classifier.encoder.blocks[1].training is training
    assert np.array_equal(first.logits, predict(classifier, config, split, VIEWS, ProcessGroup(), "fp32").logits)


def test_a_stop_ends_it_within_a_step_and_leaves_the_classifier_as_it_was(config: FinetuneConfig) -> None:
    classifier, split, stops = classifier_of(config).train(), open_splits(config)["data.val"], iter([False, True])
    with pytest.raises(Interrupted):
        predict(classifier, config, split, VIEWS, ProcessGroup(), "fp32", lambda: next(stops))
    assert classifier.training


def test_several_labels_are_scored_by_average_precision_with_the_unreadable_last(tmp_path: Path) -> None:
    config = several_labels(tmp_path)
    _, whole = scored(config, ProcessGroup())
    assert list(whole.figures) == ["eval/map", "eval/unreadable"]
    assert whole.truth.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
    (tmp_path / "val" / "bright" / "001.png").write_bytes(b"not a picture")
    _, part = scored(config, ProcessGroup())
    assert part.figures["eval/unreadable"] == 1
    # The only sample of class 1 comes last of four.
    assert part.merged.records.tolist() == [0, 2, 3]
    every = np.zeros((4, 3))
    every[[0, 2, 3]] = part.merged.probabilities
    known = [average_precision_score(whole.truth[:, c], every[:, c]) for c in (0, 2)]
    assert part.figures["eval/map"] == pytest.approx(100 * (sum(known) + 1 / 4) / 3)


def several_labels(folder: Path, **overrides: Any) -> FinetuneConfig:
    """Lists whose samples have none, one or two of three labels."""
    tiny_finetuning(folder)
    for name, count in (("train", 24), ("val", 4)):
        labels = ("0", "0,1", "2", "-")
        lines = [f"{name}/{('dark', 'bright')[i % 2]}/{i:03d}.png {labels[i % 4]}\n" for i in range(count)]
        (folder / f"{name}.txt").write_text("".join(lines))
    data = {f"data__{name}": str(folder / f"{name}.txt") for name in ("train", "val")}
    return tiny_finetuning(
        folder, **{**data, "head__multi_label": True, "head__classes": 3, "augment__mix_prob": 0, **overrides}
    )
