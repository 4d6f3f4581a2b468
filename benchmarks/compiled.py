"""The cost of dispatch in compiled code: nothing in the graph, and next to nothing in guards."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
from measure import Row, compare
from torch import nn

from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping, use_kernel_mapping

LAYERS = 100
LIMIT = 1.05


class Reference(nn.Module):
    """A layer with a parameter and an operator that its kernel does not use."""

    def __init__(self) -> None:
        """Make the parameter."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        """Return another result than the kernel."""
        return torch.sin(x) * self.weight + eps


class Kernel(nn.Module):
    """The kernel of all layers."""

    can_torch_compile = True
    weight: torch.Tensor

    def forward(self, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        """Return two operators' worth of work."""
        return torch.cos(x) * self.weight


def layer_class(name: str, *, dispatch: bool) -> type[Reference]:
    """Return a fresh layer class: dispatched, or with the kernel's forward in place of its own."""
    fresh = type(name, (Reference,), {"forward": Reference.forward if dispatch else Kernel.forward})
    return use_kernel_forward_from_hub(name)(fresh) if dispatch else fresh


class Model(nn.Module):
    """Layers, one after the other."""

    def __init__(self, names: list[str], *, dispatch: bool) -> None:
        """Make `LAYERS` layers, of one class for each name in turn."""
        super().__init__()
        classes = [layer_class(name, dispatch=dispatch) for name in names]
        self.layers = nn.ModuleList(classes[i % len(classes)]() for i in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run them all."""
        for layer in self.layers:
            x = layer(x)
        return x


def run() -> Iterator[Row]:
    """Measure graphs, guards and calls; on a CUDA device where there is one, too."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for classes in (1, 10):
            yield from _models(classes, "warm", "inside a scope", device)
            yield from _models(classes, "cold", "inside a scope", device)
        yield from _models(10, "warm", "registered", device)


def _models(classes: int, state: str, inside: str, device: str) -> Iterator[Row]:
    names = [f"bench_compiled_{device}_{classes}_{state}_{inside.split()[0]}_{i}" for i in range(classes)]
    models = f"{classes} x {LAYERS // classes} layers, traced {state}, {inside} ({device})"
    peer = "kernels called directly"
    mapping = {name: {device: Kernel} for name in names}
    dispatched, direct = Model(names, dispatch=True).to(device), Model(names, dispatch=False).to(device)
    x = torch.ones(8, device=device)
    if inside == "registered":
        register_kernel_mapping(mapping)
        mapping = {}
    with use_kernel_mapping(mapping), torch.no_grad():
        if state == "warm":
            dispatched(x)
        torch._dynamo.reset()
        subject, other = Compiled(dispatched), Compiled(direct)
        if not torch.equal(subject.call(x), other.call(x)):
            raise AssertionError("the kernels did not serve")
        times = compare({"subject": ("f(x)", {"f": subject.call, "x": x}), "peer": ("f(x)", {"f": other.call, "x": x})})
    different, dead = _differences(subject.graphs, other.graphs)
    nodes = f"of {sum(len(graph.nodes) for graph in other.graphs)} nodes"
    yield Row("compiled", f"graph nodes that differ: {models}", different, "nodes", nodes, limit=0)
    if different:
        yield Row("compiled", f"... of which read an attribute that nothing uses: {models}", dead, "nodes", nodes)
    yield Row(
        "compiled",
        f"call: {models}",
        times["subject"] / 1e3,
        "us",
        peer,
        times["peer"] / 1e3,
        LIMIT,
        1.0,
        judge="ratio",
    )
    guards, peer_guards = subject.guards(), other.guards()
    if guards is not None and peer_guards is not None:
        yield Row("compiled", f"guards: {models}", guards, "guards", peer, peer_guards)


class Compiled:
    """A compiled call of a model, in a function of its own, so that only its compilations are counted."""

    def __init__(self, model: nn.Module) -> None:
        """Prepare; the first call compiles."""
        self.graphs: list[torch.fx.Graph] = []
        names: dict[str, Any] = {"model": model}
        exec("def run(x):\n    return model(x)\n", names)
        self.function = names["run"]
        self.call: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            self.function, backend=self._keep, fullgraph=True
        )

    def _keep(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs.append(module.graph)
        return module.forward

    def guards(self) -> int | None:
        """Count the leaf guards; None if this PyTorch does not show them."""
        try:
            from torch._dynamo.eval_frame import _debug_get_cache_entry_list

            (entry,) = _debug_get_cache_entry_list(self.function.__code__)
            return len(re.findall(r"\+- [A-Z_]+:", str(entry.guard_manager))) or None
        except (ImportError, AttributeError, TypeError, ValueError):
            return None


def _differences(ours: list[torch.fx.Graph], theirs: list[torch.fx.Graph]) -> tuple[int, int]:
    """Count the lines of a diff of two lists of nodes, and those among them that nothing uses."""
    nodes = [node for graph in ours for node in graph.nodes]
    left, right = ([line for graph in graphs for line in _lines(graph)] for graphs in (ours, theirs))
    different = dead = 0
    for change, low, high, other_low, other_high in difflib.SequenceMatcher(
        None, left, right, autojunk=False
    ).get_opcodes():
        if change != "equal":
            different += max(high - low, other_high - other_low)
            dead += sum(not node.users and node.op != "output" for node in nodes[low:high])
    return different, dead


def _lines(graph: torch.fx.Graph) -> list[tuple[str, str, str, str]]:
    """Describe each node, with nodes numbered: names of inputs differ between versions of Dynamo."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            "" if node.op == "placeholder" else str(node.target),
            str(torch.fx.node.map_arg(node.args, number.__getitem__)),
            str(torch.fx.node.map_arg(node.kwargs, number.__getitem__)),
        )
        for node in graph.nodes
    ]
