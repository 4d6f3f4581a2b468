"""Plugin `torch`: PyTorch's own fused operators, for the norms and activations of adopted models.

Licence: that of PyTorch, BSD. Tried with PyTorch 2.6, 2.11 and 2.13, on CPUs and an NVIDIA GPU. Limits: arguments and
weights of two dtypes are left to the next candidate, for classes differ in the dtype that they return then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels_core import Candidate, LayerRequest, hookimpl


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)  # autocast makes it float32


def _rms_norm_offset(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Do so with 1 + weight, in float32 or wider: in bfloat16, that sum would lose the weight's last digits."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return _rms_norm(x.to(dtype), 1.0 + weight.to(dtype), epsilon).to(x.dtype)


class TorchRMSNorm(nn.Module):
    """`torch.nn.functional.rms_norm`."""

    can_torch_compile = True
    local_except = (-1,)

    def forward(self: Any, hidden_states: Tensor) -> Any:
        """Return rows of the same shape and dtype."""
        weight = self.weight
        if weight.dtype is not hidden_states.dtype:
            return NotImplemented
        return _rms_norm(hidden_states, weight, self.variance_epsilon)


class TorchRMSNormOffset(nn.Module):
    """The same with 1 + weight."""

    can_torch_compile = True
    local_except = (-1,)

    def forward(self: Any, hidden_states: Tensor) -> Any:
        """Return rows of the same shape and dtype."""
        weight = self.weight
        if weight.dtype is not hidden_states.dtype:
            return NotImplemented
        return _rms_norm_offset(hidden_states, weight, self.variance_epsilon)


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


class TorchLayerNorm(nn.Module):
    """`torch.nn.functional.layer_norm`."""

    can_torch_compile = True
    local_except = (-1,)

    def forward(self: Any, hidden_states: Tensor) -> Any:
        """Return rows of the same shape and dtype."""
        weight, bias = self.weight, self.bias
        if weight.dtype is not hidden_states.dtype or (bias is not None and bias.dtype is not weight.dtype):
            return NotImplemented
        return functional.layer_norm(hidden_states, weight.shape, weight, bias, self.eps).to(hidden_states.dtype)


class TorchGeluTanh(nn.Module):
    """`torch.nn.functional.gelu`, approximated by tanh."""

    can_torch_compile = True
    local_except = ()

    def forward(self: Any, input: Tensor) -> Tensor:
        """Return a tensor of the same shape and dtype."""
        return functional.gelu(input, approximate="tanh")


_KERNELS = {
    "RMSNorm": TorchRMSNorm,
    "RMSNormOffset": TorchRMSNormOffset,
    "LayerNorm": TorchLayerNorm,
    "GeluTanh": TorchGeluTanh,
}
_NAMED = {"add_rms_norm": _with_sum(_rms_norm), "add_rms_norm_offset": _with_sum(_rms_norm_offset)}
"""Kernels that serve only where a mapping names them, for they bypass a kernel that is mapped for the norm."""


@hookimpl
def kernels_find_candidates(request: LayerRequest) -> list[Candidate] | None:
    """Offer them after those of all other plugins, on CPUs and CUDA GPUs."""
    from ..adoption.classes import adopted_rule  # loaded where a model is adopted, and not needed before

    kernel = _KERNELS.get(request.layer_name)
    if kernel is None or request.device.type not in ("cpu", "cuda") or adopted_rule(request.layer) is None:
        return None
    if request.layer is None or request.layer.qualname.startswith("torch."):  # that is the same operator
        return None
    return [Candidate(kernel, priority=-10)]


def _load(layer_name: str, device: torch.device) -> object:
    if layer_name == "linear_cross_entropy":  # only where a mapping names it: the model then returns no logits
        from .linear_cross_entropy import linear_cross_entropy  # not needed before

        return linear_cross_entropy
    return {**_KERNELS, **_NAMED}.get(layer_name)


@hookimpl
def kernels_packs() -> Mapping[str, Callable[..., object]]:
    """Offer them for layers that a mapping names, too: the user knows then what these compute."""
    return {"torch": _load}
