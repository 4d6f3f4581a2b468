"""The mode of a call, and which kernels may serve it."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import STAND_INS, ArgumentError, Mode, check_registered_mode, resolve, use_kernel_forward_from_hub
from kernels_plugins.mapping import use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")


@pytest.fixture
def by_mode(make_kernel: Make) -> use_kernel_mapping:
    """Open a scope in which inference adds 10, and training 20."""
    return use_kernel_mapping({"Add": {"cpu": {Mode.INFERENCE: make_kernel(10), Mode.TRAINING: make_kernel(20)}}})


def test_training_when_autograd_records(make_layer: Make, by_mode: Any) -> None:
    """A tensor that requires grad makes a call training, where gradients are enabled; none makes it inference."""
    layer, recorded = make_layer()(), torch.zeros(2, requires_grad=True)
    with by_mode:
        for _ in range(2):
            assert layer(X)[0] == 10
            assert layer(recorded)[0] == 20
            with torch.no_grad():
                assert layer(recorded)[0] == 10
                with torch.enable_grad():
                    assert layer(recorded)[0] == 20
            with torch.inference_mode():
                assert layer(recorded)[0] == 10
            assert layer(recorded * 2)[0] == 20
            assert layer(recorded.detach())[0] == 10


def test_train_and_eval_say_nothing(make_layer: Make, by_mode: Any) -> None:
    """module.train() and module.eval() do not decide: whether autograd records does."""
    layer = make_layer()()
    with by_mode:
        assert layer.train()(X)[0] == 10
        assert layer.eval()(torch.zeros(2, requires_grad=True))[0] == 20


class Kernel(nn.Module):
    """An inference kernel that cuts the graph, as a kernel without backward does."""

    has_backward = False

    def forward(self, *xs: Any, **more: Any) -> Any:
        return "kernel"


PLACES: dict[str, Callable[[torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "first": lambda t: ((t,), {}),
    "second": lambda t: ((X, t), {}),
    "keyword": lambda t: ((X,), {"k": t}),
    "list": lambda t: ((X, [t]), {}),
    "tuple": lambda t: (((X, t),), {}),
    "dict": lambda t: ((X,), {"k": {"t": t}}),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_kernel_without_backward_while_recording(place: str) -> None:
    """Wherever the tensor that requires grad stands, a kernel with has_backward = False is not picked."""

    @use_kernel_forward_from_hub("Anything")
    class Anything(nn.Module):
        def forward(self, *xs: Any, **more: Any) -> Any:
            return "reference"

    args, kwargs = PLACES[place](torch.zeros(2, requires_grad=True))
    with use_kernel_mapping({"Anything": {"cpu": Kernel}}):
        for _ in range(2):
            assert Anything()(*args, **kwargs) == "reference"
            with torch.no_grad():
                assert Anything()(*args, **kwargs) == "kernel"
        args, kwargs = PLACES[place](torch.zeros(2))
        assert Anything()(*args, **kwargs) == "kernel"


STATES: dict[str, Callable[[nn.Module], None]] = {
    "parameter": lambda m: m.register_parameter("w", nn.Parameter(torch.ones(1))),
    "parameter of a child": lambda m: m.add_module("inner", nn.Linear(1, 1)),
    "buffer that requires grad": lambda m: m.register_buffer("w", torch.ones(1, requires_grad=True)),
    "tensor attribute": lambda m: setattr(m, "w", torch.ones(1, requires_grad=True)),
    "computed attribute": lambda m: setattr(m, "w", torch.ones(1, requires_grad=True) * 2),
}


@pytest.mark.parametrize("state", STATES)
def test_state_that_autograd_records_counts(state: str) -> None:
    """State that requires grad makes a call training: buffers and plain tensors, too, as FSDP and DataParallel have."""

    @use_kernel_forward_from_hub("Anything")
    class Anything(nn.Module):
        def forward(self, *xs: Any, **more: Any) -> Any:
            return "reference"

    module = Anything()
    STATES[state](module)
    with use_kernel_mapping({"Anything": {"cpu": Kernel}}):
        assert module(X) == "reference"
        with torch.no_grad():
            assert module(X) == "kernel"


def test_frozen_module_is_inference() -> None:
    """Parameters that do not require grad leave a call inference."""

    @use_kernel_forward_from_hub("Anything")
    class Anything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, *xs: Any, **more: Any) -> Any:
            return "reference"

    module = Anything().requires_grad_(False)
    with use_kernel_mapping({"Anything": {"cpu": Kernel}}):
        assert module(X) == "kernel"
        module.requires_grad_(True)
        assert module(X) == "reference"


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jvp", "forward_ad"])
def test_function_transforms_record(transform: str) -> None:
    """Under torch.func and forward-mode autograd, a kernel without derivative does not silently give zeros."""

    @use_kernel_forward_from_hub("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 2

    kernel.has_backward = False  # type: ignore[attr-defined]
    x, one = torch.ones(()), torch.ones(())
    with use_kernel_mapping({"double": {"cpu": kernel}}):
        assert double(x) == 2
        if transform == "grad":
            result = torch.func.grad(double)(x)
        elif transform == "vjp":
            result = torch.func.vjp(double, x)[1](one)[0]
        elif transform == "jacrev":
            result = torch.func.jacrev(double)(x)
        elif transform == "jvp":
            result = torch.func.jvp(double, (x,), (one,))[1]
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = double(torch.autograd.forward_ad.make_dual(x, one))
                result = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert result == 2


@pytest.mark.parametrize(
    ("declared", "expected"), [({}, True), ({"has_backward": True}, True), ({"has_backward": False}, False)]
)
def test_absent_has_backward_means_true(make_kernel: Make, declared: Any, expected: bool) -> None:
    """A kernel that says nothing about its backward is trusted to have one."""
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10, **declared)}}):
        resolution = resolve("Add", device="cpu", mode=Mode.TRAINING)
    assert resolution.is_reference is not expected
    assert expected or "has_backward = False" in resolution.refusals[0].reason


@pytest.mark.parametrize("base", [Mode.TRAINING, Mode.INFERENCE])
@pytest.mark.parametrize(
    ("declared", "expected"), [({}, False), ({"can_torch_compile": False}, False), ({"can_torch_compile": True}, True)]
)
def test_absent_can_torch_compile_means_false(make_kernel: Make, base: Mode, declared: Any, expected: bool) -> None:
    """A kernel that does not say that it can be traced is not used while tracing."""
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10, **declared)}}):
        resolution = resolve("Add", device="cpu", mode=base | Mode.TORCH_COMPILE)
    assert resolution.is_reference is not expected
    assert expected or "can_torch_compile" in resolution.refusals[0].reason


def test_checkpointing_recomputes_with_the_same_kernel(make_layer: Make, make_kernel: Make) -> None:
    """Activation checkpointing inside a scope gives the kernel's numbers and gradients."""
    from torch.utils.checkpoint import checkpoint

    layer, x = make_layer()(), torch.zeros(2, requires_grad=True)
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        y = checkpoint(layer, x, use_reentrant=False)
        y.sum().backward()
    assert y.tolist() == [10, 10]
    assert x.grad is not None and x.grad.tolist() == [1, 1]


# --- The flag itself -----------------------------------------------------------------------------------


def test_impossible_combinations_are_errors() -> None:
    """Training excludes inference, and FALLBACK any other, in either order."""
    for left, right in itertools.permutations([Mode.TRAINING, Mode.INFERENCE]):
        with pytest.raises(ArgumentError, match="exclude each other"):
            left | right
    for other in (Mode.TRAINING, Mode.INFERENCE, Mode.TORCH_COMPILE):
        for left, right in ((Mode.FALLBACK, other), (other, Mode.FALLBACK)):
            with pytest.raises(ArgumentError, match="FALLBACK"):
                left | right
    with pytest.raises(ArgumentError):
        Mode.TRAINING | Mode.TORCH_COMPILE | Mode.INFERENCE
    assert Mode.FALLBACK | Mode.FALLBACK == Mode.FALLBACK


def test_errors_of_modes_are_value_errors() -> None:
    """A caller can catch ValueError."""
    with pytest.raises(ValueError):
        Mode.TRAINING | Mode.INFERENCE


def test_modes_survive_pickle() -> None:
    """A combined mode comes back equal."""
    mode = Mode.TRAINING | Mode.TORCH_COMPILE
    assert pickle.loads(pickle.dumps(mode)) == mode


@pytest.mark.parametrize("mode", [Mode.FALLBACK, Mode.TORCH_COMPILE, Mode(0)])
def test_calls_have_a_whole_mode(mode: Mode) -> None:
    """A call is training or inference: anything else is refused."""
    with pytest.raises(ArgumentError):
        resolve("Add", device="cpu", mode=mode)


def test_registered_modes() -> None:
    """A source can be registered for FALLBACK and the modes of calls, not for TORCH_COMPILE alone."""
    for mode in (Mode.FALLBACK, *STAND_INS):
        assert check_registered_mode(mode) is mode
    for mode in (Mode.TORCH_COMPILE, Mode(0)):
        with pytest.raises(ArgumentError):
            check_registered_mode(mode)


def test_table_of_stand_ins() -> None:
    """Nothing for inference serves training, nothing untraced serves tracing, and the exact mode goes first."""
    assert len(STAND_INS) == 4
    for mode, stand_ins in STAND_INS.items():
        assert stand_ins[0] == mode and stand_ins[-1] == Mode.FALLBACK
        assert len(set(stand_ins)) == len(stand_ins)
        for other in stand_ins[:-1]:
            assert not (Mode.TRAINING in mode and Mode.INFERENCE in other)
            assert not (Mode.TORCH_COMPILE in mode and Mode.TORCH_COMPILE not in other)


@pytest.mark.parametrize("mode", STAND_INS)
def test_best_registered_mode_serves(make_kernel: Make, mode: Mode) -> None:
    """Of the registered modes, the best stand-in serves, as each better one is taken away."""
    registered = {stand_in: make_kernel(i, can_torch_compile=True) for i, stand_in in enumerate(STAND_INS[mode])}
    useless = {m: make_kernel(99, can_torch_compile=True) for m in STAND_INS if m not in registered}
    for stand_in in STAND_INS[mode]:
        with use_kernel_mapping({"Add": {"cpu": {**useless, **registered}}}):
            resolution = resolve("Add", device="cpu", mode=mode)
        assert resolution.implementation is registered.pop(stand_in).forward
    with use_kernel_mapping({"Add": {"cpu": useless}}):
        assert resolve("Add", device="cpu", mode=mode).is_reference
