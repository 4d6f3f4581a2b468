"""Plugin `liger`: the kernels of Liger, in Triton, for norms and gated MLPs on GPUs.

Licence of `liger-kernel`: BSD 2-clause. Tried with 0.8.5. Served only where a mapping names `"pack:liger"`, for they
make the decoding of single tokens slower. Limits: float16, bfloat16 and float32; rows of at most 65,536 items; not in
compiled code, where the layer's own operators are fused as well; no second derivatives, and for an MLP one backward for
each forward, for it writes the gradients over the outputs of the projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from kernels_core import KernelLayer, LoadedLayer, LoadError, hookimpl

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _checked(output: Tensor, *, once: bool = False) -> Tensor:
    """Let a backward raise that Liger would compute wrongly in silence."""
    runs = 0

    def check(gradients: object) -> None:
        nonlocal runs
        runs += 1
        if torch.is_grad_enabled() or (once and runs > 1):  # autograd records a backward for a second derivative only
            why = "a second backward through one forward" if runs > 1 else "second derivatives"
            raise RuntimeError(f"Liger's kernels cannot compute {why}: leave pack:liger out of the mapping there.")

    if output.grad_fn is not None:
        output.grad_fn.register_prehook(check)
    return output


def _norm(apply: Callable[..., Tensor], offset: float, casting: str) -> type[nn.Module]:
    class LigerRMSNorm(nn.Module):
        dtypes = _DTYPES
        local_except = (-1,)

        def forward(self: Any, hidden_states: Tensor) -> Any:
            weight = self.weight
            if weight.dtype is not hidden_states.dtype:  # classes differ in the dtype that they return then
                return NotImplemented
            # Not in place: that would overwrite the gradient of the output, which a residual connection reads, too.
            return _checked(apply(hidden_states, weight, self.variance_epsilon, offset, casting, False))

    return LigerRMSNorm


def _mlp(apply: Callable[..., Tensor], *, packed: bool = False) -> type[nn.Module]:
    class LigerMLP(nn.Module):
        dtypes = _DTYPES
        local_except = (-1,)

        def forward(self: Any, x: Tensor) -> Any:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if packed else (self.gate_proj(x), self.up_proj(x))
            return self.down_proj(_checked(apply(gate, up), once=True))

    return LigerMLP


@functools.cache
def _kernels() -> dict[str, KernelLayer]:
    from liger_kernel import ops  # type: ignore[import-not-found,import-untyped,unused-ignore]  # takes seconds

    silu, gelu, norm = (getattr(ops, f"Liger{name}Function").apply for name in ("SiLUMul", "GELUMul", "RMSNorm"))
    norms = {"RMSNorm": _norm(norm, 0.0, "llama"), "RMSNormOffset": _norm(norm, 1.0, "gemma")}
    mlps = {"SwiGLUMLP": _mlp(silu), "GeGLUTanhMLP": _mlp(gelu), "PackedSwiGLUMLP": _mlp(silu, packed=True)}
    return {**norms, **mlps}


def _load(layer_name: str, device: torch.device) -> LoadedLayer | None:
    if device.type != "cuda":
        raise LoadError(f"Liger's kernels are for GPUs, and this call is on {device.type}")
    try:
        kernel = _kernels().get(layer_name)
    except ImportError as error:
        raise LoadError(f"{error}: pip install 'kernels-core[liger]' installs liger-kernel") from error
    return LoadedLayer(kernel, f"liger-kernel {version('liger-kernel')}") if kernel is not None else None


@hookimpl
def kernels_packs() -> Mapping[str, Callable[..., object]]:
    """Offer the pack; nothing of Liger is imported before it serves."""
    return {"liger": _load}
