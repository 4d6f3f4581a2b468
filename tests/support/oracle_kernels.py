"""A layer, and kernels for it: right ones, and such that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kernels_core import use_kernel_forward_from_hub

EPS = 1e-6


@use_kernel_forward_from_hub("OracleNorm")
class Norm(nn.Module):
    """The layer: a root mean square norm with a weight."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * h.to(x.dtype)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def kernel(forward: Callable[..., Any], **declarations: bool) -> type[nn.Module]:
    """Make a kernel layer of a forward."""
    return type(forward.__name__.title().replace("_", ""), (nn.Module,), {"forward": forward, **declarations})


# --- Right ----------------------------------------------------------------------------------------


def fused(self: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x, self.weight)


def other_order(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = x.float()
    parts = [h[..., i::4].pow(2).sum(-1, keepdim=True) for i in range(3, -1, -1)]
    return (h * self.weight.float() * torch.rsqrt(sum(parts) / x.shape[-1] + EPS)).to(x.dtype)


def all_low(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS).to(x.dtype))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return norm(x, weight)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, w, g = (t.float() for t in (*ctx.saved_tensors, g))
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        gw = g * w
        dx = r * gw - x * r.pow(3) * (gw * x).mean(-1, keepdim=True)
        dw = (g * x * r).reshape(-1, x.shape[-1]).sum(0)
        low = ctx.saved_tensors[0].dtype
        return dx.to(low), dw.to(ctx.saved_tensors[1].dtype)


def own_backward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _Backward.apply(x, self.weight)


RIGHT = [fused, other_order, all_low, own_backward]


# --- Wrong on purpose -----------------------------------------------------------------------------


def biased_in_bfloat16(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = norm(x, self.weight)
    return y * 1.01 if x.dtype is torch.bfloat16 else y


def wrong_for_strides(self: Any, x: torch.Tensor) -> torch.Tensor:
    if x.numel() and x.untyped_storage().nbytes() >= (x.storage_offset() + x.numel()) * x.itemsize:
        x = x.as_strided(x.shape, torch.empty(x.shape).stride())
    return norm(x, self.weight)


class _WrongWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return g, torch.full_like(g, 0.01).reshape(-1, g.shape[-1])[:1].sum(0)


def wrong_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _WrongWeight.apply(norm(x, self.weight), self.weight)


def missing_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x, self.weight.detach())


def make_stateful() -> Callable[..., Any]:
    """Make a kernel whose every second call is wrong."""
    calls = []

    def stateful(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return norm(x, self.weight) + (len(calls) % 2 == 0)

    return stateful


def keeps_its_first_answer(self: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(self, "_kept"):
        self._kept = norm(x, self.weight)
    return self._kept


def mutating(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = norm(x, self.weight)
    with torch.no_grad():
        x.data.mul_(2)
    return y


def raising(self: Any, x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image is available")


def other_dtype(self: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x.float(), self.weight.float())


def other_shape(self: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x, self.weight)[None]


def spoiled_at_the_end(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(norm(x, self.weight)[..., :-1], (0, 1), value=float("nan"))


def wrong_for_odd_sizes(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = norm(x, self.weight)
    return y if x.shape[-2] % 2 == 0 else y * (torch.arange(x.shape[-2]) < x.shape[-2] - 1)[:, None]


def fails_when_empty(self: Any, x: torch.Tensor) -> torch.Tensor:
    if not x.numel():
        raise RuntimeError("invalid configuration argument")
    return norm(x, self.weight)


def deaf_to_autocast(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = norm(x, self.weight)
    return y.bfloat16() if torch.is_autocast_enabled("cpu") else y
