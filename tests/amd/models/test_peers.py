"""Compare our models with transformers' VideoMAE and ViTMAE and with a timm ViT on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining, ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from amd.config import ClipConfig, EncoderConfig, TrainConfig, validate
from amd.distillation import distill
from amd.exchange.load import load_encoder_state, load_student_state
from amd.models.encoder import Encoder
from amd.models.student import Student
from amd.models.teachers.timm import load_timm
from amd.tokens import TokenSets, patchify
from tests.support.runs.configs import mae, tiny_image_config, tiny_video_config

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}


def perturbed(model: nn.Module) -> nn.Module:
    """Move all parameters away from neutral values, so that a dropped bias changes the loss."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def vit_mae(**settings: Any) -> Any:
    peer = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **settings))
    # transformers 5 leaves the position tables of a new model at zero; its own function computes them with sine and
    # cosine halves swapped.
    for table in (peer.vit.embeddings.position_embeddings, peer.decoder.decoder_pos_embed):
        filled = build_2d_sinusoidal_position_embedding(4, 4, table.shape[-1], cls_token=True)
        table.data.copy_(filled.roll(table.shape[-1] // 2, dims=-1))
    return perturbed(peer)


def published_videomae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys as in published files: `q_bias` and `v_bias` next to the linear layers."""
    names = {"query.bias": "q_bias", "value.bias": "v_bias"}
    return {
        next((key.replace(new, old) for new, old in names.items() if key.endswith(new)), key): tensor
        for key, tensor in state.items()
    }


def published_vit_mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys to the names used before transformers 5."""
    renames = (
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )
    out = {}
    for key, tensor in state.items():
        for new, old in renames:
            key = key.replace(new, old)
        out[key] = tensor
    return out


def unchanged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def peer_sized(base: TrainConfig) -> TrainConfig:
    encoder = {"width": 48, "depth": 3, "heads": 3}
    return mae(base, **{f"student__encoder__{key}": value for key, value in encoder.items()})


def load(config: TrainConfig, state: dict[str, Tensor]) -> Student:
    student = Student(config).eval()
    load_student_state(student, state, "peer")
    return student


def random_sets(batch: int, tokens: int, visible: int) -> TokenSets:
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)])
    shown, hidden = order[:, :visible].sort().values, order[:, visible:].sort().values
    return TokenSets(shown, hidden[:, :0], hidden, hidden)


@pytest.mark.parametrize("rename_keys", [unchanged, published_videomae])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_matches_transformers_videomae_on_the_same_mask(normalised: bool, rename_keys: Callable) -> None:
    torch.manual_seed(0)
    settings = VideoMAEConfig(
        **SIZES, num_frames=4, tubelet_size=2, use_mean_pooling=False, norm_pix_loss=normalised, qkv_bias=True
    )
    peer: Any = perturbed(VideoMAEForPreTraining(settings))
    peer.decoder.norm.eps = 1e-6  # the official value; transformers keeps torch's default of 1e-5
    config = peer_sized(tiny_video_config(objective__pixels="per_channel" if normalised else "unit"))
    student = load(config, rename_keys(peer.state_dict()))
    clips, sets = torch.randn(3, 3, 4, 16, 16), random_sets(3, 32, 8)
    hidden = torch.zeros(3, 32, dtype=torch.bool).scatter(1, sets.student_masked, True)
    with torch.no_grad():
        theirs = peer(clips.transpose(1, 2), bool_masked_pos=hidden)
        loss = distill(student, None, clips, sets, config).total
        output = student(patchify(clips, 2, 4).gather(1, sets.student_visible[..., None].expand(-1, -1, 96)), sets)
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    torch.testing.assert_close(output.reconstructed, theirs.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rename_keys", [unchanged, published_vit_mae])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_matches_transformers_vit_mae_on_the_same_mask(normalised: bool, rename_keys: Callable) -> None:
    torch.manual_seed(0)
    peer = vit_mae(mask_ratio=0.75, norm_pix_loss=normalised)
    config = peer_sized(tiny_image_config(objective__pixels="per_patch" if normalised else "normalized"))
    student = load(config, rename_keys(peer.state_dict()))
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    order = noise.argsort(dim=1)
    sets = TokenSets(order[:, :4], order[:, :0], order[:, 4:], order[:, 4:])
    with torch.no_grad():
        theirs = peer(images, noise=noise)
        loss = distill(student, None, images[:, :, None], sets, config).total
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("part", ["q_bias", "v_bias"])
def test_attention_biases_left_at_zero_change_the_loss(part: str) -> None:
    torch.manual_seed(0)
    peer = vit_mae(norm_pix_loss=True)
    config = peer_sized(tiny_image_config())
    student = load(config, peer.state_dict())
    images, sets = torch.randn(2, 3, 1, 16, 16), random_sets(2, 16, 4)
    with torch.no_grad():
        before = distill(student, None, images, sets, config).total.item()
        for block in student.encoder.blocks:
            block.attn.get_parameter(part).zero_()
        after = distill(student, None, images, sets, config).total.item()
    assert after != pytest.approx(before, rel=1e-4)


def test_features_match_a_timm_vit() -> None:
    import timm

    clip = ClipConfig(frames=1, tubelet=1, size=(32, 48), patch=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    torch.manual_seed(0)
    state = load_timm("timm:vit_tiny_patch16_224", clip, pretrained=False).state_dict()
    peer = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=clip.size, num_classes=0)
    peer.load_state_dict(state)
    perturbed(peer)
    config = validate(EncoderConfig, {"width": 192, "depth": 12, "heads": 3, "class_token": True})
    encoder = Encoder(config, clip.grid, clip.token_values).eval()
    load_encoder_state(encoder, peer.state_dict(), "timm", intermediates_only=True)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        theirs = peer.forward_features(images)
        got = encoder(patchify(images[:, :, None], 1, 16), torch.arange(6).expand(2, -1)).final
    torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-4)
