# SPDX-License-Identifier: Apache-2.0
"""The layers, each a `forward` over the Triton kernels beside this file.

Each class holds a `forward` alone: a kernel loader runs it with `self` being the layer of the model, whose
parameters and attributes it reads.
"""

from torch import Tensor, nn

from .gated import gelu_and_mul, silu_and_mul
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = ["GeluAndMul", "RMSNorm", "RotaryEmbedding", "SiluAndMul", "gelu_and_mul", "silu_and_mul"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 and scaled in the input's dtype."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises the last dimension of `hidden_states`."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SiluAndMul(nn.Module):
    """SiLU of the first half of the last dimension, times the second half."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Returns `silu(a) * b` for `x = [a, b]`."""
        return silu_and_mul(x)


class GeluAndMul(nn.Module):
    """Exact GELU of the first half of the last dimension, times the second half."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Returns `gelu(a) * b` for `x = [a, b]`."""
        return gelu_and_mul(x)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys, pairing each channel with the one half a head away."""

    has_backward = True
    can_torch_compile = True

    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates `query` and `key` of shape [batch, heads, seq, dim] by `cos` and `sin` of [batch or 1, seq, dim]."""
        return rotary(query, key, cos, sin)
