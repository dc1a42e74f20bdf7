from __future__ import annotations

import pytest

from amd.presets.detection import DETECTION_PRESETS
from amd.presets.finetuning import FINETUNE_PRESETS
from amd.training.trainer.optimizer import cosine_lr


@pytest.mark.parametrize(
    ("name", "peak", "last"),
    [
        # MAE: blr x batch / 256, and an absolute min_lr.
        ("in1k-vit-b-finetune", 2e-3, 1e-6),
        ("in1k-vit-s-finetune", 4e-3, 1e-6),
        # AMD and VideoMAE: both flags x batch / 256.
        ("k400-vit-b-finetune", 1.4e-3, 2e-6),
        ("k400-vit-s-finetune", 2e-3, 2e-6),
        ("ssv2-vit-b-finetune", 5e-4, 1e-6),
        ("ssv2-vit-s-finetune", 1e-3, 1e-6),
        ("ucf101-vit-b-finetune", 2.5e-4, 5e-6),
    ],
)
def test_learning_rates_of_the_presets_match_the_official_code(name: str, peak: float, last: float) -> None:
    optim = FINETUNE_PRESETS[name].config.optim
    assert optim.lr == pytest.approx(peak)
    final = cosine_lr(1000, peak=optim.lr, final=optim.final_lr, steps=1000, warmup=50)
    assert final == pytest.approx(last)


def test_paper_presets_test_the_last_checkpoint_and_demo_presets_the_best_one() -> None:
    for name, preset in (FINETUNE_PRESETS | DETECTION_PRESETS).items():
        assert preset.config.evaluation.checkpoint == ("best" if name.startswith("demo-") else "last"), name


def test_the_evaluation_batch_size_does_not_depend_on_the_number_of_gpus() -> None:
    assert {preset.config.evaluation.batch_size for preset in DETECTION_PRESETS.values()} == {6}
