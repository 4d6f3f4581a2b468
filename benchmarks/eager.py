"""The cost of a warm dispatched call, against the undecorated layer and against one hop by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Row, compare
from torch import nn

from kernels_core import Mode, use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping, use_kernel_mapping

PLAIN, HOP = "undecorated module", "one hop by hand"
UNPROVEN = {
    "no parameters": PLAIN,
    "frozen parameter": f"{PLAIN} with it",
    "frozen parameter that its forward reads": f"{PLAIN} with it",
}
LIMIT, GOAL = 1.30, 1.20
HOP_LIMIT, HOP_GOAL = 1.10, 1.00
UNPROVEN_LIMIT, UNPROVEN_GOAL = 1.45, 1.30
GOALS = {LIMIT: GOAL, HOP_LIMIT: HOP_GOAL, UNPROVEN_LIMIT: UNPROVEN_GOAL}
COPIES = 3


class Identity(nn.Module):
    """The cheapest layer there is, undecorated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


class Scaled(nn.Module):
    """A layer with keyword-only arguments and defaults, undecorated."""

    def forward(self, x: torch.Tensor, *, scale: float = 1.0, eps: float = 1e-6) -> torch.Tensor:
        """Return `x`."""
        return x


class IdentityKernel(Identity):
    """A kernel that serves in every mode."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


class InferenceKernel(IdentityKernel):
    """A second kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


class UncompiledKernel(Identity):
    """A kernel that does not declare `can_torch_compile`, as is the default."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


class ScaledKernel(Scaled):
    """A kernel with keywords that serves in every mode."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor, *, scale: float = 1.0, eps: float = 1e-6) -> torch.Tensor:
        """Return `x`."""
        return x


class Defaulted(nn.Module):
    """A layer with defaults for arguments that may be given by position, undecorated."""

    def forward(self, x: torch.Tensor, scale: float = 1.0, eps: float = 1e-6) -> torch.Tensor:
        """Return `x`."""
        return x


class DefaultedKernel(Defaulted):
    """A kernel for it that serves in every mode."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor, scale: float = 1.0, eps: float = 1e-6) -> torch.Tensor:
        """Return `x`."""
        return x


class Weighted(nn.Module):
    """A layer that reads its weight, undecorated."""

    weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` times the weight."""
        return x * self.weight


class WeightedKernel(Weighted):
    """A kernel for it that serves in every mode."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` times the weight."""
        return x * self.weight


class Hop(nn.Module):
    """A static dispatcher by hand: it forwards to a stored bound method."""

    def __init__(self, layer: nn.Module) -> None:
        """Store the forward of `layer`."""
        super().__init__()
        self.impl = layer.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.impl(*args, **kwargs)


def decorated(base: type[nn.Module], name: str) -> nn.Module:
    """Return an instance of a fresh class, decorated with `name`, whose reference is that of `base`."""
    fresh = type(name, (nn.Module,), {"forward": base.forward})
    return used(use_kernel_forward_from_hub(name)(fresh)())


def used(module: nn.Module) -> nn.Module:
    """Return a module in the state in which those of a program are, which has assigned an attribute to it.

    As long as nothing was ever assigned, CPython (3.11 and 3.12) keeps the attributes in the object, where
    `nn.Module.__call__` finds them sooner; `self.weight = ...` or `eval()` end that, and so does a look at `__dict__`.
    """
    return module.train()


def plain_function(x: torch.Tensor) -> torch.Tensor:
    """Return `x`."""
    return x


def function_kernel(x: torch.Tensor) -> torch.Tensor:
    """Return `x`."""
    return x


function_kernel.can_torch_compile = True  # type: ignore[attr-defined]


def run() -> Iterator[Row]:
    """Measure on the CPU and, where there is one, on a CUDA device."""
    yield from on_device("cpu")
    if torch.cuda.is_available():
        yield from on_device("cuda")


def on_device(device: str) -> Iterator[Row]:
    """Measure with a tensor on `device`: the smallest of several copies, which lie elsewhere in memory."""
    copies = [_copy(device) for _ in range(COPIES)]
    best = {
        group: {key: min(copy[group][key] for copy in copies) for key in taken} for group, taken in copies[0].items()
    }
    times, times_keywords, times_defaults = best["identity"], best["keywords"], best["defaults"]
    times_defaulted, times_defaulted_keywords = best["defaulted"], best["defaulted_keywords"]
    times_function = best["function"]
    times_no_grad, times_grad, times_requires = best["no_grad"], best["grad"], best["requires_grad"]

    def row(
        subject: str, taken: dict[str, float], key: str, peer: str, peer_key: str, limit: float | None = None
    ) -> Row:
        goal = GOALS[limit] if limit else None
        return Row(
            "eager", f"{subject} ({device})", taken[key], "ns", peer, taken[peer_key], limit, goal, judge="ratio"
        )

    yield row("identity layer", times, "identity", PLAIN, "plain", LIMIT)
    yield row("identity layer", times, "identity", HOP, "hop", HOP_LIMIT)
    yield row("identity layer, in a scope", best["scope"], "identity", PLAIN, "plain", LIMIT)
    yield row("identity layer, in a scope", best["scope"], "identity", HOP, "hop", HOP_LIMIT)
    yield row("identity layer, nothing mapped", times, "unmapped", PLAIN, "plain", LIMIT)
    yield row("identity layer, nothing mapped", times, "unmapped", HOP, "hop", HOP_LIMIT)
    yield row("keyword-only layer, called with keywords", times_keywords, "scaled", PLAIN, "plain", LIMIT)
    yield row("keyword-only layer, called with keywords", times_keywords, "scaled", HOP, "hop", HOP_LIMIT)
    yield row("keyword-only layer, defaults", times_defaults, "scaled", PLAIN, "plain", LIMIT)
    yield row("keyword-only layer, defaults", times_defaults, "scaled", HOP, "hop", HOP_LIMIT)
    for subject, taken in (("defaults", times_defaulted), ("called with keywords", times_defaulted_keywords)):
        yield row(f"layer with defaults, {subject}", taken, "defaulted", PLAIN, "plain", LIMIT)
        yield row(f"layer with defaults, {subject}", taken, "defaulted", HOP, "hop", HOP_LIMIT)
    yield row("one hop by hand", times, "hop", PLAIN, "plain")
    yield row("decorated function", times_function, "function", "plain function", "plain")
    yield row("kernels differ by mode, no_grad", times_no_grad, "modes", PLAIN, "plain")
    yield row("kernels differ by mode, nothing requires grad", times_grad, "modes", PLAIN, "plain")
    yield row("kernels differ by mode, x requires grad", times_requires, "modes", PLAIN, "plain")
    yield row("kernel not for compile, no_grad", times_no_grad, "uncompiled", PLAIN, "plain")
    yield row("kernel not for compile, nothing requires grad", times_grad, "uncompiled", PLAIN, "plain")
    yield row("kernel not for compile, x requires grad", times_requires, "uncompiled", PLAIN, "plain")
    yield row("identity layer that was compiled cold", best["cold"], "cold", PLAIN, "plain")
    for state, peer in UNPROVEN.items():
        for mode, limit in (("no_grad", LIMIT), ("gradients enabled", UNPROVEN_LIMIT)):
            subject = f"kernel that never trained, {state}, {mode}"
            yield row(subject, best[f"{state}, {mode}"], "unproven", peer, "plain", limit)


def _copy(device: str) -> dict[str, dict[str, float]]:
    """Make all subjects anew and time them, group by group."""
    x = torch.ones(2, device=device)
    names: dict[str, dict[Any, Any]] = {
        "bench_identity": {device: IdentityKernel},
        "bench_scaled": {device: ScaledKernel},
        "bench_defaulted": {device: DefaultedKernel},
        "bench_function": {device: function_kernel},
        "bench_weighted": {device: WeightedKernel},
        "bench_cold": {device: IdentityKernel},
        "bench_uncompiled": {device: UncompiledKernel},
        "bench_modes": {device: {Mode.INFERENCE: InferenceKernel, Mode.TRAINING: IdentityKernel}},
    }
    plain, modes = used(Identity()), decorated(Identity, "bench_modes")
    cold = decorated(Identity, "bench_cold")
    scaled = {"plain": used(Scaled()), "hop": Hop(ScaledKernel()), "scaled": decorated(Scaled, "bench_scaled")}
    defaulted = {
        "plain": used(Defaulted()),
        "hop": Hop(DefaultedKernel()),
        "defaulted": decorated(Defaulted, "bench_defaulted"),
    }
    function = use_kernel_forward_from_hub("bench_function")(plain_function)
    mode_calls = {"plain": plain, "modes": modes, "uncompiled": decorated(Identity, "bench_uncompiled")}
    calls = {
        "plain": plain,
        "hop": Hop(IdentityKernel()),
        "identity": decorated(Identity, "bench_identity"),
        "unmapped": decorated(Identity, "bench_unmapped"),
    }
    register_kernel_mapping(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bench_uncompiled: refused where calls are traced
        taken = {}
        pairs = {
            "no parameters": [plain, decorated(Identity, "bench_identity")],
            "frozen parameter": [used(Identity()), decorated(Identity, "bench_identity")],
            "frozen parameter that its forward reads": [used(Weighted()), decorated(Weighted, "bench_weighted")],
        }
        for state, pair in pairs.items():
            if state != "no parameters":
                for module in pair:
                    module.weight = nn.Parameter(torch.ones(2, device=device), requires_grad=False)
            for mode in ("no_grad", "gradients enabled"):
                with torch.set_grad_enabled(mode != "no_grad"):
                    taken[f"{state}, {mode}"] = _times(x, dict(zip(("plain", "unproven"), pair, strict=True)))
        recorded = x.clone().requires_grad_()
        for call in (*calls.values(), *scaled.values(), *defaulted.values(), function, *mode_calls.values()):
            call(recorded)  # from here on, kernels are known to keep gradients
        taken |= {
            "identity": _times(x, calls),
            "keywords": _times(x, scaled, "call(x, scale=2.0, eps=1e-5)"),
            "defaults": _times(x, scaled),
            "defaulted": _times(x, defaulted),
            "defaulted_keywords": _times(x, defaulted, "call(x, scale=2.0, eps=1e-5)"),
            "function": _times(x, {"plain": plain_function, "function": function}),
            "grad": _times(x, mode_calls),
            "requires_grad": _times(x.clone().requires_grad_(), mode_calls),
        }
        with torch.no_grad():
            taken["no_grad"] = _times(x, mode_calls)
        with use_kernel_mapping({}):  # each call asks whether it is in the forward of an autograd function
            calls["identity"](x)
            taken["scope"] = _times(x, calls)
        torch._dynamo.reset()
        torch.compile(cold, backend="eager", fullgraph=True)(x)  # traced before any eager call
        cold(recorded)
        taken["cold"] = _times(x, {"plain": plain, "cold": cold})
    return taken


def _times(x: torch.Tensor, calls: dict[str, Callable[..., Any]], source: str = "call(x)") -> dict[str, float]:
    return compare({name: (source, {"call": call, "x": x}) for name, call in calls.items()}, rounds=15, repeats=8)
