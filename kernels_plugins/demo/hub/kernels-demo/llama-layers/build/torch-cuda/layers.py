# SPDX-License-Identifier: Apache-2.0
"""The layers, each a `forward` over the Triton kernels beside this file.

Each class holds a `forward` alone: a kernel loader runs it with `self` being the layer of the model, whose
parameters and attributes it reads.
"""

import torch
from torch import Tensor, nn

from .gated import GELU, SILU, packed_gated
from .rms_norm import rms_norm
from .rotary import fits, rotary

__all__ = ["GeluAndMul", "RMSNorm", "RotaryEmbedding", "SiluAndMul", "gelu_and_mul", "silu_and_mul"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 and scaled in the input's dtype."""

    has_backward = True
    can_torch_compile = True
    local_except = (-1,)

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises the last dimension of `hidden_states`."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SiluAndMul(nn.Module):
    """SiLU of the first half of the last dimension, times the second half."""

    has_backward = True
    can_torch_compile = True
    local_except = (-1,)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `silu(a) * b` for `x = [a, b]`."""
        return silu_and_mul(x)


class GeluAndMul(nn.Module):
    """Exact GELU of the first half of the last dimension, times the second half."""

    has_backward = True
    can_torch_compile = True
    local_except = (-1,)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `gelu(a) * b` for `x = [a, b]`."""
        return gelu_and_mul(x)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys, pairing each channel with the one half a head away."""

    has_backward = True
    can_torch_compile = True
    local_except = (-1, -3, -4)  # by position: heads and batches do not align with those of cos and sin

    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates `query` and `key` of shape [batch, heads, seq, dim] by `cos` and `sin` of [batch or 1, seq, dim]."""
        if not fits(query, key, cos, sin):
            # Such as angles that are learned: a gradient that is missing would pass unnoticed.
            return _rotary(query, cos, sin), _rotary(key, cos, sin)
        return rotary(query, key, cos, sin)


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns `silu(a) * b` for `x = [a, b]` along the last dimension."""
    return packed_gated(x, SILU)


def gelu_and_mul(x: Tensor) -> Tensor:
    """Returns `gelu(a) * b`, with the exact GELU, for `x = [a, b]` along the last dimension."""
    return packed_gated(x, GELU)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
