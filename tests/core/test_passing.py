"""Calls that a kernel does not take: the next candidate serves them, dispatched, kernelized and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from warned import ignored, noted

from kernels_core import (
    ArgumentTypeError,
    KernelsWarning,
    Mode,
    NoKernelError,
    count_calls,
    decorated_layer,
    forget,
    kernelize,
    quarantine,
    quarantined,
    receipt,
    release,
    resolve,
    unkernelize,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from kernels_core.generated import passed_back
from kernels_plugins.mapping import use_kernel_mapping

Make = Callable[..., Any]
EVEN, ODD = torch.zeros(2), torch.zeros(3)


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
    """Calls that the first kernel passes on are served by the second, or the reference; also where autograd records."""
    torch._dynamo.reset()
    other = even(20)
    other.forward = lambda self, x: NotImplemented if x.shape[-1] == 5 else x + 20  # type: ignore[method-assign]
    tensors = [torch.zeros(columns, requires_grad=recorded) for columns in (2, 3, 5, 4, 3)]
    layer = make_layer()()
    mode = Mode.TRAINING if recorded else Mode.INFERENCE
    if "compiled" in how:
        mode |= Mode.TORCH_COMPILE
    with use_kernel_mapping({"Add": {"cpu": [even(10), other]}}), ignored(KernelsWarning):
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


def test_a_frozen_kernel_passes_on_traced_calls_that_it_would_not_serve(make_layer: Make, make_kernel: Make) -> None:
    """Kernelized for eager calls and compiled, or mapped otherwise since: the frozen kernel has passed them on."""
    second, model = make_kernel(20, can_torch_compile=True), nn.Sequential(make_layer()())
    for sources, number in (
        ([even(10, can_torch_compile=False), second], 20),
        ([even(10, can_torch_compile=False)], 1),
    ):
        with use_kernel_mapping({"Add": {"cpu": sources}}), ignored(KernelsWarning), torch.no_grad():
            kernelize(model, mode=Mode.INFERENCE, device="cpu")
            torch._dynamo.reset()
            assert values(torch.compile(model, backend="eager", fullgraph=True), EVEN, ODD) == [10, number]
        with use_kernel_mapping({"Add": {"cpu": make_kernel(30)}}), torch.no_grad():
            assert values(model, EVEN, ODD) == [10, number]
        unkernelize(model)


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
    with use_kernel_mapping({"Add": {"cpu": kernel}}), noted() as caught:
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
        with use_kernel_mapping({"Plus": {"cpu": source}}), torch.no_grad(), ignored():
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


def test_an_error_about_a_dtype_excludes_that_dtype(make_layer: Make) -> None:
    """Python and C++ name the dtype of the first tensor in an error: the kernel serves others, kernelized too."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float16:
            raise RuntimeError("\"add\" not implemented for 'Half'")
        if x.dtype == torch.bfloat16:
            raise TypeError("torch.bfloat16 is unknown")
        return x + 10

    kernel = type("Raises", (nn.Module,), {"forward": forward, "can_torch_compile": True})
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": kernel}}), torch.no_grad():
        model = kernelize(make_layer()(), mode=Mode.INFERENCE, device="cpu")
        frozen = decorated_layer(model)
        quarantine(frozen, kernel.forward, kernel="Raises", reason="by hand", dtype=torch.float16)
        assert values(model, EVEN, EVEN.half(), EVEN) == [10, 1, 10]
        with pytest.warns(KernelsWarning, match="quarantine for torch.float16: it raised RuntimeError"):
            assert values(layer, EVEN, EVEN.half(), EVEN, EVEN.half()) == [10, 1, 10, 1]
        assert values(layer, EVEN.bfloat16(), EVEN) == [1, 10]
        assert [entry.dtype for entry in quarantined()] == [torch.float16, torch.float16, torch.bfloat16]
        release()
        assert values(model, EVEN) == values(layer, EVEN) == [10]


def test_the_user_learns_of_a_dtype_that_another_kernel_serves(make_layer: Make, make_kernel: Make) -> None:
    """One warning when the kernel raises, though the next candidate takes over; none where a call is only passed on."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float16:
            raise RuntimeError("no code for 'Half'")
        return x + 10

    kernel = type("Raises", (nn.Module,), {"forward": forward})
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", KernelsWarning)
        for kernels in [kernel, make_kernel(20)], [even(10), make_kernel(20)]:
            layer = make_layer()()
            with use_kernel_mapping({"Add": {"cpu": kernels}}):
                values(layer, EVEN.half(), EVEN.half(), ODD, ODD)
    (warned,) = caught
    assert "Raises: it is in quarantine for torch.float16: it raised" in str(warned.message)


def test_compiled_code_leaves_out_a_dtype(make_layer: Make, make_kernel: Make, compiled: Make) -> None:
    """The graph of another dtype stays; a change of mappings compiles nothing again; released, the kernel is back."""
    layer, kernel = make_layer()(), make_kernel(10, can_torch_compile=True)
    other = make_kernel(20, can_torch_compile=True)
    called, counter = compiled(layer)
    with use_kernel_mapping({"Add": {"cpu": [kernel, other]}}), torch.no_grad():
        args = decorated_layer(layer), kernel.forward
        entry = quarantine(*args, kernel="Add10", reason="by hand", dtype=torch.float64, device="cpu")
        assert values(called, EVEN, EVEN.double()) == [10, 20]
        graphs = counter.frame_count
        forget()
        assert values(called, EVEN, EVEN.double()) == [10, 20] and counter.frame_count == graphs
        release(entry)
        assert values(called, EVEN.double()) == [10]


def test_the_receipt_names_the_calls_that_are_left_out(make_layer: Make) -> None:
    """Declared dtypes, and those in quarantine, are a remark of the row, kernelized or not."""
    kernel = declaring(10, dtypes=(torch.float32, torch.float16))
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        for model in nn.Sequential(make_layer()()), kernelize(make_layer()(), mode=Mode.INFERENCE, device="cpu"):
            (row,) = receipt(model, device="cpu").rows
            assert list(row.remarks) == ["it takes only float16, float32"]
    entry = quarantine("*.Declaring", reason="by hand", dtype=torch.float16)
    assert str(entry) == "*.Declaring for torch.float16: by hand"
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        (row,) = receipt(nn.Sequential(make_layer()()), device="cpu").rows
    assert "it is in quarantine for torch.float16: by hand; it takes only" in str(row.note)
    with pytest.raises(ArgumentTypeError, match="dtype"):
        quarantine("*", reason="r", dtype="float16")  # type: ignore[arg-type]


def test_functions_of_a_kernelized_module_pass_on() -> None:
    """The scope is gone when the kernel of a frozen function passes a call on: its next candidate serves."""

    @use_kernel_forward_from_hub("Plus")
    def plus(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def first(x: torch.Tensor) -> Any:
        return x + 10 if x.shape[-1] % 2 == 0 else NotImplemented

    def second(x: torch.Tensor) -> torch.Tensor:
        return x + 20

    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return plus(x)

    with use_kernel_mapping({"Plus": {"cpu": [first, second]}}):
        model = kernelize(use_kernelized_func(plus)(Calls)(), mode=Mode.INFERENCE, device="cpu")
    with torch.no_grad():
        assert values(model, EVEN, ODD) == [10, 20]


def test_a_recorded_call_of_an_inference_model_gets_a_kernel_for_training(make_layer: Make, make_kernel: Make) -> None:
    """The first kernel passes a recorded call on: one without a backward does not serve it, the one after it does."""
    mapping = {"Add": {"cpu": [even(10), make_kernel(20, has_backward=False), make_kernel(30)]}}
    with use_kernel_mapping(mapping), ignored(KernelsWarning):
        model = kernelize(make_layer()(), mode=Mode.INFERENCE, device="cpu")
        x = torch.zeros(3, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None and values(model, x.detach()) == [20] and model(x)[0].item() == 30


@pytest.mark.parametrize("is_kernelized", [False, True])
def test_tracers_and_transforms_follow(make_layer: Make, make_kernel: Make, is_kernelized: bool) -> None:
    """Export, make_fx, vmap, grad and jvp get the next candidate, too."""
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = make_layer()()
    mapping = {"Add": {"cpu": [even(10), make_kernel(20, can_torch_compile=True)]}}
    with use_kernel_mapping(mapping):
        if is_kernelized:
            layer = kernelize(layer, mode=Mode.TRAINING, device="cpu")
        for x in EVEN, ODD:  # both kernels are proven, which PyTorch 2.6 needs under transforms
            layer(x.clone().requires_grad_()).sum().backward()
        assert values(torch.export.export(nn.Sequential(layer), (ODD,)).module(), ODD) == [20]
        assert values(make_fx(layer)(ODD), ODD) == [20]
        assert values(torch.func.vmap(layer), torch.zeros(2, 3)) == [20]
        assert bool((torch.func.grad(lambda x: layer(x).sum())(ODD) == 1).all())
        assert torch.func.jvp(layer, (ODD,), (ODD + 1,))[0][0] == 20


def test_a_reference_that_returns_not_implemented_has_the_last_word(make_kernel: Make) -> None:
    """Also where a kernel serves the other mode, and where a plugin is around the call; it may run again then."""

    @use_kernel_forward_from_hub("Odd")
    def answers(x: torch.Tensor) -> Any:
        return NotImplemented

    def inference(x: torch.Tensor) -> Any:
        return NotImplemented if x.shape[-1] % 2 else x

    inference.has_backward = False  # type: ignore[attr-defined]
    recorded = torch.zeros(3, requires_grad=True)
    with use_kernel_mapping({"Odd": {"cpu": inference}}), count_calls(), ignored(KernelsWarning):
        answered = [answers(x) for x in (EVEN, recorded, ODD, recorded, ODD)]
    assert answered[0] is EVEN and answered[1:] == [NotImplemented] * 4


@pytest.mark.parametrize("variable", ["DISABLE_KERNEL_MAPPING", "KERNELS_DENY"])
def test_what_is_off_by_then_is_no_answer(variable: str, make_layer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is warm and passes a call on; what it would be decided by now gives the reference: that is called."""

    class Single(nn.Module):
        dtypes = (torch.float32,)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3

    layer, x = make_layer("Scale")(), torch.ones(2)
    wanted = layer(x.double())
    with use_kernel_mapping({"Scale": {"cpu": Single}}), ignored(KernelsWarning):
        assert layer(x).tolist() == [3, 3]
        monkeypatch.setenv(variable, "1" if variable.startswith("DIS") else "*Single*")
        assert torch.equal(layer(x.double()), wanted)


@pytest.mark.parametrize("declared", [{"supports": dict}, {"dtypes": torch.ones(2)}, {"dtypes": 3}])
def test_limits_that_cannot_be_read_refuse_one_kernel(declared: dict[str, Any], make_layer: Make) -> None:
    """The refusal names the kernel, and the next candidate serves."""
    layer = make_layer("Scale")()
    bad = type("Bad", (nn.Module,), {"forward": lambda self, x: x * 7, **declared})
    good = type("Good", (nn.Module,), {"forward": lambda self, x: x * 5})
    with use_kernel_mapping({"Scale": {"cpu": [bad, good]}}):
        decision = resolve(layer, device="cpu", mode=Mode.INFERENCE)
    assert decision.origin.endswith("Good")
    (refusal,) = decision.refusals
    assert refusal.candidate.source is bad and ("supports" in refusal.reason or "dtypes" in refusal.reason)


def test_quarantine_while_a_kernel_passes_a_call_on(make_layer: Make) -> None:
    """The reference answers a call whose kernel is put into quarantine by another thread before it passes it on."""
    made = make_layer("Scale")
    layer, entries = made(), []

    class Passing(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            if not entries and x.shape[0] == 2:
                kernel = resolve(layer, device="cpu", mode=Mode.INFERENCE).implementation
                entries.append(quarantine(decorated_layer(layer), kernel, reason="test"))
            return NotImplemented

    with use_kernel_mapping({"Scale": {"cpu": Passing}}), ignored(KernelsWarning):
        first, second = layer(torch.ones(1)), layer(torch.ones(2))
    assert release() == len(entries) == 1
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)


def test_the_next_candidate_is_judged_as_the_first(make_layer: Make, make_kernel: Make) -> None:
    """The second kernel raises, or loses gradients: it goes into quarantine, and the third candidate serves."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    def loses(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach() + 20

    for bad in forward, loses:
        second = type("Second", (nn.Module,), {"forward": bad})
        layer, x = make_layer()(), torch.zeros(3, requires_grad=True)
        with use_kernel_mapping({"Add": {"cpu": [even(10), second, make_kernel(30)]}}), ignored():
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
