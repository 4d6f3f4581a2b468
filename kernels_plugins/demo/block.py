"""A small Llama-style block made of the demo's layers: all that a user of kernels writes."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers import GeluAndMul, RMSNorm, RotaryEmbedding, SiluAndMul


class Block(nn.Module):
    """Attention, an MLP gated by SiLU and one gated by GELU, so that every layer of the demo is used.

    Each is behind a norm and added to the residual stream; there are half as many keys as query heads.
    """

    def __init__(self, hidden: int, heads: int, inner: int, length: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.attention = Attention(hidden, heads, length)
        self.silu_norm = RMSNorm(hidden)
        self.silu_mlp = mlp(hidden, inner, SiluAndMul())
        self.gelu_norm = RMSNorm(hidden)
        self.gelu_mlp = mlp(hidden, inner, GeluAndMul())

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, seq, hidden] to the same shape."""
        x = x + self.attention(self.norm(x))
        x = x + self.silu_mlp(self.silu_norm(x))
        output: Tensor = x + self.gelu_mlp(self.gelu_norm(x))
        return output


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped keys."""

    cos: Tensor
    sin: Tensor

    def __init__(self, hidden: int, heads: int, length: int) -> None:
        super().__init__()
        self.dim = hidden // heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden // 2, bias=False)
        self.v_proj = nn.Linear(hidden, hidden // 2, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.rotary = RotaryEmbedding()
        angles = torch.outer(torch.arange(length), 10_000 ** -torch.linspace(0, 1, self.dim // 2 + 1)[:-1])
        angles = torch.cat((angles, angles), dim=-1)[None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, seq, hidden] to the same shape."""
        batch, seq, _ = x.shape
        q, k, v = (
            project(x).view(batch, seq, -1, self.dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotary(q, k, self.cos[:, :seq], self.sin[:, :seq])
        # Grouped keys: two query heads share one.
        k, v = (heads.repeat_interleave(2, dim=1) for heads in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


def mlp(hidden: int, inner: int, activation: nn.Module) -> nn.Module:
    """Return two projections up, gated, and one down."""
    up, down = nn.Linear(hidden, 2 * inner, bias=False), nn.Linear(inner, hidden, bias=False)
    return nn.Sequential(OrderedDict(gate_up_proj=up, activation=activation, down_proj=down))
