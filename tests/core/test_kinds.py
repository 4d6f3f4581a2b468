"""Layers that are coroutine functions or generators: `inspect` knows them as such, and kernels are of the same kind."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from warned import ignored

from kernels_core import KernelsWarning, Mode, kernelize, resolve, use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping

X = torch.ones(1)


def scaled(factor: float) -> dict[str, Callable[..., Any]]:
    """Return a function of each kind, as the forward of a layer or kernel."""

    def plain(self: Any, x: torch.Tensor) -> Any:
        return x * factor

    async def coroutine(self: Any, x: torch.Tensor) -> Any:
        await asyncio.sleep(0)
        return x * factor

    def generator(self: Any, x: torch.Tensor) -> Iterator[Any]:
        sent = yield x * factor
        yield sent

    async def async_generator(self: Any, x: torch.Tensor) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        yield x * factor
        yield "end"

    return {
        "plain": plain,
        "coroutine": coroutine,
        "generator": generator,
        "async generator": async_generator,
    }


def result(kind: str, layer: nn.Module) -> float:
    """Return the number of a call, as its caller gets it."""
    if kind == "coroutine":
        return float(asyncio.run(layer(X)))
    if kind == "generator":
        steps = layer(X)
        number = float(next(steps))
        assert steps.send("sent") == "sent"  # the caller's values reach the kernel
        return number
    if kind == "async generator":

        async def collect() -> list[Any]:
            return [item async for item in layer(X)]

        number, end = asyncio.run(collect())
        assert end == "end"
        return float(number)
    return float(layer(X))


IS_KIND: dict[str, Callable[[Any], bool]] = {
    "coroutine": inspect.iscoroutinefunction,
    "generator": inspect.isgeneratorfunction,
    "async generator": inspect.isasyncgenfunction,
}


@pytest.mark.parametrize("kind", ["plain", *IS_KIND])
def test_each_kind_is_served_by_its_own(kind: str) -> None:
    """A layer stays of its kind, dispatched and kernelized; a kernel of its kind serves, of another it is refused."""
    layer = use_kernel_forward_from_hub(f"Kind {kind}")(type("Layer", (nn.Module,), {"forward": scaled(2)[kind]}))
    for of in ("plain", *IS_KIND):
        kernel = type("Kernel", (nn.Module,), {"forward": scaled(4)[of]})
        with use_kernel_mapping({f"Kind {kind}": {"cpu": kernel}}):
            found = resolve(layer, device="cpu", mode=Mode.INFERENCE)
            assert found.is_reference is (of != kind)
            if of != kind:
                assert f"it is a {of} function, where the layer's own forward is a {kind} one" in str(found.refusals[0])
                continue
            assert result(kind, layer()) == 4
            frozen = kernelize(nn.Sequential(layer()), mode=Mode.INFERENCE, device="cpu")[0]
        assert result(kind, frozen) == 4
        for forward in (layer.forward, type(frozen).forward):
            assert [name for name, test in IS_KIND.items() if test(forward)] == ([kind] if kind != "plain" else [])


def test_errors_of_kernels() -> None:
    """A coroutine that raises is replaced by the reference; the error of a generator, which has yielded, is raised."""

    class Broken(nn.Module):
        async def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise OSError("broken")

    class BrokenSteps(nn.Module):
        def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
            yield x
            raise OSError("broken")

    wait = use_kernel_forward_from_hub("Waits")(type("Wait", (nn.Module,), {"forward": scaled(2)["coroutine"]}))
    steps = use_kernel_forward_from_hub("Steps")(type("Steps", (nn.Module,), {"forward": scaled(2)["generator"]}))
    with use_kernel_mapping({"Waits": {"cpu": Broken}, "Steps": {"cpu": BrokenSteps}}):
        with pytest.warns(KernelsWarning, match="broken"):
            assert result("coroutine", wait()) == 2
        with pytest.raises(OSError, match="broken"):
            list(steps()(X))


@pytest.mark.parametrize("is_kernelized", [False, True])
@pytest.mark.parametrize("kind", ["coroutine", "generator"])
def test_what_returns_not_implemented_passes_the_call_on(kind: str, is_kernelized: bool) -> None:
    """A coroutine or generator returns it before anything else: the next candidate serves, then the reference."""

    async def coroutine(self: Any, x: torch.Tensor) -> Any:
        return NotImplemented

    def generator(self: Any, x: torch.Tensor) -> Iterator[Any]:
        return NotImplemented
        yield

    passes = type("Passes", (nn.Module,), {"forward": {"coroutine": coroutine, "generator": generator}[kind]})
    also = type("Also", (passes,), {"forward": lambda self, x: passes.forward(self, x)})  # not of the kind
    serves = type("Serves", (nn.Module,), {"forward": scaled(3)[kind]})
    layer = use_kernel_forward_from_hub("Kinds")(type("Kinds", (nn.Module,), {"forward": scaled(2)[kind]}))()
    for sources, factor in (([passes, also, serves], 3), ([passes], 2)):
        with use_kernel_mapping({"Kinds": {"cpu": list(sources)}}), ignored(KernelsWarning):
            called = kernelize(type(layer)(), mode=Mode.INFERENCE, device="cpu") if is_kernelized else layer
            assert result(kind, called) == factor
    declares = type("Declares", (serves,), {"dtypes": (torch.float32,)})
    with use_kernel_mapping({"Kinds": {"cpu": declares}}):
        (refusal,) = resolve(layer, device="cpu", mode=Mode.INFERENCE).refusals
    assert "let it return NotImplemented" in refusal.reason
