"""Kernels that read past the parts of a module: adapters, hooks and quantized weights on these are not ignored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from warned import ignored, noted

from kernels_core import (
    KernelizeError,
    KernelsWarning,
    Mode,
    RequirementError,
    count_calls,
    kernelize,
    quarantined,
    receipt,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins.mapping import use_kernel_mapping

X = torch.ones(2, 4)
SHIFT = 100.0
"""The number that kernels add, so that an output shows which function made it."""


@pytest.fixture(autouse=True)
def _unhook() -> Iterator[None]:
    yield
    while _HANDLES:
        _HANDLES.pop().remove()


_HANDLES: list[Any] = []
"""Hooks of all modules, which end with the test."""


def hook_of_all_modules(layer: Any) -> None:
    def hook(module: Any, args: Any, output: Any) -> Any:
        return output * 3 if module is layer.gate else None

    _HANDLES.append(register_module_forward_hook(hook))


class Adapter(nn.Module):
    """An adapter as libraries for fine-tuning have them, with the weight of the module that it wraps."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Linear(4, 4, bias=False)

    @property
    def weight(self) -> Any:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.base(x) + self.delta(x)


class Lora(nn.Linear):
    """An adapter with parameters of its own beside the weight."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.low = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.low


class Fused(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.gate.weight) + SHIFT  # type: ignore[arg-type,union-attr]


class Declared(nn.Module):
    can_torch_compile = True
    reads = {"gate": nn.Linear}  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part: Any = self.gate
        return nn.functional.linear(x, part.weight) + SHIFT


class Named(nn.Module):
    """Declares the part, and names the weight that it reads."""

    can_torch_compile = True
    reads = {"gate": nn.Linear}  # noqa: RUF012
    forward = Fused.forward


def make(name: str = "Gated", **options: Any) -> Any:
    @use_kernel_forward_from_hub(name, **options)
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate: Any = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> Any:
            return self.gate(x)

    return Gated()


def whole(module: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, module.gate.weight, module.gate.bias) + SHIFT


READERS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a function": lambda self, x: whole(self, x.to(self.gate.weight.dtype)),
    "a function, after another argument": lambda self, x: (lambda y, m: whole(m, y))(x, self) + 0 * self.gate.weight[0],
}


@pytest.mark.parametrize("reader", READERS)
def test_a_kernel_that_passes_its_module_on_may_read_all_of_a_part(reader: str) -> None:
    """The code of its forward names one parameter of a declared part; a function that it calls reads another one."""
    members = {"reads": {"gate": nn.Linear}, "forward": READERS[reader]}
    layer = make(f"Reads by {reader}")
    layer.gate = nn.Linear(4, 4)
    with use_kernel_mapping({f"Reads by {reader}": {"cpu": type("Whole", (nn.Module,), members)}}), noted() as caught:
        torch.testing.assert_close(layer(X), layer.gate(X) + SHIFT)
    assert not caught


def own_forward(layer: Any) -> None:
    layer.gate.forward = lambda x: x * 3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "adapter": lambda layer: setattr(layer, "gate", Adapter(layer.gate)),
    "lora": lambda layer: setattr(layer, "gate", Lora()),
    "bias": lambda layer: setattr(layer, "gate", nn.Linear(4, 4)),
    "hook": lambda layer: layer.gate.register_forward_hook(lambda module, args, output: output * 3),
    "pre-hook": lambda layer: layer.gate.register_forward_pre_hook(lambda module, args: args[0] * 3),
    "hook of all modules": hook_of_all_modules,
    "forward": own_forward,
    "parametrization": lambda layer: parametrizations.weight_norm(layer.gate),
}


@pytest.mark.parametrize("kernel", [Fused, Declared, Named])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kernelized", [False, True])
def test_a_changed_part_is_not_ignored(kernel: Any, change: str, kernelized: bool) -> None:
    """The kernel serves until the part changes, and the reference from then on, with a warning that names the part."""
    if kernel is Declared and change == "bias":
        pytest.skip("the declared class is the same, and the code does not show what it reads of it")
    layer, other = make(f"Gated{kernel}{change}{kernelized}"), make()
    name = f"Gated{kernel}{change}{kernelized}"
    with use_kernel_mapping({name: {"cpu": kernel}}), noted() as caught:
        if kernelized:
            kernelize(layer, mode=Mode.TRAINING, device="cpu")
        torch.testing.assert_close(layer(X), layer.gate(X) + SHIFT)
        CHANGES[change](layer)
        for _ in range(2):
            torch.testing.assert_close(layer(X), layer.gate(X))
            with torch.no_grad():
                torch.testing.assert_close(layer(X), layer.gate(X))
    told = [str(w.message) for w in caught if issubclass(w.category, KernelsWarning) and "'gate'" in str(w.message)]
    assert len(told) == 1 and name in told[0]
    assert not quarantined() and other is not layer


@pytest.mark.parametrize("kernel", [Fused, Declared])
@pytest.mark.parametrize("when", ["dispatched", "after kernelize", "before kernelize", "while suspended"])
def test_receipts_show_a_changed_part(kernel: Any, when: str) -> None:
    """The row of that module alone is for the reference, with the part; its count, too; until the part is as it was."""
    name = f"Shown{kernel.__name__}{when}"
    cls = type(make(name))
    model = nn.Sequential(cls(), cls()).eval()
    with use_kernel_mapping({name: {"cpu": kernel}}), ignored(), torch.no_grad():
        if when in ("after kernelize", "while suspended"):
            kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert [row.is_reference for row in receipt(model).rows] == [False, False]
        if when == "while suspended":
            model.train()
        gate = model[1].gate
        model[1].gate = Adapter(gate)
        if when == "before kernelize":
            with pytest.raises(KernelizeError, match="'gate'"):
                kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=False)
            with pytest.warns(KernelsWarning, match="'gate'"):
                kernelize(model, mode=Mode.INFERENCE, device="cpu")
        with count_calls():
            model(X)
        first, second = receipt(model).rows
        assert not first.is_reference and second.is_reference
        assert first.calls == {first.origin: 1} and second.calls == {"reference": 1}
        assert first.frozen is second.frozen is ("kernelize" in when)
        assert second.refusals[-1][0].endswith(kernel.__name__) and "'gate'" in second.refusals[-1][1]
        with pytest.raises(RequirementError, match="'gate'"):
            receipt(model).require("*")
        model[1].gate = gate
        receipt(model).require("*")
        torch.testing.assert_close(model[1](X), gate(X) + SHIFT)


def test_a_part_that_is_called_may_be_anything() -> None:
    """A kernel that calls a part, and only asks for the dtype of its weight, serves with an adapter, too."""

    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            gate: Any = self.gate
            return self.gate(x.to(self.gate.weight.dtype)) + 0 * gate.weight.sum() + SHIFT  # type: ignore[operator,union-attr,arg-type]

    layer = make()
    layer.gate = Adapter(layer.gate)
    with use_kernel_mapping({"Gated": {"cpu": Calls}}):
        torch.testing.assert_close(layer(X), layer.gate(X) + SHIFT)


def test_kernelized_parts_are_of_their_class() -> None:
    """A part that is a kernelized layer itself is the class that the kernel declares."""

    @use_kernel_forward_from_hub("Inner")
    class Inner(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    class Outer(nn.Module):
        reads = {"gate": (Inner, nn.Linear)}  # noqa: RUF012

        def forward(self, x: torch.Tensor) -> Any:
            return nn.functional.linear(x, self.gate.weight) + SHIFT  # type: ignore[arg-type,union-attr]

    layer = make("Outer")
    layer.gate = Inner(4, 4, bias=False)
    with use_kernel_mapping({"Outer": {"cpu": Outer}}):
        kernelize(layer, mode=Mode.INFERENCE, device="cpu")
    assert type(layer.gate) is not Inner
    with torch.no_grad():
        assert torch.all(layer(X) > SHIFT / 2)


@pytest.mark.parametrize("kernel", [Fused, Declared])
def test_compiled_code_looks_at_parts(kernel: Any) -> None:
    """Compiled without a graph break, the kernel serves; with an adapter, the reference does."""
    layer = make("Compiled")
    with use_kernel_mapping({"Compiled": {"cpu": kernel}}), ignored():
        call: Any = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(call(X), layer.gate(X) + SHIFT)
        layer.gate = Adapter(layer.gate)
        torch.testing.assert_close(call(X), layer.gate(X))
    torch._dynamo.reset()


@pytest.mark.parametrize("reads", [{"gate": "Linear"}, {1: nn.Linear}, [nn.Linear]])
def test_a_wrong_declaration_is_refused(reads: Any) -> None:
    """The reason shows the right form."""
    kernel = type("Wrong", (nn.Module,), {"forward": Fused.forward, "reads": reads})
    make("Wrong")
    with use_kernel_mapping({"Wrong": {"cpu": kernel}}), ignored():
        resolution = resolve("Wrong", device="cpu", mode=Mode.INFERENCE)
    assert resolution.is_reference and "nn.Linear" in resolution.refusals[0].reason


def test_a_kernel_without_the_gradients_of_a_child_serves_no_inference() -> None:
    """Where its code does not show which parts it reads, the check of gradients puts it out for inference, too."""

    class Hidden(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            gate: Any = getattr(self, "gate")  # noqa: B009
            return nn.functional.linear(x, gate.weight) + SHIFT

    layer = make("Hidden")
    layer.gate = Adapter(layer.gate)
    with use_kernel_mapping({"Hidden": {"cpu": Hidden}}), ignored():
        layer(X)
        with torch.no_grad():
            torch.testing.assert_close(layer(X), layer.gate(X))
    assert [entry.mode for entry in quarantined()] == [None]


# --- Layers that are not called --------------------------------------------------------------------


@use_kernel_forward_from_hub("Inner")
class InnerLayer(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


@use_kernel_forward_from_hub("Outer")
class OuterLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = InnerLayer(4, 4), InnerLayer(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.other(self.inner(x))


class Around(nn.Module):
    reads = {"inner": InnerLayer}  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(nn.functional.linear(x, self.inner.weight, self.inner.bias))  # type: ignore


def test_a_layer_that_a_kernel_reads_past_is_marked() -> None:
    """Receipts show a layer that the kernel of its parent computes as bypassed, in text, JSON and page."""
    model = nn.Sequential(OuterLayer(), OuterLayer())
    with use_kernel_mapping({"Outer": {"cpu": Around}}):
        found = receipt(model, device="cpu")
        rows = {row.path: row for row in found.rows}
        assert rows["0"].bypasses == ("inner",) and rows["0.inner"].origin == "bypassed" and rows["0.inner"].is_bypassed
        assert rows["0.other"].is_reference and rows["1.inner"].is_bypassed
        lines = str(found).splitlines()
        assert "    bypasses inner" in lines and any(line.startswith("0-1.inner ") for line in lines)
        assert json.loads(found.to_json())[0]["bypasses"] == ["inner"]
        page = found._repr_html_()
        assert "Not called" in page and "Around computes it" in page
        found.require("*.inner")
        with pytest.raises(RequirementError, match="bypassed"):
            found.require("*.inner", origin="acme/*")
        model[1].inner.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
        rows = {row.path: row for row in receipt(model, device="cpu").rows}
        assert rows["0.inner"].is_bypassed and rows["1"].is_reference and rows["1.inner"].is_reference


def test_a_layer_that_is_called_elsewhere_is_not_bypassed() -> None:
    """A shared layer runs at its other place."""
    model = nn.Sequential(OuterLayer(), nn.Identity())
    model[1] = model[0].inner  # type: ignore[assignment]
    with use_kernel_mapping({"Outer": {"cpu": Around}}):
        rows = {row.path: row for row in receipt(model, device="cpu").rows}
    assert rows["0"].bypasses == ("inner",) and rows["0.inner"].is_reference and rows["0.inner"].aliases == ("1",)


def test_what_is_inside_of_a_bypassed_part_is_bypassed() -> None:
    """No layer or function below a part runs that a kernel computes itself."""

    @use_kernel_forward_from_hub("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep, self.function = InnerLayer(4, 4), double

        def forward(self, x: torch.Tensor) -> Any:
            return self.function(self.deep(x))

    class Past(nn.Module):
        reads = {"part": Part}  # noqa: RUF012

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    @use_kernel_forward_from_hub("Holder")
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: torch.Tensor) -> Any:
            return self.part(x)

    with use_kernel_mapping({"Holder": {"cpu": Past}}):
        rows = receipt(Holder(), device="cpu").rows
    assert {row.path: row.is_bypassed for row in rows} == {"": False, "part.deep": True, "part:double": True}
