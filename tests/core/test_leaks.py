"""Layers, kernels and scopes that are dropped leave nothing behind, and tracers record dispatched layers."""

from __future__ import annotations

import gc
import linecache
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from warned import never, noted

from kernels_core import KernelsWarning, Mode, kernelize, use_kernel_forward_from_hub, warn_once
from kernels_core.scopes import frame as frames
from kernels_plugins import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)


def test_kernel_classes_of_functions_go_with_their_scope(make_kernel: Make) -> None:
    """A kernel class that served a function in a transient scope is collected with it."""

    @use_kernel_forward_from_hub("Shift")
    def shift(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    kernel = make_kernel(10)
    seen = weakref.ref(kernel)
    with use_kernel_mapping({"Shift": {"cpu": kernel}}):
        assert shift(X)[0] == 10
    del kernel
    gc.collect()
    assert seen() is None


def test_transient_sources_are_warned_of_once(make_layer: Make) -> None:
    """Sources of one kind that fail for one reason are one story, whatever their addresses."""

    class Fails:
        def load(self) -> Any:
            raise OSError("no network")

    layer = make_layer()()
    with noted() as caught:
        for _ in range(5):
            with use_kernel_mapping({"Add": {"cpu": Fails()}}):
                layer(X)
    assert len(caught) == 1 and len(warn_once._issued) == 1


def test_dropped_layers_leave_no_names_and_no_source() -> None:
    """Memory of generated code and published answers of a dropped layer is given back."""

    def make() -> None:
        @use_kernel_forward_from_hub("Gone")
        def gone(x: torch.Tensor) -> torch.Tensor:
            return x

        @use_kernel_forward_from_hub("GoneClass")
        class Gone(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        def kernel(self: nn.Module, other: torch.Tensor) -> torch.Tensor:
            return other

        gone(X)
        torch.compile(gone, backend="eager", fullgraph=True)(X)
        with use_kernel_mapping({"GoneClass": {"cpu": type("Kernel", (nn.Module,), {"forward": kernel})}}):
            kernelize(Gone(), mode=Mode.TRAINING, device="cpu")(X)

    def taken() -> tuple[int, int, int]:
        make()  # drops the texts of layers that are gone
        torch._dynamo.reset()
        gc.collect()
        texts = [file for file in linecache.cache if "kernels_core" in file]
        return len(frames.root.published), len(texts), len(vars(frames.Frame))

    counts = [taken() for _ in range(8)]
    assert counts[-1] <= counts[2], counts


def test_symbolic_trace_where_the_mode_matters(make_layer: Make, make_kernel: Make) -> None:
    """torch.fx traces a model also where training and inference are served apart."""
    model = nn.Sequential(make_layer()())
    register_kernel_mapping({"Add": {"cpu": make_kernel(10, has_backward=False)}})
    assert torch.fx.symbolic_trace(model)(X).shape == X.shape


def test_warnings_as_errors_are_not_half_applied(make_layer: Make, make_kernel: Make) -> None:
    """Where warnings are errors, every call raises until the reason is gone."""
    layer = make_layer()()
    register_kernel_mapping({"Add": {"cpu": "not a source".encode}})
    with never():
        for _ in range(3):
            with pytest.raises(KernelsWarning):
                layer(X)
    register_kernel_mapping({"Add": {"cpu": make_kernel(10)}})
    assert layer(X)[0] == 10


def test_parameters_in_another_order_are_refused() -> None:
    """A kernel with the same parameter names in another order would swap arguments in silence."""

    @use_kernel_forward_from_hub("Scale")
    def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x - weight

    def swapped(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - weight

    with (
        use_kernel_mapping({"Scale": {"cpu": swapped}}),
        pytest.warns(KernelsWarning, match="in another order"),
    ):
        assert scaled(torch.ones(1), X[:1]) == 1
