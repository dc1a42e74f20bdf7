from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from amd.artifacts.weights import load_card
from amd.config import AttentiveConfig, ConfigError, EncoderConfig, ProbeConfig
from amd.downstream.arrays import Features, TokenFeatures
from amd.downstream.probing.attentive import (
    AttentiveHead,
    attentive_batch_size,
    check_heads,
    classify,
    collect_tokens,
    train_attentive,
)
from amd.downstream.probing.classifiers import linear, top1
from amd.downstream.probing.linear import shuffled
from amd.downstream.probing.run import run_probe
from tests.amd.downstream.probing.test_run import images as images

WIDTH, TOKENS, CLASSES = 16, 9, 4


def marked(seed: int, samples: int) -> TokenFeatures:
    """Return samples in which one marked token encodes the class; the remaining tokens cancel it in the mean."""
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % CLASSES
    tokens = rng.normal(0, 0.1, (samples, TOKENS, WIDTH))
    marker = rng.integers(TOKENS, size=samples)
    code = np.zeros((samples, WIDTH))
    code[np.arange(samples), labels] = 2
    tokens -= code[:, None] / (TOKENS - 1)
    tokens[np.arange(samples), marker] = code
    tokens[np.arange(samples), marker, -1] = 3  # the mark
    tokens[:, :, :-1] -= tokens[:, :, :-1].mean(axis=1, keepdims=True)  # no class is left in the mean
    return TokenFeatures(tokens.astype(np.float16), labels)


def trained(train: TokenFeatures, config: AttentiveConfig, seed: int = 0) -> AttentiveHead:
    batch = attentive_batch_size(config, len(train.labels))
    return train_attentive(
        shuffled(train, batch, config.epochs, seed),
        config,
        width=WIDTH,
        heads=2,
        classes=CLASSES,
        steps_per_epoch=len(train.labels) // batch,
        seed=seed,
    )


def test_the_head_separates_classes_that_a_linear_probe_on_mean_tokens_cannot() -> None:
    train, test = marked(0, 400), marked(1, 200)
    mean = Features(train.values.astype(np.float32).mean(axis=1), train.labels)
    on_mean = top1(linear(mean, test.values.astype(np.float32).mean(axis=1)), test.labels)
    head = trained(train, AttentiveConfig(epochs=30, lr=3e-3))
    scores, labels = classify(head, [(torch.from_numpy(test.values), torch.from_numpy(test.labels))])
    assert on_mean < 45
    assert top1(scores.argmax(axis=1), labels) > 95


def test_token_order_does_not_matter() -> None:
    head = AttentiveHead(WIDTH, 2, CLASSES).eval()
    tokens = torch.from_numpy(marked(0, 8).values)
    torch.testing.assert_close(head(tokens), head(tokens.flip(1)))


def test_training_is_deterministic_for_a_given_seed() -> None:
    train, config = marked(0, 64), AttentiveConfig(epochs=2)
    first, again, other = (trained(train, config, seed).linear.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_score_is_written_to_the_card_without_computing_pooled_features(
    images: Callable[..., ProbeConfig], tmp_path: Path
) -> None:
    report = run_probe(images(kinds=["attentive"], attentive={"epochs": 5}))
    (score,) = load_card(str(tmp_path / "encoders" / "tiny")).scores
    assert score == report.scores[0]
    assert (score.protocol, score.samples, score.values) == ("attentive", 20, {"eval/top1": 100.0})
    assert score.settings["epochs"] == 5
    assert not (tmp_path / "features").exists()


def test_tokens_of_augmented_samples_are_recomputed_in_every_epoch(images: Callable[..., ProbeConfig]) -> None:
    attentive = {"epochs": 3, "augment": "image", "memory_mib": 1}
    assert run_probe(images(kinds=["attentive"], attentive=attentive)).scores[0].values == {"eval/top1": 100.0}


def test_unreadable_samples_are_excluded_from_the_score(images: Callable[..., ProbeConfig], tmp_path: Path) -> None:
    files = sorted((tmp_path / "test").rglob("*.png"))
    files[0].write_bytes(b"cannot be decoded")
    config = images(kinds=["attentive", "knn"], attentive={"epochs": 2}, data__max_bad_fraction=0.1)
    report = run_probe(config)
    assert [score.samples for score in report.scores] == [19, 19]
    assert [bad["location"] for bad in report.left_out] == [str(files[0])]


def test_tokens_that_exceed_the_memory_limit_are_rejected_before_they_are_stored() -> None:
    batches = [(torch.zeros(2, 196, 384), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(ConfigError, match=r"memory_mib=100: .* 1000 samples .* take 144 MiB; raise the limit"):
        collect_tokens(batches, 1000, AttentiveConfig(memory_mib=100))


def test_the_number_of_heads_must_divide_the_width() -> None:
    encoder = EncoderConfig(size="demo-student")
    assert check_heads(AttentiveConfig(), encoder) == encoder.heads
    with pytest.raises(ConfigError, match=r"attentive.heads=5 must divide the encoder's width 64"):
        check_heads(AttentiveConfig(heads=5), encoder)


@pytest.mark.parametrize(
    ("samples", "requested", "batch"), [(20, None, 20), (1000, None, 62), (10**6, None, 256), (9, 32, 9)]
)
def test_the_batch_size_is_reduced_for_small_data_sets(samples: int, requested: int | None, batch: int) -> None:
    assert attentive_batch_size(AttentiveConfig(batch_size=requested), samples) == batch
