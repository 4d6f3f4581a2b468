"""Quarantine: kernels that are out, and the circuit breaker that takes out those that raise."""

from __future__ import annotations

import dataclasses
import gc
import signal
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from warned import ignored

from kernels_core import (
    ArgumentTypeError,
    KernelsWarning,
    Mode,
    NoKernelError,
    decorated_layer,
    forget,
    kernelize,
    quarantine,
    quarantined,
    release,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins.mapping import use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)


counter: list[int] = []


@use_kernel_forward_from_hub("Consumes")
class Consumes(nn.Module):
    """Adds the numbers of an iterator or a list, and leaves a trace in the list."""

    def forward(self, x: torch.Tensor, numbers: Any) -> torch.Tensor:
        """Add."""
        total = sum(numbers)
        if isinstance(numbers, list):
            numbers.append(0)
        return x + total


class ConsumesAndRaises(nn.Module):
    """Does so too, and fails after that."""

    def forward(self, x: torch.Tensor, numbers: Any) -> torch.Tensor:
        """Raise."""
        Consumes.forward.kernels_layer.reference(self, x, numbers)  # type: ignore[attr-defined]
        raise RuntimeError("boom")


class ConsumesAndLosesGradients(nn.Module):
    """Does so too, outside of autograd."""

    def forward(self, x: torch.Tensor, numbers: Any) -> torch.Tensor:
        """Add."""
        return x.detach() + sum(numbers)


class Raises(nn.Module):
    """Adds ten, and raises on the third call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count."""
        counter.append(1)
        if len(counter) == 3:
            raise RuntimeError("boom")
        return x + 10


@pytest.fixture
def raising() -> type[nn.Module]:
    """Return a kernel that adds ten, and raises on its third call."""
    counter.clear()
    return Raises


def test_kernel_that_raises_is_replaced_in_the_same_call(make_layer: Make, raising: Any) -> None:
    """The third call gets the reference's answer, with one warning; the kernel is out from then on."""
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": raising}}):
        assert [layer(X)[0].item() for _ in range(2)] == [10, 10]
        with pytest.warns(KernelsWarning, match=r"RuntimeError: boom"):
            assert [layer(X)[0].item() for _ in range(3)] == [1, 1, 1]
    assert len(counter) == 3  # it was not called again
    (entry,) = quarantined()
    assert (entry.layer_name, entry.kernel, entry.device) == ("Add", f"{__name__}.Raises", torch.device("cpu"))
    assert "RuntimeError: boom" in entry.reason and "Raises" in str(entry)


def test_next_candidate_takes_over(make_layer: Make, make_kernel: Make, raising: Any) -> None:
    """After a kernel is out, the next candidate serves, not the reference."""
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": [raising, make_kernel(20)]}}), ignored():
        assert [layer(X)[0].item() for _ in range(5)] == [10, 10, 1, 20, 20]


def test_released_kernel_serves_again(make_layer: Make, raising: Any) -> None:
    """release() lets kernels back in, one entry or all; entries that are not there are not counted."""
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": raising}}), ignored():
        for _ in range(4):
            layer(X)
        (entry,) = quarantined()
        counter.clear()
        assert layer(X)[0] == 1
        assert release(entry) == 1 and quarantined() == []
        assert layer(X)[0] == 10
        assert release(entry) == 0 and release() == 0


def test_error_of_the_caller_is_no_fault_of_the_kernel(make_layer: Make) -> None:
    """Where the reference raises, too, the kernel's error goes on unchanged, and no kernel goes into quarantine."""
    raised, why, meanwhile = ValueError("from the kernel"), OSError("why"), KeyError("meanwhile")

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                raise meanwhile
            except KeyError:
                raise raised from why

    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": Kernel}}):
        for _ in range(2):
            with pytest.raises(ValueError, match="from the kernel") as caught:
                layer([X])  # to which the reference cannot add a number
            assert caught.value is raised and raised.__cause__ is why and raised.__context__ is meanwhile
    assert quarantined() == []


def test_changed_argument_is_not_used_again(make_layer: Make) -> None:
    """A kernel that may have changed its argument before it raised: the error goes on, and the kernel is out."""

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(100)
            raise RuntimeError("boom")

    layer, x = make_layer()(), torch.zeros(2)
    with use_kernel_mapping({"Add": {"cpu": Kernel}}), pytest.warns(KernelsWarning):
        with pytest.raises(RuntimeError, match="boom"):
            layer(x)
        assert len(quarantined()) == 1
        assert layer(torch.zeros(2))[0] == 1


def test_an_argument_that_can_be_read_once_is_not_read_again() -> None:
    """A kernel that has read a generator before it raised: the error goes on, rather than a reference without it."""
    with use_kernel_mapping({"Consumes": {"cpu": ConsumesAndRaises}}):
        with pytest.raises(RuntimeError, match="boom"):
            Consumes()(X, (n for n in (1, 2)))
        assert quarantined() == []  # nobody can tell what the reference would have done
    with use_kernel_mapping({"Consumes": {"cpu": ConsumesAndLosesGradients}}), pytest.warns(KernelsWarning):
        output = Consumes()(torch.zeros(2, requires_grad=True), (n for n in (1, 2)))
    assert output.tolist() == [3, 3]


def test_what_an_object_remembers_is_not_done_twice() -> None:
    """A list that a kernel may have changed before it raised is judged on a copy, the error goes on, and it is out."""
    numbers = [1, 2]
    with use_kernel_mapping({"Consumes": {"cpu": ConsumesAndRaises}}):
        with (
            pytest.raises(RuntimeError, match="boom"),
            pytest.warns(KernelsWarning, match="This call was not made anew"),
        ):
            Consumes()(X, numbers)
        assert numbers == [1, 2, 0] and len(quarantined()) == 1
        with pytest.warns(KernelsWarning, match="it is in quarantine"):
            assert Consumes()(X, (1, 2))[0] == 3


def test_strict_mode_raises(make_layer: Make, raising: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With KERNELS_STRICT the error goes on, and the next call raises with the reason."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": raising}}):
        layer(X), layer(X)
        with pytest.warns(KernelsWarning), pytest.raises(RuntimeError, match="boom"):
            layer(X)
        with pytest.raises(NoKernelError, match=r"in quarantine: it raised RuntimeError: boom"):
            layer(X)


def test_without_fallback_the_error_goes_on(make_layer: Make, raising: Any) -> None:
    """A layer that must not fall back gets the error, then NoKernelError."""
    layer = make_layer(use_fallback=False)()
    with use_kernel_mapping({"Add": {"cpu": raising}}):
        layer(X), layer(X)
        with pytest.warns(KernelsWarning), pytest.raises(RuntimeError, match="boom"):
            layer(X)
        with pytest.raises(NoKernelError):
            layer(X)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: lost")]
)
def test_what_is_no_fault_of_a_kernel_goes_on(make_layer: Make, error: BaseException) -> None:
    """Interrupts, lack of memory and a lost device are never papered over, nor held against the kernel."""

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": Kernel}}), pytest.raises(type(error)) as caught:
        layer(torch.zeros(2))
    assert caught.value is error
    assert quarantined() == []


def test_functions_too(raising: Any) -> None:
    """A decorated function is protected as a layer is."""

    @use_kernel_forward_from_hub("add")
    def add(x: torch.Tensor, *, more: float = 1.0) -> torch.Tensor:
        return x + more

    def kernel(x: torch.Tensor, *, more: float = 1.0) -> torch.Tensor:
        raise RuntimeError("boom")

    with use_kernel_mapping({"add": {"cpu": kernel}}), pytest.warns(KernelsWarning, match="boom"):
        assert add(torch.zeros(1), more=3.0).item() == 3.0
        assert add(torch.zeros(1)).item() == 1.0


def test_quarantine_by_hand(make_layer: Make, make_kernel: Make) -> None:
    """quarantine() takes a kernel out for one layer, one device or one mode, and for nothing else."""
    first, second, kernel = make_layer("A"), make_layer("B"), make_kernel(10, can_torch_compile=True)
    with use_kernel_mapping({name: {"cpu": kernel} for name in "AB"}), ignored():
        assert first()(X)[0] == 10
        common = {"kernel": "a kernel", "reason": "it is wrong"}
        quarantine(decorated_layer(first), kernel.forward, device=torch.device("cuda", 1), **common)
        assert first()(X)[0] == 10
        quarantine(decorated_layer(first), kernel.forward, mode=Mode.TRAINING, **common)
        assert first()(X)[0] == 10 and first()(X.clone().requires_grad_())[0] == 1
        quarantine(decorated_layer(first), kernel.forward, **common)
        assert first()(X)[0] == 1 and second()(X)[0] == 10
        refusal = resolve(first, device="cpu", mode=Mode.INFERENCE).refusals[0]
        assert refusal.reason == "it is in quarantine: it is wrong"
    assert [entry.mode for entry in quarantined()] == [None, Mode.TRAINING, None]


def test_compiled_code_follows(make_layer: Make, make_kernel: Make, compiled: Make) -> None:
    """Code that was compiled with a kernel runs the reference after the kernel is out, and the kernel after release."""
    layer, kernel = make_layer(), make_kernel(10, can_torch_compile=True)
    run, counter = compiled(layer())
    with use_kernel_mapping({"Add": {"cpu": kernel}}), ignored():
        assert run(X)[0] == 10
        entry = quarantine(decorated_layer(layer), kernel.forward, kernel="k", reason="wrong")
        assert run(X)[0] == 1
        release(entry)
        assert run(X)[0] == 10
    assert counter.frame_count == 2


def test_kernelized_models_follow(make_layer: Make, make_kernel: Make) -> None:
    """A kernelized module stops using a kernel that is out, and uses it again after release."""
    layer, kernel = make_layer(), make_kernel(10)
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        model = kernelize(layer(), mode=Mode.INFERENCE, device="cpu")
    assert model(X)[0] == 10
    entry = quarantine(decorated_layer(layer), kernel.forward, kernel="k", reason="wrong")
    assert model(X)[0] == 1
    release(entry)
    assert model(X)[0] == 10


def test_dropped_kernels_are_forgotten(make_layer: Make, make_kernel: Make) -> None:
    """An entry does not keep a kernel or a layer alive, and goes with them."""
    layer, kernel = make_layer(), make_kernel(10)
    quarantine(decorated_layer(layer), kernel.forward, kernel="k", reason="wrong")
    assert len(quarantined()) == 1
    del kernel
    gc.collect()
    assert quarantined() == []


def test_tracers_are_not_held_against_a_kernel(make_layer: Make) -> None:
    """A kernel that cannot run on fake or symbolic tensors is not taken out for that."""

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(x) is not torch.Tensor:
                raise TypeError("real tensors only")
            return x + 10

    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": Kernel}}):
        assert layer(X)[0] == 10
        with FakeTensorMode() as mode, pytest.warns(KernelsWarning, match="can_torch_compile"):
            layer(mode.from_tensor(X))
        assert layer(X)[0] == 10
    assert quarantined() == []


class NoAddition(TorchFunctionMode):
    """Forbids a function, as counters do that do not know one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.add:
            raise NotImplementedError("it is not counted")
        return func(*args, **(kwargs or {}))


class NoAdditionBelow(TorchDispatchMode):
    """Forbids an operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor:
            raise NotImplementedError("it is not counted")
        return func(*args, **(kwargs or {}))


class Plus(nn.Module):
    """Adds ten, by a function that these modes know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add."""
        return torch.add(x, torch.full_like(x, 10))


@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_function_mode_raises_is_not_held_against_a_kernel(make_layer: Make, recorded: bool) -> None:
    """The reference answers under the mode, with one warning that names it; plain calls run the kernel."""

    @use_kernel_forward_from_hub("Add")
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    layer, x = Layer(), torch.zeros(2, requires_grad=recorded)
    with use_kernel_mapping({"Add": {"cpu": Plus}}):
        with NoAddition(), pytest.warns(KernelsWarning, match="under the mode NoAddition") as caught:
            assert layer(x)[0] == layer(x)[0] == 0
        assert len(caught) == 1
        assert quarantined() == []
        assert layer(x)[0] == 10


def test_the_error_of_a_function_mode_goes_on_where_the_reference_must_not_serve(make_layer: Make) -> None:
    """With `use_fallback=False`, the caller gets it, and the kernel is not out."""
    layer = make_layer(use_fallback=False)()
    with use_kernel_mapping({"Add": {"cpu": Plus}}):
        with NoAddition(), pytest.raises(NotImplementedError, match="not counted"):
            layer(X)
        assert layer(X)[0] == 10
    assert quarantined() == []


def test_what_a_dispatch_mode_raises_goes_on(make_layer: Make) -> None:
    """The caller gets it, and the kernel is not out."""
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": Plus}}):
        with NoAdditionBelow(), pytest.raises(NotImplementedError, match="not counted"):
            layer(X)
        assert layer(X)[0] == 10
    assert quarantined() == []


def test_a_kernel_that_raises_by_itself_under_a_function_mode_is_out(make_layer: Make, raising: Any) -> None:
    """A mode has no part in an error that did not come through it."""
    counter.extend([1, 1])
    with use_kernel_mapping({"Add": {"cpu": raising}}), NoAddition(), pytest.warns(KernelsWarning, match="quarantine"):
        assert make_layer()()(X)[0] == 1
    assert len(quarantined()) == 1


def test_a_kernel_that_raises_under_a_default_device_is_out(make_layer: Make) -> None:
    """That, too, is a mode that all functions pass, but it refuses none."""

    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.add(x, torch.zeros(3))

    with use_kernel_mapping({"Add": {"cpu": Wrong}}), torch.device("cpu"):
        with pytest.warns(KernelsWarning, match="quarantine"):
            assert make_layer()()(X)[0] == 1
    assert len(quarantined()) == 1


class OutOfTimeError(Exception):
    """An alarm has gone off."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms here")
def test_what_a_signal_handler_raises_goes_on(make_layer: Make) -> None:
    """An alarm ends a call of a kernel as one of the reference: the error is not hidden, and the kernel is not out."""

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.numel() > 2:
                time.sleep(60)
            return x + 10

    class Alarm:
        def ring(self, *args: Any) -> None:
            raise OutOfTimeError

    layer, before = make_layer()(), signal.signal(signal.SIGALRM, Alarm().ring)
    try:
        with use_kernel_mapping({"Add": {"cpu": Slow}}):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(OutOfTimeError):
                layer(torch.zeros(3))
            assert layer(X)[0] == 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert quarantined() == []


def test_a_kernel_that_warns_is_not_out_where_warnings_are_errors(make_layer: Make) -> None:
    """The reference answers such calls, and the kernel all others."""

    class Warns(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            return x + 10

    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": Warns}}):
        with pytest.warns(KernelsWarning, match="where warnings are errors"):
            warnings.simplefilter("error", DeprecationWarning)
            assert layer(X)[0] == 1
        assert quarantined() == []
        with pytest.warns(DeprecationWarning, match="old"):
            assert layer(X)[0] == 10


def test_a_kernel_without_a_deterministic_algorithm_is_not_out(make_layer: Make) -> None:
    """The reference answers where algorithms have to be deterministic, and the kernel all other calls."""

    class Puts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.put(torch.tensor([0]), torch.tensor([10.0]))

    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise MuteError

    layer = make_layer()()
    torch.use_deterministic_algorithms(True)
    try:
        with use_kernel_mapping({"Add": {"cpu": Puts}}):
            with pytest.warns(KernelsWarning, match="where algorithms are to be deterministic"):
                assert layer(X)[0] == 1
            torch.use_deterministic_algorithms(False)
            assert quarantined() == [] and layer(X)[0] == 10
        torch.use_deterministic_algorithms(True)
        with use_kernel_mapping({"Add": {"cpu": Fails}}), ignored(KernelsWarning):
            assert layer(X)[0] == 1 and len(quarantined()) == 1  # another error, also one without a text, puts it out
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*(Sparse|[Nn]ested).*:UserWarning")
@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.nested.as_nested_tensor])
def test_a_kernel_that_needs_strides_is_not_out_for_tensors_without(make: Callable[..., torch.Tensor]) -> None:
    """A kernel that needs addresses raises for sparse and nested tensors, and goes on serving plain ones."""

    @use_kernel_forward_from_hub("Negate")
    class Negate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.neg(x)

    class Addressed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(-x.numpy())

    layer, x = Negate(), torch.ones(2, 2)
    with use_kernel_mapping({"Negate": {"cpu": Addressed}}):
        with pytest.warns(KernelsWarning, match="for a tensor that is sparse or nested"):
            odd = layer(make(x))
        assert type(odd) is torch.Tensor and (odd.layout is not torch.strided or odd.is_nested)
        assert quarantined() == []
        assert layer(x)[0, 0] == -1


def test_checkpoints_stop_early_without_harm(make_layer: Make, make_kernel: Make) -> None:
    """Activation checkpointing ends a recomputation with an exception of its own: no kernel is blamed."""

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.sin() + 10).exp().cos()

    layer = make_layer()()
    x = torch.zeros(2, requires_grad=True)
    with use_kernel_mapping({"Add": {"cpu": Kernel}}):
        checkpoint(lambda t: layer(t.sin()), x, use_reentrant=False).sum().backward()
    assert quarantined() == []


def test_reference_in_the_stand_in_keeps_autograd(make_layer: Make) -> None:
    """The call that a kernel failed in has gradients, from the reference."""

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("boom")

    x = torch.zeros(2, requires_grad=True)
    with use_kernel_mapping({"Add": {"cpu": Kernel}}), pytest.warns(KernelsWarning):
        make_layer()()(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1]


def test_a_device_may_be_named(make_layer: Make, make_kernel: Make) -> None:
    """A device is given in any form that other functions take."""
    layer, kernel = make_layer(), make_kernel(10)
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        for device, is_out in (("cpu", True), ("cuda:0", False)):
            quarantine(decorated_layer(layer), kernel.forward, kernel="k", reason="r", device=device)
            assert resolve(layer, device="cpu", mode=Mode.INFERENCE).is_reference is is_out
            release()


def test_arguments_of_the_wrong_type(make_layer: Make, make_kernel: Make) -> None:
    """An entry without effect is an error: calls call no class."""
    layer, kernel = make_layer(), make_kernel(10)
    with pytest.raises(ArgumentTypeError, match="decorated_layer"):
        quarantine(layer, kernel.forward, kernel="k", reason="r")
    with pytest.raises(ArgumentTypeError, match="forward of a class"):
        quarantine(decorated_layer(layer), kernel, kernel="k", reason="r")
    with pytest.raises(ArgumentTypeError, match="entries that quarantined"):
        release("all")  # type: ignore[arg-type]
    assert quarantined() == []


def test_a_long_error_is_told_in_short(make_layer: Make) -> None:
    """PyTorch lists every kernel of an operator below an empty line: that is no reason."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("Could not run 'op'.\n\nCPU: registered at here\nMeta: registered at there")

    with use_kernel_mapping({"Add": {"cpu": type("Fails", (nn.Module,), {"forward": forward})}}):
        make_layer()()(X)
    assert quarantined()[0].reason.startswith("it raised NotImplementedError: Could not run 'op', where the reference")


class MuteError(Exception):
    """Has no text: asking for it raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error", [MuteError(), ValueError("x" * 5_000_000)], ids=["mute", "long"])
def test_errors_with_no_text_or_a_long_one(make_layer: Make, error: Exception) -> None:
    """An exception whose `__str__` raises, or whose message has megabytes, is as good a reason as any other."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise error

    def load() -> Any:
        raise error

    layer = make_layer()()
    source = type("Source", (), {"load": staticmethod(load)})()
    for kernel in type("Bad", (nn.Module,), {"forward": forward}), source:
        with use_kernel_mapping({"Add": {"cpu": kernel}}), torch.no_grad(), pytest.warns(KernelsWarning) as caught:
            assert layer(X)[0] == layer(X)[0] == 1
            (refusal,) = resolve(layer, device="cpu", mode=Mode.INFERENCE).refusals
        assert type(error).__name__ in refusal.reason
        assert max(len(str(warning.message)) for warning in caught) < 5000


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Takes no attributes."""

    code: int = 1


def test_exceptions_that_are_frozen(make_layer: Make) -> None:
    """An exception that takes no attributes is kept as any other, with its traceback, and the reference answers."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise FrozenError(7) from FrozenError(6)

    with use_kernel_mapping({"Add": {"cpu": type("Fails", (nn.Module,), {"forward": forward})}}), ignored():
        assert make_layer()()(X)[0] == 1
    error = quarantined()[0].error
    assert type(error) is FrozenError and error.args == (7,) and isinstance(error.__cause__, FrozenError)
    assert error.__traceback__ is not None and error.__traceback__.tb_frame.f_code.co_name == "forward"


def test_names_of_exceptions_are_made_visible(make_layer: Make) -> None:
    """No name of a class drives a terminal."""
    named = type("Bad\x1b[2J", (Exception,), {})

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise named

    with use_kernel_mapping({"Add": {"cpu": type("Fails", (nn.Module,), {"forward": forward})}}), ignored():
        make_layer()()(X)
    assert "\x1b" not in str(quarantined()[0]) and "Bad\\x1b" in quarantined()[0].reason


def test_what_a_kernel_raised_is_kept_without_its_values(make_layer: Make) -> None:
    """Entry and refusal have the exception with its cause and lines; nothing keeps the arguments of the call alive."""

    def look(x: torch.Tensor) -> None:
        raise KeyError("no such shape")

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        try:
            look(x)
        except KeyError as error:
            raise LookupError("no code for this shape") from error
        return x

    layer, x = make_layer()(), torch.zeros(2)
    kernel = type("Raises", (nn.Module,), {"forward": forward})
    with use_kernel_mapping({"Add": {"cpu": kernel}}), torch.no_grad(), pytest.warns(KernelsWarning):
        layer(x)
        (refusal,) = resolve(layer, device="cpu", mode=Mode.INFERENCE).refusals
    (entry,) = quarantined()
    assert isinstance(entry.error, LookupError) and refusal.error is entry.error
    assert isinstance(entry.error.__cause__, KeyError)
    lines = "".join(traceback.format_exception(entry.error))
    assert 'raise KeyError("no such shape")' in lines and "in look" in lines and "raise LookupError" in lines
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_an_error_that_the_caller_gets_keeps_its_frames(make_layer: Make) -> None:
    """The kept exception is a copy where the caller gets the original, whose traceback a debugger may walk."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise LookupError("no code")

    layer = make_layer(use_fallback=False)()
    with use_kernel_mapping({"Add": {"cpu": type("Raises", (nn.Module,), {"forward": forward})}}), torch.no_grad():
        with pytest.raises(LookupError) as told, ignored():
            layer(X)
        kept = quarantined()[0].error
    assert isinstance(kept, LookupError) and kept is not told.value and kept.args == ("no code",)
    assert any("x" in entry.frame.f_locals for entry in told.traceback)


@pytest.mark.parametrize("glob", ["Add", "*.Add10", "mapp?ng"], ids=["layer", "origin", "plugin"])
@pytest.mark.parametrize("how", ["KERNELS_DENY", "quarantine"])
def test_kernels_that_a_glob_names(
    make_layer: Make, make_kernel: Make, monkeypatch: pytest.MonkeyPatch, how: str, glob: str
) -> None:
    """Dispatched, kernelized and compiled calls run the reference while a glob names the kernel, and say why."""
    torch._dynamo.reset()
    kernel = make_kernel(10, can_torch_compile=True)
    with use_kernel_mapping({"Add": {"cpu": kernel}}), torch.no_grad(), ignored(KernelsWarning):
        layer = make_layer()()
        model = kernelize(nn.Sequential(make_layer()()), mode=Mode.INFERENCE, device="cpu")
        compiled = torch.compile(make_layer()(), backend="eager", fullgraph=True)

        def outputs() -> list[float]:
            return [float(called(X)[0]) for called in (layer, model, compiled)]

        assert outputs() == [10, 10, 10]
        if how == "quarantine":
            entry = quarantine(glob, reason="we do not use it")
        else:
            monkeypatch.setenv(how, f"other/*, {glob}")
            forget()
        assert outputs() == [1, 1, 1]
        (refusal,) = resolve(layer, device="cpu", mode=Mode.INFERENCE).refusals
        assert ("we do not use it" if how == "quarantine" else "KERNELS_DENY has") in refusal.reason
        if how == "quarantine":
            assert str(entry) == f"{glob}: we do not use it" and release(entry) == 1
        else:
            monkeypatch.delenv(how)
            forget()
        assert outputs() == [10, 10, 10]


def test_the_next_candidate_serves_in_place_of_a_denied_one(make_layer: Make, make_kernel: Make) -> None:
    """A glob takes out only the kernels that it matches, also for a device; a denied source is not loaded."""
    loaded = []

    class Source:
        repo_id = "acme/kernels"

        def load(self) -> Any:
            loaded.append(1)
            return make_kernel(10)

    quarantine("acme/*", reason="not ours", device="cpu")
    quarantine("*.Add30", reason="not ours", device="meta")
    with use_kernel_mapping({"Add": {"cpu": [Source(), make_kernel(30)]}}), torch.no_grad():
        with pytest.warns(KernelsWarning, match="not ours"):
            assert make_layer()()(X)[0] == 30
    assert not loaded


@pytest.mark.parametrize("given", [("",), ("acme/*", abs), (None,), (3, abs)])
def test_globs_that_cannot_be_used(given: Any) -> None:
    """An empty text, a glob with a function, and other values are refused."""
    with pytest.raises(ArgumentTypeError, match="takes a layer"):
        quarantine(*given, reason="none")
