"""Probes of a kernel: gradients, tracing, dtypes, layouts, sizes, CUDA graphs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

from kernels_core import NUMERICS, Resolution, set_module
from kernels_core.replay import Call, each_tensor, mapped

from ..comparison import Tolerances, compare
from ..numerics.invariance import BACKWARD, joined
from ..numerics.properties import find
from .inputs import Forward, Recorded, with_gradients
from .report import VerifyRow
from .subject import stop_if_broken, tried

_PROBE_OF_CASE = {
    **dict.fromkeys(("as given", "other values"), "forward"),
    **dict.fromkeys(("strided", "transposed", "expanded", "offset by one element"), "layouts"),
    **dict.fromkeys(("empty", "batch of one", "odd size", "odd width"), "sizes"),
    "autocast bfloat16": "autocast",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """The result of one probe.

    Attributes:
        ok: Whether the kernel can do it; None if that could not be determined.
        reason: Why not; for a property of numbers, the smallest input that was found to show it, or the inputs tried.
    """

    ok: bool | None
    reason: str = ""


@dataclass(frozen=True)
class ProbeReport:
    """The results of all probes of a kernel.

    Attributes:
        kernel: Where it comes from.
        layer: The layer that it served.
        device: The device on which that was.
        torch: The version of PyTorch.
        probes: The result of each probe, by name: `"forward"`, `"gradients"`, `"compile"`, `"layouts"`, `"sizes"`,
            `"autocast"`, `"cuda graph"`, the name of each other dtype, and the properties of numbers that were asked
            for or that the kernel declares, such as `"batch_invariant"`.
    """

    kernel: str
    layer: str
    device: str
    torch: str
    probes: Mapping[str, Probe] = field(default_factory=dict)

    @property
    def failed(self) -> dict[str, str]:
        """The reason of each probe that failed, by name."""
        return {name: probe.reason for name, probe in self.probes.items() if probe.ok is False}

    def can(self, name: str) -> bool | None:
        """Whether the kernel can do something; None if that is not known."""
        probe = self.probes.get(name)
        return probe.ok if probe is not None else None

    def __str__(self) -> str:
        """A line for each probe."""
        words = {True: "yes", False: "no", None: "unknown"}
        lines = [f"{self.kernel} for layer {self.layer!r} on {self.device}, torch {self.torch}"]
        lines += [f"  {name}: {words[p.ok]}{f': {p.reason}' if p.reason else ''}" for name, p in self.probes.items()]
        return "\n".join(lines)


def probe(
    recorded: Recorded,
    resolution: Resolution,
    *,
    tolerances: Tolerances | None = None,
    numerics: Collection[str] = (),
    every_size: bool = False,
) -> ProbeReport:
    """Try a kernel on a call, and on others that are derived from it; nothing is changed.

    Of properties of numbers, those are found out that are asked for, or that the kernel declares.
    """
    call, implementation = recorded.call, cast(Forward, resolution.implementation)
    probes = dict(_judged(tried(recorded, resolution, tolerances=tolerances)))
    device = str(resolution.request.device)
    report = ProbeReport(resolution.origin, recorded.layer.name, device, torch.__version__, probes)
    if report.can("forward"):
        probes["compile"] = _traces(call, implementation, bool(report.can("gradients")))
        if call.devices and call.devices[0].type == "cuda":
            with torch.cuda.device(call.devices[0]):  # graphs are of the current GPU
                probes["cuda graph"] = _captures(call, implementation)
        names = {*numerics, *filter(resolution.declares, NUMERICS)}
        training = bool(report.can("gradients"))
        if training and "batch_invariant" in names:
            names.add(BACKWARD)
        reference, compiles = recorded.layer.reference, bool(report.can("compile"))
        found = find(call, implementation, reference, names, compiles=compiles, every=every_size)
        found = joined(found, training=training)
        probes |= {name: Probe(finding.has, finding.why) for name, finding in found.items()}
    return report


def _judged(rows: list[VerifyRow]) -> Iterator[tuple[str, Probe]]:
    """Yield a result for each probe that rows belong to."""
    untrained = any(_probe_of(row) == "gradients" and not row.ok for row in rows)
    groups: dict[str, list[VerifyRow]] = {}
    for row in rows:
        name = _probe_of(row)
        if not (untrained and row.mode == "training" and name != "gradients"):  # reported once
            groups.setdefault(name, []).append(row)
    for name, group in groups.items():
        if bad := next((row for row in group if row.verdict in ("wrong", "failed")), None):
            yield name, Probe(False, f"{', '.join(filter(None, (bad.case, bad.subject)))}: {bad.reason}")
        elif any(row.verdict == "ok" for row in group):
            yield name, Probe(True)
        else:
            yield name, Probe(None, group[0].reason)


def _probe_of(row: VerifyRow) -> str:
    """Training on inputs like the given ones is about gradients; anything else is about its case."""
    if row.mode == "training" and row.case in ("as given", "other values"):
        return "gradients"
    return _PROBE_OF_CASE.get(row.case, row.case)


# --- Tracing --------------------------------------------------------------------------------------


def _traces(call: Call, implementation: Forward, gradients: bool) -> Probe:
    """Compile without graph breaks, and compare with the same kernel in eager mode."""
    call = with_gradients(call) if gradients else call

    def probed(*args: Any, **kwargs: Any) -> Any:
        return implementation(*args, **kwargs)

    # A code object for each probe, because Dynamo limits the compilations of one. It keeps the name of a file:
    # Dynamo compiles all functions without one as if they were the same.
    probed.__code__ = probed.__code__.replace()
    try:
        eager = call.run(implementation, gradients=gradients)
        compiled = torch.compile(probed, fullgraph=True, backend="aot_eager", dynamic=False)
        traced = call.run(compiled, gradients=gradients)
    except Exception as error:
        return Probe(False, f"{type(error).__name__}: {_first_line(error)}")
    for kind, one, other in (
        ("outputs", traced.outputs, eager.outputs),
        ("gradients", dict(traced.gradients), dict(eager.gradients)),
    ):
        difference = compare(one, other)
        if not difference.ok:
            return Probe(False, f"compiled, its {kind} are others than in eager mode: {difference}")
    if traced.mutated.keys() != eager.mutated.keys():
        return Probe(False, "compiled, it changes other arguments in place than in eager mode")
    return Probe(True)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


# --- CUDA graphs ----------------------------------------------------------------------------------


@functools.cache
def _capturing(gpu: int) -> Any:
    """Return the stream to capture on: PyTorch's own is of the GPU of its first capture. cuBLAS has memory for each."""
    make_stream: Any = torch.cuda.Stream
    return make_stream(gpu)


def captured(run: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return the CUDA graph of a run, and the output that replays write to.

    After a capture that failed, its generator refuses to draw ever after, as do all graphs that use it, and its stream
    stays the current one. So each graph has a generator state of its own, and the stream is set back.

    Args:
        run: What to capture. It has run on this device before, for what is compiled or allocated then.
        pool: The memory of other graphs to share; after a capture that failed, it cannot be used again.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        aside = _capturing(torch.cuda.current_device())
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool, stream=aside):
            output = run()
    finally:
        generator.graphsafe_set_state(own)
    return graph, output


def _captures(call: Call, implementation: Forward) -> Probe:
    """Capture a call in a CUDA graph, replay it, and compare."""

    def replayed(*args: Any, **kwargs: Any) -> Any:
        make_stream: Any = torch.cuda.Stream
        current, aside = torch.cuda.current_stream(), make_stream()
        aside.wait_stream(current)  # a capture must not be on the default stream, so its warm-up is not, either
        with torch.cuda.stream(aside):
            implementation(*args, **kwargs)  # compiles, and allocates memory that it keeps
        current.wait_stream(aside)
        graph, outputs = captured(lambda: implementation(*args, **kwargs))
        graph.replay()
        torch.cuda.synchronize()
        return mapped(outputs, each_tensor(torch.clone))

    try:
        expected = call.run(implementation, gradients=False)
        actual = call.run(replayed, gradients=False)
    except Exception as error:
        try:
            torch.cuda.synchronize()  # raises if the device is lost; a failed capture leaves it intact
        except Exception as broken:
            stop_if_broken(broken)
            raise error from broken
        return Probe(False, f"{type(error).__name__}: {_first_line(error)}")
    difference = compare(actual.outputs, expected.outputs)
    return Probe(True) if difference.ok else Probe(False, f"replayed, its outputs are others: {difference}")


def implementation_of(kernel: Any, *, function: bool) -> Forward:
    """Return the function that calls run: the `forward` of a class, for a function layer on an empty module."""
    if not isinstance(kernel, type):
        return kernel  # type: ignore[no-any-return]
    forward: Forward = kernel.forward  # type: ignore[attr-defined]
    return types.MethodType(forward, kernel()) if function else forward


set_module("kernels_plugins", globals())
