"""The kernels for the layers of adopted models: forwards that run on their modules, and functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels_core import KernelLayer

from . import cross_entropy, gated, rms_norm, rotary


def _norm(offset: float) -> type[nn.Module]:
    class TritonRMSNorm(nn.Module):
        can_torch_compile = True
        local_except = (-1,)

        def forward(self: Any, hidden_states: Tensor) -> Any:
            weight = self.weight
            # Classes differ in the dtype that they return where weights have another one, and in what they broadcast.
            if weight.dtype is not hidden_states.dtype or hidden_states.shape[-1:] != weight.shape:
                return NotImplemented
            return rms_norm.rms_norm(hidden_states, weight, self.variance_epsilon, offset)

    return TritonRMSNorm


def _mlp(kind: int) -> type[nn.Module]:
    class TritonMLP(nn.Module):
        can_torch_compile = True
        local_except = (-1,)

        def forward(self: Any, x: Tensor) -> Any:
            return self.down_proj(gated.gated(self.gate_proj(x), self.up_proj(x), kind))

    return TritonMLP


class TritonPackedSwiGLUMLP(nn.Module):
    """The same with one projection whose first half is the gate."""

    can_torch_compile = True
    local_except = (-1,)

    def forward(self: Any, x: Tensor) -> Any:
        """Project up, gate by SiLU, project down."""
        return self.down_proj(gated.packed_gated(self.gate_up_proj(x), gated.SILU))


def _and_mul(kind: int) -> type[nn.Module]:
    class TritonActAndMul(nn.Module):
        can_torch_compile = True
        local_except = (-1,)

        def forward(self: Any, x: Tensor) -> Tensor:
            return gated.packed_gated(x, kind)

    return TritonActAndMul


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, halves: int, *, partial: bool) -> Any:
    angles = cos.shape[-1] * (3 - halves)
    if q.dtype is not cos.dtype or (angles != q.shape[-1] and not partial):
        return NotImplemented
    if not rotary.fits(q, k, cos, sin, unsqueeze_dim, halves):
        return NotImplemented
    return rotary.turn(q, k, cos, sin, unsqueeze_dim, halves, False)


def rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """Turn queries and keys, which have as many columns as cos and sin."""
    return _rotary(q, k, cos, sin, unsqueeze_dim, 2, partial=False)


def rotary_pos_emb_partial(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """Turn the first columns of queries and keys, as many as cos and sin have."""
    return _rotary(q, k, cos, sin, unsqueeze_dim, 2, partial=True)


def rotary_pos_emb_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """Turn queries and keys, which have twice the columns of cos and sin."""
    return _rotary(q, k, cos, sin, unsqueeze_dim, 1, partial=False)


def rotary_pos_emb_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Turn queries and keys without a batch: positions, heads, columns."""
    if not q.dim() == k.dim() == 3 or cos.dim() != 2:
        return NotImplemented
    turned = _rotary(q[None], k[None], cos[None], sin[None], 2, 2, partial=False)
    return turned if turned is NotImplemented else (turned[0][0], turned[1][0])


# --- For parents -----------------------------------------------------------------------------------


def _add(hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float, offset: float) -> Any:
    if not hidden_states.dtype is residual.dtype is weight.dtype or hidden_states.shape != residual.shape:
        return NotImplemented
    if hidden_states.shape[-1:] != weight.shape:
        return NotImplemented
    return rms_norm.add_rms_norm(hidden_states, residual, weight, epsilon, offset)


def add_rms_norm(hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float, norm: nn.Module) -> Any:
    """Add, and normalise the sum."""
    return _add(hidden_states, residual, weight, epsilon, 0.0)


def add_rms_norm_offset(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float, norm: nn.Module
) -> Any:
    """Add, and normalise the sum by a norm with 1 + weight."""
    return _add(hidden_states, residual, weight, epsilon, 1.0)


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_items: Tensor | int | None,
    ignore_index: int,
) -> Any:
    """Return the mean loss of the labels, or their sum by a number of items."""
    if torch.is_autocast_enabled():  # as the linear layer does
        dtype = torch.get_autocast_dtype("cuda")
        hidden_states, weight, bias = (
            hidden_states.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
    if hidden_states.dtype is not weight.dtype or (bias is not None and bias.dtype is not weight.dtype):
        return NotImplemented
    return cross_entropy.linear_cross_entropy(hidden_states, weight, bias, labels, num_items, ignore_index).float()


for _function in (
    *(rotary_pos_emb, rotary_pos_emb_partial, rotary_pos_emb_half, rotary_pos_emb_vision),
    *(add_rms_norm, add_rms_norm_offset),
):
    vars(_function)["can_torch_compile"] = True
for _function in (add_rms_norm, add_rms_norm_offset):
    vars(_function)["local_except"] = (-1,)
for _function in (rotary_pos_emb, rotary_pos_emb_partial, rotary_pos_emb_half):
    vars(_function)["local_except"] = (-1, -3)  # by position: the heads of q are where cos and sin have a batch

KERNELS: dict[str, KernelLayer] = {
    "RMSNorm": _norm(0.0),
    "RMSNormOffset": _norm(1.0),
    "SwiGLUMLP": _mlp(gated.SILU),
    "GeGLUMLP": _mlp(gated.GELU),
    "GeGLUTanhMLP": _mlp(gated.GELU_TANH),
    "PackedSwiGLUMLP": TritonPackedSwiGLUMLP,
    "SiluAndMul": _and_mul(gated.SILU),
    "GeluAndMul": _and_mul(gated.GELU),
    "GeluTanhAndMul": _and_mul(gated.GELU_TANH),
    "rotary_pos_emb": rotary_pos_emb,
    "rotary_pos_emb_partial": rotary_pos_emb_partial,
    "rotary_pos_emb_half": rotary_pos_emb_half,
    "rotary_pos_emb_vision": rotary_pos_emb_vision,
    "add_rms_norm": add_rms_norm,
    "add_rms_norm_offset": add_rms_norm_offset,
    "linear_cross_entropy": linear_cross_entropy,
}
"""By layer name."""
