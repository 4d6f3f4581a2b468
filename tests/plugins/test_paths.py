"""The paths of layers in the rows and messages of all tools."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from kernels_core import KernelsWarning, receipt, use_kernel_forward_from_hub
from kernels_plugins import bisect, canary, use_kernel_mapping, verify


@use_kernel_forward_from_hub("HasPath")
class Layer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 2


class Wrapper(nn.Module):
    def __init__(self, name: str, child: nn.Module) -> None:
        super().__init__()
        self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.children())(x)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_all_tools_name_layers_by_the_paths_of_the_model(name: str) -> None:
    """Wrappers of a model, and of layers in it, add nothing to the paths of receipts, reports, culprits, messages."""
    model, x = Wrapper(name, nn.Sequential(nn.Identity(), Wrapper(name, Layer()))), torch.ones(2)
    with use_kernel_mapping({"HasPath": {"cpu": Wrong}}), torch.no_grad():
        found = [row.path for row in receipt(model, device="cpu").rows]
        found += [
            culprit.path for culprit in bisect(model, lambda model: float(model(x).sum()), tolerance=0.1).culprits
        ]
        found += [row.path for row in verify(model, x, gradients=False).rows[:1]]
        with canary(first=1, action="warn"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KernelsWarning)
            model(x)
    assert found == ["1"] * 3
    assert ["layer 'HasPath' at '1' on cpu" in str(warning.message) for warning in caught] == [True]
