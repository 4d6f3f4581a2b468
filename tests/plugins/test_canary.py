"""Canaries: kernels that are wrong on purpose are found in a live model, and right ones are left alone."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    CanaryError,
    KernelsWarning,
    PluginManager,
    ScopeError,
    quarantined,
    use_kernel_forward_from_hub,
)
from kernels_plugins import canary, use_kernel_mapping
from kernels_plugins.canary import outliers, reader
from kernels_plugins.canary import plugin as canary_plugin
from kernels_plugins.canary.reader import Magnitudes, Reader, part_of
from kernels_plugins.canary.settings import Settings, settings_of_environment
from kernels_plugins.canary.watch import start_over

SIZE = 16


@pytest.fixture(autouse=True)
def _canary(mapping_plugin: object, isolated_plugins: PluginManager) -> Iterator[None]:
    """Have the plugin."""
    isolated_plugins.register(canary_plugin, "canary")
    yield
    gc.collect()  # a checkpoint that was left by an error keeps its hooks until it is gone


@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    """Root mean square norm, with a bias and a counter of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, SIZE))
        self.bias = nn.Parameter(torch.linspace(-1, 1, SIZE))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight + self.bias


def kernel_of(compute: Callable[[Any, torch.Tensor], torch.Tensor]) -> type[nn.Module]:
    """Make a kernel class."""
    return type("Kernel", (nn.Module,), {"forward": compute})


def right(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The same, computed otherwise."""
    self.calls += 1
    return torch.nn.functional.rms_norm(x, (SIZE,), self.weight, 1e-6) + self.bias


def biased_in_bfloat16(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = right(self, x)
    return out * 1.02 if x.dtype == torch.bfloat16 else out


def wrong_for_strided(self: Any, x: torch.Tensor) -> torch.Tensor:
    return right(self, x if x.is_contiguous() else x.contiguous().flip(-1))


class _NoWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, torch.ones(SIZE)


def wrong_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The gradient of the weight is one too large."""
    return _NoWeightGradient.apply(right(self, x), self.weight)  # type: ignore[no-any-return]


def missing_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return torch.nn.functional.rms_norm(x, (SIZE,), self.weight, 1e-6) + self.bias.detach()


def mutating(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = right(self, x)
    with torch.no_grad():
        x.mul_(2)
    return out


def forgets_the_buffer(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (SIZE,), self.weight, 1e-6) + self.bias


def stateful(seen: list[int]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return right(self, x) + (len(seen) - 1)

    return compute


WRONG: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], Callable[[], torch.Tensor], str]] = {
    "biased in bfloat16": (biased_in_bfloat16, lambda: torch.randn(64, SIZE).bfloat16(), "output"),
    "wrong for strided input": (wrong_for_strided, lambda: torch.randn(SIZE, 4).T, "output"),
    "wrong gradient of one parameter": (wrong_gradient, lambda: torch.randn(4, SIZE), "gradient of.*parameter weight"),
    "mutates its input": (mutating, lambda: torch.randn(4, SIZE), "input x was changed in place"),
    "forgets a buffer": (forgets_the_buffer, lambda: torch.randn(4, SIZE), "buffer calls"),
    "another shape": (lambda self, x: right(self, x)[:1], lambda: torch.randn(4, SIZE), "shape"),
    "not a number": (lambda self, x: right(self, x) * float("nan"), lambda: torch.randn(4, SIZE), "finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_seen(name: str) -> None:
    """The first call of a kernel that is wrong raises, with layer, path, dtype, shape and error."""
    compute, make, what = WRONG[name]
    x = make()
    model = nn.ModuleDict({"block": nn.Sequential(Norm().to(x.dtype))})
    with use_kernel_mapping({"Norm": {"cpu": kernel_of(compute)}}), canary(first=1, every=0, action="raise"):
        with pytest.raises(CanaryError, match=what) as seen:
            model["block"](x)
    dtype, shape = str(x.dtype).removeprefix("torch."), "x".join(map(str, x.shape))
    for part in ("layer 'Norm'", "at '0'", "on cpu", "call 1", dtype, shape):
        assert part in str(seen.value)


@pytest.mark.parametrize("action", ["quarantine", "warn"])
def test_a_backward_that_raises_is_the_fault_of_the_kernel(action: str) -> None:
    """It is reported as any other, and does not end the call that is compared."""

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = Norm.forward.__wrapped__(self, x)  # type: ignore[attr-defined]
        with torch.no_grad():
            x.mul_(1)  # saved for the backward, which refuses a tensor that was written to
        return out  # type: ignore[no-any-return]

    with use_kernel_mapping({"Norm": {"cpu": kernel_of(compute)}}), canary(first=1, action=action):
        with pytest.warns(KernelsWarning, match="second run, for its gradients, raises RuntimeError: .* inplace"):
            Norm()(torch.randn(4, SIZE, requires_grad=True) * 1)
    assert len(quarantined()) == (action == "quarantine")


def test_missing_gradient_is_seen_without_a_canary() -> None:
    """A kernel that loses the gradient of a parameter is out after its first recorded call, canary or not."""
    norm = Norm()
    with use_kernel_mapping({"Norm": {"cpu": kernel_of(missing_gradient)}}):
        with pytest.warns(KernelsWarning, match="loses gradients: parameter 'bias'"):
            norm(torch.randn(4, SIZE))  # it has counted already, so this one call cannot be made anew
        norm(torch.randn(4, SIZE)).sum().backward()
    assert norm.bias.grad is not None


def test_stateful_kernel_is_seen_on_a_later_call() -> None:
    """A kernel whose second call differs from its first passes the first, and is found on the second."""
    norm, x = Norm(), torch.randn(4, SIZE)
    with use_kernel_mapping({"Norm": {"cpu": kernel_of(stateful([]))}}), canary(first=2, action="raise"):
        with torch.no_grad():
            norm(x)
            with pytest.raises(CanaryError, match="call 2"):
                norm(x)


def test_kernel_that_turns_wrong_late_is_seen() -> None:
    """Wrong from the 50th call on: the one call in twenty that is compared sees it on the 60th."""
    calls = []

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return right(self, x) + (len(calls) >= 50)

    norm, x = Norm(), torch.randn(4, SIZE)
    with use_kernel_mapping({"Norm": {"cpu": kernel_of(compute)}}), canary(first=1, every=20, action="raise"):
        with torch.no_grad(), pytest.raises(CanaryError, match="call 60"):
            for _ in range(100):
                norm(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recording", [True, False])
def test_right_kernels_are_left_alone(dtype: torch.dtype, recording: bool) -> None:
    """A kernel that sums in another order is not accused, whatever the dtype, strides or size."""
    norm = Norm().to(dtype)
    inputs = [torch.randn(64, SIZE), torch.randn(SIZE, 5).T, torch.randn(0, SIZE), torch.randn(3, 2, SIZE) * 100]
    with use_kernel_mapping({"Norm": {"cpu": kernel_of(right)}}), canary(first=10, action="raise"):
        with torch.set_grad_enabled(recording):
            for x in inputs:
                norm(x.to(dtype))
    assert norm.calls == len(inputs)


def test_nothing_is_disturbed() -> None:
    """Outputs, gradients, random numbers, buffers and versions are those of a run without a canary."""

    @use_kernel_forward_from_hub("Drop")
    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(SIZE))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return nn.functional.dropout(x, 0.5) * self.weight

    def run(watch: bool) -> tuple[Any, ...]:
        torch.manual_seed(0)
        layer, x = Drop(), torch.randn(4, SIZE, requires_grad=True)
        middle = x * 1
        with use_kernel_mapping({"Drop": {"cpu": kernel_of(Drop.forward.__wrapped__)}}):  # type: ignore[attr-defined]
            with canary(first=9, action="raise") if watch else warnings.catch_warnings():
                for _ in range(3):
                    out = layer(middle)
                    out.sum().backward(retain_graph=True)
        assert x.grad is not None and layer.weight.grad is not None
        return out.tolist(), x.grad.tolist(), layer.weight.grad.tolist(), float(layer.calls), torch.rand(2).tolist()

    assert run(True) == run(False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_autocast_and_accumulation(reentrant: bool) -> None:
    """Checkpointing, autocast and accumulated gradients work as without, and a wrong kernel is found there."""
    x = torch.randn(4, SIZE, requires_grad=True)

    def step(compute: Any, watch: bool) -> list[Any]:
        norm = Norm()
        with use_kernel_mapping({"Norm": {"cpu": kernel_of(compute)}}):
            with canary(first=9, action="raise") if watch else warnings.catch_warnings():
                for _ in range(2):
                    with torch.autocast("cpu", torch.bfloat16):
                        y = checkpoint(lambda t: norm(t @ torch.eye(SIZE)).float(), x, use_reentrant=reentrant)
                    y.sum().backward()
        assert norm.weight.grad is not None
        return [norm.weight.grad.clone()]

    torch.testing.assert_close(step(right, True), step(right, False))
    with pytest.raises(CanaryError, match="gradient"):
        step(wrong_gradient, True)


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this PyTorch does not tell the hooks"
)
def test_checkpointing_goes_on_when_a_kernel_is_taken_out() -> None:
    """Tensors that a kernel saved for a call that the reference answers are not counted as saved by the forward."""
    norm, x = Norm(), torch.randn(4, SIZE, requires_grad=True)
    expected = torch.autograd.grad(norm(x).sum(), (x, norm.weight))
    with use_kernel_mapping({"Norm": {"cpu": kernel_of(wrong_gradient)}}), canary(first=9), warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelsWarning)
        y = checkpoint(lambda t: norm(t).exp().log(), x, use_reentrant=False)
        y.sum().backward()
    assert len(quarantined()) == 1
    torch.testing.assert_close((x.grad, norm.weight.grad), expected)


def test_what_cannot_be_compared_is_told() -> None:
    """Outputs that no comparison knows say nothing against a kernel."""

    @use_kernel_forward_from_hub("Sparse")
    def sparse(x: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor([x, x[:1]])

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor([x, x[:1]])

    with use_kernel_mapping({"Sparse": {"cpu": kernel}}), canary(first=2), torch.no_grad():
        with pytest.warns(KernelsWarning, match="cannot be compared with those of its reference|the reference fails"):
            assert sparse(torch.ones(2)).is_nested
        assert sparse(torch.ones(2)).is_nested
    assert quarantined() == []


def test_quarantine_gives_the_answer_of_the_reference() -> None:
    """With the action quarantine, this call and all later ones have the reference's answer, with a warning."""
    norm, x = Norm(), torch.randn(4, SIZE)
    expected = Norm.forward.__wrapped__(norm, x)  # type: ignore[attr-defined]
    kernel = kernel_of(lambda self, x: right(self, x) * 3)
    with use_kernel_mapping({"Norm": {"cpu": kernel}}), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with canary(first=1):
            torch.testing.assert_close(norm(x), expected)
            torch.testing.assert_close(norm(x), expected)
        torch.testing.assert_close(norm(x), expected)
    assert "It is in quarantine from now on" in str(said[0].message)
    assert [entry.layer_name for entry in quarantined()] == ["Norm"]


def test_warn_goes_on_with_the_kernel() -> None:
    """With the action warn, the kernel goes on serving, and one warning is all."""
    norm, x = Norm(), torch.randn(4, SIZE)
    kernel = kernel_of(lambda self, x: right(self, x) * 3)
    with use_kernel_mapping({"Norm": {"cpu": kernel}}), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with canary(first=5, action="warn"):
            outputs = [norm(x) for _ in range(3)]
    torch.testing.assert_close(outputs[2], right(norm, x) * 3)
    assert len([w for w in said if issubclass(w.category, KernelsWarning)]) == 1
    assert quarantined() == []


def test_only_chosen_calls_are_compared() -> None:
    """The reference runs on the first calls, then on one in so many; never for a reference, never after the block."""
    runs: list[int] = []

    @use_kernel_forward_from_hub("Counted")
    def counted(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x + 1

    with use_kernel_mapping({"Counted": {"cpu": lambda x: 1 + x}}):
        with canary(first=2, every=5, action="raise"), torch.no_grad():
            for _ in range(12):
                counted(torch.ones(1))
        assert len(runs) == 4  # 1, 2, 5, 10
        counted(torch.ones(1))
        assert len(runs) == 4


def test_reference_that_fails_is_told() -> None:
    """Where the reference cannot run, the kernel is not accused, and one warning says so."""

    @use_kernel_forward_from_hub("Broken")
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no reference")

    with use_kernel_mapping({"Broken": {"cpu": lambda x: x}}), canary(action="raise"):
        with pytest.warns(KernelsWarning, match="the reference fails"):
            assert broken(torch.ones(1)).item() == 1


def test_a_reference_that_fails_hides_no_later_disagreement() -> None:
    """The warning that a call could not be compared is not the only one: a call that is wrong later has its own."""

    @use_kernel_forward_from_hub("Fussy")
    def fussy(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            raise ValueError("too small")
        return x * 2

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with use_kernel_mapping({"Fussy": {"cpu": kernel}}), canary(first=9, action="warn"):
        with pytest.warns(KernelsWarning, match="the reference fails"):
            fussy(torch.ones(1))
        with pytest.warns(KernelsWarning, match="3 instead of 2"):
            fussy(torch.ones(2))


def test_other_threads_are_watched() -> None:
    """A canary watches the whole process: a wrong kernel is found in another thread."""
    norm, caught = Norm(), []

    def work() -> None:
        with use_kernel_mapping({"Norm": {"cpu": kernel_of(lambda self, x: right(self, x) + 1)}}):
            try:
                norm(torch.randn(4, SIZE))
            except CanaryError as error:
                caught.append(error)

    with canary(action="raise"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_canaries_nest_and_are_left_once() -> None:
    """The innermost canary counts; leaving one that is not open is an error."""
    outer, inner = canary(action="raise"), canary(action="warn")
    with outer, inner:
        assert canary_plugin.active_settings() == inner.settings
    assert canary_plugin.active_settings() is None
    with pytest.raises(ScopeError, match="not open"):
        outer.__exit__(None, None, None)


def test_large_tensors_are_seen_in_part_on_later_calls() -> None:
    """A later call compares some rows of a large tensor, others each time: a kernel that is wrong all over is found."""
    norm, x, calls = Norm(), torch.randn(2**18, SIZE), []

    def compute(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return right(self, x) + 0.1 * (len(calls) >= 3)

    with use_kernel_mapping({"Norm": {"cpu": kernel_of(compute)}}), canary(first=0, every=1, action="raise"):
        with torch.no_grad():
            norm(x), norm(x)
            with pytest.raises(CanaryError, match=r"call 3 \(x float32 262144x16\): output \(float32, 65536x16\)"):
                norm(x)


ENVIRONMENT = {
    "": None,
    "0": None,
    "1": Settings(),
    "first=1": Settings(first=1),
    "first=1,outliers=off": Settings(first=1, outliers=False),
    " first = 2 , every=7, action=raise ": Settings(2, 7, "raise"),
}


@pytest.mark.parametrize("text", ENVIRONMENT)
def test_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """KERNELS_CANARY says the same as the arguments."""
    monkeypatch.setenv("KERNELS_CANARY", text)
    assert settings_of_environment() == ENVIRONMENT[text]


@pytest.mark.parametrize(
    "text", ["first", "first=x", "last=3", "action=explode", "first=-1", "first=1;every=2", "outliers=x"]
)
def test_bad_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that cannot be parsed is an error with its name and the form."""
    monkeypatch.setenv("KERNELS_CANARY", text)
    with pytest.raises(ArgumentError, match="KERNELS_CANARY"):
        settings_of_environment()


def test_environment_watches_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With KERNELS_CANARY set, kernels are watched without a block."""
    monkeypatch.setenv("KERNELS_CANARY", "first=1,action=raise")
    start_over()  # as in a new process
    with use_kernel_mapping({"Norm": {"cpu": kernel_of(lambda self, x: right(self, x) + 1)}}):
        with pytest.raises(CanaryError):
            Norm()(torch.randn(4, SIZE))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"first": -1}, ArgumentError),
        ({"every": 1.5}, ArgumentTypeError),
        ({"first": True}, ArgumentTypeError),
        ({"action": "explode"}, ArgumentError),
        ({"outliers": 1}, ArgumentTypeError),
    ],
)
def test_bad_arguments(settings: dict[str, Any], error: type[Exception]) -> None:
    """Impossible settings are refused when they are made."""
    with pytest.raises(error):
        canary(**settings)


def test_a_call_that_is_passed_on_is_not_compared() -> None:
    """The kernel has no output to compare: it stays, and the next one is compared."""

    def passes(self: Any, x: torch.Tensor) -> Any:
        return NotImplemented

    def wrong(self: Any, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) * 2

    layer, x = Norm(), torch.randn(2, SIZE)
    kernels = [kernel_of(passes), kernel_of(wrong)]
    with use_kernel_mapping({"Norm": {"cpu": kernels}}), canary(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", KernelsWarning)
        layer(x)
    assert [entry.reason.partition(":")[0] for entry in quarantined()] == [
        "a canary found that it disagrees with the reference"
    ]


# --- Outliers ---------------------------------------------------------------------------------------


def wrong_for(is_outlier: Callable[[torch.Tensor], Any]) -> type[nn.Module]:
    """Make a kernel that is wrong for some inputs."""
    return kernel_of(lambda self, x: right(self, x) + (1.0 if is_outlier(x) else 0.0))


def _with_nan() -> torch.Tensor:
    x = torch.randn(4, SIZE)
    x[2, 3] = float("nan")
    return x


OUTLIERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[], torch.Tensor], str]] = {
    "large": (lambda x: x.abs().max() > 1e3, lambda: torch.randn(4, SIZE) * 1e4, "reaches"),
    "one large number": (lambda x: x.abs().max() > 1e3, lambda: torch.eye(4, SIZE) * 5e3, "tensor 1 .* reaches 5e"),
    "tiny": (lambda x: x.abs().max() < 1e-4, lambda: torch.randn(4, SIZE) * 1e-6, "reaches"),
    "zero": (lambda x: not x.any(), lambda: torch.zeros(4, SIZE), "reaches 0"),
    "NaN": (lambda x: x.isnan().any(), _with_nan, "holds NaN"),
    "infinite": (lambda x: x.isinf().any(), lambda: _with_nan().nan_to_num(nan=float("-inf")), "holds -inf"),
    "shape": (lambda x: x.shape[0] == 3, lambda: torch.randn(3, SIZE), "other dtypes, shapes or strides"),
    "stride": (lambda x: not x.is_contiguous(), lambda: torch.randn(SIZE, 4).T, "other dtypes, shapes or strides"),
    "dtype": (lambda x: x.dtype is torch.float64, lambda: torch.randn(4, SIZE).double(), "other dtypes"),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", OUTLIERS)
def test_a_kernel_wrong_for_outliers_is_found(name: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within two outliers, usual calls between or not, also where magnitudes are read one call later."""
    monkeypatch.setattr(outliers, "_is_late", lambda device: late)
    is_outlier, make, why = OUTLIERS[name]
    for between in (0, 3):
        norm = Norm()
        with use_kernel_mapping({"Norm": {"cpu": wrong_for(is_outlier)}}):
            with canary(first=1, every=0, action="raise"), torch.no_grad():
                for _ in range(6):
                    norm(torch.randn(4, SIZE).clamp(-3, 3) + 2)
                with pytest.raises(CanaryError, match=f"compared because .*{why}"):
                    norm(make())
                    for _ in range(between):
                        norm(torch.randn(4, SIZE).clamp(-3, 3) + 2)
                    norm(make())


SPECIAL = (float("inf"), float("-inf"), float("nan"))


def with_first(first: float, rest: float) -> torch.Tensor:
    """Return numbers that are all one, but for the first and the last."""
    x = torch.ones(4, 8)
    x[0, 0], x[-1, -1] = first, rest
    return x


@dataclasses.dataclass
class Options:
    """An argument that holds a tensor."""

    x: torch.Tensor


@pytest.mark.parametrize("late", [False, True])
def test_magnitudes_of_each_sort_of_number_are_told_apart(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero is not like one; integers, booleans, complex numbers and lists in lists have magnitudes, too."""
    monkeypatch.setattr(outliers, "_is_late", lambda device: late)
    one = torch.ones(4, 8)
    pairs: list[tuple[Any, Any]] = [
        (one, one * 0),
        *((one.to(dtype), one.to(dtype) * 100) for dtype in (torch.int64, torch.int32, torch.uint8, torch.complex64)),
        *((one.to(dtype), (one * 100).to(dtype)) for dtype in (torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2)),
        (one.bool(), ~one.bool()),
        *((with_first(1.0, rest), with_first(1e4, rest)) for rest in SPECIAL),
        *((with_first(1.0, rest), with_first(other, rest)) for rest, other in itertools.permutations(SPECIAL[:2], 2)),
        (with_first(1.0, SPECIAL[0]), with_first(float("nan"), SPECIAL[0])),
        (Options(one), Options(one * 1000)),
        ([one] * 40, [one] * 39 + [one * 1000]),
        (one.long(), torch.full((4, 8), -(2**63))),
        ([[one]], [[one * 1000]]),
        ({"a": one}, {"b": one}),
        *((1.0, other) for other in (1000.0, -1.0, 0.0, 1e-3, float("inf"), 1)),
        (1, 10**400),
    ]
    for usual, rare in pairs:
        found = outliers.Outliers()
        assert [found.find((usual,)) for _ in range(3)] == [""] * 3
        assert any([found.find((rare,)) for _ in range(4)]), (usual, rare)
        assert found.find((usual,)) == ""


def test_usual_calls_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many calls with like inputs, the reference runs on the first only; without the trigger, on no outlier."""
    runs: list[int] = []

    @use_kernel_forward_from_hub("Usual")
    def usual(x: torch.Tensor) -> torch.Tensor:
        runs.append(len(x))
        return x + 1

    with use_kernel_mapping({"Usual": {"cpu": lambda x: 1 + x}}), torch.no_grad():
        for late in (False, True):
            monkeypatch.setattr(outliers, "_is_late", lambda device, late=late: late)
            with canary(first=1, every=0, action="raise"):
                for number in range(30):
                    usual(torch.full((4,), 1.0 + number / 100))
                for _ in range(5):
                    usual(torch.full((4,), 1e6))
            assert len(runs) == 2, late
            runs.clear()
        with canary(first=1, every=0, outliers=False):
            usual(torch.ones(4)), usual(torch.full((5,), 1e6))
        assert runs == [4]


def test_lengths_that_always_change_are_compared_by_class() -> None:
    """A kernel whose lengths differ in each call is compared for the first 64 of them, then for few."""
    found = outliers.Outliers()
    compared = [bool(found.find((torch.ones(length, 8),))) for length in range(1, 1025)]
    assert sum(compared[:64]) == 63  # the first has nothing to be unlike to
    assert 0 < sum(compared[64:]) < 30


def test_gaps_between_rows_are_seen_among_lengths_that_always_change() -> None:
    """Also after only classes of forms are distinguished: a kernel may take rows to lie one behind the other."""
    found = outliers.Outliers()
    for length in range(1, 101):
        found.find((torch.ones(length, 8),))
    assert not found.find((torch.ones(77, 8),))
    assert "strides" in found.find((torch.ones(77, 24)[:, :8],))
    assert not found.find((torch.ones(75, 24)[:, :8],))
    assert "strides" in found.find((torch.ones(77 * 8 + 1)[1:].view(77, 8),))  # begins beside a multiple of 16 bytes


@pytest.mark.parametrize("of_input", [False, True])
def test_the_first_call_that_autograd_records_is_compared(of_input: bool) -> None:
    """A backward that is wrong is found where evaluation comes first, and only parameters want gradients."""

    class TooLarge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            return gradients[0] * 3

    wrong = kernel_of(lambda self, x: TooLarge.apply(right(self, x)))
    norm, x = Norm().requires_grad_(not of_input), torch.randn(4, SIZE)
    with use_kernel_mapping({"Norm": {"cpu": wrong}}), canary(first=2, every=0, action="raise"):
        with torch.no_grad():
            for _ in range(4):
                norm(x.requires_grad_(of_input))
        with pytest.raises(CanaryError, match=r"numbers or modes.*gradient of"):
            norm(x)
    frozen, x = Norm().requires_grad_(False), torch.randn(4, SIZE)
    with use_kernel_mapping({"Norm": {"cpu": wrong}}), canary(first=2, every=0, action="raise"):
        for _ in range(4):
            frozen(x)
        with pytest.raises(CanaryError, match=r"numbers or modes.*gradient of"):
            frozen.requires_grad_()(x)


def test_autocast_is_another_mode() -> None:
    """The first call under autocast is compared, and the first of each of its dtypes."""
    found, x = outliers.Outliers(), torch.ones(4, 8)
    assert not found.find((x,))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert "modes" in found.find((x,))
            assert not found.find((x,))
    assert not found.find((x,))


def test_tensors_of_each_device_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on another device that comes first, such as a scale on the CPU, hides none."""
    read: list[torch.device] = []

    class Elsewhere(Reader):
        def start(self, tensors: list[torch.Tensor], number: int, whole: bool) -> Any:
            read.extend(tensor.device for tensor in tensors)
            return super().start(tensors, number, whole)

    fake = torch.device("cpu", 0)  # another one than "cpu", which stands for a GPU here
    monkeypatch.setattr(outliers, "_is_late", lambda device: device == fake)
    monkeypatch.setattr(outliers, "_reader", functools.cache(lambda device: Elsewhere(torch.device("cpu"))))
    x = torch.ones(4, 8)

    class There(torch.Tensor):
        device = fake

    monkeypatch.setattr(outliers, "_PLAIN", (torch.Tensor, There))
    for first in (x, torch.ones((), device="meta")):
        found, there = outliers.Outliers(), x.as_subclass(There)
        assert not found.find((first, there)) and not found.find((first, there))
        assert any([found.find((first, there * 1000)) for _ in range(2)])
        assert set(read) == {fake}
        assert first.is_meta or "tensor 1 of its inputs" in found.find((first * 1000, there))


def test_a_large_tensor_is_looked_at_in_part() -> None:
    """Of a much larger tensor, other rows each time, without a copy; smaller ones are looked at in full."""
    x = torch.arange(64.0).view(2, 16, 2).transpose(0, 1)
    parts = [part_of(x, number, 8) for number in range(8)]
    assert torch.cat([part.flatten() for part in parts]).sort().values.equal(torch.arange(64.0))
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in parts)
    assert part_of(x, 3, 32) is x


def found(places: list[tuple[Magnitudes, int]]) -> list[float]:
    """Return the magnitudes at these places, which must be there."""
    return [(magnitudes.sizes() or [])[index][0] for magnitudes, index in places]


def test_what_has_not_changed_is_not_read_again() -> None:
    """Tensors that autograd has recorded are read once, for any kernel, until they change; others each time."""
    reader = Reader(torch.device("cpu"))
    weight = nn.Parameter(torch.ones(4))
    x, plain = weight * 2, torch.ones(4)

    def read() -> list[float]:
        return found(reader.start([x, weight, plain], 1, whole=False))

    ((first, _), *_) = reader.start([x, weight, plain], 1, whole=False)
    ((again, _), (other, _), _) = reader.start([x, weight, plain], 2, whole=False)
    assert again is first and other is not first
    with torch.no_grad():
        x.mul_(2)
    weight.data.fill_(3)  # as fused optimizers do: no version counts it
    plain.data.fill_(7)
    assert read() == [4.0, 3.0, 7.0]
    x = x * 2
    assert read() == [8.0, 3.0, 7.0]


def test_a_reading_outlives_its_memory() -> None:
    """Magnitudes that were never read stay known when their row of memory belongs to later calls."""
    reader = Reader(torch.device("cpu"))
    readings = [reader.start([torch.full((3,), float(number))], 1, whole=False) for number in range(600)]
    assert [found(places) for places in readings] == [[float(number)] for number in range(600)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_the_process_change_no_magnitude(dtype: torch.dtype) -> None:
    """A reader that is made while the default dtype or device is another one reads the same."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            reader = Reader(torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert found(reader.start([torch.tensor([1.0, -5.0])], 1, whole=False)) == [5.0]


def test_threads_that_share_a_reader_get_their_own_magnitudes() -> None:
    """Also where one is stopped within a call while others make more calls than there are rows of memory."""
    reader, wrong = Reader(torch.device("cpu")), list[object]()

    def read(seed: int) -> None:
        for number in range(1000):
            expected = [float(seed * 1000 + number), float(number)]
            places = reader.start([torch.full((3,), value) for value in expected], 1, whole=False)
            if (got := found(places)) != expected:
                wrong.append((got, expected))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong, wrong[:3]


def test_a_kernel_that_cannot_read_is_replaced() -> None:
    """Where Triton's kernel fails, operators of PyTorch read, and one warning says so."""

    def fails(*args: object) -> None:
        raise RuntimeError("no compiler")

    reader = Reader(torch.device("cpu"))
    reader._kernel = fails
    with pytest.warns(KernelsWarning, match="RuntimeError: no compiler"):
        assert found(reader.start([torch.tensor([1.0, -5.0])], 1, whole=False)) == [5.0]
    assert found(reader.start([torch.tensor([1.0, -6.0])], 1, whole=False)) == [6.0]


def test_an_outlier_seen_in_a_part_is_looked_for_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large tensor, a part is read in each call; once it held a new magnitude, the next call reads all of it."""
    monkeypatch.setattr(outliers, "_is_late", lambda device: True)
    monkeypatch.setattr(reader, "READ", 64)
    found, usual = outliers.Outliers(), torch.ones(64, 8)
    assert not any([found.find((usual,)) for _ in range(9)])  # one row in eight of each
    rare, other = usual.clone(), usual.clone()
    rare[13, 5] = other[3, 2] = 1e4
    assert not any([found.find((rare,)) for _ in range(4)])  # the last of them, the 13th call, reads that row
    assert "reaches 1e+04" in found.find((other,))  # of whose rows the 14th call would not read the third


def test_a_dataclass_that_refers_to_itself_ends() -> None:
    """Its tensors are read once; and the number 0, such as a dimension, is another one than 1."""

    @dataclasses.dataclass
    class Node:
        x: torch.Tensor
        parent: Any = None

    node, found = Node(torch.ones(2)), outliers.Outliers()
    node.parent = [node]
    assert found.find((node, 0)) == found.find((node, 0)) == "" and found.find((node, 1))
    node.x = node.x * 1e6
    assert "reaches 1e+06" in found.find((node, 1))


def test_tensors_that_are_not_plain_are_no_outliers() -> None:
    """A comparison of distributed tensors takes part in collectives, so no rank begins one by itself."""

    class Other(torch.Tensor):
        pass

    found = outliers.Outliers()
    assert [found.find((x.as_subclass(Other),)) for x in (torch.ones(2), torch.ones(3) * 1e6)] == ["", ""]
    found = outliers.Outliers()
    assert found.find((torch.ones(2), 1, True)) == "" and found.find((torch.ones(2), 2, False))
