from __future__ import annotations

import yaml

from amd.artifacts.card import Card, HeadCard, Score, is_non_commercial
from amd.artifacts.model_card import model_card
from amd.config import ClipConfig, EncoderConfig


def card(**fields) -> Card:  # type: ignore[no-untyped-def]
    return Card(**({"id": "e1", "encoder": EncoderConfig(size="S"), "clip": ClipConfig()} | fields))


def front_matter(text: str) -> dict[str, object]:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_front_matter_has_the_fields_that_the_hub_reads() -> None:
    front = front_matter(model_card(card(weights_license="CC-BY-NC-4.0", objective="amd")))
    assert front["license"] == "cc-by-nc-4.0"
    assert {"video", "amd"} <= set(front["tags"])
    assert front_matter(model_card(card()))["license"] == "unknown"
    assert front_matter(model_card(card(weights_license="Model: terms #3")))["license"] == "model: terms #3"


def test_a_non_commercial_licence_is_announced_before_the_usage_section() -> None:
    text = model_card(card(weights_license="CC-BY-NC-4.0"))
    assert text.index("Non-commercial use only (CC-BY-NC-4.0)") < text.index("## Use")
    assert "Commercial use is not allowed" in text
    for free in (None, "Apache-2.0", "MIT"):
        assert "on-commercial" not in model_card(card(weights_license=free))


def test_non_commercial_licences_are_recognised_by_name() -> None:
    assert all(
        is_non_commercial(name) for name in ("CC-BY-NC-4.0", "cc-by-nc-sa-4.0", "CC BY NC 4.0", "Non-Commercial")
    )
    assert not any(is_non_commercial(name) for name in (None, "", "CC-BY-4.0", "Apache-2.0", "NCSA"))


def test_the_lineage_section_lists_teacher_initial_weights_data_run_and_versions() -> None:
    teacher = {"id": "t1", "encoder": {"width": 1024, "depth": 24}, "teacher": {"weights": "videomae.pth"}}
    text = model_card(
        card(
            run="run-7",
            steps=93800,
            teacher=teacher,
            start={"weights": "timm:vit_base_patch16_224"},
            data={"train": "s3://k400", "samples": 240000, "digest": "abc123"},
            versions={"amd-service": "0.1.0", "torch": "2.15"},
            sha256="f00d",
        )
    )
    for parts in (
        "t1 (width 1024, 24 blocks), distilled from videomae.pth",
        "initial weights: timm:vit_base_patch16_224",
        "s3://k400",
        "abc123",
        "run-7",
        "93800",
        "amd-service 0.1.0, torch 2.15",
        "f00d",
    ):
        assert parts in text


def test_special_characters_in_names_do_not_break_the_score_table() -> None:
    score = Score(protocol="test", data="a|b\nc", samples=10, views="5x3", values={"eval/top1": 71.234})
    text = model_card(card(scores=(score,), head=HeadCard(classes=5)))
    (row,) = [line for line in text.splitlines() if "5x3" in line]
    assert row == "| fine-tuned, test set | a/b c | 10 | 5x3 | top1 71.23 |"
    assert "No scores yet" in model_card(card())


def test_the_input_section_describes_the_expected_pixels() -> None:
    image = ClipConfig(frames=1, tubelet=1, size=(32, 48), patch=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    text = model_card(card(clip=image, interpolation="bicubic"))
    for parts in ("mean [0.5, 0.5, 0.5], standard deviation [0.25, 0.25, 0.25]", "bicubic", "32x48", "(batch, 384)"):
        assert parts in text
    assert "every fourth frame" not in text
    assert "16 frames of 224x224 pixels, every 4th frame" in model_card(card())


def test_the_best_score_comes_from_the_strictest_protocol() -> None:
    scores = tuple(
        Score(protocol=protocol, data="d", samples=1, values={name: value})
        for protocol, name, value in (
            ("knn", "eval/knn_top1", 99.0),
            ("test", "eval/top1", 60.0),
            ("test", "eval/top1", 70),
        )
    )
    assert card(scores=scores).best_score == ("eval/top1", 70.0)
    assert card().best_score is None
