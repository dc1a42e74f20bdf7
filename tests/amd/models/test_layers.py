from __future__ import annotations

import pytest
import torch

from amd.models.layers import Attention, Block
from amd.models.predictor import Predictor
from tests.support.runs.configs import tiny_video_config


def perturb(module: torch.nn.Module) -> None:
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("queries", [1, 5, 9])
def test_limiting_a_block_to_the_last_tokens_does_not_change_their_output(queries: int) -> None:
    block = Block(24, 3, 4.0)
    perturb(block)
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(block(x, queries), block(x)[:, -queries:], rtol=1e-5, atol=1e-5)


def test_attention_matches_the_formula() -> None:
    attention = Attention(24, 3)
    perturb(attention)
    x = torch.randn(2, 5, 24)
    weight_q, weight_k, weight_v = attention.qkv.weight.chunk(3)
    q, k, v = x @ weight_q.T + attention.q_bias, x @ weight_k.T, x @ weight_v.T + attention.v_bias
    heads = []
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)
        scores = (q[..., part] @ k[..., part].transpose(1, 2)) / 8**0.5
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)), rtol=1e-4, atol=1e-4)


def test_a_bias_on_keys_does_not_change_the_output() -> None:
    attention = Attention(24, 3)
    perturb(attention)
    x = torch.randn(2, 5, 24)
    plain = attention(x)
    q, k, v = torch.nn.functional.linear(x, attention.qkv.weight).chunk(3, dim=-1)
    shifted = k + torch.randn(24)
    q, k, v = (t.reshape(2, 5, 3, 8).transpose(1, 2) for t in (q + attention.q_bias, shifted, v + attention.v_bias))
    biased = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(biased), plain, rtol=1e-4, atol=1e-4)


def test_drop_path_preserves_the_mean_in_training_and_is_inactive_in_evaluation() -> None:
    block = Block(24, 3, 4.0, drop_path=0.5)
    perturb(block)
    x = torch.randn(1, 4, 24)
    block.eval()
    assert torch.equal(block(x), block(x))
    block.train()
    branch = torch.ones(20_000, 1, 1)
    kept = block._drop_branch(branch)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert abs(float(kept.mean()) - 1) < 0.05


def test_predictions_are_the_same_with_and_without_returning_visible_tokens() -> None:
    config = tiny_video_config()
    predictor = Predictor(config.student.encoder, config.clip.grid, 32, depth=2, heads=2)
    perturb(predictor)
    visible, queries = torch.arange(8)[None], torch.arange(8, 32)[None]
    x = torch.randn(1, 8, 32)
    whole = predictor(x, visible, queries, return_visible=True)
    assert whole.shape == (1, 32, 32)
    torch.testing.assert_close(predictor(x, visible, queries), whole[:, 8:], rtol=1e-4, atol=1e-4)
