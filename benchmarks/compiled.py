"""What dispatch costs in compiled code: nothing in the graph, and next to nothing in guards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Row, compare
from torch import nn

from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping

LAYERS = 100
LIMIT = 1.05


class Reference(nn.Module):
    """A layer with a parameter and an operator that its kernel does not use."""

    def __init__(self) -> None:
        """Make the parameter."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        """Return something that tells from the kernel."""
        return torch.sin(x) * self.weight + eps


class Kernel(nn.Module):
    """What serves."""

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
    """Measure graphs, guards and calls; on a CUDA device where there is one, else on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for classes in (1, 10):
        for state in ("warm", "cold"):
            for inside in ("inside a scope", "registered"):
                if inside == "registered" and (state == "cold" or classes == 1):
                    continue
                yield from _models(classes, state, inside, device)


def _models(classes: int, state: str, inside: str, device: str) -> Iterator[Row]:
    names = [f"bench_compiled_{classes}_{state}_{inside.split()[0]}_{i}" for i in range(classes)]
    what = f"{classes} x {LAYERS // classes} layers, traced {state}, {inside} ({device})"
    peer = "kernels called directly"
    mapping = {name: {device: Kernel} for name in names}
    dispatched, direct = Model(names, dispatch=True).to(device), Model(names, dispatch=False).to(device)
    x = torch.ones(8, device=device)
    if inside == "registered":
        from kernels_plugins import register_kernel_mapping

        register_kernel_mapping(mapping)
        mapping = {}
    with use_kernel_mapping(mapping), torch.no_grad():
        if state == "warm":
            dispatched(x)
        torch._dynamo.reset()
        subject, subject_graphs = _compile(dispatched)
        other, other_graphs = _compile(direct)
        if not torch.equal(subject(x), other(x)):
            raise AssertionError("the kernels did not serve")
        times = compare({"subject": ("f(x)", {"f": subject, "x": x}), "peer": ("f(x)", {"f": other, "x": x})})
    different = _differences(subject_graphs, other_graphs)
    nodes = sum(len(graph.nodes) for graph in other_graphs)
    yield Row("compiled", f"graph nodes that differ: {what}", different, "nodes", f"of {nodes} nodes", limit=0)
    yield Row(
        "compiled", f"call: {what}", times["subject"] / 1e3, "us", peer, times["peer"] / 1e3, LIMIT, 1.0, judge="ratio"
    )
    guards, peer_guards = _guards(dispatched), _guards(direct)
    if guards is not None and peer_guards is not None:
        yield Row("compiled", f"guards: {what}", guards, "guards", peer, peer_guards)


def _compile(model: nn.Module) -> tuple[Callable[..., Any], list[torch.fx.Graph]]:
    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(module.graph)
        return module.forward

    return torch.compile(model, backend=backend, fullgraph=True), graphs


def _differences(ours: list[torch.fx.Graph], theirs: list[torch.fx.Graph]) -> int:
    """Count the nodes that are not the same operator with the same arguments at the same place."""
    left = [_node(node) for graph in ours for node in graph.nodes]
    right = [_node(node) for graph in theirs for node in graph.nodes]
    return abs(len(left) - len(right)) + sum(a != b for a, b in zip(left, right, strict=False))


def _node(node: torch.fx.Node) -> tuple[str, str, str, str]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)


def _guards(model: nn.Module) -> int | None:
    """Count the leaf guards of a compiled model; None if this PyTorch does not show them."""
    try:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        entries = _debug_get_cache_entry_list(type(model).forward.__code__)
        chosen = [entry for entry in entries if entry.guard_manager.check({"self": model, "x": _input(model)})]
        shown = str((chosen or entries)[0].guard_manager)
    except Exception:
        return None
    leaves = re.findall(r"\+- (?!\w*GuardManager|source)[A-Z_]+\b", shown)
    return len(leaves)


def _input(model: nn.Module) -> torch.Tensor:
    return torch.ones(8, device=next(model.parameters()).device)
