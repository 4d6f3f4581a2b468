"""Keyword-only parameters reach the kernel, whatever kind of callable it is and in whatever order it has them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import (
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginManager,
    Resolution,
    hookimpl,
    kernelize,
    release,
    use_kernel_forward_from_hub,
)
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


# --- Nothing packed: neither *args nor **kwargs ---------------------------------------------------


@use_kernel_forward_from_hub("Unpacked")
class Unpacked(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float = 2.0, shift: float = 0.5) -> Any:
        return x * scale + shift


def unpacked(self: nn.Module, x: torch.Tensor, *, scale: float = 9, shift: float = 9) -> Any:
    return 10 * (x * scale + shift)


def unpacked_reordered(self: nn.Module, x: torch.Tensor, *, shift: float, scale: float) -> Any:
    return 10 * (x * scale + shift)


def unpacked_closure() -> Callable[..., Any]:
    ten = 10

    def forward(self: nn.Module, x: torch.Tensor, *, scale: float = 9, shift: float = 9) -> Any:
        return ten * (x * scale + shift)

    return forward


@functools.wraps(unpacked)
def unpacked_wrapped(*args: Any, **kwargs: Any) -> Any:
    return unpacked(*args, **kwargs)


UNPACKED = [unpacked, unpacked_reordered, unpacked_closure(), unpacked_wrapped]


def unpacked_kernel(forward: Callable[..., Any], **declarations: bool) -> use_kernel_mapping:
    return use_kernel_mapping({"Unpacked": {"cpu": type("Kernel", (nn.Module,), {"forward": forward, **declarations})}})


@pytest.mark.parametrize("forward", UNPACKED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("has_backward", [True, False])
@pytest.mark.parametrize("first", [X, X.clone().requires_grad_()], ids=["plain", "recorded"])
def test_unpacked_keywords_arrive(forward: Callable[..., Any], has_backward: bool, first: torch.Tensor) -> None:
    """Defaults are the reference's and keywords go to their names, before and after a kernel has trained."""
    layer = Unpacked()
    factor = 1 if first.requires_grad and not has_backward else 10
    with unpacked_kernel(forward, has_backward=has_backward):
        for _ in range(3):
            assert layer(first).item() == factor * 2.5
            assert layer(first, shift=1.0).item() == factor * 3.0
            assert layer(x=first, shift=0.0, scale=3.0).item() == factor * 3.0
            with pytest.raises(TypeError):
                layer(first, 1.0)
    assert layer(first, scale=3.0).item() == 3.5


def test_unpacked_keywords_the_long_way() -> None:
    """A tensor inside of a list, one on another device, and none at all: the same keywords arrive."""

    @use_kernel_forward_from_hub("UnpackedList")
    class Layer(nn.Module):
        def forward(self, xs: Any, *, scale: float = 2.0, shift: float = 0.5) -> Any:
            return "reference", scale, shift

    class Kernel(nn.Module):
        def forward(self, xs: Any, *, scale: float = 2.0, shift: float = 0.5) -> Any:
            return "kernel", scale, shift

    with use_kernel_mapping({"UnpackedList": {"cpu": Kernel}}):
        for _ in range(2):
            assert Layer()([X], shift=1.0) == ("kernel", 2.0, 1.0)
            assert Layer()(torch.ones(1, device="meta"), scale=3.0) == ("reference", 3.0, 0.5)
            assert Layer()(None, scale=3.0) == ("reference", 3.0, 0.5)


def test_unpacked_keywords_of_a_function() -> None:
    """A decorated function, too."""

    @use_kernel_forward_from_hub("unpacked_function")
    def function(x: torch.Tensor, *, scale: float = 2.0) -> Any:
        return x * scale

    def kernel(x: torch.Tensor, *, scale: float = 9.0) -> Any:
        return 10 * (x * scale)

    with use_kernel_mapping({"unpacked_function": {"cpu": kernel}}):
        assert [function(X).item(), function(X, scale=3.0).item()] == [20.0, 30.0]
        assert torch.compile(function, backend="eager")(X, scale=3.0).item() == 3.0  # not declared to be traceable


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_unpacked_keywords_where_a_kernel_is_taken_out() -> None:
    """The reference gets the keywords when a kernel raises, and when one loses gradients."""

    def raises(self: Any, x: torch.Tensor, *, scale: float = 2.0, shift: float = 0.5) -> Any:
        raise RuntimeError("boom")

    def loses(self: Any, x: torch.Tensor, *, scale: float = 2.0, shift: float = 0.5) -> Any:
        return 10 * (x.detach() * scale + shift)

    for forward in (raises, loses):
        x = torch.ones(1, requires_grad=True)
        with unpacked_kernel(forward):
            layer = Unpacked()
            for _ in range(2):
                output = layer(x, shift=1.0)
                assert output.item() == 3.0 and output.requires_grad
        release()


def test_unpacked_keywords_through_a_wrapper(isolated_plugins: PluginManager, mapping_plugin: object) -> None:
    """A wrapper that a plugin puts around a kernel is called with keywords."""
    seen: list[Any] = []

    class Plugin:
        @hookimpl
        def kernels_wrap_forward(self, resolution: Resolution) -> Any:
            def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
                def around(*args: Any, **kwargs: Any) -> Any:
                    seen.append((len(args), sorted(kwargs)))
                    return forward(*args, **kwargs)

                return around

            return wrap

    isolated_plugins.register(Plugin(), "around")
    with unpacked_kernel(unpacked), warnings.catch_warnings():
        warnings.simplefilter("error", KernelsWarning)
        assert [Unpacked()(X).item(), Unpacked()(X, scale=3.0).item()] == [25.0, 35.0]
    assert seen == [(2, ["scale", "shift"])] * 2


def renames(forward: Any) -> Any:
    """Rename an old keyword, as libraries do."""

    @functools.wraps(forward)
    def inner(*args: Any, **kwargs: Any) -> Any:
        if "past" in kwargs:
            kwargs["cache"] = kwargs.pop("past")
        return forward(*args, **kwargs)

    return inner


@use_kernel_forward_from_hub("Renamed")
class Renamed(nn.Module):
    """Takes `past` for `cache`."""

    @renames
    def forward(self, x: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
        return x if cache is None else x + cache


class TakesCache(nn.Module):
    """Adds 10 to tell that it ran."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
        return x + 10 if cache is None else x + cache + 10


@pytest.mark.parametrize("how", ["dispatched", "kernelized", "compiled"])
def test_no_kernel_swallows_a_keyword_that_a_decorator_renames(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference serves calls with such a keyword, with a warning; the kernel serves all others."""
    torch._dynamo.reset()
    layer: Any = Renamed()
    with use_kernel_mapping({"Renamed": {"cpu": TakesCache}}), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelsWarning)
        if how == "kernelized":
            layer = kernelize(layer, mode=Mode.INFERENCE, device="cpu")
        if how == "compiled":
            layer = torch.compile(layer, backend="eager", fullgraph=True)
        assert [layer(X).item(), layer(X, cache=X).item(), layer(X, past=X).item()] == [11, 12, 2]
        if how != "compiled":
            monkeypatch.setenv("KERNELS_STRICT", "1")
            with pytest.raises(NoKernelError, match="'past'"):
                layer(X, past=X)
