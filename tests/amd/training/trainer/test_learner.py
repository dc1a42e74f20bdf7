"""A training step computes the same gradient regardless of how micro-batches and ranks split the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amd.config import TrainConfig, with_overrides
from amd.data.loading import order
from amd.data.loading.loader import Batch
from amd.models.encoder import Encoder
from amd.models.teachers.frozen import Teacher
from amd.training.process_group import ProcessGroup
from amd.training.trainer.distiller import Distiller
from tests.support.processes import run_ranks
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config


def teacher_of(config: TrainConfig) -> Teacher | None:
    if config.teacher is None:
        return None
    torch.manual_seed(1)
    encoder = Encoder(config.teacher.encoder, config.clip.grid, config.clip.token_values)
    return Teacher(encoder, tuple(pair.teacher for pair in config.objective.layers))


def batches_of(config: TrainConfig, rank: int = 0, world: int = 1, step: int = 0) -> list[Batch]:
    """Return the micro-batches of one rank, taken from a global batch of random clips."""
    generator = torch.Generator().manual_seed(step)
    shape = (config.clips_per_step, 3, config.clip.frames, *config.clip.size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    positions = order.share(config.optim.batch_size, rank, world)
    parts = order.micro_batches(positions, config.scaling.micro_batch or len(positions))
    repeats = config.data.repeats
    batches = []
    for part in parts:
        rows = slice(part.start * repeats, part.stop * repeats)
        records = torch.arange(rows.start, rows.stop) // repeats
        batches.append(Batch(clips[rows], torch.full_like(records, -1), records, []))
    return batches


def gradients(config: TrainConfig) -> dict[str, torch.Tensor]:
    learner = Distiller(config, ProcessGroup(), teacher_of(config))
    learner.accumulate(0, batches_of(config))
    return {name: parameter.grad for name, parameter in learner.student.named_parameters()}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_accumulated_gradients_match_the_gradient_of_the_whole_batch(micro_batch: int) -> None:
    config = tiny_video_config(data__repeats=2)
    assert_close(gradients(with_overrides(config, {"scaling.micro_batch": micro_batch})), gradients(config))


@pytest.mark.parametrize("config", [tiny_video_config(), tiny_image_config(), mae(tiny_image_config())])
def test_every_student_parameter_receives_a_gradient_and_no_teacher_parameter_does(config: TrainConfig) -> None:
    learner = Distiller(config, ProcessGroup(), teacher_of(config))
    learner.accumulate(0, batches_of(config))
    assert not [name for name, parameter in learner.student.named_parameters() if parameter.grad is None]
    assert learner.teacher is None or not [
        p for p in learner.teacher.parameters() if p.requires_grad or p.grad is not None
    ]


def test_the_optimizer_contains_exactly_the_student_parameters() -> None:
    config = tiny_video_config()
    learner = Distiller(config, ProcessGroup(), teacher_of(config))
    optimized = {id(parameter) for group in learner.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in learner.student.parameters()}


def test_a_non_finite_step_changes_no_parameter_and_reports_its_records() -> None:
    config = tiny_video_config(scaling__micro_batch=4)
    learner = Distiller(config, ProcessGroup(), teacher_of(config))
    learner.learn(0, batches_of(config), lr=1e-3)
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    moments = {i: value["exp_avg"].clone() for i, value in enumerate(learner.optimizer.state.values())}
    non_finite = batches_of(config, step=1)
    clips = non_finite[1].clips.float()
    clips[0] = float("nan")
    learner.learn(1, [non_finite[0], non_finite[1]._replace(clips=clips)], lr=1e-3)
    learner.learn(2, batches_of(config, step=2), lr=1e-3)
    assert learner.health.first_bad_step() == 1
    assert learner.suspect_records(1) == [4, 5, 6, 7]
    assert all(torch.equal(before[name], value) for name, value in learner.student.state_dict().items())
    assert all(torch.equal(moments[i], value["exp_avg"]) for i, value in enumerate(learner.optimizer.state.values()))


def test_warm_up_changes_no_state() -> None:
    config = tiny_video_config()
    learner = Distiller(config, ProcessGroup(), teacher_of(config))
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    assert learner.warm_up() > 0
    assert all(torch.equal(before[name], value) for name, value in learner.student.state_dict().items())
    assert not [p for p in learner.student.parameters() if p.grad is not None]
    assert not learner.optimizer.state


def test_bf16_on_cpu_is_close_to_full_precision() -> None:
    full, half = (
        Distiller(config, ProcessGroup(), teacher_of(config))
        for config in (tiny_video_config(), tiny_video_config(scaling__precision="bf16"))
    )
    for learner in (full, half):
        learner.accumulate(0, batches_of(learner.config))
    losses = [float(learner.recent_losses[0][2]) for learner in (full, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [tiny_video_config(optim__clip_norm=1.0), tiny_image_config()])
def test_a_step_never_synchronises_with_the_gpu(config: TrainConfig) -> None:
    learner = Distiller(config, ProcessGroup(device=torch.device("cuda", 0)), teacher_of(config))
    batches = [batch._replace(clips=batch.clips.pin_memory()) for batch in batches_of(config)]
    learner.learn(0, batches, lr=1e-3)  # the first step may synchronise: allocations, lazy loading
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.learn(1, batches, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_rank(rank: int, world: int, values: dict[str, Any], folder: str) -> None:
    """Save the gradients and norms of two steps. Runs in one process per rank."""
    import torch.distributed as dist

    from amd.config import validate

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    config = validate(TrainConfig, values)
    learner = Distiller(config, ProcessGroup(rank, world), teacher_of(config))
    learner.join()
    norms = []
    for step in range(2):
        learner.optimizer.zero_grad()
        norms.append(learner.accumulate(step, batches_of(config, rank, world, step)))
        torch.save(
            {name: parameter.grad for name, parameter in learner.student.named_parameters()},
            f"{folder}/gradients-{world}-{rank}-{step}",
        )
    torch.save(norms, f"{folder}/norms-{world}-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [3])
def test_the_gradient_across_ranks_matches_the_gradient_of_the_whole_batch(world: int, tmp_path: Path) -> None:
    """Three ranks share eight samples unevenly, in micro-batches of two; their gradient norms are bit-identical."""
    config = tiny_video_config(scaling__micro_batch=2, scaling__workers=[1, world])
    values = config.model_dump(mode="json")
    assert run_ranks(run_rank, [(rank, world, values, str(tmp_path)) for rank in range(world)]) == [0] * world
    for step in range(2):
        learner = Distiller(config, ProcessGroup(), teacher_of(config))
        learner.accumulate(step, batches_of(config, step=step))
        single_process = {name: parameter.grad for name, parameter in learner.student.named_parameters()}
        distributed = [torch.load(tmp_path / f"gradients-{world}-{rank}-{step}") for rank in range(world)]
        assert_close(distributed[0], single_process)
        assert all(
            torch.equal(distributed[0][name], other[name]) for other in distributed[1:] for name in single_process
        )
    norms = [torch.load(tmp_path / f"norms-{world}-{rank}") for rank in range(world)]
    assert all(norm == norms[0] for norm in norms)
