"""`Call`: the same call again, with any forward, and no trace of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels_core.replay import Call, ModelState, is_observed, same_numbers
from kernels_plugins.comparison import compare


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
    """Keeps its arguments, as the caches of language models do; knows itself."""

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
    """A tensor of inference mode cannot be saved for a backward: its copy can."""
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
    """Casts to float32 inside do not lose digits; casts to less than the inputs have still lose them."""
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
    """Neither those of the user nor those of activation checkpointing, which count saved tensors."""
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
    """Random numbers that are drawn between change nothing."""
    snapshot = Call(Layer(), (torch.randn(4, 8),)).snapshot()
    first = snapshot.run(Layer.forward).outputs
    torch.rand(9)
    assert torch.equal(snapshot.run(Layer.forward).outputs, first)


class Noise(nn.Module):
    """Draws from a generator of its own, in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.generators = {"noise": [torch.Generator().manual_seed(1)]}

    def forward(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        for each in (self.generators["noise"][0], generator):
            x = x + (torch.rand(x.shape, generator=each) if each is not None else 0)
        return x


def test_generators_of_the_call_are_restored() -> None:
    """Runs of a snapshot start from the states of its own generators, in modules, containers and arguments."""
    noise, given = nn.Sequential(Noise()), torch.Generator().manual_seed(2)
    own = noise[0].generators["noise"][0]

    def forward(module: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return module[0](x, generator)  # type: ignore[no-any-return]

    call = Call(noise, (torch.ones(3), given)).snapshot()
    before = own.get_state(), given.get_state()
    first, second = call.run(forward), call.run(forward)
    assert torch.equal(first.outputs, second.outputs) and first.random
    assert torch.equal(own.get_state(), before[0]) and torch.equal(given.get_state(), before[1])
    with call.replayed(forward, objects=True) as replay:
        assert torch.equal(replay.outputs, first.outputs)
    with ModelState(noise).kept():
        noise(torch.ones(3))
    assert torch.equal(own.get_state(), before[0])
    assert torch.equal(forward(noise, torch.ones(3), given), first.outputs)


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
    """Only the layout of the gradient that comes in is another."""
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


# --- Each user's way ------------------------------------------------------------------------------


class Odd(nn.Module):
    """Keeps a weight that is no parameter, a buffer, and objects that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.weight = torch.ones(2, requires_grad=True)
        self.weights = {"other": torch.ones(2, requires_grad=True)}
        self.register_buffer("cache", torch.zeros(2))
        self.log: list[int] = []
        self.options = Options()


@dataclass
class Options:
    """Options of a layer."""

    scale: float = 1.0


CHANGES: dict[str, Callable[[Odd, list[int]], Any]] = {
    "log[0]": lambda m, items: m.log.append(1),
    "input argument 2[1]": lambda m, items: items.append(1),
    "input argument 2[0]": lambda m, items: items.clear(),
    "options.scale": lambda m, items: setattr(m.options, "scale", 1.5),
    "options": lambda m, items: setattr(m, "options", m.options),
    "module inner": lambda m, items: setattr(m, "inner", nn.Linear(2, 2)),
    "training": lambda m, items: m.eval(),
    "new": lambda m, items: setattr(m, "new", 3),
    "weights['other']": lambda m, items: m.weights.update(other=torch.ones(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_attributes_and_items_are_named(name: str) -> None:
    """Also those of lists, dicts and dataclasses; setting the same object again changes nothing."""
    module, items = Odd(), [5]
    options = module.options
    run = Call(module, (torch.ones(2), items)).run(lambda m, x, items: CHANGES[name](m, items))
    assert (name in run.attributes) is (name != "options")
    assert items == [5] and module.log == [] and module.training and not hasattr(module, "new")
    options.scale = 1.0  # an object that a module keeps is shared, and only noticed


def test_every_tensor_that_requires_grad_has_a_gradient() -> None:
    """Weights in attributes and dicts, too, as some wrappers keep them; the originals get none."""
    module = Odd()
    run = Call(module, (torch.ones(2),)).run(lambda m, x: x * m.weight * m.weights["other"])
    reached = {name for name, gradient in run.gradients.items() if gradient is not None}
    assert reached == {"attribute weight", "attribute weights['other']"}
    assert run.gradients["parameter inner.weight"] is None and module.weight.grad is None


def test_memory_that_inputs_share_with_a_module_is_shared_in_the_copies() -> None:
    """A view of a buffer among the arguments is a view of the copied buffer."""
    module = Odd()

    def forward(m: Odd, view: torch.Tensor) -> torch.Tensor:
        view.fill_(7)
        return m.cache.clone()

    run = Call(module, (module.cache[:1],)).run(forward)
    assert run.outputs.tolist() == [7.0, 0.0] and set(run.mutated) == {"input argument 1", "buffer cache"}
    assert not module.cache.any()


def test_parameters_may_stay_where_they_are() -> None:
    """Without a copy of parameters, only these are shared; one that is an argument, too, is copied."""
    module = nn.Linear(2, 2)

    def forward(m: nn.Linear, weight: torch.Tensor) -> Any:
        return m.bias.data_ptr(), weight.data_ptr(), m.weight.data_ptr()

    kept = Call(module, (module.weight,)).run(forward, parameters=False, gradients=False).outputs
    assert kept[0] == module.bias.data_ptr() and module.weight.data_ptr() not in kept
    assert module.bias.data_ptr() not in Call(module, (module.weight,)).run(forward, gradients=False).outputs


def test_objects_are_copied_where_that_is_asked_for() -> None:
    """For a caller whose arguments must not remember anything; a generator cannot be copied, and that raises."""
    counter: Any = type("Counter", (), {"count": 0})()

    def forward(x: torch.Tensor, counter: Any) -> torch.Tensor:
        counter.count = counter.count + 1
        return x * counter.count

    with Call(None, (torch.ones(1), counter)).replayed(forward, objects=True) as replay:
        assert replay.outputs == 1
    assert counter.count == 0
    Call(None, (torch.ones(1), counter)).run(forward)
    assert counter.count == 1
    with pytest.raises(TypeError), Call(None, ((n for n in [1]),)).replayed(next, objects=True):
        pass


def test_a_replay_shows_outputs_as_they_were_returned() -> None:
    """Recorded by autograd from the copies, so that a path to each can be looked for."""
    x, state = torch.ones(2, requires_grad=True), torch.get_rng_state()
    call = Call(None, (x, x))
    with call.replayed(lambda a, b: a * torch.rand(2)) as replay:
        found = torch.autograd.grad(replay.outputs, list(replay.sources.values()), torch.ones(2), allow_unused=True)
        assert [gradient is None for gradient in found] == [False, True] and replay.drew
        assert all(original is x for original in replay.originals.values())
        assert not torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), state) and x.grad is None
    with torch.no_grad(), call.replayed(torch.add) as replay:
        assert replay.sources == {} and not replay.outputs.requires_grad


def test_hooks_of_modules_are_as_they_are() -> None:
    """A hook of a module inside runs on the copy, and stays on the original."""
    module, seen = nn.Sequential(nn.Linear(2, 2)), []
    handle = module[0].register_forward_hook(lambda inner, args, output: seen.append(inner))
    Call(module, (torch.ones(2),)).run(nn.Sequential.forward)
    assert len(seen) == 1 and seen[0] is not module[0]
    handle.remove()
    module(torch.ones(2))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint8", "bool", "complex64"])
def test_same_numbers_in_every_dtype(name: str) -> None:
    """PyTorch compares few of the small ones, and NaN with nothing."""
    dtype = getattr(torch, name, torch.int8)
    if dtype.itemsize == 1:
        one, other = (torch.tensor([0, 1, n], dtype=torch.uint8).view(dtype) for n in (0, 1))
    else:
        one, other = (torch.tensor([0, torch.nan, n], dtype=dtype) for n in (0, 1))
    assert same_numbers(one, one.clone()) and not same_numbers(one, other)
    assert not same_numbers(one, one[:2]) and not same_numbers(one, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2).to_sparse(),
        lambda: torch.nn.Parameter(torch.ones(2)).as_subclass(type("Sub", (torch.Tensor,), {})),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
        lambda: torch.ones(2, device="meta"),
        lambda: torch.ones(0, 3),
    ],
    ids=["sparse", "subclass", "quantized", "conjugated", "meta", "empty"],
)
def test_tensors_that_are_more_than_memory(make: Callable[[], torch.Tensor]) -> None:
    """They are copied as they are."""
    tensor = make()
    (copied,) = Call(None, (tensor,)).snapshot().inputs.values()
    assert copied is not tensor and type(copied) is type(tensor)
    assert (copied.layout, copied.is_quantized, copied.shape) == (tensor.layout, tensor.is_quantized, tensor.shape)
    assert not Call(None, (tensor,)).run(lambda x: x, mutations=not tensor.is_meta).mutated


def test_what_is_observed_is_told(compiled: Any) -> None:
    """Transforms, modes that see operators, and tracers; not autograd, autocast or inference mode."""
    found = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        found.append(is_observed())
        return x

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        ask(torch.ones(1))
    assert found == [False]
    torch.func.vmap(ask)(torch.ones(2))
    torch.func.grad(lambda x: ask(x).sum())(torch.ones(2))
    torch.jit.trace(ask, (torch.ones(1),), check_trace=False)
    with FlopCounterMode(display=False):
        ask(torch.ones(1))
    assert found == [False, True, True, True, True]
    assert compiled(lambda x: x + 1 if is_observed() else x)[0](torch.ones(1)) == 2


def test_a_model_is_restored() -> None:
    """Attributes, hooks, lists, gradients, data of parameters, buffers and random numbers, also after an error."""
    model = nn.Sequential(Odd(), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
    gradient = model[1].weight.grad = torch.ones(2)
    state = ModelState(model)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(KeyError), state.kept():
            assert model[1].weight.grad is None
            model[1](torch.randn(3, 2)).sum().backward()
            model[0].log.append(1)
            model[0].extra = model[0].inner = nn.Linear(1, 1)
            model.half().requires_grad_().eval()
            model[2].register_forward_hook(print)
            model[2].weight = nn.Parameter(torch.zeros(1))
            del model[0].options
            raise KeyError
        assert model[1].weight.grad is gradient and model[1].bias.grad is None
        assert model[0].log == [] and not hasattr(model[0], "extra") and model[0].options.scale == 1
        assert model[0].inner.weight.shape == (2, 2) and not model[2]._forward_hooks
        assert all(module.training for module in model.modules()) and not model[2].weight.requires_grad
        for name, tensor in model.state_dict(keep_vars=True).items():
            was, numbers = before[name]
            assert tensor is was and tensor.dtype == numbers.dtype and torch.equal(tensor, numbers)
        assert torch.equal(torch.get_rng_state(), random) and state.changed_parameters() == []
    with torch.no_grad():
        model[1].weight.add_(1)
    assert state.changed_parameters() == ["1.weight"]
