"""PyTorch's `rms_norm` as models compute it: with the weight, with 1 + weight, and with the sum before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide each row by its root mean square, and multiply by the weight."""
    return functional.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)  # autocast makes it float32


def rms_norm_offset(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Do so with 1 + weight, in float32 or wider: in bfloat16, that sum would lose the weight's last digits."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return rms_norm(x.to(dtype), 1.0 + weight.to(dtype), epsilon).to(x.dtype)


def _with_sum(norm: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Any]:
    def add_rms_norm(
        hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float, norm_module: object = None
    ) -> Any:
        """Add, and normalise the sum, without the price of a module's call."""
        if weight.dtype is not hidden_states.dtype or residual.dtype is not hidden_states.dtype:
            return NotImplemented
        summed = residual + hidden_states
        return norm(summed, weight, epsilon), summed

    add_rms_norm.__qualname__ = "add_rms_norm"  # receipts show it
    vars(add_rms_norm).update(can_torch_compile=True, local_except=(-1,))
    return add_rms_norm


SUMS = {"add_rms_norm": _with_sum(rms_norm), "add_rms_norm_offset": _with_sum(rms_norm_offset)}
"""By layer name: the kernels for a sum and its norm."""
