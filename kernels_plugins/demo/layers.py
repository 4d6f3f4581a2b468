"""The demo's layers in eager torch: the reference forward of every kernel."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels_core import use_kernel_forward_from_hub

__all__ = ["GeluAndMul", "RMSNorm", "RotaryEmbedding", "SiluAndMul"]


@use_kernel_forward_from_hub("RMSNorm")
class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, as Llama defines it."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise in float32, round to the input's dtype, then scale by the weight."""
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


@use_kernel_forward_from_hub("SiluAndMul")
class SiluAndMul(nn.Module):
    """SiLU of the first half of the last dimension, times the second half."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `silu(a) * b` for `x = [a, b]`."""
        half = x.shape[-1] // 2
        return functional.silu(x[..., :half]) * x[..., half:]


@use_kernel_forward_from_hub("GeluAndMul")
class GeluAndMul(nn.Module):
    """Exact GELU of the first half of the last dimension, times the second half."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `gelu(a) * b` for `x = [a, b]`."""
        half = x.shape[-1] // 2
        return functional.gelu(x[..., :half]) * x[..., half:]


@use_kernel_forward_from_hub("RotaryEmbedding")
class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys, pairing each channel with the one half a head away."""

    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions' angles.

        Args:
            query: [batch, heads, seq, dim].
            key: [batch, key heads, seq, dim].
            cos: [batch or 1, seq, dim].
            sin: [batch or 1, seq, dim].
        """
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
