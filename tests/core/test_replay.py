"""`Call`: the same call again, with any forward, and no trace of it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels_core.replay import Call
from kernels_plugins.oracle.comparison import compare


class Layer(nn.Module):
    """Draws random numbers, counts in a buffer and in attributes, and has a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.tied = self.linear.weight
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.log = 0, []

    def forward(self, x: torch.Tensor, *rest: Any, scale: float = 1.0) -> torch.Tensor:
        self.count += 1
        self.calls += 1
        self.log.append(self.calls)
        return torch.dropout(self.linear(x) @ self.tied * scale, 0.5, True)


class Cache:
    """Keeps what it is given, as the caches of language models do; knows itself."""

    def __init__(self) -> None:
        self.layers = [torch.ones(2, 3)]
        self.name, self.me = "cache", self

    def update(self, x: torch.Tensor) -> torch.Tensor:
        self.layers[0] = torch.cat([self.layers[0], x])
        self.layers.append(x)
        return self.layers[0]


def test_objects_with_tensors_are_copied() -> None:
    """A cache that every run appends to is the same at the start of each, and afterwards."""
    cache, x = Cache(), torch.randn(1, 3)
    call = Call(None, (x, cache))
    assert list(call.inputs) == ["argument 1", "argument 2.layers[0]"]
    for _ in range(2):
        run = call.run(lambda x, cache: (cache.update(x), cache))
        assert run.outputs[0].shape == (3, 3)
    assert compare(run.outputs, call.run(lambda x, cache: (cache.update(x), cache)).outputs).ok
    assert len(cache.layers) == 1 and cache.layers[0].shape == (2, 3)


def test_runs_are_equal_and_leave_nothing_behind() -> None:
    """Two runs draw the same random numbers; module, inputs, gradients and random numbers are as before."""
    layer, x = Layer(), torch.randn(4, 8, requires_grad=True)
    state, random = [t.clone() for t in (x, *layer.state_dict().values())], torch.get_rng_state()
    call = Call(layer, (x,), {"scale": 2.0})
    one, two = call.run(Layer.forward), call.run(Layer.forward)
    assert torch.equal(one.outputs, two.outputs) and one.outputs.grad_fn is None
    assert set(one.gradients) == {"input argument 1", "parameter tied", "parameter linear.bias"}
    assert all(torch.equal(one.gradients[name], two.gradients[name]) for name in one.gradients)
    assert set(one.mutated) == {"buffer count"} and one.mutated["buffer count"] == 1
    assert set(one.attributes) == {"calls", "log[0]"} and one.random
    assert (layer.calls, layer.log, layer.count.item()) == (0, [], 0)
    assert all(map(torch.equal, state, (x, *layer.state_dict().values())))
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None and layer.linear.weight.grad is None


def test_gradients_are_those_of_the_live_call() -> None:
    """For the same gradients of the outputs, also in nested outputs."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)

    def forward(x: torch.Tensor, w: torch.Tensor) -> Any:
        return {"a": x * w, "b": [x.sum(), w.detach(), 3]}

    run = Call(None, (x, w)).run(forward)
    twice = Call(None, (x, w)).run(forward, seed=1)
    assert not torch.equal(run.gradients["input argument 2"], twice.gradients["input argument 2"])
    probe = Call(None, (x, w)).run(lambda x, w: x * w)
    pushed = probe.gradients["input argument 1"] / w.detach()
    torch.testing.assert_close(run.gradients["input argument 2"], (pushed * x.detach()).sum(0))


def test_snapshots_keep_strides_aliases_and_requirements() -> None:
    """Views of one memory stay so, tensors apart stay apart, and neither is the original."""
    base = torch.arange(64.0).view(8, 8)
    given = [base[:, ::2], base[1:3], base.T, torch.zeros(1, 4).expand(3, 4), base[5, 5], torch.arange(3)]
    other = torch.randn(2, requires_grad=True)
    call = Call(None, (given, {"o": other}))
    copied = call.snapshot()
    found = list(copied.inputs.values())
    for one, two in zip([*given, other], found, strict=True):
        assert torch.equal(one, two) and one.stride() == two.stride()
        assert one.requires_grad == two.requires_grad and one.data_ptr() != two.data_ptr()
        assert one.data_ptr() % 64 == two.data_ptr() % 64
    found[2].zero_()
    assert not found[1].any() and base.any() and found[5].any()
    assert list(copied.inputs) == [*(f"argument 1[{i}]" for i in range(6)), "argument 2['o']"]


def test_the_same_tensor_twice_is_one_memory() -> None:
    """A forward that writes into one argument sees it in the other."""
    x = torch.ones(3)

    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return b.clone()

    run = Call(None, (x, x)).run(forward)
    assert run.outputs.tolist() == [2.0, 2.0, 2.0]
    assert set(run.mutated) == {"input argument 1", "input argument 2"} and x.tolist() == [1.0] * 3


def test_writing_into_an_input_that_requires_grad_works() -> None:
    """As in a model, where inputs are results."""
    x = torch.ones(3, requires_grad=True)
    run = Call(None, (x,)).run(lambda x: x.mul_(2))
    pushed = Call(None, (x,)).run(lambda x: x * 1).gradients["input argument 1"]
    torch.testing.assert_close(run.gradients["input argument 1"], 2 * pushed)
    assert set(run.mutated) == {"input argument 1"}


def test_grad_modes_are_those_of_the_call() -> None:
    """No gradients under no_grad or in inference mode, unless they are asked for."""
    call = Call(Layer(), (torch.randn(2, 8),))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = Call(call.module, (torch.randn(2, 8),))
            assert not inside.run(Layer.forward).gradients
            assert not inside.snapshot().run(Layer.forward).gradients
            assert inside.run(Layer.forward, gradients=True).gradients
            seen = inside.run(lambda m, x: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())).outputs
            assert seen == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert call.run(lambda m, x: torch.is_grad_enabled(), gradients=False).outputs is False
    assert call.run(Layer.forward).gradients


def test_inference_tensors_can_be_replayed_with_gradients() -> None:
    """What was made in inference mode cannot be saved for a backward: its copy can."""
    with torch.inference_mode():
        layer, x = Layer(), torch.randn(2, 8)
    run = Call(layer, (x,)).run(Layer.forward, gradients=True)
    assert run.gradients["parameter linear.bias"] is not None


def test_autocast_counts_as_around_the_call() -> None:
    """And its cache keeps nothing of the run."""
    layer = Layer()
    with torch.autocast("cpu", torch.bfloat16):
        run = Call(layer, (torch.randn(2, 8),)).run(Layer.forward)
        exact = Call(layer, (torch.randn(2, 8),)).run(Layer.forward, dtype=torch.float64)
    assert run.outputs.dtype is torch.bfloat16 and exact.outputs.dtype is torch.float64


def test_float64_goes_all_the_way() -> None:
    """Casts to float32 inside do not lose digits; casts to less than the inputs have do what they are for."""
    x = torch.randn(4, 8)
    call = Call(None, (x,))
    exact = call.run(
        lambda x: torch.softmax(x.float() @ x.to(torch.float32).T, -1, dtype=torch.float32), dtype=torch.float64
    )
    torch.testing.assert_close(exact.outputs, torch.softmax(x.double() @ x.double().T, -1), rtol=1e-14, atol=1e-14)
    coarse = call.run(lambda x: x.bfloat16().float(), dtype=torch.float64)
    assert torch.equal(coarse.outputs.float(), x.bfloat16().float())


def test_modules_are_converted_with_their_inputs() -> None:
    """A call in bfloat16 has parameters in bfloat16; the module has not changed."""
    layer = Layer()
    call = Call(layer, (torch.randn(2, 8), torch.arange(3))).converted(torch.float32, torch.bfloat16)
    assert call.run(Layer.forward).outputs.dtype is torch.bfloat16
    assert call.inputs["argument 2"].dtype is torch.int64 and layer.linear.weight.dtype is torch.float32


def test_hooks_for_saved_tensors_see_nothing() -> None:
    """Neither those of the user nor those of activation checkpointing, which count what is saved."""
    packed: list[torch.Tensor] = []
    layer, x = Layer(), torch.randn(2, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        Call(layer, (x,)).run(Layer.forward)
    assert not packed

    def forward(x: torch.Tensor) -> torch.Tensor:
        Call(layer, (x,)).run(Layer.forward)
        return torch.sin(layer.linear(x))

    expected = torch.autograd.grad(torch.sin(layer.linear(x)).sum(), x)
    actual = torch.autograd.grad(checkpoint(forward, x, use_reentrant=False).sum(), x)
    assert torch.equal(actual[0], expected[0])


def test_a_run_keeps_nothing_alive() -> None:
    """No graph, no copy."""
    kept: list[Any] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(x * 2)
        kept.append(weakref.ref(y))
        return y.sum()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        Call(None, (torch.ones(3, requires_grad=True),)).run(forward)
    gc.collect()
    assert kept[0]() is None


def test_snapshots_start_from_their_own_random_numbers() -> None:
    """What is drawn between does not count."""
    snapshot = Call(Layer(), (torch.randn(4, 8),)).snapshot()
    first = snapshot.run(Layer.forward).outputs
    torch.rand(9)
    assert torch.equal(snapshot.run(Layer.forward).outputs, first)


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    """Modes, random numbers and the module are as before."""
    layer, x = Layer(), torch.randn(2, 8)
    random = torch.get_rng_state()

    def fails(self: Layer, x: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        self.count.add_(5)
        self.linear.weight.data.zero_()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Call(layer, (x,)).run(fails)
    assert layer.count == 0 and layer.linear.weight.any()
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()


def test_gradients_that_are_not_contiguous_are_the_same_numbers() -> None:
    """Only the layout of what comes in is another."""
    strides: list[tuple[int, ...]] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            strides.append(g.stride())
            return g * 2

    call = Call(None, (torch.randn(3, 4, requires_grad=True),))
    one, two = call.run(Look.apply), call.run(Look.apply, contiguous=False)
    assert strides == [(4, 1), (8, 2)]
    assert compare(dict(one.gradients), dict(two.gradients)).ok
