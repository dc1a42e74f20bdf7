from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from amd.config import LinearConfig
from amd.downstream.arrays import Features
from amd.downstream.probing.classifiers import linear, top1
from amd.downstream.probing.linear import LinearHead, batch_size, logits, shuffled, train_head
from amd.training.trainer.optimizer import cosine_lr
from tests.amd.downstream.probing.test_classifiers import clouds


def trained(train: Features, config: LinearConfig, seed: int = 0) -> LinearHead:
    batch = batch_size(config, len(train.labels))
    return train_head(
        shuffled(train, batch, config.epochs, seed),
        config,
        width=train.values.shape[1],
        classes=4,
        batch=batch,
        steps_per_epoch=len(train.labels) // batch,
        seed=seed,
    )


@pytest.mark.parametrize("method", ["lars", "sgd"])
def test_training_matches_a_reference_implementation_of_the_mae_probe(method: str) -> None:
    """The reference computes BatchNorm, the cross-entropy gradient, LARS (util/lars.py of MAE) and momentum by hand."""
    train = clouds(1, 96)
    config = LinearConfig.model_validate(
        {"method": method, "epochs": 3, "warmup_epochs": 1, "batch_size": 32, "base_lr": 8.0 if method == "lars" else 1}
    )
    head = trained(train, config)

    start = train_head([], config, width=12, classes=4, batch=32, steps_per_epoch=3, seed=0).linear
    weight, bias = start.weight.detach().double(), start.bias.detach().double()
    assert weight.std() == pytest.approx(0.01, rel=0.3)
    assert not bias.any()
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    means, variances = [], []
    for step, (features, labels) in enumerate(shuffled(train, 32, 3, 0)):
        x = features.double()
        means.append(x.mean(0))
        variances.append(x.var(0, unbiased=True))
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
        residual = (x @ weight.T + bias).softmax(1) - functional.one_hot(labels, 4)
        gradients = [residual.T @ x / 32, residual.mean(0)]
        if method == "lars":
            gradients[0] *= 0.001 * weight.norm() / gradients[0].norm()  # matrices only
        lr = cosine_lr(step, peak=config.base_lr * 32 / 256, final=0.0, steps=9, warmup=3)
        for i, (parameter, gradient) in enumerate(zip((weight, bias), gradients, strict=True)):
            momentum[i] = 0.9 * momentum[i] + gradient
            parameter -= lr * momentum[i]
    np.testing.assert_allclose(head.linear.weight.detach(), weight, atol=2e-6)
    np.testing.assert_allclose(head.linear.bias.detach(), bias, atol=2e-6)
    test = clouds(2, 20).values
    normed = (torch.from_numpy(test) - torch.stack(means).mean(0)) / (torch.stack(variances).mean(0) + 1e-6).sqrt()
    np.testing.assert_allclose(logits(head, test), normed @ weight.T + bias, atol=1e-4)


def test_the_head_is_about_as_accurate_as_logistic_regression() -> None:
    train, test = clouds(1, 600), clouds(2, 400)
    predicted = logits(trained(train, LinearConfig()), test.values).argmax(axis=1)
    peer = top1(linear(train, test.values), test.labels)
    assert top1(predicted, test.labels) == pytest.approx(peer, abs=2)
    assert peer > 80


def test_the_head_depends_on_the_seed_but_not_on_the_global_generator() -> None:
    train = clouds(1, 100)
    config = LinearConfig(epochs=3, warmup_epochs=1)
    heads = []
    for noise, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        heads.append(trained(train, config, seed).linear.weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_every_epoch_visits_each_sample_once_in_a_new_order() -> None:
    train = Features(np.arange(12, dtype=np.float32)[:, None], np.arange(12))
    taken = torch.cat([labels for _, labels in shuffled(train, 4, 2, seed=0)]).tolist()
    first, second = taken[:12], taken[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert [len(labels) for _, labels in shuffled(train, 5, 1, seed=0)] == [5, 5]


@pytest.mark.parametrize(
    ("samples", "requested", "batch"),
    [(1_281_167, None, 16_384), (100_000, None, 6250), (200, None, 32), (20, None, 20), (500, 64, 64), (50, 64, 50)],
)
def test_the_default_batch_size_matches_mae_and_shrinks_for_small_data_sets(
    samples: int, requested: int | None, batch: int
) -> None:
    assert batch_size(LinearConfig(batch_size=requested), samples) == batch
