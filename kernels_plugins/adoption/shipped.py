"""The rules that come with kernels-core, and their oracles: norms, gated MLPs and activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .rule import Binding, Rule


def _random(*shape: int) -> Tensor:
    """Return numbers of several magnitudes: a small row shows the epsilon of a norm, a large one the tails."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return rows * torch.tensor([1e-3, 1.0, 8.0], dtype=torch.float64).view(3, *(1 for _ in shape))


def _hidden(module: Any) -> tuple[Tensor]:
    """Return rows, in training with one more dimension: classes may treat images, (batch, channels, ...), apart."""
    shape = tuple(module.weight.shape)
    if len(shape) != 1 or shape == (1,):  # kernels normalise over the shape of the weight, which broadcasts here
        raise ValueError(f"its weight is of shape {shape}, not as long as a row")
    return (_random(2, *shape) if not module.training else _random(1, 2, *shape),)


def _projected(module: Any) -> tuple[Tensor]:
    projection = module.gate_proj if hasattr(module, "gate_proj") else module.gate_up_proj
    return (_random(1, projection.in_features),)


def _gated(module: Any) -> tuple[Tensor]:
    return (_random(2, 16),)


# --- Norms -----------------------------------------------------------------------------------------


def _is_wide() -> bool:
    """Whether `rms_norm` without an epsilon takes that of the dtype in which it computes, as PyTorch 2.6 does not."""
    row = torch.full((1,), 2.0**-9, dtype=torch.bfloat16, device="cpu")
    wide = functional.rms_norm(row, (1,), eps=torch.finfo(torch.float32).eps)
    return torch.equal(functional.rms_norm(row, (1,)), wide)


_IS_WIDE = _is_wide()


def _epsilon(module: Any) -> float:
    """Return the epsilon of an RMSNorm, under any of its names; that of `nn.RMSNorm` may be that of its dtype."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        epsilon = module.__dict__.get(name, module)
        if epsilon is None and isinstance(module, nn.RMSNorm):
            dtype = module.weight.dtype
            return torch.finfo(torch.promote_types(dtype, torch.float32) if _IS_WIDE else dtype).eps
        if isinstance(epsilon, (int, float)):
            return epsilon
    raise AttributeError("it has no number as variance_epsilon, eps or epsilon")


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Divide each row by its root mean square, and multiply by the weight."""
    return _rms_norm(hidden_states, self.weight, self.variance_epsilon)


def rms_norm_offset(self: Any, hidden_states: Tensor) -> Tensor:
    """Divide each row by its root mean square, and multiply by 1 + weight."""
    return _rms_norm(hidden_states, 1 + self.weight, self.variance_epsilon)


def layer_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Normalise each row, multiply by the weight and add the bias."""
    return functional.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.eps)


_RMS_NORMS = ("*.*RMSNorm*", "*.*RmsNorm*", "*.*T5LayerNorm")
_RMS_BINDS: dict[str, Binding] = {"weight": ("weight", "scale"), "variance_epsilon": _epsilon}

# --- MLPs ------------------------------------------------------------------------------------------


def swiglu_mlp(self: Any, x: Tensor) -> Tensor:
    """Project up twice, gate by SiLU, project down."""
    return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def geglu_mlp(self: Any, x: Tensor) -> Tensor:
    """Project up twice, gate by the exact GELU, project down."""
    return self.down_proj(functional.gelu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def geglu_tanh_mlp(self: Any, x: Tensor) -> Tensor:
    """Project up twice, gate by GELU in its approximation by tanh, project down."""
    gate = functional.gelu(self.gate_proj(x), approximate="tanh")
    return self.down_proj(gate * self.up_proj(x))  # type: ignore[no-any-return]


def packed_swiglu_mlp(self: Any, x: Tensor) -> Tensor:
    """Do the same by SiLU, with one projection whose first half is the gate."""
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(up * functional.silu(gate))  # type: ignore[no-any-return]


_MLPS = ("*.*MLP", "*.*MLP2", "*.*FeedForward")
_SEPARATE = {"gate_proj": nn.Linear, "up_proj": nn.Linear, "down_proj": nn.Linear}
_PACKED = {"gate_up_proj": nn.Linear, "down_proj": nn.Linear}

# --- Activations -----------------------------------------------------------------------------------


def gelu_tanh(self: Any, x: Tensor) -> Tensor:
    """Compute GELU in its approximation by tanh."""
    return functional.gelu(x, approximate="tanh")


def silu_and_mul(self: Any, x: Tensor) -> Tensor:
    """Multiply the second half of each row by the SiLU of the first."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


_GELUS = ("*.*NewGELU*", "*.*FastGELU*", "*.*AccurateGELU*")  # those in one operation have nothing to gain

RULES = (
    Rule("RMSNorm", "RMSNorm", _RMS_NORMS, rms_norm, _hidden, _RMS_BINDS),
    Rule("RMSNorm, 1 + weight", "RMSNormOffset", _RMS_NORMS, rms_norm_offset, _hidden, _RMS_BINDS),
    Rule(
        "LayerNorm",
        "LayerNorm",
        ("*.*LayerNorm", "*.*LayerNorm1P"),
        layer_norm,
        _hidden,
        {"weight": ("weight", "gamma"), "bias": ("bias", "beta"), "eps": ("eps", "variance_epsilon", "epsilon")},
    ),
    Rule("SwiGLU MLP", "SwiGLUMLP", _MLPS, swiglu_mlp, _projected, parts=_SEPARATE),
    Rule("GeGLU MLP", "GeGLUMLP", _MLPS, geglu_mlp, _projected, parts=_SEPARATE),
    Rule("GeGLU MLP, tanh", "GeGLUTanhMLP", _MLPS, geglu_tanh_mlp, _projected, parts=_SEPARATE),
    Rule("SwiGLU MLP, packed", "PackedSwiGLUMLP", _MLPS, packed_swiglu_mlp, _projected, parts=_PACKED),
    Rule("GELU, tanh", "GeluTanh", _GELUS, gelu_tanh, _gated),
    Rule("SiLU and mul", "SiluAndMul", ("*.*SiluAndMul", "*.*SwiGLU"), silu_and_mul, _gated),
)
"""In the order in which they are tried."""
