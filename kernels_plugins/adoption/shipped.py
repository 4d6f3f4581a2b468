"""The rules that come with kernels-core, and their oracles: norms, gated MLPs, activations and rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .rule import Binding, Rule, UnfitError


def random_rows(*shape: int) -> Tensor:
    """Return numbers of several magnitudes: a small row shows the epsilon of a norm, a large one the tails."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return rows * torch.tensor([1e-3, 1.0, 8.0], dtype=torch.float64).view(3, *(1 for _ in shape))


def _hidden(module: Any) -> tuple[Tensor]:
    """Return rows, in training with one more dimension: classes may treat images, (batch, channels, ...), apart.

    The first are as small as the root of the epsilon, so that it matters where the class adds it.
    """
    if getattr(module, "data_format", "") == "channels_first":  # as that of ConvNeXt
        raise UnfitError("it normalises over the channels of images, the second dimension, and the layer over the last")
    shape = tuple(module.weight.shape)
    if len(shape) != 1 or shape == (1,):  # kernels normalise over the shape of the weight, which broadcasts here
        raise UnfitError(f"its weight is of shape {shape}, not as long as a row")
    rows = random_rows(2, *shape) if not module.training else random_rows(1, 2, *shape)
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    rows[0] *= 1e3 * (epsilon**0.5 or 1e-3)
    return (rows,)


def _projected(module: Any) -> tuple[Tensor]:
    projection = module.gate_proj if hasattr(module, "gate_proj") else module.gate_up_proj
    return (random_rows(1, projection.in_features),)


def _gated(module: Any) -> tuple[Tensor]:
    return (random_rows(2, 16),)


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


_T5_NORMS = ("T5", "SwitchTransformers", "Pix2Struct", "Pop2Piano", "Udop", "Kosmos2_5")  # RMSNorms by another name
_RMS_NORMS = ("*.*RMSNorm*", "*.*RmsNorm*", *(f"*.*{model}LayerNorm" for model in _T5_NORMS))
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


def gelu_and_mul(self: Any, x: Tensor) -> Tensor:
    """Do so with the exact GELU."""
    gate, up = x.chunk(2, dim=-1)
    return functional.gelu(gate) * up


def gelu_tanh_and_mul(self: Any, x: Tensor) -> Tensor:
    """Do so with GELU in its approximation by tanh."""
    gate, up = x.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


_GEGLUS = ("*.*GeluAndMul", "*.*GeGLU", "*.*GEGLU")
_GELUS = ("*.*NewGELU*", "*.*FastGELU*", "*.*AccurateGELU*")  # those in one operation have nothing to gain

# --- Rotary embeddings: functions that attention calls ---------------------------------------------

Pair = tuple[Tensor, Tensor]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each row, with numbers for each half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """Rotate queries and keys, which have as many columns as cos and sin."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def rotary_pos_emb_partial(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """Rotate the first columns of queries and keys, as many as cos and sin have: some, or all."""
    width = cos.shape[-1]
    turned = rotary_pos_emb(q[..., :width], k[..., :width], cos, sin, unsqueeze_dim)
    return torch.cat((turned[0], q[..., width:]), dim=-1), torch.cat((turned[1], k[..., width:]), dim=-1)


def rotary_pos_emb_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """Rotate queries and keys, which have twice the columns of cos and sin."""
    return rotary_pos_emb(q, k, torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1), unsqueeze_dim)


def rotary_pos_emb_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """Rotate queries and keys without a batch: positions, heads, columns."""
    return rotary_pos_emb(q, k, cos, sin, -2)


def _rotated(*widths: int) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Return queries of 8 columns, fewer keys, cos and sin of some widths; heads before positions, and after."""

    def inputs(function: Any) -> list[tuple[Any, ...]]:
        q, k = random_rows(4, 5, 8), random_rows(2, 5, 8)
        angles = [(random_rows(5, width), random_rows(5, width).flip(0)) for width in widths]
        return [(q, k, *each, 1) for each in angles] + [
            (q.transpose(1, 2), k.transpose(1, 2), *each, 2) for each in angles
        ]

    return inputs


def _seen(function: Any) -> tuple[Tensor, ...]:
    return random_rows(4, 8), random_rows(2, 8), random_rows(8), random_rows(8).flip(0)


_ANY = ("*",)  # of classes whose forward calls such a function
_ROTARY = "apply_rotary_pos_emb"

RULES = (
    Rule("RMSNorm", "RMSNorm", _RMS_NORMS, rms_norm, _hidden, _RMS_BINDS),
    Rule("RMSNorm, 1 + weight", "RMSNormOffset", _RMS_NORMS, rms_norm_offset, _hidden, _RMS_BINDS),
    Rule(
        "LayerNorm",
        "LayerNorm",
        ("*.*LayerNorm", "*.*LayerNorm1P"),
        layer_norm,
        _hidden,
        {"weight": ("weight", "gamma"), "bias": ("bias", "beta", None), "eps": ("eps", "variance_epsilon", "epsilon")},
    ),
    Rule("SwiGLU MLP", "SwiGLUMLP", _MLPS, swiglu_mlp, _projected, parts=_SEPARATE),
    Rule("GeGLU MLP", "GeGLUMLP", _MLPS, geglu_mlp, _projected, parts=_SEPARATE),
    Rule("GeGLU MLP, tanh", "GeGLUTanhMLP", _MLPS, geglu_tanh_mlp, _projected, parts=_SEPARATE),
    Rule("SwiGLU MLP, packed", "PackedSwiGLUMLP", _MLPS, packed_swiglu_mlp, _projected, parts=_PACKED),
    Rule("GELU, tanh", "GeluTanh", _GELUS, gelu_tanh, _gated),
    Rule("SiLU and mul", "SiluAndMul", ("*.*SiluAndMul", "*.*SwiGLU"), silu_and_mul, _gated),
    Rule("GELU and mul", "GeluAndMul", _GEGLUS, gelu_and_mul, _gated),
    Rule("GELU and mul, tanh", "GeluTanhAndMul", _GEGLUS, gelu_tanh_and_mul, _gated),
    # Before the one for all columns, which computes the same where cos has as many: such a function takes fewer, too.
    Rule("rotary, partial", "rotary_pos_emb_partial", _ANY, rotary_pos_emb_partial, _rotated(4, 8), function=_ROTARY),
    Rule("rotary, half", "rotary_pos_emb_half", _ANY, rotary_pos_emb_half, _rotated(4), function=_ROTARY),
    Rule("rotary", "rotary_pos_emb", _ANY, rotary_pos_emb, _rotated(8), function=_ROTARY),
    Rule("rotary, vision", "rotary_pos_emb_vision", _ANY, rotary_pos_emb_vision, _seen, function=f"{_ROTARY}_vision"),
)
"""In the order in which they are tried."""
