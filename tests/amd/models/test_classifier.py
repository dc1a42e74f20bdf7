from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amd.artifacts.weights import encode, whole_clips
from amd.config import ClipConfig, EncoderConfig, validate
from amd.exchange.initialization import load_starting_point
from amd.models.classifier import Classifier
from amd.training.trainer.learner import count

VIDEO = ClipConfig(frames=16, size=224, patch=16, tubelet=2)


@pytest.mark.parametrize(
    ("size", "classes", "parameters"), [("S", 400, 22_033_936), ("B", 400, 86_534_800), ("B", 174, 86_361_006)]
)
def test_a_classifier_has_the_official_number_of_parameters(size: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        classifier = Classifier(validate(EncoderConfig, {"size": size}), VIDEO.grid, VIDEO.token_values, classes)
    assert count(classifier) == parameters


def test_the_head_is_initialised_with_the_official_scale() -> None:
    config = EncoderConfig(width=384, depth=1, heads=6)
    torch.manual_seed(0)
    head = Classifier(config, ClipConfig().grid, 12, 400, init_scale=0.001).head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert not head.bias.any()


def test_official_fine_tuned_weights_reproduce_the_official_features_and_logits(golden: Path, tmp_path: Path) -> None:
    stored = load_file(golden / "finetune.safetensors")
    official = {key.removeprefix("meanpool.state."): value for key, value in stored.items() if "meanpool.state" in key}
    save_file(official, tmp_path / "finetuned.safetensors")
    clip = ClipConfig(frames=4, size=16, patch=4, tubelet=2)
    classifier = Classifier(EncoderConfig(width=24, depth=2, heads=3), clip.grid, clip.token_values, 7).eval()
    start = load_starting_point(classifier.encoder, str(tmp_path / "finetuned.safetensors"), None, clip)
    classifier.head.load_state_dict({"weight": official["head.weight"], "bias": official["head.bias"]})
    assert start.pooling == "mean_then_norm"
    video = load_file(golden / "amd_inputs.safetensors")["video"]
    with torch.no_grad():
        features = classifier.features(*whole_clips(classifier.encoder, clip, video))
        logits = classifier(*whole_clips(classifier.encoder, clip, video))
        served = encode(classifier.encoder, clip, video, "mean_then_norm")
    torch.testing.assert_close(features, stored["meanpool.f32.features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, stored["meanpool.f32.logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(served, features)


def test_a_class_token_takes_part_in_attention_but_not_in_the_mean() -> None:
    clip = ClipConfig(frames=1, size=16, patch=4, tubelet=1)
    config = EncoderConfig(width=24, depth=2, heads=3, class_token=True, positions="sincos_2d")
    classifier = Classifier(config, clip.grid, clip.token_values, 3).eval()
    clips = torch.randint(0, 256, (2, 3, 1, 16, 16), dtype=torch.uint8)
    tokens, index = whole_clips(classifier.encoder, clip, clips)
    features = classifier.features(tokens, index)
    last = classifier.encoder(tokens, index, intermediates=(2,), final=False).intermediates[0]
    assert last.shape == (2, 16, 24), "without the class token"
    torch.testing.assert_close(features, classifier.encoder.norm(last.mean(dim=1)))
    classifier(tokens, index).sum().backward()
    assert [name for name, value in classifier.named_parameters() if value.grad is None or not value.grad.any()] == []
