"""What it costs to kernelize a large model, against Hugging Face `kernels`, and what its calls cost then."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Row, compare
from torch import nn

from kernels_core import Mode, kernelize, unkernelize, use_kernel_forward_from_hub, use_kernelized_func
from kernels_plugins import use_kernel_mapping

MODULES = 10_000
LIMIT = 0.25
ROUNDS = 15


class Scale(nn.Module):
    """A layer with a parameter, as most have."""

    def __init__(self) -> None:
        """Make the parameter."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


class Kernel(nn.Module):
    """What serves."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


class Source:
    """A repository that is there already: equal to any other."""

    def load(self) -> type[nn.Module]:
        """Return the kernel."""
        return Kernel

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source)

    def __hash__(self) -> int:
        return 0


def model_of(decorate: Callable[[str], Any]) -> nn.Module:
    """Return a model of decorated layers."""
    layer = decorate("bench_kernelize")(type("Decorated", (Scale,), {"forward": Scale.forward}))
    return nn.Sequential(*(layer() for _ in range(MODULES)))


def run() -> Iterator[Row]:
    """Measure both libraries in turns, where both are installed; then calls."""
    yield from _models()
    yield from _calls()


def _models() -> Iterator[Row]:
    mapping = {"bench_kernelize": {"cpu": Source()}}
    ours = model_of(use_kernel_forward_from_hub)
    times: dict[str, list[float]] = {"ours": [], "undo": [], "theirs": []}
    peer, theirs = _peer()
    for _ in range(ROUNDS):
        with use_kernel_mapping(mapping):
            times["ours"].append(_seconds(lambda: kernelize(ours, mode=Mode.INFERENCE)))
        times["undo"].append(_seconds(lambda: unkernelize(ours)))
        if theirs is not None:
            times["theirs"].append(theirs(mapping))
    each = {name: statistics.median(taken) / MODULES * 1e6 for name, taken in times.items() if taken}
    yield Row(
        "kernelize",
        f"kernelize {MODULES} modules, per module",
        each["ours"],
        "us",
        peer,
        each.get("theirs"),
        LIMIT if peer else None,
        judge="ratio",
    )
    yield Row("kernelize", f"unkernelize {MODULES} modules, per module", each["undo"], "us")


def _peer() -> tuple[str, Callable[[Any], float] | None]:
    """Return the name of the peer, and what times it; nothing where it is not installed."""
    if importlib.util.find_spec("kernels") is None:
        return "", None
    import kernels

    model = model_of(kernels.use_kernel_forward_from_hub)

    def theirs(mapping: Any) -> float:
        with kernels.use_kernel_mapping(mapping):
            return _seconds(lambda: kernels.kernelize(model, mode=kernels.Mode.INFERENCE))

    return f"Hugging Face kernels {kernels.__version__}", theirs


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _calls() -> Iterator[Row]:
    """Calls of kernelized modules, against those of undecorated ones."""
    x = torch.ones(2)
    plain, plain_function = nn.Identity(), type("Plain", (nn.Module,), {"forward": lambda self, x: _identity(x)})()
    layer = use_kernel_forward_from_hub("bench_frozen")(type("L", (nn.Module,), {"forward": Kernel.forward}))
    function = use_kernel_forward_from_hub("bench_function")(_identity)
    uses = use_kernelized_func(function)(type("Uses", (nn.Module,), {"forward": lambda self, x: function(x)}))
    with use_kernel_mapping({"bench_frozen": {"cpu": Kernel}, "bench_function": {"cpu": _other}}):
        frozen, pinned = (kernelize(module(), mode=Mode.INFERENCE, device="cpu") for module in (layer, uses))
    calls = {"plain": plain, "frozen": frozen, "plain function": plain_function, "pinned": pinned}
    times = compare({name: ("call(x)", {"call": call, "x": x}) for name, call in calls.items()})
    yield Row("kernelize", "call of a kernelized identity", times["frozen"], "ns", "undecorated module", times["plain"])
    yield Row(
        "kernelize",
        "call of a kernelized module that calls a decorated function",
        times["pinned"],
        "ns",
        "the same with an undecorated one",
        times["plain function"],
    )


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _other(x: torch.Tensor) -> torch.Tensor:
    return x
