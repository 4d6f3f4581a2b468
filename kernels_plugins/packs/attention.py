"""PyTorch's `scaled_dot_product_attention`, for a function that computes it and takes some or all of its parameters."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import cast

from torch import Tensor
from torch.nn import functional

from kernels_core import KernelLayer, Layer, LoadedLayer, LoadError


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call the operator, which takes the last two by name only."""
    given = (query, key, value, attn_mask, dropout_p, is_causal)
    return functional.scaled_dot_product_attention(*given, scale=scale, enable_gqa=enable_gqa)


def _fitted(layer: Layer) -> KernelLayer:
    """Return the kernel with the parameters of a layer: where these are the same, calls can leave out all others."""
    own = list(inspect.signature(scaled_dot_product_attention).parameters.values())
    taken = list(layer.signature.parameters.values())
    same = [
        one.name == other.name and one.kind is other.kind and one.default in (one.empty, other.default)
        for one, other in zip(taken, own, strict=False)
    ]
    if not layer.is_function or not 3 <= len(taken) <= len(own) or not all(same):
        shown = ", ".join(str(each.replace(annotation=each.empty)) for each in own)
        raise LoadError(
            f"PyTorch's operator serves functions that take ({shown}), or the first of these, with equal defaults; "
            f"write such a function for the layer, which takes ({', '.join(map(str, layer.signature.parameters))})"
        )
    plain = cast(FunctionType, scaled_dot_product_attention)
    made = FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__)
    vars(made).update(can_torch_compile=True, __signature__=layer.signature)
    return made


def load() -> LoadedLayer:
    """Return the kernel, which is made for each layer."""
    place = f"{scaled_dot_product_attention.__module__}.{scaled_dot_product_attention.__qualname__}"
    return LoadedLayer(scaled_dot_product_attention, place, adapt=_fitted)
