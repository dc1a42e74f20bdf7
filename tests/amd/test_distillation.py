from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amd.config import TrainConfig, with_overrides
from amd.distillation import distill
from amd.losses import LossTerms
from amd.masks import sample_token_sets
from amd.models.encoder import Encoder
from amd.models.student import Student
from amd.models.teachers.frozen import Teacher
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config

THREE_PAIRS = [{"student": s, "teacher": t} for s, t in ((1, 2), (3, 3), (4, 4))]
OBJECTIVES: dict[str, TrainConfig] = {
    "video": tiny_video_config(),
    "image": tiny_image_config(),
    "video, mae": mae(tiny_video_config()),
    "image, mae": mae(tiny_image_config()),
    "not square": tiny_video_config(clip__size=[8, 24]),
    "random masks on video": tiny_video_config(mask__strategy="random"),
    "direct only": tiny_video_config(objective__weights__generation=0),
    "generation only": tiny_video_config(objective__weights__direct=0),
    "no reconstruction": tiny_video_config(objective__weights__reconstruction=0),
    "no reconstruction, class token": tiny_image_config(objective__weights__reconstruction=0),
    "equal ratios": tiny_video_config(mask__teacher_ratio=0.75),
    "full-view teacher": tiny_video_config(mask__teacher_ratio=0.0),
    "three pairs, summed": tiny_video_config(objective__layers=THREE_PAIRS, objective__reduction="sum"),
    "last pair only": tiny_video_config(objective__layers=[{"student": 4, "teacher": 4}]),
    "layer norm, l1": tiny_video_config(objective__target_norm="layer_norm", objective__distance="l1"),
    "l2-normalised, smooth l1": tiny_video_config(objective__target_norm="l2", objective__distance="smooth_l1"),
    "running cell": tiny_video_config(mask__decoder="running_cell"),
    "3-D positions": tiny_video_config(student__encoder__positions="sincos_3d"),
    "narrow MLPs": tiny_video_config(student__encoder__mlp_ratio=2.0, teacher__encoder__mlp_ratio=3.0),
    "one generator block": tiny_video_config(student__generator__depth=1),
    "narrow generators": tiny_video_config(student__generator__width=32),
    "wide generators, class token": tiny_image_config(student__generator__width=96, student__generator__heads=3),
}


def networks(config: TrainConfig, seed: int = 0) -> tuple[Student, Teacher | None]:
    torch.manual_seed(seed)
    student = Student(config)
    if config.teacher is None:
        return student, None
    encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
    return student, Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers))


def batch(config: TrainConfig, count: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, config.clip.frames, *config.clip.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def run(config: TrainConfig, student: Student, teacher: Teacher | None, clips: Tensor) -> LossTerms:
    sets = sample_token_sets(config.mask, config.clip.grid, len(clips), torch.Generator().manual_seed(2))
    return distill(student, teacher, clips, sets, config)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_student_parameter_receives_a_gradient_and_no_teacher_parameter_does(name: str) -> None:
    config = OBJECTIVES[name]
    student, teacher = networks(config)
    terms = run(config, student, teacher, batch(config))
    terms.total.backward()
    trained = {key: value for key, value in student.named_parameters() if value.requires_grad}
    assert not [key for key, value in trained.items() if value.grad is None]
    # Symmetry may cancel single entries of a gradient, never all entries of a parameter.
    assert not [key for key, value in trained.items() if value.grad is not None and not value.grad.any()]
    if teacher is not None:
        assert not any(value.requires_grad or value.grad is not None for value in teacher.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_total_loss_is_the_weighted_sum_of_the_loss_terms(name: str) -> None:
    config = OBJECTIVES[name]
    terms = run(config, *networks(config), batch(config))
    weights = config.objective.weights
    expected = (
        weights.reconstruction * terms.reconstruction
        + weights.direct * terms.direct
        + weights.generation * terms.generation
    )
    torch.testing.assert_close(terms.total, expected)
    assert (terms.generation > 0) == config.has_generation
    assert (terms.direct > 0) == (config.objective.kind == "amd")


def test_direct_alignment_is_zero_when_student_equals_teacher() -> None:
    config = tiny_video_config(
        teacher__encoder=tiny_video_config().student.encoder.model_dump(), mask__teacher_ratio=0.75
    )
    student, teacher = networks(config)
    assert teacher is not None
    teacher.encoder.load_state_dict(student.encoder.state_dict())
    for projection in student.projections:
        torch.nn.init.eye_(projection.weight)  # type: ignore[arg-type]
    assert run(config, student, teacher, batch(config)).direct < 1e-12


def test_the_teacher_sees_teacher_only_tokens_and_the_student_does_not() -> None:
    config = tiny_video_config()
    student, teacher = networks(config)
    clips = batch(config, 1)
    sets = sample_token_sets(config.mask, config.clip.grid, 1, torch.Generator().manual_seed(2))
    changed = _inverted(config, clips, sets.teacher_only)
    before, after = (distill(student, teacher, x, sets, config) for x in (clips, changed))
    assert before.generation != after.generation  # its targets changed
    assert before.direct != after.direct  # only through the teacher's attention
    hidden = _inverted(config, clips, sets.student_masked[:, ~torch.isin(sets.student_masked, sets.teacher_only)[0]])
    unaligned = distill(student, teacher, hidden, sets, config)
    assert unaligned.direct == before.direct  # tokens hidden from both networks do not affect alignment
    assert unaligned.generation == before.generation
    assert unaligned.reconstruction != before.reconstruction


def _inverted(config: TrainConfig, clips: Tensor, index: Tensor) -> Tensor:
    from amd.tokens import patchify, unpatchify

    tokens = patchify(clips, config.clip.tubelet, config.clip.patch).clone()
    tokens[0, index[0]] = 255 - tokens[0, index[0]]
    return unpatchify(tokens, config.clip.grid, config.clip.tubelet, config.clip.patch)


def test_the_generation_gradient_reaches_the_encoder_through_the_projection() -> None:
    config = tiny_video_config(objective__weights__direct=0, objective__weights__reconstruction=0)
    student, teacher = networks(config)
    run(config, student, teacher, batch(config)).total.backward()
    first = student.encoder.blocks[0].attn.qkv.weight.grad  # type: ignore[union-attr]
    assert first is not None
    assert first.any()  # type: ignore[operator]


def test_the_loss_of_a_batch_is_the_mean_loss_of_its_halves() -> None:
    config = tiny_video_config()
    student, teacher = networks(config)
    clips = batch(config, 4)
    sets = sample_token_sets(config.mask, config.clip.grid, 4, torch.Generator().manual_seed(2))
    whole = distill(student, teacher, clips, sets, config)
    halves = [distill(student, teacher, clips[i : i + 2], sets.rows(i, i + 2), config) for i in (0, 2)]
    for name in LossTerms._fields:
        mean = (getattr(halves[0], name) + getattr(halves[1], name)) / 2
        torch.testing.assert_close(getattr(whole, name), mean, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_is_close_to_float32() -> None:
    config = tiny_video_config()
    student, teacher = networks(config)
    exact = run(config, student, teacher, batch(config))
    with torch.autocast("cpu", torch.bfloat16):
        approximate = run(config, student, teacher, batch(config))
    assert approximate.total.dtype == torch.float32
    torch.testing.assert_close(approximate.total, exact.total, rtol=2e-2, atol=0)


def test_the_teacher_stays_in_eval_mode_and_out_of_the_student_state_dict() -> None:
    config = with_overrides(tiny_video_config(), {"teacher.encoder.drop_path": 0.5})
    student, teacher = networks(config)
    assert teacher is not None
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not [key for key in student.state_dict() if "teacher" in key]
