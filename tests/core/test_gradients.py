"""Kernels that lose gradients never train: they are refused on the call that would lose the first one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from warned import noted

from kernels_core import (
    Mode,
    kernelize,
    quarantined,
    release,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.guards.gradients import _CALLS_WITHOUT_NEWS
from kernels_plugins.mapping import use_kernel_mapping

Forward = Callable[..., Any]


pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")  # kernels are refused here
TELLS_HOOKS = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this PyTorch does not tell the hooks"
)


def make(reference: Forward, **tensors: torch.Tensor) -> Any:
    """Return a layer of a class of its own, with parameters."""
    members = {"forward": reference}
    layer: Any = use_kernel_forward_from_hub("Layer")(type("Layer", (nn.Module,), members))()
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor))
    return layer


def kernels(*forwards: Forward) -> use_kernel_mapping:
    """Map the layer to kernels, in order, which are named as their functions."""
    classes = [type(forward.__name__, (nn.Module,), {"forward": forward}) for forward in forwards]
    return use_kernel_mapping({"Layer": {"cpu": classes}})


def out() -> list[str]:
    """Return which kernels are in quarantine."""
    return [entry.kernel.rpartition(".")[2] for entry in quarantined()]


def scale(self: Any, x: torch.Tensor) -> Any:
    """Reference of most tests."""
    return x * self.weight


def right(self: Any, x: torch.Tensor) -> Any:
    """Keeps all gradients."""
    return self.weight * x


def loses_weight(self: Any, x: torch.Tensor) -> Any:
    """Saves tensors for a backward, and loses one gradient."""
    return x.exp().log() * self.weight.detach()


def loses_input(self: Any, x: torch.Tensor) -> Any:
    """Lose the other one."""
    return x.detach() * self.weight


def loses_all(self: Any, x: torch.Tensor) -> Any:
    """Compute outside of autograd."""
    return (x * self.weight).detach()


def ones(requires_grad: bool = False) -> torch.Tensor:
    return torch.ones(3, requires_grad=requires_grad)


def test_candidates_are_tried_in_order_and_each_loss_is_told() -> None:
    """The next candidate takes over in the same call, and inference goes on with the first."""
    layer, x = make(scale, weight=ones() * 2), ones(True)
    with kernels(loses_all, loses_weight, right):
        layer(x).sum().backward()
        assert resolve(layer, device="cpu", mode=Mode.TRAINING).origin.endswith("right")
        assert resolve(layer, device="cpu", mode=Mode.INFERENCE).origin.endswith("loses_all")
    assert x.grad is not None and x.grad.tolist() == [2, 2, 2]
    assert layer.weight.grad.tolist() == [1, 1, 1]
    assert out() == ["loses_all", "loses_weight"]
    assert [entry.mode for entry in quarantined()] == [Mode.TRAINING] * 2
    assert "argument 'x', parameter 'weight'" in quarantined()[0].reason
    assert "argument" not in quarantined()[1].reason


def test_the_reference_takes_over_where_no_candidate_is_left() -> None:
    """The gradient is the reference's, under accumulation, too."""
    layer = make(scale, weight=ones())
    with kernels(loses_all):
        for _ in range(3):
            layer(ones()).sum().backward()
    assert layer.weight.grad.tolist() == [3, 3, 3]


@pytest.mark.parametrize("first", ["frozen weight", "input without gradient"])
@pytest.mark.parametrize("frozen", [False, True], ids=["dispatched", "kernelized"])
def test_what_required_no_gradient_on_the_first_call_is_looked_at_later(first: str, frozen: bool) -> None:
    """A kernel is proven for tensors that required gradients, not for those that were frozen, or data, that time."""
    layer = make(scale, weight=ones())
    with kernels(loses_weight if first == "frozen weight" else loses_input):
        if frozen:
            kernelize(layer, mode=Mode.TRAINING)
        if first == "frozen weight":
            layer.requires_grad_(False)
            layer(ones(True)).sum().backward()
            layer.requires_grad_(True)
        else:
            layer(ones()).sum().backward()
            layer.weight.grad = None
        assert out() == []
        x = ones(True)
        layer(x).sum().backward()
    assert len(out()) == 1
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1]
    assert layer.weight.grad.tolist() == [1, 1, 1]


def test_an_argument_that_was_not_given_is_looked_at_when_it_is() -> None:
    """`residual=None` on the first call proves nothing for a residual."""

    def reference(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return x if residual is None else x + residual

    def loses_residual(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return x * 1 if residual is None else x + residual.detach()

    layer, residual = make(reference), ones(True)
    with kernels(loses_residual):
        layer(ones(True)).sum().backward()
        layer(ones(True), residual).sum().backward()
    assert residual.grad is not None
    assert out() == ["loses_residual"]


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("kind", [list, tuple, lambda items: dict(enumerate(items))], ids=["list", "tuple", "dict"])
def test_each_item_of_an_argument_counts(kind: Any, lost: int) -> None:
    """The gradient of the first item is as good as that of the last."""

    def reference(self: Any, xs: Any) -> Any:
        return xs[0] * xs[1]

    def loses_one(self: Any, xs: Any) -> Any:
        return xs[lost].detach() * xs[1 - lost]

    xs = [ones(True), ones(True)]
    with kernels(loses_one):
        make(reference)(kind(xs)).sum().backward()
    assert all(x.grad is not None for x in xs)
    assert f"argument 'xs'[{lost}] requires" in quarantined()[0].reason


def test_a_weight_in_a_plain_attribute_counts() -> None:
    """A tensor that is no parameter but requires grad, as some wrappers keep theirs, is looked at, too."""
    layer = make(scale)
    layer.weight = ones(True)
    with kernels(loses_weight):
        layer(ones()).sum().backward()
    assert layer.weight.grad is not None
    assert "attribute 'weight'" in quarantined()[0].reason


def test_gradients_that_the_reference_lacks_too_are_no_loss() -> None:
    """A mask that gets no gradient, and a parameter that is not used, say nothing against a kernel."""

    def reference(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return x * mask.detach() * self.weight

    def kernel(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.weight * (mask.detach() * x)

    layer, x, mask = make(reference, weight=ones(), unused=ones()), ones(True), ones(True)
    with kernels(kernel):
        layer(x, mask).sum().backward()
    assert out() == []
    assert x.grad is not None and layer.weight.grad is not None
    assert mask.grad is None and layer.unused.grad is None


@pytest.mark.parametrize("reentrant", [pytest.param(False, marks=TELLS_HOOKS), True])
def test_checkpointing_goes_on_when_a_kernel_is_refused(reentrant: bool) -> None:
    """Tensors that a refused kernel saved for its backward are not counted as saved by the forward."""
    layer, x = make(scale, weight=ones()), ones(True)
    with kernels(loses_all, loses_weight, right):
        for _ in range(2):
            checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None and x.grad.tolist() == layer.weight.grad.tolist() == [2, 2, 2]
    assert out() == ["loses_all", "loses_weight"]


@TELLS_HOOKS
def test_checkpointing_goes_on_when_a_kernel_is_compared_with_the_reference() -> None:
    """Tensors that the reference saved do not count either; those that an accepted kernel saved do."""

    def reference(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return (x * mask.detach()).exp()

    def kernel(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return torch.exp(mask.detach() * x)

    x, mask = ones(True), ones(True)
    with kernels(kernel):
        checkpoint(make(reference), x, mask, use_reentrant=False).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.exp(ones()))
    assert out() == []


@TELLS_HOOKS
def test_hooks_for_saved_tensors_see_an_accepted_kernel_and_no_other() -> None:
    """Hooks unpack the tensors that they packed, and none of a run that is void."""
    packed: list[torch.Tensor] = []
    unpacked: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    def unpack(number: int) -> torch.Tensor:
        unpacked.append(packed[number])
        return packed[number]

    with kernels(loses_weight, right), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        make(scale, weight=ones())(ones(True)).sum().backward()
    assert len(packed) == len(unpacked) == 2  # right saves its two factors
    assert out() == ["loses_weight"]


def test_random_numbers_of_a_refused_kernel_are_given_back() -> None:
    """A refused kernel and a comparison leave the numbers that the reference would have drawn."""

    def reference(self: Any, x: torch.Tensor) -> Any:
        return nn.functional.dropout(x)

    def loses(self: Any, x: torch.Tensor) -> Any:
        return nn.functional.dropout(x).detach()

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return torch.cat([make(reference)(torch.ones(64, requires_grad=True)), torch.rand(8)])

    expected = run()
    with kernels(loses):
        assert torch.equal(run(), expected)
    assert out() == ["loses"]


@pytest.mark.parametrize("where", ["argument", "argument that needs no gradient", "buffer"])
def test_what_was_changed_in_place_is_changed_once(where: str) -> None:
    """A refused kernel that changed something is not followed by another run, nor is its state touched by one."""

    def reference(self: Any, x: torch.Tensor, count: torch.Tensor) -> Any:
        {"argument": x, "buffer": self.count}.get(where, count).add_(1)
        return x * self.weight

    def loses(self: Any, x: torch.Tensor, count: torch.Tensor) -> Any:
        with torch.no_grad():
            return reference(self, x, count)

    layer = make(reference, weight=ones())
    layer.register_buffer("count", torch.zeros(3))
    x, count = ones(True) * 1, torch.zeros(3)
    with kernels(loses), noted() as said:
        layer(x, count)
    assert x.tolist() == [2 if where == "argument" else 1] * 3
    assert (count + layer.count).tolist() == [0 if where == "argument" else 1] * 3
    assert out() == ["loses"]
    assert any("cannot be made anew" in str(each.message) for each in said)


def test_a_reference_that_changes_a_buffer_does_not_keep_the_call_from_being_made_anew() -> None:
    """Only changes by the kernel count; the comparison undoes those of the reference."""

    def counts(self: Any, x: torch.Tensor) -> Any:
        self.count.add_(1)
        return x * self.weight

    layer = make(counts, weight=ones())
    layer.register_buffer("count", torch.zeros(1))
    with kernels(loses_all):
        layer(ones()).sum().backward()
    assert layer.weight.grad is not None
    assert layer.count.item() == 1


def test_a_kernel_that_serves_where_the_reference_fails_is_kept() -> None:
    """A gradient that cannot be compared is reported, and no kernel is accused."""

    def fails(self: Any, x: torch.Tensor) -> Any:
        raise ValueError("not implemented")

    with kernels(loses_all), noted() as said:
        assert make(fails, weight=ones())(ones()).tolist() == [1, 1, 1]
    assert out() == []
    assert "the reference fails: ValueError: not implemented" in str(said[0].message)


@TELLS_HOOKS
def test_a_kernel_that_raises_on_its_first_recorded_call() -> None:
    """The circuit breaker takes over, under checkpointing, too: the run that raised has saved nothing."""

    def raises(self: Any, x: torch.Tensor) -> Any:
        x * self.weight
        raise RuntimeError("boom")

    layer = make(scale, weight=ones())
    with kernels(raises):
        checkpoint(layer, ones(), use_reentrant=False).sum().backward()
    assert layer.weight.grad.tolist() == [1, 1, 1]
    assert "it raised RuntimeError: boom" in quarantined()[0].reason


@pytest.mark.parametrize("output", ["tuple", "dict", "integers"])
def test_outputs_of_several_tensors(output: str) -> None:
    """A path to one output is enough; where no output can have a gradient, none is lost."""

    def wrapped(y: torch.Tensor) -> Any:
        return {"tuple": (y.detach(), [y]), "dict": {"y": y, "n": 3}, "integers": y.argmax()}[output]

    def reference(self: Any, x: torch.Tensor) -> Any:
        return wrapped(x * self.weight)

    def kernel(self: Any, x: torch.Tensor) -> Any:
        return wrapped(self.weight * x)

    with kernels(kernel):
        make(reference, weight=ones())(ones(True))
    assert out() == []


def test_nothing_is_left_once_all_gradients_were_seen() -> None:
    """Until then each recorded call is looked at; after it, kernelized modules have the bare kernel."""
    layer = make(scale, weight=ones())
    with kernels(right):
        kernelize(layer, mode=Mode.TRAINING)
    for recorded in (False, True):
        layer(ones(recorded))
        assert type(layer).forward.__globals__["_kernels_unproven"] is not recorded


def test_nothing_is_left_after_a_hundred_calls_that_bring_nothing_new() -> None:
    """A mask never requires grad: calls are not looked at for ever, and calls that are not recorded do not count."""
    layer = make(scale, weight=ones())
    with kernels(right):
        kernelize(layer, mode=Mode.TRAINING)
    state = type(layer).forward.__globals__
    layer.weight.requires_grad_(False)
    for _ in range(200):
        layer(ones())
    layer.weight.requires_grad_()
    for number in range(1 + _CALLS_WITHOUT_NEWS):
        assert state["_kernels_unproven"], number
        layer(ones())
    assert not state["_kernels_unproven"]


def test_each_layer_proves_a_kernel_for_itself() -> None:
    """A kernel that keeps the gradients of one layer may lose those of another that it also serves."""

    def shared(self: Any, x: torch.Tensor) -> Any:
        return x * (self.weight if self.trains else self.weight.detach())

    first, second = make(scale, weight=ones()), make(scale, weight=ones())
    first.trains, second.trains = True, False
    with kernels(shared):
        for layer in (first, second):
            layer(ones(True)).sum().backward()
            assert layer.weight.grad is not None
    assert len(out()) == 1


def test_every_combination_of_what_requires_gradients() -> None:
    """In whatever order things begin to require gradients, the first loss is noticed on its call, and not before."""
    for order in itertools.permutations([(True, False), (False, True), (True, True)]):
        layer = make(scale, weight=ones())
        lost = False
        with kernels(loses_weight):
            for trains_input, trains_weight in order:
                layer.requires_grad_(trains_weight)
                assert layer(ones(trains_input)).requires_grad
                lost = lost or trains_weight
                assert out() == ["loses_weight"] * lost
        release()
