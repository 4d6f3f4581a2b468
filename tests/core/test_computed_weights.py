"""Weights that are computed from parameters: a right kernel is not accused, and one that loses gradients is found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from kernels_core import KernelsWarning, quarantined, use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping

X = torch.ones(2, 4)


def hypernetwork(layer: Any) -> None:
    """Let another layer compute the weight, which is an attribute then."""
    del layer._parameters["weight"]
    layer.other = nn.Linear(2, 16)
    layer.weight = layer.other(torch.ones(2)).view(4, 4)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


WAYS: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda layer: None,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "own parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "hypernetwork": hypernetwork,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", [*WAYS, "functional_call"])
@pytest.mark.parametrize("loses", [False, True])
def test_weights_that_are_computed(way: str, loses: bool) -> None:
    """The kernel serves with all gradients; one that loses that of the weight is found, and its call made anew."""

    @use_kernel_forward_from_hub("Computed")
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.detach() if loses else self.weight, self.bias)

    layer = Layer()
    with use_kernel_mapping({"Computed": {"cpu": Kernel}}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelsWarning)
        if way == "functional_call":
            source = torch.randn(4, 4, requires_grad=True)
            sources = [source]
            torch.func.functional_call(layer, {"weight": source * 2}, (X,)).sum().backward()
        else:
            WAYS[way](layer)
            layer(X).sum().backward(retain_graph=True)
            sources = list(layer.parameters())
    told = any("the gradients of this one call are lost" in str(warning.message) for warning in caught)
    assert all(source.grad is not None for source in sources) is not told
    assert told is (loses and way == "parametrizations.spectral_norm")  # whose computation changes a buffer
    assert bool(quarantined()) is loses
    assert any(issubclass(warning.category, KernelsWarning) for warning in caught) is loses
