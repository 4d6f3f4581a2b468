"""The pack `triton` where there is no Triton, or no GPU: what it offers, refuses and raises."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    LoadError,
    Mode,
    PluginManager,
    forget,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import add_rms_norm, linear_cross_entropy, use_kernel_mapping
from kernels_plugins.adoption.shipped import RULES
from kernels_plugins.adoption.shipped_parents import PARENT_RULES
from kernels_plugins.packs.triton import plugin

PACKAGE = "kernels_plugins.packs.triton"
CUDA = torch.device("cuda")


@use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(autouse=True)
def pack(isolated_plugins: PluginManager, mapping_plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the pack, in a process without Triton."""
    isolated_plugins.register(plugin, "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [
        name for name in sys.modules if name.startswith(f"{PACKAGE}.") and not name.endswith((".functions", ".plugin"))
    ]:
        monkeypatch.delitem(sys.modules, name)


def test_without_triton() -> None:
    """A mapping that names the pack is no error; its kernels are refused with the reason, and tried again later."""
    with use_kernel_mapping({"RMSNorm": "pack:triton"}):
        (refusal,) = resolve(Norm, device="cuda", mode=Mode.INFERENCE).refusals
        assert "triton" in refusal.reason and refusal.reason.endswith("PyTorch for CUDA installs Triton")
        (refusal,) = resolve(Norm, device="cpu", mode=Mode.INFERENCE).refusals
        assert refusal.reason.endswith("the kernels in Triton are for GPUs, and this call is on cpu")
        assert not any(name.startswith(f"{PACKAGE}.launch") for name in sys.modules)


def test_offers_kernels_by_layer_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton, the kernel of the layer serves, and a name without one is refused; Triton's version is shown."""
    module: Any = types.ModuleType(f"{PACKAGE}.layers")
    kernel = type("Kernel", (nn.Module,), {"forward": lambda self, x: x})
    module.KERNELS = {"RMSNorm": kernel}
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    forget()
    with use_kernel_mapping({"RMSNorm": "pack:triton", "Other": "pack:triton"}):
        assert resolve(Norm, device="cuda", mode=Mode.INFERENCE).origin == "pack triton, Triton 3.6.0"
        (refusal,) = resolve("Other", device="cuda", mode=Mode.INFERENCE).refusals
        assert "it has no kernel for 'Other' on cuda" in refusal.reason


def test_names_are_those_of_rules() -> None:
    """Each layer for which the pack has a kernel is one that a rule adopts, so none is misspelt."""
    table = Path(plugin.__file__ or "").with_name("layers.py").read_text(encoding="utf-8").partition("KERNELS: ")[2]
    names = {line.split('"')[1] for line in table.splitlines() if line.startswith('    "')}
    assert len(names) == 16 and names <= {rule.layer_name for rule in (*RULES, *PARENT_RULES)}


X, W = torch.ones(2, 3, 4), torch.ones(4)
LABELS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ((X, X, W, 1e-6), LoadError, "needs Triton"),
        ((None, X, W, 1e-6), ArgumentTypeError, "x of add_rms_norm is a tensor, not a NoneType"),
        ((X, X.half(), W, 1e-6), ArgumentError, "residual is of torch.float16"),
        ((X.int(), X.int(), W.int(), 1e-6), ArgumentError, "x is of torch.int32"),
        ((X, X.to("meta"), W, 1e-6), ArgumentError, "residual is torch.strided on meta"),
        ((X, X, W.to_sparse(), 1e-6), ArgumentError, "weight is torch.sparse_coo on cpu"),
        ((X, X[:1], W, 1e-6), ArgumentError, r"not \(2, 3, 4\), \(1, 3, 4\), \(4,\)"),
        ((X, X, W[:3], 1e-6), ArgumentError, r"a weight of \[width\]"),
        ((X, X, W, "1e-6"), ArgumentTypeError, "eps of add_rms_norm"),
        ((X, X, W, 1e-6, None), ArgumentTypeError, "offset of add_rms_norm"),
    ],
)
def test_wrong_arguments_of_add_rms_norm(arguments: Any, error: type[Exception], problem: str) -> None:
    """Arguments that a kernel would misread are refused, with those to pass."""
    with pytest.raises(error, match=problem):
        add_rms_norm(*arguments)


V = torch.ones(9, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "problem"),
    [
        ((X, V, LABELS), {}, LoadError, "needs Triton"),
        ((X, V, LABELS, torch.ones(9)), {"num_items": 3}, LoadError, "needs Triton"),
        ((X, V, [[0]]), {}, ArgumentTypeError, "labels of linear_cross_entropy is a tensor of int64"),
        ((X, V, LABELS.int()), {}, ArgumentTypeError, "not torch.int32"),
        ((X, V, LABELS[:1]), {}, ArgumentError, r"labels \[...\] on the same device"),
        ((X, V, LABELS.to("meta")), {}, ArgumentError, "on the same device"),
        ((X, V[:, :3], LABELS), {}, ArgumentError, r"not \(2, 3, 4\), \(9, 3\), \(2, 3\)"),
        ((X, V[:0], LABELS), {}, ArgumentError, r"\(0, 4\)"),
        ((X, V, LABELS, torch.ones(8)), {}, ArgumentError, r"\(8,\)"),
        ((X, V, LABELS, torch.ones(9).half()), {}, ArgumentError, "bias is of torch.float16"),
        ((X, V, LABELS), {"reduction": "none"}, ArgumentError, "'mean' or 'sum', not 'none'"),
        ((X, V, LABELS), {"ignore_index": 1.0}, ArgumentTypeError, "ignore_index"),
        ((X, V, LABELS), {"num_items": "3"}, ArgumentTypeError, "num_items"),
    ],
)
def test_wrong_arguments_of_linear_cross_entropy(
    arguments: Any, options: Any, error: type[Exception], problem: str
) -> None:
    """Arguments that a kernel would misread are refused, with those to pass."""
    with pytest.raises(error, match=problem):
        linear_cross_entropy(*arguments, **options)
