"""Tests that the mask lab shows the same masks as training and the same reconstructions as serving."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amd.config import ConfigError, TrainConfig, with_overrides
from amd.lab import view
from amd.lab.cost import compare_cost
from amd.losses import LossTerms
from amd.models.encoder import Encoder
from amd.models.student import Student
from amd.models.teachers.frozen import Teacher
from amd.reconstruction import HIDDEN, MaskedTokens, reconstruct
from amd.tokens import patchify, take_tokens
from amd.training.process_group import ProcessGroup
from amd.training.trainer.distiller import Distiller
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config

CONFIGS = {"image": tiny_image_config(), "video": tiny_video_config(), "undistilled": mae(tiny_video_config())}


def noise(config: TrainConfig) -> torch.Tensor:
    return torch.randint(0, 256, (3, config.clip.frames, *config.clip.size), dtype=torch.uint8)


def model_of(config: TrainConfig) -> view.Autoencoder:
    torch.manual_seed(0)
    student = Student(config).eval()
    assert student.decoder is not None
    return view.Autoencoder(student.encoder, student.decoder, config.objective.pixels)


@cache
def learner_of(name: str) -> Distiller:
    """Return a cached learner whose config tests replace, because building one takes longer than sampling its masks."""
    return Distiller(mae(CONFIGS[name]), ProcessGroup(), None)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_lab_draws_the_same_masks_as_training(data: st.DataObject) -> None:
    learner = learner_of(data.draw(st.sampled_from(["image", "video"])))
    student = data.draw(st.sampled_from([0.5, 0.75, 0.9]))
    values = {
        "mask.student_ratio": student,
        "mask.teacher_ratio": data.draw(st.sampled_from([0.0, 0.25, 0.5])),
        "mask.strategy": data.draw(st.sampled_from(["random", "tube"])),
        "mask.decoder": data.draw(st.sampled_from(["all", "running_cell"])),
        "seed": data.draw(st.integers(0, 2**31 - 1)),
        "optim.batch_size": data.draw(st.integers(1, 9)),
        "data.repeats": data.draw(st.integers(1, 3)),
    }
    learner.config = config = with_overrides(learner.config, values)
    step = data.draw(st.integers(0, 10**6))
    position = data.draw(st.integers(0, config.clips_per_step - 1))
    learner.begin(step)
    assert learner._sets is not None
    trained = learner._sets.rows(position, position + 1)
    shown = view.sample_clip_sets(config, step, position)
    for ours, theirs in zip(shown, trained, strict=True):
        assert torch.equal(ours, theirs)


def test_a_position_outside_the_batch_is_rejected() -> None:
    config = with_overrides(CONFIGS["image"], {"data.repeats": 2})
    view.sample_clip_sets(config, 0, 15)
    with pytest.raises(ConfigError, match=r"position=16 must be from 0 to 15: .*batch_size=8 x data\.repeats=2"):
        view.sample_clip_sets(config, 0, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_layer_shows_the_tokens_of_its_set(name: str) -> None:
    config = CONFIGS[name]
    clip, frames = config.clip, noise(config)
    sets = view.sample_clip_sets(config, 3, 1)
    found = view.view_masks(config, sets, frames, model_of(config))
    with_teacher = {"teacher", "roles"} if config.teacher else set()
    assert set(found.layers) == {"input", "student", "masked", "rebuilt", "error"} | with_teacher
    tokens = {name: patchify(layer[None], clip.tubelet, clip.patch) for name, layer in found.layers.items()}
    blank = torch.tensor(HIDDEN, dtype=torch.uint8).repeat(clip.token_values // 3)
    assert torch.equal(found.layers["input"], frames)
    for layer, shown in (("student", sets.student_visible), ("masked", sets.reconstructed)):
        assert torch.equal(take_tokens(tokens[layer], shown), take_tokens(tokens["input"], shown))
    assert (take_tokens(tokens["student"], sets.student_masked) == blank).all()
    assert (take_tokens(tokens["masked"], sets.student_visible) == blank).all()
    if config.teacher:
        roles = (take_tokens(tokens["roles"], sets.student_visible), take_tokens(tokens["roles"], sets.teacher_only))
        assert not torch.equal(roles[0], take_tokens(tokens["input"], sets.student_visible))
        assert not (roles[1] == blank).all(dim=-1).any()
        seen = (tokens["teacher"] != blank).any(dim=-1).sum().item()
        assert seen == sets.student_visible.shape[1] + sets.teacher_only.shape[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_reconstructed_pixels_and_errors_match_reconstruct(name: str) -> None:
    config, model = CONFIGS[name], model_of(CONFIGS[name])
    frames, sets = noise(config), view.sample_clip_sets(config, 0, 2)
    masked = MaskedTokens(sets.student_visible[0], sets.student_masked[0])
    with torch.inference_mode():
        expected = reconstruct(model.encoder, model.decoder, frames[None], masked, config.clip, model.pixels)
    found = view.view_masks(config, sets, frames, model).rebuilt
    assert found is not None
    torch.testing.assert_close(found.pixels, expected.reconstructed[0], rtol=0, atol=1e-5)
    assert found.errors.mean().item() == pytest.approx(expected.losses.item(), rel=1e-5) == pytest.approx(found.loss)


def distillation_of(config: TrainConfig) -> view.Distillation:
    torch.manual_seed(0)
    assert config.teacher is not None
    encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
    teacher = Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers))
    return view.Distillation(Student(config).eval(), teacher)


ALIGNED = {
    "image": tiny_image_config(),
    "video": tiny_video_config(),
    "normalised": tiny_video_config(objective__target_norm="layer_norm", objective__distance="smooth_l1"),
    "summed": tiny_video_config(objective__reduction="sum", mask__decoder="running_cell"),
    "equal ratios": tiny_video_config(mask__teacher_ratio=0.75),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_mean_token_alignment_matches_the_training_loss_terms(name: str) -> None:
    config, step, position = ALIGNED[name], 3, 5
    student, teacher = distillation_of(config)
    learner = Distiller(config, ProcessGroup(), teacher)
    learner.student.load_state_dict(student.state_dict())
    learner.begin(step)
    frames = noise(config)
    terms = LossTerms(*learner.loss(frames[None], None, position))  # type: ignore[arg-type]  # reads no labels
    sets = view.sample_clip_sets(config, step, position)
    found = view.view_masks(config, sets, frames, None, view.Distillation(student, teacher)).alignment
    assert found is not None
    assert found.direct.shape == sets.student_visible[0].shape
    assert found.direct.mean().item() == pytest.approx(terms.direct.item(), rel=1e-5)
    if not config.has_generation:
        assert len(found.generation) == 0
        return
    assert found.generation.shape == sets.teacher_only[0].shape
    assert found.generation.mean().item() == pytest.approx(terms.generation.item(), rel=1e-5)


def test_the_alignment_layer_colours_tokens_visible_to_the_teacher_by_loss() -> None:
    config = CONFIGS["video"]
    sets, clip = view.sample_clip_sets(config, 0, 0), config.clip
    found = view.view_masks(config, sets, noise(config), None, distillation_of(config))
    assert found.alignment is not None
    tokens = patchify(found.layers["alignment"][None], clip.tubelet, clip.patch)[0]
    seen = torch.cat([sets.student_visible, sets.teacher_only], dim=1)[0]
    blank = torch.tensor(HIDDEN, dtype=torch.uint8).repeat(clip.token_values // 3)
    assert sorted(torch.nonzero((tokens != blank).any(dim=-1))[:, 0].tolist()) == sorted(seen.tolist())
    losses = torch.cat([found.alignment.direct, found.alignment.generation])
    green = tokens[seen, 1].int()  # falls as the loss rises
    assert (green[losses.argsort()].diff() <= 0).all()
    assert green[losses.argmax()] < green[losses.argmin()]


def test_a_student_trained_without_generation_can_be_aligned_at_any_ratios() -> None:
    trained = ALIGNED["equal ratios"]
    shown = with_overrides(trained, {"mask.teacher_ratio": 0.5})
    sets = view.sample_clip_sets(shown, 0, 0)
    found = view.view_masks(shown, sets, noise(shown), None, distillation_of(trained)).alignment
    assert found is not None
    assert (len(found.direct), len(found.generation)) == (sets.student_visible.shape[1], 0)


def test_tokens_omitted_by_the_decoder_are_painted_over() -> None:
    config = tiny_video_config(mask__decoder="running_cell")
    sets = view.sample_clip_sets(config, 0, 0)
    shown = view.view_masks(config, sets, noise(config), model_of(config)).layers["rebuilt"]
    tokens = patchify(shown[None], config.clip.tubelet, config.clip.patch)
    omitted = sorted(set(sets.student_masked[0].tolist()) - set(sets.reconstructed[0].tolist()))
    assert omitted
    blank = torch.tensor(HIDDEN, dtype=torch.uint8).repeat(config.clip.token_values // 3)
    assert (tokens[0, omitted] == blank).all()


def test_masks_are_drawn_without_a_clip_or_a_model() -> None:
    config = CONFIGS["video"]
    sets = view.sample_clip_sets(config, 0, 0)
    assert set(view.view_masks(config, sets, None, model_of(config)).layers) == {
        "student",
        "teacher",
        "roles",
        "masked",
    }
    assert "rebuilt" not in view.view_masks(config, sets, noise(config), None).layers
    assert "alignment" not in view.view_masks(config, sets, None, None, distillation_of(config)).layers


def test_the_cost_falls_as_the_teacher_sees_fewer_tokens() -> None:
    config = CONFIGS["image"]
    cheaper = compare_cost(with_overrides(config, {"mask.teacher_ratio": 0.75}), config)
    dearer = compare_cost(with_overrides(config, {"mask.teacher_ratio": 0.0}), config)
    assert compare_cost(config, config).relative == 1.0
    assert cheaper.relative < 1.0 < dearer.relative
    assert dearer.flops.teacher > dearer.baseline.teacher
