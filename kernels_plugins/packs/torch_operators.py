"""Plugin `torch`: PyTorch's own fused operators, for the norms and activations of adopted models.

Licence: that of PyTorch, BSD. Tried with PyTorch 2.6, 2.11 and 2.13, on CPUs and an NVIDIA GPU. Limits: arguments and
weights of two dtypes are left to the next candidate, for classes differ in the dtype that they return then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels_core import Candidate, LayerRequest, hookimpl


def _norm(name: str, norm: Callable[[Tensor, Tensor, float], Tensor]) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        weight = self.weight
        if weight.dtype is not hidden_states.dtype:
            return NotImplemented
        return norm(hidden_states, weight, self.variance_epsilon)

    return _layer(name, forward)


def _layer_norm(self: Any, hidden_states: Tensor) -> Any:
    weight, bias = self.weight, self.bias
    if weight.dtype is not hidden_states.dtype or (bias is not None and bias.dtype is not weight.dtype):
        return NotImplemented
    return functional.layer_norm(hidden_states, weight.shape, weight, bias, self.eps).to(hidden_states.dtype)


def _gelu_tanh(self: Any, input: Tensor) -> Tensor:
    return functional.gelu(input, approximate="tanh")


def _layer(name: str, forward: Callable[..., Any], *, local_except: tuple[int, ...] = (-1,)) -> type[nn.Module]:
    members = {"forward": forward, "can_torch_compile": True, "local_except": local_except, "__module__": __name__}
    return type(name, (nn.Module,), members)


_OFFERED = ("RMSNorm", "RMSNormOffset", "LayerNorm", "GeluTanh")


@functools.cache
def _kernels() -> dict[str, type[nn.Module]]:
    from .rms_norm import rms_norm, rms_norm_offset  # not needed before

    layer_norm, gelu = _layer("TorchLayerNorm", _layer_norm), _layer("TorchGeluTanh", _gelu_tanh, local_except=())
    norms = {"RMSNorm": _norm("TorchRMSNorm", rms_norm), "RMSNormOffset": _norm("TorchRMSNormOffset", rms_norm_offset)}
    return {**norms, "LayerNorm": layer_norm, "GeluTanh": gelu}


@hookimpl
def kernels_find_candidates(request: LayerRequest) -> list[Candidate] | None:
    """Offer them after those of all other plugins, on CPUs and CUDA GPUs."""
    from ..adoption.classes import adopted_rule  # loaded where a model is adopted, and not needed before

    if request.layer_name not in _OFFERED or request.device.type not in ("cpu", "cuda"):
        return None
    if adopted_rule(request.layer) is None or request.layer is None or request.layer.qualname.startswith("torch."):
        return None  # the last one is the same operator
    return [Candidate(_kernels()[request.layer_name], priority=-10)]


def _load(layer_name: str, device: torch.device) -> object:
    from .rms_norm import SUMS  # they bypass a kernel for the norm: only where a mapping names them

    if layer_name == "linear_cross_entropy":  # only where a mapping names it: the model then returns no logits
        from .linear_cross_entropy import linear_cross_entropy  # not needed before

        return linear_cross_entropy
    if layer_name == "scaled_dot_product_attention":
        from .attention import load  # not needed before

        return load()
    return _kernels().get(layer_name) or SUMS.get(layer_name)


@hookimpl
def kernels_packs() -> Mapping[str, Callable[..., object]]:
    """Offer them for layers that a mapping names, too: the user knows then what these compute."""
    return {"torch": _load}
