"""The operators of PyTorch that are replaced on a GPU are listed with the layers that run there."""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import receipt, use_kernel_forward_from_hub

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@use_kernel_forward_from_hub("GpuProvenance")
class Layer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.hardswish(x)


def overrides(device: str) -> dict[str, str]:
    """Return what the receipt of a layer on a device has about replaced operators."""
    (row,) = json.loads(receipt(Layer(), device=device).to_json())
    found: dict[str, str] = row["provenance"].get("overrides", {})
    return found


def test_replaced_operators_are_those_of_the_device() -> None:
    """An operator that is replaced for CUDA is listed there, and not for the CPU; so are those of PyTorch itself."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("hardswish", lambda x: x, "CUDA")
    on_gpu, on_cpu = overrides("cuda"), overrides("cpu")
    assert __file__ in on_gpu["hardswish"] and "hardswish" not in on_cpu
    del library
    assert "hardswish" not in overrides("cuda")
    try:
        native: Any = importlib.import_module("torch.backends.python_native")
    except ImportError:  # an older PyTorch brings no such operators
        return
    for language in native.available_dsls:
        for operator in native.get_dsl_operations(language):
            if operator in on_gpu:
                assert language in on_gpu[operator]
