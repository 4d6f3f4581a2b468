"""Keyword-only parameters reach the kernel, whatever kind of callable it is and in whatever order it has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping

X = torch.ones(1)


@use_kernel_forward_from_hub("Keywords")
class Keywords(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float = 2.0, shift: float = 0.5, **rest: float) -> Any:
        return "reference", x.item() * scale + shift, rest


def reordered(self: nn.Module, x: torch.Tensor, *, shift: float, scale: float, **rest: float) -> Any:
    return "kernel", x.item() * scale + shift, rest


def in_order(self: nn.Module, x: torch.Tensor, *, scale: float = 9, shift: float = 9, **rest: float) -> Any:
    return "kernel", x.item() * scale + shift, rest


def closure() -> Callable[..., Any]:
    name = "kernel"

    def forward(self: nn.Module, x: torch.Tensor, *, scale: float = 9, shift: float = 9, **rest: float) -> Any:
        return name, x.item() * scale + shift, rest

    return forward


@functools.wraps(in_order)
def wrapped(*args: Any, **kwargs: Any) -> Any:
    return in_order(*args, **kwargs)


@pytest.mark.parametrize("forward", [in_order, reordered, closure(), wrapped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("has_backward", [True, False])
def test_keyword_only_parameters_arrive(forward: Callable[..., Any], has_backward: bool) -> None:
    """Defaults are the reference's, keywords go to their names, the rest to **rest, also where the mode matters."""
    kernel = type("Kernel", (nn.Module,), {"forward": forward, "has_backward": has_backward})
    layer = Keywords()
    assert layer(X, shift=1.0) == ("reference", 3.0, {})
    with use_kernel_mapping({"Keywords": {"cpu": kernel}}):
        assert layer(X) == ("kernel", 2.5, {})
        assert layer(X, shift=1.0) == ("kernel", 3.0, {})
        assert layer(x=X, scale=3.0, other=7.0) == ("kernel", 3.5, {"other": 7.0})
    assert layer(X, scale=3.0, other=7.0) == ("reference", 3.5, {"other": 7.0})
    assert Keywords.forward.__kwdefaults__ == {"scale": 2.0, "shift": 0.5}
