"""Calls that a kernel does not take: the next candidate serves them, dispatched, kernelized and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import (
    KernelsWarning,
    Mode,
    NoKernelError,
    count_calls,
    kernelize,
    quarantined,
    receipt,
    release,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.generated import passed_back
from kernels_plugins.mapping import use_kernel_mapping

Make = Callable[..., Any]
EVEN, ODD = torch.zeros(2), torch.zeros(3)


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    """Leave nothing in quarantine."""
    yield
    release()


def even(added: float, **members: Any) -> type[nn.Module]:
    """Make a kernel that takes calls with an even number of columns only."""

    def forward(self: nn.Module, x: torch.Tensor) -> Any:
        return x + added if x.shape[-1] % 2 == 0 else NotImplemented

    return type("Even", (nn.Module,), {"forward": forward, "can_torch_compile": True, **members})


def declaring(added: float, **members: Any) -> type[nn.Module]:
    """Make a kernel with declarations."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + added

    return type("Declaring", (nn.Module,), {"forward": forward, "can_torch_compile": True, **members})


def values(layer: Any, *tensors: torch.Tensor) -> list[float]:
    """Return the first number of each output."""
    return [float(layer(x).flatten()[0]) for x in tensors]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("how", ["dispatched", "kernelized", "compiled", "kernelized and compiled"])
def test_the_next_candidate_serves_the_call(make_layer: Make, make_kernel: Make, how: str, recorded: bool) -> None:
    """What the first kernel passes on, the second one serves, or the reference; also where autograd records."""
    torch._dynamo.reset()
    other = even(20)
    other.forward = lambda self, x: NotImplemented if x.shape[-1] == 5 else x + 20  # type: ignore[method-assign]
    tensors = [torch.zeros(columns, requires_grad=recorded) for columns in (2, 3, 5, 4, 3)]
    layer = make_layer()()
    mode = Mode.TRAINING if recorded else Mode.INFERENCE
    if "compiled" in how:
        mode |= Mode.TORCH_COMPILE
    with use_kernel_mapping({"Add": {"cpu": [even(10), other]}}), warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelsWarning)
        if "kernelized" in how:
            layer = kernelize(nn.Sequential(layer), mode=mode, device="cpu")
        called = torch.compile(layer, backend="eager", fullgraph=True) if "compiled" in how else layer
        assert values(called, *tensors) == [10, 20, 1, 10, 20]
        if recorded:
            for x in tensors:
                called(x).sum().backward()
                assert x.grad is not None and bool((x.grad == 1).all())


def test_after_the_scope_a_kernelized_model_keeps_the_next_candidate(make_layer: Make, make_kernel: Make) -> None:
    """The mapping is gone when the frozen kernel first passes a call on: its second candidate serves all the same."""
    model = nn.Sequential(make_layer()())
    with use_kernel_mapping({"Add": {"cpu": [even(10), make_kernel(20)]}}):
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    with torch.no_grad():
        assert values(model, EVEN, ODD) == [10, 20]


def test_a_helper_may_say_it(make_layer: Make) -> None:
    """`NotImplemented` comes from a function that the kernel calls: kernelized modules pass on, too."""

    def helper(x: torch.Tensor) -> Any:
        return NotImplemented

    kernel = declaring(10)
    kernel.forward = lambda self, x: helper(x)  # type: ignore[method-assign]
    with use_kernel_mapping({"Add": {"cpu": kernel}}), pytest.warns(KernelsWarning, match="it returns NotImplemented"):
        model = kernelize(make_layer()(), mode=Mode.INFERENCE, device="cpu")
        assert values(model, EVEN) == [1]


def test_the_user_learns_that_the_reference_runs(make_layer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning where the reference serves; an error in strict mode, and where the reference must not serve."""
    with use_kernel_mapping({"Add": {"cpu": even(10)}}), torch.no_grad():
        with pytest.warns(
            KernelsWarning, match="is not used in some calls, reference runs instead: .*Even: it passes some calls on"
        ) as caught:
            layer = make_layer()()
            assert values(layer, ODD, ODD) == [1, 1]
        assert len(caught) == 1
        with pytest.raises(NoKernelError, match="it passes some calls on"):
            make_layer(use_fallback=False)()(ODD)
        monkeypatch.setenv("KERNELS_STRICT", "1")
        with use_kernel_mapping({"Add": {"cpu": even(10)}}), pytest.raises(NoKernelError, match="KERNELS_STRICT"):
            layer(ODD)
        assert resolve(layer, device="cpu", mode=Mode.INFERENCE).origin.endswith("Even")


@pytest.mark.parametrize("is_kernelized", [False, True])
def test_dtypes_and_supports(make_layer: Make, is_kernelized: bool) -> None:
    """A kernel serves the dtypes and shapes that it declares, and its text need not look at them."""
    kernel = declaring(10, dtypes=(torch.float32,), supports=lambda self, x: x.shape[-1] % 2 == 0)
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": kernel}}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if is_kernelized:
            layer = kernelize(layer, mode=Mode.INFERENCE, device="cpu")
        with torch.no_grad():
            assert values(layer, EVEN, ODD, EVEN.double(), EVEN) == [10, 1, 1, 10]
    assert "it takes only float32; it takes only calls for which its supports(...) is true" in str(caught[-1].message)
    assert quarantined() == []


def test_declarations_of_a_function() -> None:
    """A kernel that is a function, or a class for a function layer, declares as well."""

    @use_kernel_forward_from_hub("Plus")
    def plus(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x + 10

    kernel.dtypes = (torch.float32,)  # type: ignore[attr-defined]
    for source in kernel, declaring(10, dtypes={torch.float32}):
        with use_kernel_mapping({"Plus": {"cpu": source}}), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert values(plus, EVEN, EVEN.double(), EVEN) == [10, 1, 10]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"dtypes": torch.float32}, "write a tuple of dtypes"),
        ({"dtypes": ("float32",)}, "write a tuple of dtypes"),
        ({"dtypes": ()}, "write a tuple of dtypes"),
        ({"supports": True}, "with the parameters of forward"),
        ({"supports": lambda x: True}, "with the parameters of forward"),
    ],
)
def test_declarations_that_cannot_be_used(make_layer: Make, members: Any, reason: str) -> None:
    """A declaration of the wrong type refuses the kernel, with an example of the right one."""
    with use_kernel_mapping({"Add": {"cpu": declaring(10, **members)}}):
        (refusal,) = resolve(make_layer(), device="cpu", mode=Mode.INFERENCE).refusals
    assert reason in refusal.reason


def test_the_next_candidate_is_judged_as_the_first(make_layer: Make, make_kernel: Make) -> None:
    """The second kernel raises, or loses gradients: it goes into quarantine, and the third candidate serves."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    def loses(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach() + 20

    for bad in forward, loses:
        second = type("Second", (nn.Module,), {"forward": bad})
        layer, x = make_layer()(), torch.zeros(3, requires_grad=True)
        with use_kernel_mapping({"Add": {"cpu": [even(10), second, make_kernel(30)]}}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert layer(x)[0].item() in (1, 30) and layer(x)[0].item() == 30
            layer(x).sum().backward()
        assert x.grad is not None
        assert "Second" in str(quarantined()[-1])


def test_counts_are_those_of_the_kernels_that_served(make_layer: Make, make_kernel: Make) -> None:
    """A call that was passed on is counted once, for the kernel that served it."""
    model = nn.Sequential(make_layer()())
    with use_kernel_mapping({"Add": {"cpu": [even(10), make_kernel(20)]}}), torch.no_grad():
        with count_calls():
            assert values(model, EVEN, ODD, ODD) == [10, 20, 20]
        (calls,) = (row.calls for row in receipt(model, device="cpu").rows)
    assert calls is not None and [(o.rpartition(".")[2], n) for o, n in calls.items()] == [("Even", 1), ("Add20", 2)]


def test_a_reference_that_returns_it_is_called_once(make_layer: Make) -> None:
    """A function whose own answer is `NotImplemented`, as of an operator, keeps it."""
    calls = []

    @use_kernel_forward_from_hub("Odd")
    def answers(x: torch.Tensor) -> Any:
        calls.append(1)
        return NotImplemented

    assert answers(EVEN) is NotImplemented and answers(1) is NotImplemented  # type: ignore[arg-type]
    assert len(calls) == 2 and passed_back() is NotImplemented
