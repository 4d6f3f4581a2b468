"""Keyword-only parameters reach the kernel, whatever kind of callable it is and in whatever order it has them."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from warned import ignored, never, noted

from kernels_core import (
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginManager,
    Resolution,
    count_calls,
    decorated_layer,
    hookimpl,
    kernelize,
    quarantined,
    release,
    use_kernel_forward_from_hub,
)
from kernels_core.models.counting import calls_of
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
    with unpacked_kernel(unpacked), never(KernelsWarning):
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


def kernel_function(x: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
    return x + 10 if cache is None else x + cache + 10


def kernel_function_without_rest(x: torch.Tensor, cache: Any = None) -> torch.Tensor:
    return kernel_function(x, cache)


def of_class(function: Callable[..., Any], **declarations: Any) -> type[nn.Module]:
    """Return a kernel class that calls a function."""
    if function is kernel_function:

        def forward(self: Any, x: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
            return kernel_function(x, cache, **kwargs)

    else:

        def forward(self: Any, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
            return kernel_function(x, cache)

    return type("TakesCache", (nn.Module,), {"forward": forward, "can_torch_compile": True, **declarations})


for each in (kernel_function, kernel_function_without_rest):
    each.__dict__["can_torch_compile"] = True

_numbers = itertools.count()


def renamed(kind: str, rest: bool) -> tuple[str, Any]:
    """Return a new layer name, and a function or module that takes `past` for `cache`."""
    name = f"Renamed{next(_numbers)}"

    def reference(x: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
        assert not kwargs
        return x if cache is None else x + cache

    def without_rest(x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return x if cache is None else x + cache

    def method(self: Any, x: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
        return reference(x, cache, **kwargs)

    def method_without_rest(self: Any, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return without_rest(x, cache)

    decorate = use_kernel_forward_from_hub(name)
    if kind == "function":
        return name, decorate(renames(reference if rest else without_rest))
    cls = type("Renamed", (nn.Module,), {"forward": renames(method if rest else method_without_rest)})
    return name, decorate(cls)()


@pytest.mark.parametrize("how", ["dispatched", "kernelized", "compiled"])
@pytest.mark.parametrize("rest", [True, False], ids=["rest", "no rest"])
@pytest.mark.parametrize("kinds", ["module", "function", "function, class"])
def test_no_kernel_swallows_a_keyword_that_a_decorator_renames(
    how: str, rest: bool, kinds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference serves calls with such a keyword, with one warning; the kernel serves all others, before and after.

    So it is for modules and functions, and whether or not the forward takes other keywords: the kernel is not at fault.
    """
    torch._dynamo.reset()
    kind, _, is_class = kinds.partition(", ")
    name, layer = renamed(kind, rest)
    held = layer
    function = kernel_function if rest else kernel_function_without_rest
    kernel = of_class(function) if is_class or kind == "module" else function
    with use_kernel_mapping({name: {"cpu": kernel}}), torch.no_grad(), noted() as caught:
        if how == "kernelized" and kind == "module":
            layer = kernelize(layer, mode=Mode.INFERENCE, device="cpu")
        elif how == "kernelized":
            holder = type(
                "Holder", (nn.Module,), {"forward": lambda self, *args, **kwargs: self.held(*args, **kwargs)}
            )()
            holder.held = layer
            layer = kernelize(holder, mode=Mode.INFERENCE, device="cpu")
        elif how == "compiled":
            layer = torch.compile(layer, backend="eager", fullgraph=True)
        calls: list[dict[str, Any]] = [{}, {"cache": X}, {"past": X}, {"past": X}, {}]
        assert [layer(X, **call).item() for call in calls] == [11, 12, 2, 2, 11]
        if how != "compiled":
            with count_calls():
                assert [layer(X, **call).item() for call in calls] == [11, 12, 2, 2, 11]
            [counts] = calls_of([decorated_layer(held) if kind == "function" else layer])
            assert counts is not None and counts.pop("reference") == 2 and [*counts.values()] == [3]
            monkeypatch.setenv("KERNELS_STRICT", "1")
            with pytest.raises(NoKernelError, match="'past'"):
                layer(X, past=X)
    assert not quarantined()
    reasons = {str(w.message) for w in caught if issubclass(w.category, KernelsWarning)}
    assert len(reasons) == 1 and "'past'" in reasons.pop()


def test_no_kernel_gets_an_argument_in_another_place() -> None:
    """Where a decorator takes more arguments by position than the forward, or hides which, the reference serves."""

    def by_position(forward: Any) -> Any:
        @functools.wraps(forward)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return forward(*args[:1], **dict(zip(["cache"], args[1:], strict=False)), **kwargs)

        return inner

    def hidden(forward: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return renames(forward)(*args, **kwargs)

        inner.__dict__["__signature__"] = inspect.signature(forward)
        return inner

    def reference(x: torch.Tensor, *, cache: Any = None) -> torch.Tensor:
        return x if cache is None else x + cache

    def kernel(x: torch.Tensor, *, cache: Any = None) -> torch.Tensor:
        return reference(x, cache=cache) + 10

    first, second = by_position(reference), hidden(reference)
    first, second = use_kernel_forward_from_hub("Moved")(first), use_kernel_forward_from_hub("Hidden")(second)
    with use_kernel_mapping({name: {"cpu": kernel} for name in ("Moved", "Hidden")}), torch.no_grad():
        for _ in range(2):
            assert first(X, cache=X).item() == second(X, cache=X).item() == 12
            with ignored(KernelsWarning):
                assert first(X, X).item() == second(X, past=X).item() == 2
    assert not quarantined()


@pytest.mark.parametrize("is_function", [True, False])
@pytest.mark.parametrize("packs", [True, False])
def test_a_decorator_with_parameters_of_its_own_is_not_replaced(is_function: bool, packs: bool) -> None:
    """Where the decorator has parameters that the forward has not, the kernel is refused, with that reason."""

    def halves(forward: Any) -> Any:
        @functools.wraps(forward)
        def packed(*args: Any, half: bool = False, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) / (2 if half else 1)

        @functools.wraps(forward)
        def named(x: torch.Tensor, half: bool = False) -> Any:
            return forward(x) / (2 if half else 1)

        @functools.wraps(forward)
        def method(self: Any, x: torch.Tensor, half: bool = False) -> Any:
            return forward(self, x) / (2 if half else 1)

        return packed if packs else named if is_function else method

    def function(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    name = f"Halved{is_function}{packs}"
    decorate = use_kernel_forward_from_hub(name)
    layer: Any
    if is_function:
        layer, kernel = decorate(halves(function)), lambda x: x * 20
    else:
        layer = decorate(type("Halved", (nn.Module,), {"forward": halves(lambda self, x: x * 2)}))()
        kernel = type("Kernel", (nn.Module,), {"forward": lambda self, x: x * 20})
    with use_kernel_mapping({name: {"cpu": kernel}}), pytest.warns(KernelsWarning, match="of its own: half"):
        assert [layer(X).item(), layer(X, half=True).item()] == [2, 1]
    assert not quarantined()
