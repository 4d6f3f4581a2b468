"""Until a kernel is proven, the first call that autograd records is checked, however many calls came before."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import register_pytree_node

from kernels_core import (
    KernelsWarning,
    LayerRequest,
    Mode,
    PluginManager,
    Resolution,
    hookimpl,
    kernelize,
    quarantined,
    use_kernel_forward_from_hub,
)
from kernels_core.guards import gradients, proof
from kernels_core.scopes.frame import forget
from kernels_plugins import use_kernel_mapping

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")  # kernels are refused here
Forward = Callable[..., Any]


def ones(requires_grad: bool = False) -> torch.Tensor:
    return torch.ones(3, requires_grad=requires_grad)


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(ones(), requires_grad=False)


def scale(self: Any, x: Any, other: Any = None, *, more: Any = None, eps: float = 0.0) -> Any:
    """Multiply everything there is."""
    for held in (other, more, self.held):
        for factor in held.values() if isinstance(held, dict) else held if isinstance(held, list) else (held,):
            x = x * factor if factor is not None else x
    return x * self.weight * self.buffer * self.child.weight + eps


def loses(self: Any, x: Any, other: Any = None, *, more: Any = None, eps: float = 0.0) -> Any:
    """Do the same, where autograd records nothing."""
    with torch.no_grad():
        return scale(self, x, other, more=more, eps=eps)


def make(reference: Forward = scale) -> Any:
    """Return a module with tensors in every place, none of which requires grad."""
    layer: Any = use_kernel_forward_from_hub("Layer")(type("Layer", (nn.Module,), {"forward": reference}))()
    layer.weight = nn.Parameter(ones(), requires_grad=False)
    layer.register_buffer("buffer", ones())
    layer.child = Child()
    layer.held = None
    return layer


def kernel(forward: Forward) -> use_kernel_mapping:
    return use_kernel_mapping({"Layer": {"cpu": type("Kernel", (nn.Module,), {"forward": forward})}})


def hold(layer: Any, name: str, value: Any) -> None:
    setattr(layer, name, value)


PLACES: dict[str, Callable[[Any, torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "first argument": lambda layer, t: ((t,), {}),
    "second argument": lambda layer, t: ((ones(), t), {}),
    "keyword-only argument": lambda layer, t: ((ones(),), {"more": t}),
    "a number that became a tensor": lambda layer, t: ((ones(),), {"eps": t}),
    "list": lambda layer, t: ((ones(), [ones(), t]), {}),
    "dict": lambda layer, t: ((ones(),), {"more": {"a": ones(), "b": t}}),
    "attribute": lambda layer, t: hold(layer, "held", t) or ((ones(),), {}),
    "dict in an attribute": lambda layer, t: hold(layer, "held", {"t": t}) or ((ones(),), {}),
    "buffer": lambda layer, t: hold(layer, "buffer", t) or ((ones(),), {}),
    "parameter that was replaced": lambda layer, t: hold(layer, "weight", nn.Parameter(t)) or ((ones(),), {}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("frozen", [False, True], ids=["dispatched", "kernelized"])
def test_the_first_recorded_call_is_checked_wherever_the_tensor_is(place: str, frozen: bool) -> None:
    """Calls that nothing records prove nothing, and leave the check in place."""
    layer = make()
    with kernel(loses):
        if frozen:
            kernelize(layer, mode=Mode.TRAINING)
        for _ in range(3):
            assert not layer(ones(), more={"a": ones()}, eps=0.5).requires_grad
            with torch.no_grad():
                layer(ones(True))
        assert quarantined() == []
        args, kwargs = PLACES[place](layer, ones(True))
        output = layer(*args, **kwargs)
    assert len(quarantined()) == 1
    assert output.requires_grad  # the same call was served by the reference


class Packed:
    """Two tensors that belong together: it cannot be made of anything else."""

    def __init__(self, data: torch.Tensor, lengths: torch.Tensor) -> None:
        assert data.shape == lengths.shape
        self.data, self.lengths = data, lengths


register_pytree_node(Packed, lambda one: ([one.data, one.lengths], None), lambda parts, _: Packed(*parts))


@pytest.mark.parametrize("forward", [scale, loses])
def test_arguments_of_registered_classes_are_not_made_anew(forward: Forward) -> None:
    """A class that PyTorch can open, and that checks its parts, is looked through while a call is checked."""
    layer = make(lambda self, packed: scale(self, packed.data, packed.lengths))
    packed = Packed(ones(True), ones())
    with kernel(lambda self, packed: forward(self, packed.data, packed.lengths)):
        layer.weight.requires_grad_()
        output = layer(packed)
    assert len(quarantined()) == (forward is loses)
    assert output.requires_grad


@pytest.mark.parametrize("unfreeze", [lambda m: m.weight.requires_grad_(), lambda m: m.child.requires_grad_()])
@pytest.mark.parametrize("frozen", [False, True], ids=["dispatched", "kernelized"])
def test_a_parameter_that_is_unfrozen_later_is_checked(unfreeze: Callable[[Any], object], frozen: bool) -> None:
    """The tensors stay the same; only their flag changes."""
    layer = make()
    with kernel(loses):
        if frozen:
            kernelize(layer, mode=Mode.TRAINING)
        for _ in range(5):
            layer(ones())
        assert quarantined() == []
        unfreeze(layer)
        assert layer(ones()).requires_grad
    assert len(quarantined()) == 1


def test_the_training_kernel_of_two_is_checked() -> None:
    """Where kernels differ by mode, the one for training is proven, while the other serves unrecorded calls."""
    layer = make()
    fast = type("Fast", (nn.Module,), {"forward": lambda self, x, other=None, *, more=None, eps=0.0: "fast"})
    losing = type("Losing", (nn.Module,), {"forward": loses})
    with use_kernel_mapping({"Layer": {"cpu": {Mode.INFERENCE: fast, Mode.TRAINING: losing}}}):
        for _ in range(2):
            assert layer(ones()) == "fast"
        assert layer(ones(True)).requires_grad
        assert layer(ones()) == "fast"
    assert len(quarantined()) == 1


def test_each_kernel_is_proven_for_itself() -> None:
    """A layer may have a proven kernel in one scope and another in the next: that one is checked, too."""
    layer, tries = make(), []

    def right(self: Any, x: Any, other: Any = None, *, more: Any = None, eps: float = 0.0) -> Any:
        tries.append(1)
        return scale(self, x, other, more=more, eps=eps)

    first, second = kernel(right), kernel(loses)
    layer.requires_grad_()
    with second, torch.no_grad():
        layer(ones())
    with first:
        for _ in range(2):
            assert layer(ones(True), ones(True), more=ones(True)).requires_grad
    assert quarantined() == [] and len(tries) == 2
    with second:
        assert layer(ones()).requires_grad
    assert len(quarantined()) == 1


def ran_by(call: Callable[[], object]) -> list[str]:
    """Return the names of the functions of `guards` that a call runs."""
    ran: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename in (gradients.__file__, proof.__file__):
            ran.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return ran


def plain(self: Any, x: torch.Tensor, scale: float = 1.0, *, mask: Any = None) -> Any:
    return x * scale


def plain_kernel(self: Any, x: torch.Tensor, scale: float = 1.0, *, mask: Any = None) -> Any:
    return x * scale


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["dispatched", "kernelized"])
def test_an_unproven_kernel_costs_no_function_where_nothing_records(grad: bool, frozen: bool) -> None:
    """Tensors are asked by the generated forward itself; the parameters only if the reference reads its module."""
    layer, reading = make(plain), make()
    with kernel(plain_kernel), torch.set_grad_enabled(grad):
        if frozen:
            kernelize(layer, mode=Mode.TRAINING)
        layer(ones())
        assert ran_by(lambda: layer(ones(), 2.0)) == []
    with kernel(loses), torch.set_grad_enabled(grad):
        reading(ones())
        ran = set(ran_by(lambda: reading(ones(), eps=1.0)))
    assert bool(ran) is grad and all("trainable" in name or name == "<genexpr>" for name in ran), ran


def test_nothing_is_left_of_the_proof() -> None:
    """Once a kernel is proven, a recorded call asks nothing."""
    layer = make(plain).requires_grad_()
    with kernel(plain_kernel):
        assert "try_gradients" in ran_by(lambda: layer(ones(True), mask=ones(True)))
        assert ran_by(lambda: layer(ones(True))) == []


def test_a_wrapped_kernel_is_proven(isolated_plugins: PluginManager, mapping_plugin: object) -> None:
    """A wrapper that a plugin puts around a kernel gets each call once, and the check is inside of it."""
    calls: list[bool] = []

    class Plugin:
        @hookimpl
        def kernels_wrap_forward(self, resolution: Resolution) -> Any:
            def wrap(forward: Forward) -> Forward:
                def around(*args: Any, **kwargs: Any) -> Any:
                    calls.append(resolution.is_reference)
                    return forward(*args, **kwargs)

                return around

            return wrap

    isolated_plugins.register(Plugin(), "around")
    layer = make()
    with kernel(loses):
        layer(ones())
        assert layer(ones(True)).requires_grad
        assert len(quarantined()) == 1
        layer(ones(True))
    assert calls == [False, False, True, True]  # the second call was made anew, with the reference


def test_a_kernel_that_is_never_proven_goes_with_its_scope() -> None:
    """Waiting for a recorded call keeps nothing alive."""
    layer = make()
    unproven = type(layer).forward.__globals__["_kernels_unproven"]
    for _ in range(3):
        with kernel(lambda self, x, other=None, *, more=None, eps=0.0: x):
            layer(ones())
            assert len(unproven) == 1
        gc.collect()
        assert len(unproven) == 0


def test_decisions_dropped_in_the_middle_of_a_call_leave_it_checked() -> None:
    """Another thread may drop all decisions between the read of a kernel and the search for its proof."""

    class Forgets(list[Any]):
        def __iter__(self) -> Iterator[Any]:  # asked whether it holds a tensor that requires grad
            forget()
            gc.collect()
            return super().__iter__()

    layer = make()
    with kernel(loses), pytest.warns(KernelsWarning, match="loses gradients"):
        layer(ones())
        assert layer(ones(), Forgets([ones(True)])).requires_grad


def test_a_plugin_that_answers_with_an_old_decision(isolated_plugins: PluginManager) -> None:
    """A kernel is checked once and stays in quarantine, whatever request the answer of a plugin is about."""
    layer, old = make(), LayerRequest("old", torch.device("cpu"), Mode.INFERENCE)

    class Insists:
        @hookimpl
        def kernels_resolve_forward(self, request: LayerRequest) -> Resolution:
            return Resolution(old, loses, origin="insists")

    isolated_plugins.register(Insists(), "insists")
    for _ in range(2):
        assert layer(ones(True)).requires_grad
    assert len(quarantined()) == 1
