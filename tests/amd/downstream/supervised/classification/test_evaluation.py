"""Evaluation on one, two and three ranks returns the same metrics and uses every sample once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from amd.config import FinetuneConfig, ViewsConfig, validate
from amd.downstream.supervised.classification.data import open_splits
from amd.downstream.supervised.classification.evaluation import ClassificationScores, predict, score
from amd.downstream.supervised.classification.learner import new_classifier
from amd.downstream.supervised.evaluation import EvaluationContext, Predictions
from amd.models.classifier import Classifier
from amd.training.process_group import ProcessGroup
from amd.training.trainer.run_hooks import Interrupted
from tests.support.data.damage import overwrite_packets
from tests.support.data.videos import pictures, write_video
from tests.support.processes import run_ranks
from tests.support.runs.finetuning import shaded_images, tiny_finetuning

VIEWS = ViewsConfig(segments=1, crops=3)
SAMPLES = 11  # not divisible by the rank count, batch size or micro-batch size


def classifier_of(config: FinetuneConfig) -> Classifier:
    torch.manual_seed(0)
    return new_classifier(config)


def scored(
    config: FinetuneConfig, group: ProcessGroup, views: ViewsConfig = VIEWS
) -> tuple[Predictions, ClassificationScores]:
    split = open_splits(config)["data.val"]
    predictions = predict(classifier_of(config), config, split, views, EvaluationContext(group, "fp32"))
    return predictions, score(predictions, split, config, group)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """Return a config with eleven validation samples, one of them unreadable."""
    folder = tmp_path_factory.mktemp("scored")
    shaded_images(folder / "val", SAMPLES, seed=1)
    shaded_images(folder / "train", 8)
    (folder / "val" / "dark" / "004.png").write_bytes(b"not a picture")
    return tiny_finetuning(folder)


def score_on_two_and_three_ranks(rank: int, config: dict[str, Any], folder: str) -> None:
    """Score the same data on two ranks, then on three. Runs in one process per rank."""
    torch.set_num_threads(1)
    for world in (2, 3):
        if rank < world:
            rendezvous = f"file://{folder}/rendezvous-{world}"
            torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
            result = scored(validate(FinetuneConfig, config), ProcessGroup(rank, world))
            torch.save(result, f"{folder}/{rank}-of-{world}")
            torch.distributed.destroy_process_group()


def test_any_number_of_ranks_predicts_each_sample_once_and_returns_the_same_metrics(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    _, expected = scored(config, ProcessGroup())
    values = config.model_dump(mode="json")
    assert run_ranks(score_on_two_and_three_ranks, [(rank, values, str(tmp_path)) for rank in range(3)]) == [0, 0, 0]
    for world in (2, 3):
        results = [torch.load(tmp_path / f"{rank}-of-{world}", weights_only=False) for rank in range(world)]
        rows = [
            tuple(row)
            for predictions, _ in results
            for row in np.stack([predictions.records, predictions.numbers], axis=1).tolist()
        ]
        assert len(rows) == len(set(rows)) == 10 * 3, "no padding, no duplicates"
        assert all(predictions.records.size for predictions, _ in results), "every rank has samples"
        for _, scores in results:
            assert scores.merged.records.tolist() == expected.merged.records.tolist()
            assert scores.merged.views.tolist() == [3] * 10
            assert scores.merged.probabilities == pytest.approx(expected.merged.probabilities, abs=1e-6)
            assert scores.figures == pytest.approx(expected.figures, abs=1e-4)
            assert scores.faults == expected.faults


class OneOfMany(ProcessGroup):
    """Rank 0 of a group of `world` ranks, running without the other ranks."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize(("crops", "clips"), [(1, 8), (3, 6)])
def test_the_forward_batch_size_does_not_depend_on_the_number_of_ranks(tmp_path: Path, crops: int, clips: int) -> None:
    shaded_images(tmp_path / "many", 72, seed=1)
    config = tiny_finetuning(tmp_path, data__val=str(tmp_path / "many"), evaluation__batch_size=8)
    views, split = ViewsConfig(segments=1, crops=crops), open_splits(config)["data.val"]
    for world in (1, 8):
        sizes: list[int] = []
        classifier = classifier_of(config)
        classifier.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        predict(classifier, config, split, views, EvaluationContext(OneOfMany(world), "fp32"))
        assert max(sizes) == clips
        assert sum(sizes) == 72 // world * crops


def test_an_unreadable_sample_is_reported_and_counts_as_wrong(config: FinetuneConfig) -> None:
    _, scores = scored(config, ProcessGroup())
    assert [Path(sample["location"]).name for sample in scores.faults.bad] == ["004.png"]
    assert scores.figures["eval/unreadable"] == 1
    assert scores.figures["eval/top5"] == pytest.approx(100 * 10 / 11), "two classes: all but the unreadable one"
    correct = (scores.merged.probabilities.argmax(axis=1) == scores.truth).sum()
    assert scores.figures["eval/top1"] == pytest.approx(100 * correct / 11)


def test_a_damaged_video_is_scored_and_listed(tmp_path: Path) -> None:
    config = tiny_finetuning(tmp_path)
    for picture in (tmp_path / "val").rglob("*.png"):
        picture.unlink()
    write_video(tmp_path / "val" / "bright" / "whole.mp4", pictures(48))
    overwrite_packets(write_video(tmp_path / "val" / "dark" / "damaged.mp4", pictures(48)), range(12, 24))
    _, scores = scored(config, ProcessGroup())
    assert [Path(sample["location"]).name for sample in scores.faults.damaged] == ["damaged.mp4"]
    assert scores.figures["eval/unreadable"] == 0


def test_data_without_readable_samples_scores_zero(tmp_path: Path) -> None:
    config = tiny_finetuning(tmp_path)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"not a picture")
    _, scores = scored(config, ProcessGroup())
    assert scores.figures == {"eval/top1": 0, "eval/top5": 0, "eval/unreadable": 10}


@pytest.mark.parametrize("training", [True, False])
def test_a_classifier_is_scored_in_eval_mode_and_returns_to_its_previous_mode(
    config: FinetuneConfig, training: bool
) -> None:
    classifier, split = classifier_of(config).train(training), open_splits(config)["data.val"]
    modes: list[bool] = []
    classifier.encoder.blocks[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    first = predict(classifier, config, split, VIEWS, EvaluationContext(ProcessGroup(), "fp32"))
    assert set(modes) == {False}
    assert classifier.training is classifier.encoder.blocks[1].training is training
    assert np.array_equal(
        first.outputs, predict(classifier, config, split, VIEWS, EvaluationContext(ProcessGroup(), "fp32")).outputs
    )


def test_a_stop_request_ends_evaluation_within_a_step_and_restores_the_mode(config: FinetuneConfig) -> None:
    classifier, split, stops = classifier_of(config).train(), open_splits(config)["data.val"], iter([False, True])
    with pytest.raises(Interrupted):
        predict(classifier, config, split, VIEWS, EvaluationContext(ProcessGroup(), "fp32", lambda: next(stops)))
    assert classifier.training


def test_multi_label_data_is_scored_by_average_precision_with_unreadable_samples_ranked_last(tmp_path: Path) -> None:
    config = multi_label_config(tmp_path)
    _, whole = scored(config, ProcessGroup())
    assert list(whole.figures) == ["eval/map", "eval/unreadable"]
    assert whole.truth.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
    (tmp_path / "val" / "bright" / "001.png").write_bytes(b"not a picture")
    _, part = scored(config, ProcessGroup())
    assert part.figures["eval/unreadable"] == 1
    # The only sample of class 1 ranks last of four.
    assert part.merged.records.tolist() == [0, 2, 3]
    filled = np.zeros((4, 3))
    filled[[0, 2, 3]] = part.merged.probabilities
    precisions = [average_precision_score(whole.truth[:, c], filled[:, c]) for c in (0, 2)]
    assert part.figures["eval/map"] == pytest.approx(100 * (sum(precisions) + 1 / 4) / 3)


def multi_label_config(folder: Path, **overrides: Any) -> FinetuneConfig:
    """Return a config with file lists whose samples have zero, one or two of three labels."""
    tiny_finetuning(folder)
    for name, count in (("train", 24), ("val", 4)):
        labels = ("0", "0,1", "2", "-")
        lines = [f"{name}/{('dark', 'bright')[i % 2]}/{i:03d}.png {labels[i % 4]}\n" for i in range(count)]
        (folder / f"{name}.txt").write_text("".join(lines))
    data = {f"data__{name}": str(folder / f"{name}.txt") for name in ("train", "val")}
    return tiny_finetuning(
        folder, **{**data, "head__multi_label": True, "head__classes": 3, "augment__mix_prob": 0, **overrides}
    )
