"""Tests that fixed 2-D position tables at a different input size match transformers and timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from amd.artifacts.weights import Card, encode, load_encoder, save_encoder
from amd.config import ClipConfig
from amd.tokens import position_table
from tests.amd.exchange.test_initialization import BASE, IMAGE, publish, rejection_message, start
from tests.support.runs.peers import PEER, close, perturbed

MAE_VALUES = {**BASE, "class_token": True, "positions": "sincos_2d"}


def mae_folder(folder: Path) -> Any:
    """Save a ViTMAE for IMAGE's size with MAE's position table; return its embedding layer."""
    peer = perturbed(ViTMAEForPreTraining(ViTMAEConfig(**PEER, mask_ratio=0.0, decoder_hidden_size=32)))
    table = position_table("sincos_2d", IMAGE.grid, 48)
    peer.vit.embeddings.position_embeddings.data.copy_(torch.cat([torch.zeros(1, 48), table])[None])
    peer.save_pretrained(folder)
    return peer.vit.embeddings


@pytest.mark.parametrize("published", [False, True], ids=["third-party", "published"])
@pytest.mark.parametrize("size", [(24, 24), (32, 16), (8, 8), (16, 16)])
def test_a_resized_2d_position_table_matches_transformers_and_timm(
    tmp_path: Path, size: tuple[int, int], published: bool
) -> None:
    embeddings = mae_folder(tmp_path / "mae")
    if published:
        publish(tmp_path / "mae", MAE_VALUES, IMAGE)
    clip = ClipConfig(frames=1, tubelet=1, size=size, patch=4)
    encoder, point = start(MAE_VALUES, clip, tmp_path / "mae")
    table = embeddings.position_embeddings
    close(encoder.positions, resample_abs_pos_embed(table, list(clip.grid[1:]), antialias=False)[0, 1:])
    theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, clip.grid.tokens + 1, 48), *size)
    close(encoder.positions, theirs[0, 1:])
    assert point.position_grid == (None if size == IMAGE.size else (4, 4))
    if size == IMAGE.size:
        assert torch.equal(encoder.positions, position_table("sincos_2d", IMAGE.grid, 48))
    assert "positions" not in encoder.state_dict()


def test_a_resized_2d_position_table_is_always_interpolated_from_its_original_grid(tmp_path: Path) -> None:
    larger, video = (ClipConfig(frames=f, tubelet=f, size=(24, 32), patch=4) for f in (1, 2))
    publish(tmp_path / "first", MAE_VALUES, IMAGE)
    second, _ = start(MAE_VALUES, larger, tmp_path / "first")
    save_encoder(str(tmp_path / "second"), second, Card(id="e2", encoder=second.config, clip=larger))
    same, _ = start(MAE_VALUES, larger, tmp_path / "second")
    assert torch.equal(same.positions, second.positions)
    loaded, card = load_encoder(str(tmp_path / "second"))
    assert card.encoder.position_grid == (4, 4)
    images = torch.randn(2, 3, 1, 24, 32)
    with torch.no_grad():
        assert torch.equal(encode(loaded, larger, images), encode(second.eval(), larger, images))
    back, point = start(MAE_VALUES, IMAGE, tmp_path / "second")
    assert (point.position_grid, back.positions.tolist()) == (
        None,
        position_table("sincos_2d", IMAGE.grid, 48).tolist(),
    )
    clips, _ = start(MAE_VALUES, video, tmp_path / "second")
    assert torch.equal(clips.positions, second.positions)
    message = rejection_message(MAE_VALUES | {"position_grid": (5, 5)}, larger, tmp_path / "first")
    assert "its position table covers 4x4 tokens: set encoder.position_grid=[4, 4]" in message
