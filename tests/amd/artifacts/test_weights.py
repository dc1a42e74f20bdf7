from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amd.artifacts.weights import (
    Card,
    DecoderCard,
    HeadCard,
    encode,
    load_card,
    load_decoder,
    load_encoder,
    save_encoder,
    write_card,
)
from amd.config import ConfigError
from amd.models.encoder import Encoder
from amd.models.student import Student
from tests.support.runs.configs import tiny_image_config, tiny_video_config


def published(url: str, config=tiny_video_config()) -> tuple[Encoder, Card]:  # type: ignore[no-untyped-def]  # noqa: B008
    encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
    return encoder, save_encoder(url, encoder, Card(id="e1", encoder=config.student.encoder, clip=config.clip))


@pytest.mark.parametrize("config", [tiny_video_config(), tiny_image_config()])
def test_a_published_encoder_returns_the_same_embeddings_after_loading(tmp_path: Path, config) -> None:  # type: ignore[no-untyped-def]
    encoder, card = published(str(tmp_path), config)
    loaded, loaded_card = load_encoder(str(tmp_path))
    clips = torch.randint(0, 256, (2, 3, config.clip.frames, *config.clip.size), dtype=torch.uint8)
    assert loaded_card == card
    vectors = encode(loaded, card.clip, clips)
    assert vectors.shape == (2, 48)
    assert torch.equal(vectors, encode(encoder, config.clip, clips))


def published_with_decoder(url: str) -> tuple[Student, Card]:
    config = tiny_video_config()
    student = Student(config)
    decoder = DecoderCard(
        network=config.student.decoder, mask_strategy="tube", mask_ratio=0.75, pixels=config.objective.pixels
    )
    card = Card(id="e1", encoder=config.student.encoder, clip=config.clip, decoder=decoder)
    return student, save_encoder(url, student.encoder, card, decoder=student.decoder)


def test_a_decoder_is_published_next_to_its_encoder(tmp_path: Path) -> None:
    student, card = published_with_decoder(str(tmp_path))
    assert load_card(str(tmp_path)) == card
    assert card.decoder is not None
    assert card.decoder.sha256 is not None
    loaded = load_decoder(str(tmp_path), card).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in student.decoder.state_dict().items())
    assert "decoder.safetensors" in (tmp_path / "README.md").read_text()


def test_loading_a_damaged_deleted_or_unpublished_decoder_raises(tmp_path: Path) -> None:
    _, card = published_with_decoder(str(tmp_path))
    weights = tmp_path / "decoder.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    with pytest.raises(ConfigError, match="sha256"):
        load_decoder(str(tmp_path), card)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"decoder\.safetensors: file not found"):
        load_decoder(str(tmp_path), card)
    with pytest.raises(ConfigError, match="without a decoder"):
        load_decoder(str(tmp_path), card.model_copy(update={"decoder": None}))


def test_an_encoder_published_to_s3_loads_unchanged(s3_root: str) -> None:
    encoder, _ = published(f"{s3_root}/encoders/e1")
    loaded, _ = load_encoder(f"{s3_root}/encoders/e1")
    assert all(
        torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_loading_a_folder_without_an_encoder_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a published encoder"):
        load_encoder(str(tmp_path))


def test_damaged_weights_are_rejected(tmp_path: Path) -> None:
    published(str(tmp_path))
    weights = tmp_path / "encoder.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    with pytest.raises(ConfigError, match="sha256"):
        load_encoder(str(tmp_path))


def test_a_card_that_does_not_match_the_weights_is_rejected(tmp_path: Path) -> None:
    published(str(tmp_path))
    card = tmp_path / "encoder.json"
    card.write_text(card.read_text().replace('"width": 48', '"width": 96'))
    with pytest.raises(ConfigError, match="does not match its card"):
        load_encoder(str(tmp_path))


def test_the_readme_is_updated_with_the_card(tmp_path: Path) -> None:
    _, card = published(str(tmp_path))
    assert card.sha256 is not None
    assert card.sha256 in (tmp_path / "README.md").read_text()
    write_card(str(tmp_path), card.model_copy(update={"weights_license": "CC-BY-NC-4.0"}))
    assert "Non-commercial use only" in (tmp_path / "README.md").read_text()
    assert load_card(str(tmp_path)).weights_license == "CC-BY-NC-4.0"


def test_the_code_example_in_the_model_card_runs(tmp_path: Path) -> None:
    config = tiny_video_config()
    for head in (None, HeadCard(classes=5)):
        folder = str(tmp_path / ("plain" if head is None else "head"))
        encoder = Encoder(config.student.encoder, config.clip.grid, config.clip.token_values)
        pooling = "mean" if head is None else "mean_then_norm"
        card = Card(id="e1", encoder=encoder.config, clip=config.clip, head=head, pooling=pooling)
        save_encoder(folder, encoder, card, torch.nn.Linear(48, 5) if head else None)
        page = (Path(folder) / "README.md").read_text()
        code = page.split("```python\n")[1].split("```")[0]
        names = {"folder": folder, "clips": torch.zeros(2, 3, 4, 16, 16, dtype=torch.uint8)}
        exec(code, names)
        assert names["vectors" if head is None else "logits"].shape == (2, 5 if head else 48)
