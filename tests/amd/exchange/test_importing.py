"""Tests for importing third-party weights as published encoders."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, ViTConfig, ViTForImageClassification

from amd.artifacts.weights import Card, DecoderCard, encode, load_classifier, load_decoder, load_encoder, save_encoder
from amd.config import ConfigError, ImportConfig, validate
from amd.exchange.export import export
from amd.exchange.importing import Imported, import_encoder
from amd.exchange.source import license_of
from amd.models.student import Student
from tests.support.runs.configs import tiny_video_config
from tests.support.runs.peers import PEER, TIMM, close, perturbed


def import_weights(folder: Path, weights: Any, id: str | None = "e1", **values: Any) -> Imported:
    named = {} if id is None else {"id": id}
    return import_encoder(validate(ImportConfig, {"weights": str(weights), "storage": str(folder), **named, **values}))


def test_everything_but_clip_and_heads_is_inferred_from_an_official_video_file(golden: Path, tmp_path: Path) -> None:
    imported = import_weights(tmp_path, golden / "student_state.safetensors", image_size=(16, 16), frames=4, heads=3)
    card = imported.card
    assert (card.encoder.width, card.encoder.depth, card.encoder.heads) == (48, 4, 3)
    assert (card.clip.patch, card.clip.tubelet, card.clip.frames) == (4, 2, 4)
    assert card.encoder.positions == "sincos_1d"
    assert imported.notes == []
    encoder, _ = load_encoder(imported.url)
    assert torch.equal(encoder.norm.weight, load_file(golden / "student_state.safetensors")["encoder.norm.weight"])


def test_a_published_encoder_is_imported_with_its_decoder(tmp_path: Path) -> None:
    config = tiny_video_config()
    student = Student(config)
    decoder = DecoderCard(network=config.student.decoder, mask_strategy="tube", mask_ratio=0.75, pixels="per_channel")
    card = Card(id="theirs", encoder=config.student.encoder, clip=config.clip, decoder=decoder)
    save_encoder(str(tmp_path / "theirs"), student.encoder, card, decoder=student.decoder)
    imported = import_weights(tmp_path / "root", tmp_path / "theirs", "ours")
    brought = load_decoder(imported.url, imported.card).state_dict()
    assert all(torch.equal(value, brought[name]) for name, value in student.decoder.state_dict().items())


def test_guesses_are_reported(golden: Path, tmp_path: Path) -> None:
    notes = " ".join(import_weights(tmp_path, golden / "student_state.safetensors", heads=3).notes)
    assert "frames=16: guessed" in notes
    assert "image size 224: guessed" in notes
    with pytest.raises(ConfigError, match="pass --heads"):
        import_weights(tmp_path, golden / "student_state.safetensors", "e2")


def test_size_and_positions_are_inferred_from_a_mae_file(golden: Path, tmp_path: Path) -> None:
    card = import_weights(tmp_path, golden / "mae_state.safetensors", None, heads=3).card
    assert (card.clip.frames, card.clip.size, card.clip.patch) == (1, (16, 16), 4)
    assert (card.encoder.positions, card.encoder.class_token) == ("sincos_2d", True)
    assert card.id == "mae_state"


def test_a_hugging_face_classifier_is_imported_with_head_labels_and_normalisation(tmp_path: Path) -> None:
    names = {0: "run", 1: "jump", 2: "fall"}
    settings = VideoMAEConfig(**PEER, num_frames=4, tubelet_size=2, id2label=names)
    peer = perturbed(VideoMAEForVideoClassification(settings))
    peer.fc_norm.eps = 1e-6
    peer.save_pretrained(tmp_path / "peer")
    (tmp_path / "peer" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "resample": 3}')
    (tmp_path / "peer" / "README.md").write_text("---\ntags:\n- video\nlicense: cc-by-nc-4.0\n---\n# Model\n")
    imported = import_weights(tmp_path, tmp_path / "peer")
    card = imported.card
    assert card.head is not None
    assert (card.head.labels, card.pooling) == (("run", "jump", "fall"), "mean_then_norm")
    assert (card.clip.mean, card.interpolation, card.weights_license) == ((0.1, 0.2, 0.3), "bicubic", "cc-by-nc-4.0")
    assert card.is_non_commercial
    assert card.start is not None
    model, _ = load_classifier(imported.url)
    clips = torch.randn(2, 3, 4, 16, 16)
    with torch.no_grad():
        close(model.head(encode(model.encoder, card.clip, clips, card.pooling)), peer(clips.transpose(1, 2)).logits)


def test_a_head_on_the_class_token_is_omitted_and_reported(tmp_path: Path) -> None:
    perturbed(ViTForImageClassification(ViTConfig(**PEER, num_labels=3))).save_pretrained(tmp_path / "peer")
    imported = import_weights(tmp_path, tmp_path / "peer")
    assert imported.card.head is None
    assert imported.card.encoder.positions == "learned"
    assert "takes the class token" in imported.notes[-1]


def test_importing_a_timm_model_infers_its_size_and_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = perturbed(timm.models.VisionTransformer(**TIMM, num_classes=0))
    peer.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: peer)
    card = import_weights(tmp_path, "timm:vit_tiny_patch16_224", None, license="Apache-2.0").card
    assert card.id == "vit_tiny_patch16_224"
    assert (card.clip.size, card.clip.patch, card.clip.mean) == ((16, 16), 4, (0.5, 0.5, 0.5))
    assert (card.encoder.heads, card.encoder.positions, card.weights_license) == (3, "learned", "Apache-2.0")
    encoder, _ = load_encoder(str(tmp_path / "encoders" / card.id))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        close(encode(encoder, card.clip, images[:, :, None]), peer.forward_features(images)[:, 1:].mean(1))


def test_a_learned_position_table_is_resampled_to_a_different_size(tmp_path: Path) -> None:
    peer = perturbed(timm.models.VisionTransformer(**TIMM, num_classes=0))
    save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    card = import_weights(tmp_path, tmp_path / "vit.safetensors", heads=3, image_size=(24, 32)).card
    assert card.clip.size == (24, 32)
    encoder, _ = load_encoder(str(tmp_path / "encoders" / "e1"))
    expected = timm.layers.resample_abs_pos_embed(peer.pos_embed, [6, 8])
    close(encoder.positions.detach(), expected[0, 1:].detach())


@pytest.mark.parametrize("format", ["official", "timm", "huggingface"])
def test_an_export_can_be_imported_again(golden: Path, tmp_path: Path, format: Any) -> None:
    first = import_weights(tmp_path, golden / "mae_state.safetensors", heads=3, license="CC-BY-NC-4.0")
    output = tmp_path / ("out.pth" if format == "official" else "out")
    export(first.url, format, str(output))
    second = import_weights(tmp_path, output, "e2")
    assert second.notes == []
    assert second.card.encoder.model_copy(update={"positions": "sincos_2d"}) == first.card.encoder
    assert second.card.clip == first.card.clip
    assert str(second.card.weights_license).lower() == "cc-by-nc-4.0"
    assert license_of(str(output), None) == second.card.weights_license
    assert license_of("e1", str(tmp_path)) == "CC-BY-NC-4.0"
    a, b = load_encoder(first.url)[0], load_encoder(second.url)[0]
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_an_unrelated_json_file_next_to_the_weights_is_ignored(golden: Path, tmp_path: Path) -> None:
    file = tmp_path / "mae.safetensors"
    file.write_bytes((golden / "mae_state.safetensors").read_bytes())
    for text in ("{}", '{"input": 3}', '{"input": {"shape": [1]}, "output": {"labels": null}}'):
        (tmp_path / "mae.safetensors.json").write_text(text)
        assert license_of(str(file), None) is None


def test_importing_a_published_encoder_keeps_its_card(golden: Path, tmp_path: Path) -> None:
    first = import_weights(tmp_path, golden / "mae_state.safetensors", heads=3, license="CC-BY-NC-4.0")
    second = import_weights(tmp_path / "other", first.url, "e2")
    assert second.card == first.card.model_copy(update={"id": "e2"})


def test_an_imported_card_records_the_import_job_not_the_job_in_the_original_card(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMD_JOB", "import-1")
    first = import_weights(tmp_path, golden / "mae_state.safetensors", heads=3)
    monkeypatch.setenv("AMD_JOB", "import-2")
    assert import_weights(tmp_path, golden / "mae_state.safetensors", heads=3).card.job == "import-1"  # published once
    second = import_weights(tmp_path / "other", first.url, "e2")
    monkeypatch.delenv("AMD_JOB")
    third = import_weights(tmp_path / "other", first.url, "e3")
    assert (first.card.job, second.card.job, third.card.job) == ("import-1", "import-2", None)


class TouchOnUnpickle:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_malicious_truncated_and_wrong_files_are_rejected_and_publish_nothing(golden: Path, tmp_path: Path) -> None:
    payload = TouchOnUnpickle(tmp_path / "executed")
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"model": {"patch_embed.proj.weight": payload}}, protocol=2))
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2)}, "extra": payload}, tmp_path / "zip.pth")
    whole = (golden / "mae_state.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    save_file({"patch_embed.proj.weight": torch.zeros(64, 3, 2, 2)}, tmp_path / "bare.safetensors")
    for name, expected in (
        ("hostile.pth", "refused: loading would execute"),
        ("zip.pth", "refused: loading would execute"),
        ("truncated.safetensors", "a broken safetensors file"),
        ("resnet.safetensors", "keys match no known layout"),
        ("bare.safetensors", "contains no encoder"),
    ):
        with pytest.raises(ConfigError, match=expected) as caught:
            import_weights(tmp_path, tmp_path / name)
        assert len(caught.value.problems) == 1
    assert not payload.marker.exists()
    assert not (tmp_path / "encoders").exists()


def test_an_invalid_or_already_used_id_is_rejected(golden: Path, tmp_path: Path) -> None:
    import_weights(tmp_path, golden / "mae_state.safetensors", heads=3)
    with pytest.raises(ConfigError, match="another encoder is already published"):
        import_weights(tmp_path, golden / "mae_state.safetensors", heads=6)
    with pytest.raises(ConfigError, match="letters, digits"):
        import_weights(tmp_path, golden / "mae_state.safetensors", "../e3", heads=3)


def test_repeating_an_import_returns_the_published_encoder(tmp_path: Path) -> None:
    peer = perturbed(ViTForImageClassification(ViTConfig(**PEER)))
    peer.save_pretrained(tmp_path / "peer")
    first = import_weights(tmp_path, tmp_path / "peer", license="MIT")
    card = tmp_path / "encoders" / "e1" / "encoder.json"
    written = card.stat().st_mtime_ns
    again = import_weights(tmp_path, tmp_path / "peer", license="MIT")
    assert again == first
    assert card.stat().st_mtime_ns == written
    peer.vit.layernorm.weight.data[0] += 1
    peer.save_pretrained(tmp_path / "peer")
    with pytest.raises(ConfigError, match="another encoder"):  # the file now contains different weights
        import_weights(tmp_path, tmp_path / "peer", license="MIT")


def test_a_wrong_size_is_reported_with_the_differences(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights of a different architecture"):
        import_weights(tmp_path, golden / "mae_state.safetensors", size="S")
