"""Transformer blocks of a pre-norm ViT and their weight initialisation.

Shapes: B batch, N tokens, Q query tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from amd.config import Init

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with biases only on queries and values.

    A bias on keys adds a constant to all logits in a row, which softmax cancels, so omitting it changes nothing.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D), or to (B, Q, D) for only the last Q = `queries` tokens."""
        n, d = x.shape[1:]
        if queries is None or queries == n:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            query, key, value = self._heads(functional.linear(x, self.qkv.weight, bias), 3)
        else:
            # Keys and values of all tokens, queries only of the tokens whose outputs are used.
            weight_q, weight_kv = self.qkv.weight.split([d, 2 * d])
            (query,) = self._heads(functional.linear(x[:, n - queries :], weight_q, self.q_bias), 1)
            bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
            key, value = self._heads(functional.linear(x, weight_kv, bias), 2)
        mixed = functional.scaled_dot_product_attention(query, key, value)  # (B, heads, N or Q, D / heads)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split a projection into heads: (B, N, parts * D) -> `parts` tensors of (B, heads, N, D / heads)."""
        b, n, _ = x.shape
        return x.reshape(b, n, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with per-sample stochastic depth at rate `drop_path`."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, mlp_ratio)
        self.drop_path = drop_path

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D), or to (B, Q, D) for only the last Q = `queries` tokens."""
        attended = self.attn(self.norm1(x), queries)
        if queries is not None:
            x = x[:, x.shape[1] - queries :]
        x = x + self._drop_branch(attended)
        return x + self._drop_branch(self.mlp(self.norm2(x)))

    def _drop_branch(self, branch: Tensor) -> Tensor:
        """Apply stochastic depth: zero the branch for some samples and scale it for all others."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        return branch * branch.new_empty(shape).bernoulli_(keep) / keep


def init_weights(module: nn.Module, init: Init) -> None:
    """Initialise the linear layers and norms of `module`: Xavier-uniform as in the official code, or trunc-normal."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            if init == "trunc_normal":
                nn.init.trunc_normal_(part.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def init_like_torch(linear: nn.Linear) -> None:
    """Apply PyTorch's default init, U(+-1/sqrt(fan in)), as in VideoMAE's patch embedding and decoder input layer."""
    bound = 1 / math.sqrt(linear.in_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        nn.init.uniform_(linear.bias, -bound, bound)


def init_token(token: Tensor, init: Init) -> None:
    """Initialise a mask or class token from a normal distribution, truncated at one standard deviation in VideoMAE."""
    if init == "videomae":
        nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    else:
        nn.init.normal_(token, std=0.02)
