"""Exceptions of kernels, models and metrics whose text cannot be had end no tool: the class of each is reported."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import KernelsError, PluginManager, release, use_kernel_forward_from_hub
from kernels_plugins import bisect, choosing, consistency, use_kernel_mapping, verify
from kernels_plugins.choice import plugin as choice_plugin
from kernels_plugins.oracle import plugin as oracle_plugin

X = torch.ones(4, 8)


class Speechless(Exception):  # noqa: N818
    """An exception without a text."""

    def __str__(self) -> str:
        raise ValueError("no text")


@use_kernel_forward_from_hub("Speechless")
class Layer(nn.Module):
    """A layer whose kernel raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Raises(nn.Module):
    """The kernel, and a model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise Speechless


def metric(model: nn.Module) -> float:
    """Raise."""
    raise Speechless


@pytest.fixture(autouse=True)
def _plugins(mapping_plugin: types.ModuleType, isolated_plugins: PluginManager) -> Iterator[None]:
    isolated_plugins.register(choice_plugin, "choice")
    isolated_plugins.register(oracle_plugin, "oracle")
    yield
    release()


def test_a_kernel() -> None:
    """`verify` has a row for it, and a race leaves it out."""
    model = nn.Sequential(Layer()).eval()
    with use_kernel_mapping({"Speechless": {"cpu": Raises}}), torch.no_grad():
        report = verify(model, X, gradients=False)
        assert not report.ok and all("it raises Speechless" in row.reason for row in report.failures)
    module = Layer()
    with use_kernel_mapping({"Speechless": {"cpu": Raises}}), torch.no_grad():
        with choosing(contexts=["eager"], seconds=0.01) as chosen, pytest.warns(match="Speechless"):
            module(X)
    (cell,) = chosen.choice.cells_on("cpu")
    assert any("Speechless" in reason for reason in cell.lost.values())


@pytest.mark.parametrize(
    "tool",
    [
        lambda: consistency(nn.Sequential(Raises()), nn.Sequential(Raises()), X),
        lambda: bisect(nn.Sequential(Layer()), metric, tolerance=1.0),
        lambda: verify(nn.Sequential(Layer(), Raises()), X),
    ],
    ids=["consistency", "bisect", "verify"],
)
def test_a_model_or_a_metric(tool: Callable[[], Any]) -> None:
    """Each tool raises an error of ours that names the class, and has the exception as its cause."""
    with pytest.raises(KernelsError, match="Speechless: its message is not known") as caught:
        tool()
    assert isinstance(caught.value.__cause__, Speechless)
