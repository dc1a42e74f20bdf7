from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from amd.artifacts.weights import whole_clips
from amd.config import DetectionConfig, with_overrides
from amd.data.dataset.record import Record
from amd.data.loading.loader import Batch
from amd.data.loading.transforms import clip_view
from amd.downstream.supervised.detection.augment import ClipBoxes, EvaluationTransform
from amd.downstream.supervised.detection.ava import KeyFrame, KeyFrameId, KeyFrames, PersonBoxes
from amd.downstream.supervised.detection.learner import DetectionLearner, new_detector, rois_of
from amd.downstream.supervised.detection.model import resized_detector
from amd.training.process_group import ProcessGroup
from tests.support.data.ava_videos import DOWN, HEIGHT, RIGHT, SIDE, WIDTH, picture, squares_at, tiny_detection

SQUARES = np.array([[0.0, 0.0, 16.0, 16.0], [16.0, 8.0, 32.0, 32.0]])


def _learner(config: DetectionConfig) -> DetectionLearner:
    persons = {KeyFrameId("v", float(n)): PersonBoxes(SQUARES / 32, [[1], [2, 3]]) for n in range(4)}
    return DetectionLearner(config, ProcessGroup(), 3, lambda detector: None, KeyFrames(persons, {}))


def _batch(boxes: list[list[int]]) -> Batch:
    """Return a clip for each list of indices into SQUARES."""
    clips = torch.randint(0, 256, (len(boxes), 3, 4, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(1))
    clip_boxes = tuple(ClipBoxes(SQUARES[numbers], np.array(numbers, np.int64)) for numbers in boxes)
    return Batch(clips, torch.full((len(boxes),), -1), torch.arange(len(boxes)), [], clip_boxes)


@pytest.fixture
def config(tmp_path: Path) -> DetectionConfig:
    return tiny_detection(tmp_path, encoder__drop_path=0.0)


def test_every_parameter_receives_a_gradient_and_a_step_lowers_the_loss(config: DetectionConfig) -> None:
    learner, batch = _learner(config), _batch([[0], [0, 1], [1], [0]])
    (before,) = learner.loss(batch.clips, batch, 0)
    learner.accumulate(0, [batch])
    assert [name for name, p in learner.network.named_parameters() if p.grad is None or not p.grad.any()] == []
    learner.learn(0, [batch], 1e-3)
    assert learner.loss(batch.clips, batch, 0)[0] < before


def test_a_batch_without_boxes_has_zero_loss_and_gradients(config: DetectionConfig) -> None:
    learner, batch = _learner(config), _batch([[], []])
    (loss,) = learner.loss(batch.clips, batch, 0)
    loss.backward()  # DDP waits for every parameter on every rank
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in learner.network.parameters())


def test_the_gradient_does_not_depend_on_the_micro_batch_size(config: DetectionConfig) -> None:
    whole = _batch([[0], [0, 1], [], [1]])
    parts = [
        Batch(whole.clips[i : i + 2], whole.labels[i : i + 2], whole.records[i : i + 2], [], whole.extras[i : i + 2])
        for i in (0, 2)
    ]
    one, other = _learner(config), _learner(config)
    one.accumulate(0, [whole])
    other.accumulate(0, parts)
    for ours, theirs in zip(one.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_every_clip_has_the_same_weight_regardless_of_its_number_of_boxes(config: DetectionConfig) -> None:
    learner, clips = _learner(config), _batch([[0], [0]]).clips

    def loss(*boxes: list[int]) -> float:
        return float(learner.loss(clips, _batch(list(boxes))._replace(clips=clips), 0)[0])

    first, second = loss([0], []), loss([1], [])
    assert loss([0, 1], []) == pytest.approx((first + second) / 2, rel=1e-5)
    assert loss([0, 1], [0]) == pytest.approx((first + second) / 2 + loss([], [0]), rel=1e-5)


def test_targets_cover_only_the_boxes_inside_the_crop(config: DetectionConfig) -> None:
    targets = _learner(config)._targets([0, 3], _batch([[1], [0, 1]]).extras)
    assert targets.tolist() == [[0, 1, 1], [1, 0, 0], [0, 1, 1]]


def test_the_loss_of_confident_correct_logits_is_zero(config: DetectionConfig) -> None:
    learner, batch = _learner(config), _batch([[0], [0]])
    with torch.no_grad():
        learner.network.head.weight.zero_()
        learner.network.head.bias.copy_(torch.tensor([30.0, -30.0, -30.0]))
    assert learner.loss(batch.clips, batch, 0)[0].item() < 1e-9


def test_each_box_pools_the_features_inside_it(config: DetectionConfig) -> None:
    detector = new_detector(config, 3)
    features = torch.zeros(2, 48, 4, 4)  # 8 pixels per token
    features[0, :, 0, 0], features[1, :, 3, 3] = 1.0, 2.0
    pooled = detector.pooled(features, rois_of(_batch([[0, 1], [0, 1]]).extras))
    assert pooled.shape == (4, 48)
    assert pooled[:, 0].tolist() == pytest.approx([1.0, 0.0, 0.0, 2.0], abs=0.1)


def test_a_box_of_one_token_pools_that_token(config: DetectionConfig) -> None:
    """Sampling points are interpolated, so the middle cell equals the token only if cells are aligned."""
    detector = new_detector(config, 3)
    features = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 48, 4, 4)
    rois = torch.tensor([[0.0, 8.0, 8.0, 16.0, 16.0]])
    single = new_detector(with_overrides(config, {"head.resolution": 1}), 3)
    assert single.pooled(features, rois)[0, 0].item() == 5.0
    assert detector.pooled(features, rois)[0, 0].item() == pytest.approx(5 + 3 / 7 * 5, abs=1e-4)


def test_a_resized_detector_keeps_its_weights_and_interpolates_its_position_embeddings(
    config: DetectionConfig,
) -> None:
    detector = new_detector(config, 3).eval()
    clip = config.clip.model_copy(update={"size": (40, 48)})
    assert resized_detector(detector, config.clip) is detector
    other = resized_detector(detector, clip)
    assert not other.training
    for name, value in detector.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert other.encoder.positions.shape == (2 * 5 * 6, 48)
    blank = torch.zeros(1, 3, 4, 40, 48, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 0, 48, 40]])
    assert other(*whole_clips(other.encoder, clip, blank), boxes).shape == (1, 3)
    old, new = (d.encoder.positions.reshape(2, *d.encoder.grid[1:], 48) for d in (detector, other))
    torch.testing.assert_close(new.mean(dim=(1, 2)), old.mean(dim=(1, 2)), atol=0.05, rtol=0)


def test_the_detector_learns_the_action_of_each_person(config: DetectionConfig) -> None:
    """People swap sides, so only a box's content reveals the action. Scores are measured on held-out videos."""
    learner = _learner(config)
    transform = EvaluationTransform(config.data, config.clip, (0, 0))

    def clips_of(numbers: list[int]) -> Batch:
        parts = []
        for number in numbers:
            frames = np.stack([picture(list(squares_at(number, n).values())) for n in (4, 8, 12, 16)])
            boxes = [(x / WIDTH, y / HEIGHT, (x + SIDE) / WIDTH, (y + SIDE) / HEIGHT) for x, y in _corners(number)]
            key_frame = KeyFrame(Record("v", None, "video"), 0.0, np.array(boxes))
            parts.append(transform(torch.from_numpy(frames), key_frame, random.Random()))
        clips = clip_view(torch.stack([clip for clip, _ in parts]))
        return Batch(
            clips, torch.zeros(1), torch.zeros(len(numbers), dtype=torch.int64), [], tuple(p for _, p in parts)
        )

    persons = PersonBoxes(SQUARES, [[RIGHT], [DOWN]])
    learner._key_frames = KeyFrames({KeyFrameId("v", 0.0): persons}, {})
    for step in range(80):
        learner.learn(step, [clips_of([(4 * step + i) % 6 for i in range(4)])], 2e-3)
    held_out = clips_of([6, 7])
    inputs = whole_clips(learner.network.encoder, config.clip, held_out.clips)
    logits = learner.network.eval()(*inputs, rois_of(held_out.extras))
    assert (logits.argmax(dim=1) + 1).tolist() == [RIGHT, DOWN, RIGHT, DOWN]


def _corners(number: int) -> list[tuple[int, int]]:
    return list(squares_at(number, 10).values())
