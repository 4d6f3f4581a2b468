"""`opaque` and `reference_backward`: kernels that cannot be traced, or have no backward, serve all the same."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import gc
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from warned import never

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginManager,
    decorated_layer,
    hookimpl,
    kernelize,
    quarantined,
    release,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import LayerRepository, opaque, reference_backward, use_kernel_mapping
from kernels_plugins.adapters import plugin as adapters_plugin
from kernels_plugins.adapters import structure

numpy = pytest.importorskip("numpy")

SEES_ALL = structure.sees_all
NEEDS_ATTRIBUTES = pytest.mark.skipif(not SEES_ALL, reason="this Dynamo sees attributes that are named in code alone")

SIZE = 8
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
TRACED = Mode.TRAINING | Mode.TORCH_COMPILE


@pytest.fixture(autouse=True)
def _adapters(mapping_plugin: object, isolated_plugins: PluginManager) -> Iterator[None]:
    """Have the plugin, and compile anew."""
    isolated_plugins.register(adapters_plugin, "adapters")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(target: Any, backend: str = "eager", **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """Compile without graph breaks, and count graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(target, backend=counter, fullgraph=True, **options), counter


def operators(counter: CompileCounterWithBackend) -> int:
    """Count the calls of opaque kernels in the last graph."""
    return sum("kernels_opaque" in str(node.target) for node in counter.graphs[-1].graph.nodes)


def reference_of(module: Any) -> Callable[..., Any]:
    """Return the reference of a module, bound to it, or that of a function."""
    layer = decorated_layer(module)
    return layer.reference if layer.is_function else layer.reference.__get__(module)


def gradients(output: Any, *wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Derive a number that depends on every element of an output."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    total = sum(
        (leaf * torch.linspace(1, 2, leaf.numel()).view(leaf.shape)).sum() for leaf in leaves if leaf.requires_grad
    )
    return torch.autograd.grad(total, wanted, retain_graph=True)  # type: ignore[arg-type]


def assert_like_reference(run: Callable[..., Any], module: Any, *args: Any, wanted: Any = (), **kwargs: Any) -> None:
    """Compare outputs and gradients of a call with those of the reference."""
    expected = reference_of(module)(*args, **kwargs)
    output = run(*args, **kwargs)
    torch.testing.assert_close(output, expected)
    if wanted:
        torch.testing.assert_close(gradients(output, *wanted), gradients(expected, *wanted))


# --- A layer, and kernels that no compiler can look into -----------------------------------------


@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, SIZE))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class _NumpyNorm(torch.autograd.Function):
    """Computes outside of PyTorch, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        array = x.detach().float().numpy()
        scale = 1 / numpy.sqrt((array**2).mean(-1, keepdims=True) + eps)
        ctx.save_for_backward(x, weight, torch.from_numpy(scale))
        return torch.from_numpy(array * scale * weight.detach().float().numpy()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight, scale = (t.detach().float().numpy() for t in ctx.saved_tensors)
        g = gradient.detach().float().numpy()
        plain = g * weight
        dx = scale * (plain - x * scale**2 * (plain * x).mean(-1, keepdims=True))
        dw = (g * x * scale).reshape(-1, x.shape[-1]).sum(0)
        return torch.from_numpy(dx).to(gradient.dtype), torch.from_numpy(dw), None


class NumpyNorm(nn.Module):
    """A kernel that cannot be traced, with a backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _untraceable(_NumpyNorm.apply, x, self.weight, self.eps)


class InferenceNorm(nn.Module):
    """A kernel that cannot be traced, without a backward."""

    has_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _untraceable(_NumpyNorm.apply, x.detach(), self.weight.detach(), self.eps)


class TraceableNorm(nn.Module):
    """A kernel that can be traced, without a backward."""

    can_torch_compile = True
    has_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x.detach(), (SIZE,), self.weight.detach(), self.eps)


@torch._dynamo.disable
def _untraceable(function: Any, *args: Any) -> Any:
    return function(*args)


SOURCES = {
    "own backward": opaque(NumpyNorm),
    "no backward": opaque(InferenceNorm),
    "reference backward": opaque(reference_backward(NumpyNorm)),
    "traceable": reference_backward(TraceableNorm),
}
EVERY_SOURCE = pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))


def example(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(*(shape or (4, SIZE)), requires_grad=True, **options)


def serving(source: Any, name: str = "Norm") -> Any:
    return use_kernel_mapping({name: {"cpu": source}})


# --- opaque: compiled ----------------------------------------------------------------------------


def test_without_opaque_such_a_kernel_breaks_the_graph() -> None:
    """The kernels of these tests really cannot be traced: declared traceable, they fail under fullgraph."""
    kernel = type("Lies", (NumpyNorm,), {"can_torch_compile": True})
    with serving(kernel), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(Norm())[0](example())


@BACKENDS
@EVERY_SOURCE
def test_compiles_into_one_graph_with_right_gradients(source: Any, backend: str) -> None:
    """One graph, one operator in it; outputs and gradients of inputs and parameters are the reference's."""
    layer = Norm()
    with serving(source):
        run, counter = compiled(layer, backend)
        for _ in range(3):
            x = example()
            assert_like_reference(run, layer, x, wanted=(x, layer.weight))
    assert counter.frame_count == 1
    assert operators(counter) == 1


@EVERY_SOURCE
def test_eager_calls(source: Any) -> None:
    """The same sources serve eager calls, recorded and not."""
    layer, x = Norm(), example()
    with serving(source):
        assert resolve(Norm, device="cpu", mode=Mode.TRAINING).origin.startswith(__name__)
        for _ in range(3):
            assert_like_reference(layer, layer, x, wanted=(x, layer.weight))
            with torch.no_grad():
                assert_like_reference(layer, layer, x)


@BACKENDS
def test_dynamic_shapes(backend: str) -> None:
    """A dimension that is marked dynamic is compiled once, and never again."""
    layer = Norm()
    with serving(opaque(NumpyNorm)):
        run, counter = compiled(layer, backend)
        for size in (4, 7, 12, 33):
            x = example(size, SIZE)
            torch._dynamo.mark_dynamic(x, 0)
            assert_like_reference(run, layer, x, wanted=(x, layer.weight))
    assert counter.frame_count == 1


def test_automatic_dynamic_shapes() -> None:
    """Shapes that change are compiled twice: once for the first, once for all others."""
    layer = Norm()
    with serving(opaque(NumpyNorm)):
        run, counter = compiled(layer, "aot_eager")
        for size in (4, 7, 12, 33):
            x = example(size, SIZE)
            assert_like_reference(run, layer, x, wanted=(x, layer.weight))
    assert counter.frame_count == 2


@BACKENDS
def test_inference(backend: str) -> None:
    """Calls under no_grad and inference_mode compile into one operator each, without a backward."""
    layer = Norm().requires_grad_(False)
    for context in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with serving(opaque(InferenceNorm)), context():
            run, counter = compiled(layer, backend)
            x = torch.randn(3, SIZE)
            assert_like_reference(run, layer, x)
            assert not run(x).requires_grad
            assert (counter.frame_count, operators(counter)) == (1, 1)


@BACKENDS
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_autocast(backend: str, inside: bool) -> None:
    """Under autocast, in the compiled code or around it, dtypes and numbers are those of the reference."""

    @use_kernel_forward_from_hub("Linear")
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(SIZE, SIZE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _untraceable(torch.matmul, x, self.weight)

    layer, x = Linear(), example()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if inside else contextlib.nullcontext():
            return layer(x) * 2

    def expected(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return reference_of(layer)(x) * 2

    with serving(opaque(Kernel), "Linear"):
        run, counter = compiled(step, backend)
        with contextlib.nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
            output = run(x)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output, expected(x))
    wanted = (x, layer.weight)
    torch.testing.assert_close(gradients(output.float(), *wanted), gradients(expected(x).float(), *wanted))
    assert counter.frame_count == 1


@pytest.mark.parametrize("source", [opaque(NumpyNorm), opaque(InferenceNorm)], ids=["own", "reference"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", None])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(source: Any, backend: str | None, reentrant: bool) -> None:
    """Under activation checkpointing, compiled and eager, gradients are those without."""
    if reentrant and backend is not None:
        pytest.skip("Dynamo does not trace reentrant checkpoints")
    layer, x = Norm(), example()

    def step(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: layer(y.sin()).cos(), x, use_reentrant=reentrant)

    with serving(source):
        run = step if backend is None else compiled(step, backend)[0]
        found = torch.autograd.grad(run(x).sum(), (x, layer.weight)) if not reentrant else None
        if reentrant:
            run(x).sum().backward()
            found = (x.grad, layer.weight.grad)
    expected = torch.autograd.grad(reference_of(layer)(x.sin()).cos().sum(), (x, layer.weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """An exported program has the operator, also for a dynamic dimension, and outlives the scope."""
    layer = Norm().requires_grad_(False)
    with serving(opaque(NumpyNorm)):
        batch = torch.export.Dim("batch", min=2, max=100)
        program = torch.export.export(layer, (torch.randn(4, SIZE),), dynamic_shapes=({0: batch},), strict=strict)
    assert sum("kernels_opaque" in str(node.target) for node in program.graph.nodes) == 1
    for size in (3, 50):
        x = torch.randn(size, SIZE)
        torch.testing.assert_close(program.module()(x), reference_of(layer)(x))


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.INFERENCE])
def test_kernelized_models(mode: Mode) -> None:
    """`kernelize` for compiled code freezes the operator."""
    model = nn.Sequential(Norm(), nn.Tanh(), Norm())
    x = example()
    expected = model(x)
    with serving(opaque(NumpyNorm)):
        kernelize(model, mode=mode | Mode.TORCH_COMPILE, device="cpu")
    run, counter = compiled(model, "aot_eager")
    with contextlib.nullcontext() if mode is Mode.TRAINING else torch.no_grad():
        torch.testing.assert_close(run(x), expected)
    assert (counter.frame_count, operators(counter)) == (1, 2)
    if mode is Mode.TRAINING:
        wanted = (x, model[0].weight)
        torch.testing.assert_close(gradients(run(x), *wanted), gradients(expected, *wanted))


def test_equal_modules_share_what_was_compiled() -> None:
    """Modules that differ in their tensors alone do not compile again: a block of a model is compiled once."""
    layers = [Norm() for _ in range(12)]
    with serving(opaque(NumpyNorm)):

        def block(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return layer(x).sin()

        run, counter = compiled(block)
        for layer in layers:
            torch.nn.init.uniform_(layer.weight)
            x = example()
            torch.testing.assert_close(run(layer, x), reference_of(layer)(x).sin())
    assert counter.frame_count == 1


def test_changed_attributes_are_seen() -> None:
    """An attribute that has changed compiles once more, and counts."""
    layer, x = Norm(), example()
    with serving(opaque(NumpyNorm)):
        run, counter = compiled(layer)
        for eps in (1e-5, 0.5, 1e-5):
            layer.eps = eps
            assert_like_reference(run, layer, x)
    assert counter.frame_count == 2


def test_each_kernel_and_layer_has_an_operator_of_its_own() -> None:
    """Scopes with different kernels run their own, in one compiled function, and come back without compiling."""

    def kernel(factor: float) -> type[nn.Module]:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return _untraceable(lambda: x * factor)  # type: ignore[no-any-return]

        return type(f"Times{factor:g}", (nn.Module,), {"forward": forward})

    layer, x = Norm(), torch.ones(2, SIZE)
    scopes = {factor: serving(opaque(kernel(factor))) for factor in (2.0, 3.0)}
    run, counter = compiled(layer)
    for _ in range(3):
        for factor, scope in scopes.items():
            with scope:
                assert run(x)[0, 0] == factor
    assert counter.frame_count == 2


def test_what_compiled_code_follows() -> None:
    """A scope in which nothing is mapped compiles the reference; back in the first, nothing is compiled again."""
    layer, x = Norm(), example()
    run, counter = compiled(layer)
    scopes = [serving(opaque(NumpyNorm)), use_kernel_mapping({}, inherit_mapping=False)]
    for _ in range(2):
        for scope in scopes:
            with scope:
                assert_like_reference(run, layer, x)
    assert counter.frame_count == 2


def test_modes_that_watch_operators() -> None:
    """`make_fx`, fake tensors and modes that count operators see one operator, too, without a compiler."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = Norm(), example()
    expected = reference_of(layer)(x)
    with serving(opaque(NumpyNorm)):
        for mode in ("real", "fake", "symbolic"):
            graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(x.detach())
            assert sum("kernels_opaque" in str(node.target) for node in graph.graph.nodes) == 1
            torch.testing.assert_close(graph(x.detach()), expected)
        for _ in range(2):
            with Watch():
                output = layer(x)
            torch.testing.assert_close(gradients(output, x, layer.weight), gradients(expected, x, layer.weight))
        assert "kernels_opaque" in str(seen)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert layer(fake.from_tensor(x)).shape == x.shape


@EVERY_SOURCE
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kernelized", [False, True])
def test_traces_of_torchscript_and_fx_have_the_reference(source: Any, recorded: bool, kernelized: bool) -> None:
    """`torch.jit.trace` and `symbolic_trace` record the reference: no result of a kernel, and no operator of ours."""
    layer, x = Norm(), example().detach()
    expected = reference_of(layer)(x + 1)
    with serving(source), torch.set_grad_enabled(recorded):
        model = layer
        if kernelized:
            model = kernelize(layer, mode=Mode.TRAINING if recorded else Mode.INFERENCE, device="cpu")
        torch.testing.assert_close(model(x + 1), expected)
        script = torch.jit.trace(model, (x,), check_trace=False)
        graph = torch.fx.symbolic_trace(nn.Sequential(model))
        assert "kernels_opaque" not in f"{script.graph}{graph.graph}" and "aten::rsqrt" in str(script.graph)
        torch.testing.assert_close(script(x + 1), expected)
        torch.testing.assert_close(graph(x + 1), expected)
        torch.testing.assert_close(model(x + 1), expected)
    assert not quarantined()


@EVERY_SOURCE
@pytest.mark.parametrize("recorded", [False, True])
def test_exports_to_onnx_have_the_reference(source: Any, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter that works on `torch.export`, too, gets no operator of ours, which no ONNX runtime has."""
    layer, x = Norm(), example().detach()
    expected = reference_of(layer)(x)
    with serving(source), torch.set_grad_enabled(recorded):
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # onnx is not installed here
        program = torch.export.export(layer, (x,), strict=False)
        assert "kernels_opaque" not in str(program.graph)
        torch.testing.assert_close(program.module()(x), expected)


def test_numbers_of_results_under_modes_that_watch() -> None:
    """Under a mode that watches operators, a number in the result is that of this call, not of the first one."""
    from torch.utils.flop_counter import FlopCounterMode

    @use_kernel_forward_from_hub("sized")
    def sized(x: torch.Tensor) -> Any:
        return x * 2, x.shape[0]

    with serving(opaque(function_of(reference_of(sized))), "sized"), FlopCounterMode(display=False):
        assert [sized(torch.ones(size))[1] for size in (3, 4, 3)] == [3, 4, 3]


NO_VMAP = pytest.mark.skipif(not SEES_ALL, reason="not every older Dynamo traces vmap of a module")


@pytest.mark.parametrize("transform", ["grad", pytest.param("vmap", marks=NO_VMAP), "jvp"])
def test_transforms_in_compiled_code(transform: str) -> None:
    """Compiled transforms of `torch.func` get the reference, for an operator has no rule for them."""
    layer, x = Norm().requires_grad_(False), torch.randn(3, SIZE)

    def step(x: torch.Tensor, forward: Any) -> Any:
        if transform == "jvp":
            return torch.func.jvp(forward, (x,), (x.cos(),))[1]
        return torch.func.vmap(forward)(x) if transform == "vmap" else torch.func.grad(lambda y: forward(y).sum())(x)

    expected = step(x, reference_of(layer))
    with serving(opaque(NumpyNorm)), never(KernelsWarning):
        torch.testing.assert_close(compiled(lambda x: step(x, layer))[0](x), expected)


# --- What a call consists of ---------------------------------------------------------------------


class Config:
    """An object that all layers of a model share."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@use_kernel_forward_from_hub("Rich")
class Rich(nn.Module):
    """Has a bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.weight = nn.Parameter(torch.randn(SIZE))
        self.register_buffer("table", torch.randn(SIZE))
        self.plain = torch.randn(SIZE)
        self.config = Config(1.5)
        self.dtype = torch.float32
        self.sizes = [2, 3]
        self.names = {"a": 1, "b": None}
        self.act = torch.nn.functional.silu

    def forward(
        self,
        x: torch.Tensor,
        others: Any,
        mask: torch.Tensor | None = None,
        count: int = 2,
        factor: float = 1.0,
        flag: bool = True,
        how: str = "sum",
        *,
        extra: Any = None,
    ) -> Any:
        return compute(self, x, others, mask, count, factor, flag, how, extra)


def compute(
    self: Any, x: Any, others: Any, mask: Any, count: int, factor: float, flag: bool, how: str, extra: Any
) -> Any:
    """The computation of `Rich`."""
    y = self.act(self.inner(x) * self.weight + self.table) * self.plain * self.config.scale
    for other in others:
        y = y + other * count
    if mask is not None:
        y = y.masked_fill(mask, 0.0)
    y = y.to(self.dtype) * factor + self.sizes[1] + self.names["a"]
    if extra is not None:
        y = y + extra["scale"] * extra["items"][0]
    reduced = y.sum(-1) if how == "sum" else y.mean(-1)
    return {"y": y, "pair": (reduced, [y.detach().argmax(-1)]), "flag": flag, "none": None} if flag else (y, reduced)


class RichKernel(nn.Module):
    def forward(
        self,
        x: torch.Tensor,
        others: Any,
        mask: torch.Tensor | None = None,
        count: int = 2,
        factor: float = 1.0,
        flag: bool = True,
        how: str = "sum",
        *,
        extra: Any = None,
    ) -> Any:
        return _untraceable(compute, self, x, others, mask, count, factor, flag, how, extra)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("source", [opaque(RichKernel), opaque(reference_backward(RichKernel))], ids=["own", "ref"])
def test_everything_that_a_call_may_have(source: Any, backend: str) -> None:
    """Submodules, buffers, plain tensors, objects; lists, masks, numbers, texts; nested outputs with constants."""
    layer = Rich()
    x, other, scale = example(), example(), torch.tensor(2.0, requires_grad=True)
    wanted = (x, other, scale, *layer.parameters())
    with serving(source, "Rich"):
        run, counter = compiled(layer, backend)
        for arguments in (
            {"flag": True, "how": "sum", "mask": torch.rand(4, SIZE) > 0.5},
            {"flag": False, "how": "mean", "count": 5, "factor": 0.5},
        ):
            extra = {"scale": scale, "items": (other, 7, "text")}
            assert_like_reference(run, layer, x, [other, other.sin()], extra=extra, wanted=wanted, **arguments)
    assert counter.frame_count <= 3  # a float that has changed may cost one more, to be found out about
    assert operators(counter) == 1


@pytest.fixture(params=["dynamo sees all", "dynamo sees what is named"])
def dynamo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as with the newest PyTorch, and as with older ones, whose Dynamo cannot list attributes."""
    if request.param == "dynamo sees all" and not SEES_ALL:
        pytest.skip("this Dynamo does not")
    monkeypatch.setattr("kernels_plugins.adapters.structure.sees_all", request.param == "dynamo sees all")


@pytest.mark.parametrize("source", [opaque(RichKernel), opaque(reference_backward(RichKernel))], ids=["own", "ref"])
def test_modules_as_older_dynamos_see_them(dynamo: None, source: Any) -> None:
    """Submodules, plain tensors and objects reach the operator; a value that changes in an object counts."""
    layer = Rich()
    x, other = example(), example()
    wanted = (x, other, *layer.parameters())
    with serving(source, "Rich"), never(KernelsWarning):
        run, counter = compiled(layer, "aot_eager")
        assert_like_reference(run, layer, x, [other], wanted=wanted)
        assert (counter.frame_count, operators(counter)) == (1, 1)
        layer.config = Config(0.25)
        assert_like_reference(run, layer, x, [other], wanted=wanted)
        assert counter.frame_count in (2, 3)  # where floats of objects count, one that has changed costs one more


def test_numbers_that_change_become_symbols() -> None:
    """An integer argument that changes is compiled twice, not each time."""

    @use_kernel_forward_from_hub("shift")
    def shift(x: torch.Tensor, by: int) -> torch.Tensor:
        return x + by

    def kernel(x: torch.Tensor, by: int) -> torch.Tensor:
        return _untraceable(lambda: torch.from_numpy(x.detach().numpy() + by))  # type: ignore[no-any-return]

    with serving(opaque(kernel), "shift"):
        run, counter = compiled(shift, "aot_eager")
        for by in (3, 4, 5, 6):
            assert torch.equal(run(torch.ones(2), by), torch.ones(2) + by)
    assert counter.frame_count == 2


def test_floats_that_change() -> None:
    """A float argument that changes is right each time."""

    @use_kernel_forward_from_hub("times")
    def times(x: torch.Tensor, by: float) -> torch.Tensor:
        return x * by

    def kernel(x: torch.Tensor, by: float) -> torch.Tensor:
        return _untraceable(lambda: x * by)  # type: ignore[no-any-return]

    for backend in ("eager", "aot_eager"):
        with serving(opaque(kernel), "times"):
            run, _ = compiled(times, backend)
            for by in (0.5, 1.5, 2.5, float("inf")):
                assert torch.equal(run(torch.ones(2), by), torch.ones(2) * by)


def test_bools_that_depend_on_sizes() -> None:
    """A bool that is computed from a dynamic size costs one graph for each value."""

    @use_kernel_forward_from_hub("choose")
    def choose(x: torch.Tensor, flag: bool) -> torch.Tensor:
        return x * (2 if flag else 3)

    def kernel(x: torch.Tensor, flag: bool) -> torch.Tensor:
        return _untraceable(lambda: x * (2 if flag else 3))  # type: ignore[no-any-return]

    with serving(opaque(kernel), "choose"):
        run, counter = compiled(lambda x: choose(x, x.shape[0] > 4), dynamic=True)
        for size in (2, 3, 5, 7):
            assert torch.equal(run(torch.ones(size)), torch.ones(size) * (2 if size > 4 else 3))
    assert counter.frame_count == 2


@dataclasses.dataclass
class Options:
    """Objects that a caller may make for one call."""

    scale: float = 1.0
    tensor: torch.Tensor | None = None


class Text(str, enum.Enum):
    """Equal to a text, and more than one."""

    A = "a"


def test_dataclasses_that_are_made_in_compiled_code() -> None:
    """Attributes of a dataclass count as they are at the call, tensors among them; changed ones, too."""

    @use_kernel_forward_from_hub("scaled")
    def scaled(x: torch.Tensor, options: Options) -> torch.Tensor:
        return x * options.scale + options.tensor

    layer, kept = scaled, Options(2.0, torch.zeros(3))

    def step(x: torch.Tensor, forward: Any) -> Any:
        kept.scale = 7.0
        return forward(x, Options(5.0, x.sin())) + forward(x, kept)

    def kernel(x: torch.Tensor, options: Options) -> torch.Tensor:
        return _untraceable(reference_of(scaled), x, options)  # type: ignore[no-any-return]

    x = torch.randn(3, requires_grad=True)
    expected = step(x, reference_of(layer))
    kept.scale = 2.0
    for source in (opaque(kernel), reference_backward(kernel)):
        with serving(source, "scaled"):
            run, counter = (
                compiled(lambda x: step(x, layer)) if source.as_operator else (lambda x: step(x, layer), None)
            )
            output = run(x)
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(gradients(output, x), gradients(expected, x))
            assert counter is None or operators(counter) == 2


def test_objects_that_are_made_in_compiled_code() -> None:
    """Those of other classes are refused, for a kernel would see them without attributes; or taken apart by name."""

    class Chosen:
        scale = 1.0

        def __init__(self, scale: float) -> None:
            self.scale = scale

    @use_kernel_forward_from_hub("chosen")
    def chosen(x: torch.Tensor, choice: Chosen) -> torch.Tensor:
        return x * choice.scale

    def kernel(x: torch.Tensor, choice: Chosen) -> torch.Tensor:
        return _untraceable(lambda: x * choice.scale)  # type: ignore[no-any-return]

    refused = pytest.warns(KernelsWarning, match="a Chosen has no attributes")
    with serving(opaque(kernel), "chosen"), refused if SEES_ALL else contextlib.nullcontext():
        assert torch.equal(compiled(lambda x: chosen(x, Chosen(5.0)))[0](torch.ones(2)), torch.full((2,), 5.0))
    with serving(opaque(kernel), "chosen"):
        assert torch.equal(compiled(chosen)[0](torch.ones(2), Chosen(5.0)), torch.full((2,), 5.0))


def test_texts_that_are_more_than_texts() -> None:
    """A member of an enumeration of texts reaches the kernel, and the caller, as it is."""
    seen: list[Any] = []

    @use_kernel_forward_from_hub("told")
    def told(x: torch.Tensor, how: str, give: bool) -> Any:
        return (x * 2, how) if give else x * 2

    def kernel(x: torch.Tensor, how: str, give: bool) -> Any:
        seen.append(how)
        return _untraceable(reference_of(told), x, how, give)

    x = torch.ones(2)
    with serving(opaque(kernel), "told"):
        run, _ = compiled(told)
        for how in ("a", Text.A):
            assert torch.equal(run(x, how, False), x * 2)
            assert seen[-1] is how
        assert run(x, Text.A, True)[1] is Text.A and seen[-1] is Text.A


def test_modules_whose_attributes_are_named_as_kinds() -> None:
    """Attributes and keys may be called "module", "deep" or "special"."""

    @use_kernel_forward_from_hub("Odd")
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.deep = nn.Linear(SIZE, SIZE), 2.0

        def forward(self, x: torch.Tensor, others: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.module(x) * self.deep + others["special"]  # type: ignore[no-any-return]

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor, others: dict[str, torch.Tensor]) -> torch.Tensor:
            return _untraceable(decorated_layer(Odd).reference, self, x, others)  # type: ignore[no-any-return]

    layer, x = Odd(), example()
    for source in (opaque(Kernel), reference_backward(Kernel)):
        with serving(source, "Odd"):
            run = compiled(layer)[0] if source.as_operator else layer
            assert_like_reference(run, layer, x, {"special": x}, wanted=(x, layer.module.weight))
    assert not quarantined()


def test_small_numbers_and_conjugates() -> None:
    """Weights of eight bits and fewer can be inputs; outputs that PyTorch conjugates or negates later are plain."""

    @use_kernel_forward_from_hub("complex")
    def conjugated(x: torch.Tensor, small: torch.Tensor) -> Any:
        return (x * 1).conj(), (x * 1).conj().imag

    x = torch.randn(6, dtype=torch.complex64)

    def kernel(x: torch.Tensor, small: torch.Tensor) -> Any:
        return _untraceable(reference_of(conjugated), x, small)

    with serving(opaque(kernel), "complex"), torch.no_grad():
        run, counter = compiled(lambda x, small: [y + 0 for y in conjugated(x, small)])
        for name in ("float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint8", "bool"):
            dtype = getattr(torch, name, torch.int8)
            output = run(x, torch.ones(4, dtype=torch.uint8).view(dtype))
            torch.testing.assert_close(output, [x.conj().resolve_conj(), -x.imag])
        torch.view_as_real(compiled(conjugated)[0](x, torch.ones(1))[0])  # raises for what is conjugated later
    assert not quarantined() and operators(counter) == 1


# --- What cannot be an operator ------------------------------------------------------------------


def function_of(body: Callable[[torch.Tensor], Any]) -> Any:
    """Return a kernel for functions of one tensor that cannot be traced."""

    def kernel(x: torch.Tensor) -> Any:
        return _untraceable(body, x)

    return kernel


def in_place(x: torch.Tensor) -> torch.Tensor:
    x.detach().numpy()[:] += 1  # which no version counter sees
    return x * 2


MISBEHAVING = {
    "changes input x in place": in_place,
    "returns one of its inputs": lambda x: x,
    "or a view of one": lambda x: x.view(-1)[:2],
    "draws random numbers": lambda x: x * 2 + torch.rand(()),
    "not built as": lambda x: (x * 2,),
    "output 1: torch.float64 instead of torch.float32": lambda x: x.double() * 2,
    "output 1: shape (1,) instead of (2,)": lambda x: x[:1] * 2,
}


@pytest.mark.parametrize("reason", MISBEHAVING)
def test_kernels_that_misbehave_are_taken_out_on_the_first_run(reason: str) -> None:
    """On copies, so that nothing is changed; that call has the reference's answer, and compiled code follows."""

    @use_kernel_forward_from_hub("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with serving(opaque(function_of(MISBEHAVING[reason])), "double"):
        run, counter = compiled(double)
        x = torch.ones(2)
        state = torch.get_rng_state()
        assert torch.equal(run(x), torch.full((2,), 2.0))
        assert torch.equal(x, torch.ones(2)) and torch.equal(torch.get_rng_state(), state)
        assert reason in quarantined()[0].reason
        with pytest.warns(KernelsWarning, match="is not used, reference runs instead"):
            assert torch.equal(run(x), torch.full((2,), 2.0))
        assert operators(counter) == 0 and counter.frame_count == 2
        assert not resolve(double, device="cpu", mode=Mode.INFERENCE).is_reference  # eager calls are not concerned
        refusal = resolve(double, device="cpu", mode=Mode.INFERENCE | Mode.TORCH_COMPILE).refusals[0]
        assert reason in refusal.reason


def test_one_that_is_found_out_is_not_called_again() -> None:
    """Not by another call in the same compiled code, nor backward; once released, it is looked at anew."""

    @use_kernel_forward_from_hub("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    with serving(opaque(function_of(in_place)), "double"):
        run, _ = compiled(lambda x, y: double(x) + double(y))
        for _ in range(2):
            output = run(x, y)
            assert torch.equal(output, torch.full((2,), 4.0))
            (gradient,) = torch.autograd.grad(output.sum(), x)
            assert torch.equal(gradient, torch.full((2,), 2.0))
            assert torch.equal(x, torch.ones(2)) and torch.equal(y, torch.ones(2))
            assert len(quarantined()) == 1
            release()


def test_kernels_that_change_the_module() -> None:
    """A kernel that keeps a number on the module is taken out: an operator does not see the module."""

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.eps = self.eps + 1
            return _untraceable(torch.mul, x, 2)

    layer = Norm()
    with serving(opaque(Counting)):
        assert_like_reference(compiled(layer)[0], layer, example())
    assert "changes Python state: eps" in quarantined()[0].reason
    assert layer.eps == 1e-5


def test_what_was_changed_is_named() -> None:
    """A kernel that writes to a buffer is taken out, with the name of that buffer."""

    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _untraceable(self.inner.count.add_, 1)
            return _untraceable(_NumpyNorm.apply, x, self.weight, self.eps)  # type: ignore[no-any-return]

    layer = Norm()
    layer.inner = nn.Module()
    layer.inner.register_buffer("count", torch.zeros(2))
    with serving(opaque(Writes)):
        assert_like_reference(compiled(layer)[0], layer, example())
    assert "it changes buffer inner.count in place" in quarantined()[0].reason
    assert not layer.inner.count.any()


def references() -> dict[str, Any]:
    """Decorated functions whose reference cannot show the results of an operator, with the reason."""

    def depends_on_data(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)

    def size(x: torch.Tensor) -> Any:
        return x * 2, x.shape[0]

    def an_object(x: torch.Tensor) -> Any:
        return Config(x)  # type: ignore[arg-type]

    return {
        "depends on the data": depends_on_data,
        "the reference changes input x in place": in_place,
        "returns a number that depends on the sizes": size,
        "returns a Config": an_object,
    }


@pytest.mark.parametrize("reason", references())
def test_layers_that_cannot_be_operators(reason: str) -> None:
    """One warning, with the reason; the reference is compiled."""
    reference = references()[reason]
    layer = use_kernel_forward_from_hub("odd")(reference)
    kernel = function_of(reference)
    x = torch.linspace(-1, 2, 6)
    expected = reference(x.clone())
    with serving(opaque(kernel), "odd"), pytest.warns(KernelsWarning, match="cannot be opaque: .*" + re.escape(reason)):
        torch._dynamo.mark_dynamic(x, 0)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            found = compiled(layer)[0](x)
    if isinstance(expected, Config):
        assert torch.equal(found.scale, x)  # type: ignore[arg-type]
    else:
        torch.testing.assert_close(found, expected)
    if reason != "the reference changes input x in place":
        assert torch.equal(x, torch.linspace(-1, 2, 6))


@NEEDS_ATTRIBUTES
@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        (lambda: torch.Generator(), "torch.Generator"),
        (lambda: Config(torch.ones(2)), "a Tensor is hidden in an object"),  # type: ignore[arg-type]
        (lambda: nn.Linear(2, 2).forward, "a Linear is hidden"),
    ],
    ids=["generator", "tensor", "method"],
)
def test_attributes_that_cannot_be_constants(attribute: Any, reason: str) -> None:
    """Arguments whose changes compiled code could not notice are refused, and the reference is compiled."""
    layer, x = Norm(), example()
    layer.odd = attribute()
    with serving(opaque(NumpyNorm)), pytest.warns(KernelsWarning, match=reason):
        run, counter = compiled(layer)
        assert_like_reference(run, layer, x)
    assert operators(counter) == 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("adapt", [opaque, reference_backward])
@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_no_reference_where_none_is_allowed(adapt: Any, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fallback, and in strict mode, kernels that cannot be wrapped raise with the reason."""
    layer = use_kernel_forward_from_hub("insists", use_fallback=strict)(lambda x: Config(x * 2))
    if strict:
        monkeypatch.setenv("KERNELS_STRICT", "1")

    def kernel(x: torch.Tensor) -> Any:
        return Config(_untraceable(torch.mul, x, 2))

    x = torch.ones(2, requires_grad=True)
    run = compiled(layer)[0] if adapt is opaque else layer
    told = pytest.raises((NoKernelError, torch._dynamo.exc.TorchRuntimeError), match=r"returns a Config|its result")
    with serving(adapt(kernel), "insists"), told as raised:
        run(x)
    assert "KERNELS_STRICT is on" in str(raised.value) if strict else "use_fallback=False" in str(raised.value)


def test_tensors_that_are_more_than_their_data() -> None:
    """Tensors of a class of its own, and nested ones, take the reference with a reason, compiled and for gradients."""

    class Packed(nn.Parameter):
        """As libraries that quantize have them."""

    def kernel(x: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
        return _untraceable(torch.mul, x, 2)  # type: ignore[no-any-return]

    x = torch.ones(2, requires_grad=True)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for odd in (Packed(torch.ones(2)), nested):
        ignores = use_kernel_forward_from_hub("ignores")(lambda x, odd: x * 2)
        with serving(opaque(kernel), "ignores"), pytest.warns(KernelsWarning, match="tensor_subclasses"):
            assert_like_reference(compiled(ignores)[0], ignores, x, odd, wanted=(x,))
        with serving(reference_backward(kernel), "ignores"), pytest.warns(KernelsWarning, match="tensor_subclasses"):
            assert_like_reference(ignores, ignores, x, odd, wanted=(x,))
        assert not quarantined()
        torch._dynamo.reset()


def test_references_that_draw_random_numbers() -> None:
    """They are compiled themselves, for the backward of an operator would draw others; only where they draw."""

    @use_kernel_forward_from_hub("Drop")
    class Drop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, 0.5, self.training) * 2

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _untraceable(decorated_layer(Drop).reference, self, x)  # type: ignore[no-any-return]

    layer, x = Drop(), torch.ones(64, requires_grad=True)
    with serving(opaque(Kernel), "Drop"):
        run, counter = compiled(layer, "aot_eager")
        with pytest.warns(KernelsWarning, match="the reference draws random numbers"):
            output = run(x)
        assert torch.equal(torch.autograd.grad(output.sum(), x)[0], output.detach())
    layer.eval()
    with serving(opaque(Kernel), "Drop"):
        assert_like_reference(run, layer, x, wanted=(x,))
        assert operators(counter) == 1


def test_hooks_of_modules_inside() -> None:
    """A module inside with a hook is refused: the hook would not run."""
    layer = Rich()
    layer.inner.linear.register_forward_hook(lambda module, args, output: output * 2)
    x = example()
    with serving(opaque(RichKernel), "Rich"), pytest.warns(KernelsWarning, match="has hooks"):
        assert_like_reference(compiled(layer)[0], layer, x, [], flag=False)


def test_backward_hooks_of_modules_inside() -> None:
    """They are called where gradients are the reference's: the kernel is out for training."""
    layer, called = Rich(), []
    layer.inner.linear.register_full_backward_hook(lambda *args: called.append(1))
    with serving(reference_backward(RichKernel), "Rich"):
        layer(example(), [], flag=False)[0].sum().backward()
    assert called and "has hooks" in quarantined()[0].reason


def test_a_kernel_that_lost_its_gradients() -> None:
    """A kernel that claims a backward and has none is out for training; that call has right gradients."""

    class Careless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _untraceable(_NumpyNorm.apply, x.detach(), self.weight.detach(), self.eps)

    layer, x = Norm(), example()
    with serving(opaque(Careless)):
        assert_like_reference(compiled(layer)[0], layer, x, wanted=(x, layer.weight))
    assert "loses 2 of 2 gradients" in quarantined()[0].reason


def test_a_kernel_that_lost_one_gradient() -> None:
    """One that detaches only the weight is out for training, too; gradients that the reference lacks may be missing."""

    class Careless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _untraceable(_NumpyNorm.apply, x, self.weight.detach(), self.eps)

    layer, x = Norm(), example()
    layer.unused = nn.Parameter(torch.ones(2))
    for kernel in (NumpyNorm, Careless):
        assert not quarantined()
        with serving(opaque(kernel)):
            run = compiled(layer, "aot_eager")[0]
            for _ in range(2):
                assert_like_reference(run, layer, x, wanted=(x, layer.weight))
    (entry,) = quarantined()
    assert "loses 1 of 3 gradients" in entry.reason


@NEEDS_ATTRIBUTES
def test_modules_that_refer_to_themselves() -> None:
    """A module that knows the one around it is refused with the reason, and does not take forever."""
    layer, x = Rich(), example()
    layer.inner.parent = [layer]
    layer.inner.others = [Inner() for _ in range(3)]
    for other in layer.inner.others:
        other.parent = (layer,)
    with serving(opaque(RichKernel), "Rich"), pytest.warns(KernelsWarning, match="refers to itself"):
        assert_like_reference(compiled(layer)[0], layer, x, [])
    with serving(reference_backward(RichKernel), "Rich"):
        assert_like_reference(layer, layer, x, [], wanted=(x,))
    assert "refers to itself" in quarantined()[0].reason


def test_inference_tensors_among_the_inputs() -> None:
    """A recorded call may have tensors that were made in inference mode, as the reference may."""
    layer, x = Rich(), example()
    with torch.inference_mode():
        other = torch.randn(4, SIZE)
    with serving(reference_backward(RichKernel), "Rich"):
        assert_like_reference(layer, layer, x, [other], wanted=(x,))
    assert not quarantined()


def test_the_contract_holds_inside() -> None:
    """A kernel that may not serve a layer may not when it is opaque, either; the reason is the same."""

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Helpful(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def help(self) -> None:
            """Be a member besides forward."""

    class Empty(nn.Module):
        pass

    class Wide(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x

    for kernel in (Stateful, Helpful, Empty, Wide, lambda self, x: x):
        reasons = []
        for source in (kernel, opaque(kernel), reference_backward(kernel)):
            with serving(source):
                (refusal,) = resolve(Norm, device="cpu", mode=Mode.TRAINING).refusals
                reasons.append(refusal.reason)
        assert len(set(reasons)) == 1, reasons


def test_differentiating_twice_in_compiled_code_says_so() -> None:
    """A second derivative through the operator raises, and is not silently zero."""
    layer, x = Norm(), example()
    with serving(opaque(NumpyNorm)):
        output = compiled(layer)[0](x)
    (first,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


# --- reference_backward --------------------------------------------------------------------------


def test_gradcheck() -> None:
    """In float64, numerical derivatives are met, once and twice."""

    @use_kernel_forward_from_hub("Curve")
    class Curve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.sin(x * self.weight) * y**3

    class Kernel(nn.Module):
        has_backward = False

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(numpy.sin(x.numpy() * self.weight.numpy()) * y.numpy() ** 3)

    layer = Curve()
    x, y = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x, y))

    for source in (reference_backward(Kernel), opaque(reference_backward(Kernel)), opaque(Kernel)):
        with serving(source, "Curve"):
            assert resolve(Curve, device="cpu", mode=Mode.TRAINING).origin.endswith("Kernel")
            assert torch.autograd.gradcheck(run, (x, y, layer.weight))
            assert torch.autograd.gradgradcheck(run, (x, y, layer.weight))


def test_the_kernel_runs_forward_and_the_reference_backward() -> None:
    """Forward is the kernel, which sees no autograd; the reference runs in the backward alone."""
    ran: list[str] = []

    @use_kernel_forward_from_hub("told")
    def told(x: torch.Tensor) -> torch.Tensor:
        ran.append("reference")
        return x * 3

    def kernel(x: torch.Tensor) -> torch.Tensor:
        ran.append("kernel")
        assert not torch.is_grad_enabled()
        return x * 3

    kernel.has_backward = False  # type: ignore[attr-defined]
    x = torch.ones(2, requires_grad=True)
    with serving(reference_backward(kernel), "told"):
        told(x)  # looks at the kernel
        ran.clear()
        y = told(x)
        assert ran == ["kernel"]
        y.sum().backward()
        assert ran == ["kernel", "reference"]
        ran.clear()
        with torch.no_grad():
            told(x)
        assert ran == ["kernel"]
    assert torch.equal(x.grad, torch.full((2,), 3.0))  # type: ignore[arg-type]


def test_random_numbers_are_the_same_backward() -> None:
    """A reference that draws random numbers draws those of the forward again, and restores the generators."""

    @use_kernel_forward_from_hub("drop")
    def drop(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) * 1.0

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) * 1.0

    kernel.has_backward = False  # type: ignore[attr-defined]
    with serving(reference_backward(kernel), "drop"):
        for seed in range(3):
            x = torch.ones(64, requires_grad=True)
            torch.manual_seed(seed)
            expected = torch.nn.functional.dropout(x, 0.5) * 1.0
            after = torch.rand(2)
            torch.manual_seed(seed)
            y = drop(x)
            torch.rand(2)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(y, expected) and torch.equal(gradient, y.detach())
            torch.manual_seed(seed)
            drop(x).sum().backward()
            assert torch.equal(torch.rand(2), after)


@pytest.mark.parametrize("who", ["both", "kernel", "reference"])
def test_random_numbers_in_a_capture_have_the_reference(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators cannot be read while a CUDA graph is captured, so a kernel that draws does not serve there.

    The trial finds that whichever of kernel and reference draws; outside of a capture, the backward disturbs nobody.
    """
    ran: list[bool] = []

    def run(x: torch.Tensor, draws: bool) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) * 1.0 if draws else x * 1.0

    @use_kernel_forward_from_hub("drop")
    def drop(x: torch.Tensor) -> torch.Tensor:
        return run(x, who != "kernel")

    def kernel(x: torch.Tensor) -> torch.Tensor:
        ran.append(True)
        return run(x, who != "reference")

    with serving(reference_backward(kernel), "drop"):
        x = torch.ones(64, requires_grad=True)
        torch.manual_seed(0)
        run(x, who != "reference")
        after = torch.rand(2)
        torch.manual_seed(0)
        drop(x).sum().backward()
        assert torch.equal(torch.rand(2), after)
        assert len(ran) == 2  # the trial, and the call
        ran.clear()
        monkeypatch.setattr("kernels_plugins.adapters.recompute.is_capturing", lambda: True)
        y = drop(x)
        assert not ran and torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


def test_whether_random_numbers_are_drawn_may_change() -> None:
    """A rate that was zero at first, and is not later, has the right gradients."""

    @use_kernel_forward_from_hub("Rate")
    class Rate(nn.Module):
        rate = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.rate = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, self.rate) * 1.0

    class Kernel(nn.Module):
        has_backward = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, self.rate) * 1.0

    layer = Rate()
    with serving(reference_backward(Kernel), "Rate"):
        for layer.rate in (0.0, 0.5):
            x = torch.ones(64, requires_grad=True)
            y = layer(x)
            torch.rand(3)
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


def test_objects_that_are_made_for_each_call() -> None:
    """They do not make each call a first one; one that hides a tensor is noticed all the same."""
    ran: list[int] = []

    @use_kernel_forward_from_hub("told")
    def told(x: torch.Tensor, config: Any) -> torch.Tensor:
        return x * config.scale

    def kernel(x: torch.Tensor, config: Any) -> torch.Tensor:
        ran.append(1)
        return x * config.scale

    x = torch.ones(2, requires_grad=True)
    with serving(reference_backward(kernel), "told"):
        for scale in range(5):
            told(x, Config(scale))
        assert len(ran) == 6
        hidden = torch.tensor(2.0, requires_grad=True)
        told(x, Config(hidden)).sum().backward()  # type: ignore[arg-type]
    assert hidden.grad is not None and "a Tensor is hidden" in quarantined()[0].reason


@pytest.mark.parametrize("make", [lambda y: collections.OrderedDict(y=y), lambda y: [Config(y)]])
def test_results_that_hide_tensors_have_no_other_backward(make: Any) -> None:
    """A result whose tensors are out of reach would lose its gradients: the kernel is out for training."""

    @use_kernel_forward_from_hub("hides")
    def hides(x: torch.Tensor) -> Any:
        return make(x * 2)

    x = torch.ones(2, requires_grad=True)
    with serving(reference_backward(lambda x: make(x.detach() * 2)), "hides"):
        result = hides(x)
    found = result["y"] if isinstance(result, dict) else result[0].scale
    found.sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]
    assert "its result" in quarantined()[0].reason


def test_memory_holds_inputs_and_no_activations() -> None:
    """The inputs are saved for the backward."""

    @use_kernel_forward_from_hub("Deep")
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(SIZE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(10):
                x = torch.sin(x) * self.weight
            return x

    class Kernel(nn.Module):
        has_backward = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(10):
                x = torch.sin(x) * self.weight
            return x

    layer, x = Deep(), example()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with serving(reference_backward(Kernel), "Deep"):
        layer(x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), layer.weight.data_ptr()}
        assert_like_reference(layer, layer, x, wanted=(x, layer.weight))
    gone = weakref.ref(y)
    del y
    saved.clear()
    gc.collect()
    assert gone() is None


def test_autocast_counts_backward_as_forward() -> None:
    """The reference runs backward under the autocast of the forward."""

    @use_kernel_forward_from_hub("mm")
    def mm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    kernel.has_backward = False  # type: ignore[attr-defined]
    x, y = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with serving(reference_backward(kernel), "mm"):
        with torch.autocast("cpu", torch.bfloat16):
            found = mm(x, y)
            expected = x @ y
        assert found.dtype is torch.bfloat16
        for one, other in zip(
            torch.autograd.grad(found.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y)), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("source", [reference_backward(RichKernel)])
def test_everything_that_a_call_may_have_eager(source: Any) -> None:
    """Eager calls take whatever traced ones do; one tensor given twice gets the sum of both gradients."""
    layer = Rich()
    x, other = example(), example()
    with serving(source, "Rich"):
        for flag in (True, False):
            assert_like_reference(layer, layer, x, [other, x, x], flag=flag, wanted=(x, other, *layer.parameters()))


def test_mutating_kernels_have_no_other_backward() -> None:
    """A kernel that changes its inputs is out for training, on copies, and the reference answers the call."""

    @use_kernel_forward_from_hub("double")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.ones(2, requires_grad=True)
    with serving(reference_backward(function_of(in_place)), "double"):
        assert torch.equal(double(x), torch.full((2,), 2.0))
        assert torch.equal(x, torch.ones(2))
        assert "changes input x in place" in quarantined()[0].reason
        with pytest.warns(KernelsWarning, match="is not used"):
            double(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]


def test_transforms_of_torch_func_get_the_reference() -> None:
    """`torch.func.grad` and `vmap` of it differentiate the reference."""
    layer, x = Norm(), example()
    with serving(reference_backward(InferenceNorm)):
        assert_like_reference(layer, layer, x, wanted=(x,))
        each = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x.detach())
    (expected,) = torch.autograd.grad(reference_of(layer)(x).sum(), x)
    torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("recorded", [True, False])
def test_forward_mode_gets_the_reference(recorded: bool) -> None:
    """Derived forward, also under `no_grad`, the tangent is right, and the kernel is not blamed for having none."""
    layer = Norm()
    x, tangent = torch.randn(3, SIZE), torch.randn(3, SIZE)
    expected = torch.func.jvp(reference_of(layer), (x,), (tangent,))[1]
    with serving(reference_backward(InferenceNorm)), torch.set_grad_enabled(recorded):
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], expected)
        with torch.autograd.forward_ad.dual_level():
            output = layer(torch.autograd.forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(output).tangent, expected)
    assert not quarantined()


def test_a_traceable_kernel_is_inlined_where_nothing_is_recorded() -> None:
    """Without gradients, the graph is that of the kernel; with them, the operator's."""
    layer, x = Norm(), example()
    with serving(reference_backward(TraceableNorm)):
        run, counter = compiled(layer)
        with torch.no_grad():
            assert_like_reference(run, layer, x)
            assert operators(counter) == 0
        assert_like_reference(run, layer, x, wanted=(x, layer.weight))
        assert operators(counter) == 1


def test_an_untraceable_kernel_is_not_made_opaque_unasked() -> None:
    """`reference_backward` alone does not serve traced calls of a kernel that cannot be traced."""
    with serving(reference_backward(InferenceNorm)):
        refusal = resolve(Norm, device="cpu", mode=TRACED).refusals[0]
    assert "can_torch_compile" in refusal.reason


# --- Sources -------------------------------------------------------------------------------------


def test_equal_sources_are_equal() -> None:
    """Equal sources make equal adapters with one hash; nesting twice or in another order is the same."""
    repository = LayerRepository("acme/norm", layer_name="Norm", version=1)
    assert opaque(repository) == opaque("acme/norm:Norm") == opaque(opaque(repository))
    assert hash(opaque(repository)) == hash(opaque("acme/norm:Norm"))
    assert opaque(reference_backward(repository)) == reference_backward(opaque(repository))
    assert opaque(repository) != reference_backward(repository) != repository
    assert repr(opaque(reference_backward(repository))) == (
        "opaque(reference_backward(LayerRepository('acme/norm', layer_name='Norm', version=1)))"
    )
    assert repr(opaque(NumpyNorm)).endswith("test_adapters.NumpyNorm)")


@pytest.mark.parametrize("wrong", [None, 3, nn.Linear(1, 1), int, b"acme/norm:Norm"])
def test_what_is_no_source(wrong: Any) -> None:
    """An object that no kernel can come from is refused at once."""
    for adapter in (opaque, reference_backward):
        with pytest.raises(ArgumentTypeError, match="A source is a repository"):
            adapter(wrong)
        with pytest.raises(ArgumentError, match="names no layer"):
            adapter("nonsense")


def test_provenance_and_checks_are_kept() -> None:
    """The resolution has origin and checks of the kernel inside, and names the operator made of it."""
    from kernels_core import LoadedLayer

    class Source:
        loads = 0

        def load(self) -> Any:
            Source.loads += 1
            return LoadedLayer(InferenceNorm, "acme/norm@abc", {"digest": "3 files"})

    source = Source()
    for made in (opaque(source), reference_backward(source)):
        with serving(made):
            decision = resolve(Norm, device="cpu", mode=Mode.TRAINING)
        assert decision.origin == "acme/norm@abc"
        assert decision.checked["digest"] == "3 files"
    assert "one operator where traced" in {**decision.checked, **_checked(opaque(source))}["opaque"]
    assert _checked(reference_backward(source))["reference_backward"] == "gradients by the reference"
    before = Source.loads
    _checked(opaque(source))
    assert Source.loads == before


def _checked(source: Any) -> Any:
    with serving(source):
        return resolve(Norm, device="cpu", mode=Mode.TRAINING).checked


def test_names_alone_can_be_asked_about() -> None:
    """Without a decorated layer, the answer is the kernel with what it will be able to do."""
    with serving(opaque(InferenceNorm)):
        assert not resolve("Norm", device="cpu", mode=TRACED).is_reference
    with serving(reference_backward(lambda x: x), "f"):
        assert not resolve("f", device="cpu", mode=Mode.TRAINING).is_reference


def test_policies_see_what_is_inside(isolated_plugins: PluginManager) -> None:
    """Hooks that judge a source are asked about the one inside, too."""
    seen: list[Any] = []

    class Policy:
        @hookimpl
        def kernels_authorize(self, candidate: Any) -> str | None:
            seen.append(candidate.source)
            return "not this one" if candidate.source is InferenceNorm else None

        @hookimpl
        def kernels_check_layer(self, candidate: Any, layer: Any) -> str | None:
            seen.append((candidate.source, layer))
            return None

    isolated_plugins.register(Policy(), "policy")
    with serving(opaque(InferenceNorm)):
        (refusal,) = resolve(Norm, device="cpu", mode=Mode.TRAINING).refusals
        assert refusal.reason == "not this one"
    with serving(opaque(NumpyNorm)):
        assert not resolve(Norm, device="cpu", mode=Mode.TRAINING).is_reference
    assert (NumpyNorm, NumpyNorm) in seen
    function = use_kernel_forward_from_hub("f")(lambda x: x * 2)
    kernel = function_of(reference_of(function))
    with serving(reference_backward(kernel), "f"):
        for asked in (function, "f"):
            assert not resolve(asked, device="cpu", mode=Mode.TRAINING).is_reference
            assert seen[-1] == (kernel, kernel)


def test_without_the_plugin_it_is_told(isolated_plugins: PluginManager) -> None:
    """Where the plugin is blocked, the refusal says so."""
    isolated_plugins.unregister("adapters")
    with serving(opaque(NumpyNorm)):
        (refusal,) = resolve(Norm, device="cpu", mode=Mode.TRAINING).refusals
    assert "needs the plugin 'adapters'" in refusal.reason


def test_a_failing_load_is_the_reason() -> None:
    """An exception while the kernel is loaded refuses the adapter."""

    class Broken:
        def load(self) -> Any:
            raise OSError("no network")

    with serving(opaque(Broken())):
        (refusal,) = resolve(Norm, device="cpu", mode=Mode.TRAINING).refusals
    assert "no network" in refusal.reason


def test_class_kernels_for_functions() -> None:
    """A kernel class may serve a decorated function, opaque or not."""

    @use_kernel_forward_from_hub("twice")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Kernel(nn.Module):
        has_backward = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _untraceable(lambda: torch.from_numpy(x.detach().numpy() * 2))  # type: ignore[no-any-return]

    with serving(opaque(Kernel), "twice"):
        x = torch.ones(3, requires_grad=True)
        for run in (twice, compiled(twice)[0]):
            assert_like_reference(run, twice, x, wanted=(x,))


def test_operators_go_with_their_layer() -> None:
    """When a layer is dropped, so is the operator, unless compiled code may still want it."""
    import torch._library.utils as library_utils

    names: list[str] = []

    def make() -> None:
        @use_kernel_forward_from_hub("Gone")
        class Gone(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 2

        class Kernel(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return _untraceable(torch.mul, x, 2)

        with serving(opaque(Kernel), "Gone"):
            Gone()(torch.ones(2))
            implementation: Any = resolve(Gone, device="cpu", mode=Mode.INFERENCE).implementation
        names.append(implementation.kernels_operator.target._schema.name)
        assert library_utils.lookup_op(names[0])
        vars(torch.ops.kernels_opaque).pop(names[0].split("::")[1])  # which the line above has put there

    make()
    gc.collect()
    with pytest.raises((RuntimeError, AttributeError)):
        library_utils.lookup_op(names[0])


def test_operators_that_are_gone_are_no_longer_listed() -> None:
    """Code that walks all operators, as exporting and compiling for training do, meets none that was deleted."""

    def make() -> None:
        layer = use_kernel_forward_from_hub("gone")(lambda x: x * 2)
        with serving(opaque(lambda x: x * 2), "gone"):
            assert not resolve(layer, device="cpu", mode=TRACED).is_reference

    make()
    gc.collect()
    for name in list(torch.ops.kernels_opaque):
        assert getattr(torch.ops.kernels_opaque, name)


# --- Any signature, any result ---------------------------------------------------------------------

values = st.recursive(
    st.sampled_from(["tensor", "again", None, True, 3, -2, 0.5, "text"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
        st.builds(lambda a, b: Pair(a, b), inner, inner),
    ),
    max_leaves=6,
)
Pair = collections.namedtuple("Pair", "first second")


def made_of(shape: Any, x: torch.Tensor) -> Any:
    """Build a value with tensors where the shape says so."""
    if isinstance(shape, str) and shape in ("tensor", "again"):
        return x.sin() if shape == "tensor" else x.cos()
    if isinstance(shape, Pair):
        return Pair(*(made_of(child, x) for child in shape))
    if isinstance(shape, (list, tuple)):
        return type(shape)(made_of(child, x) for child in shape)
    return {key: made_of(child, x) for key, child in shape.items()} if isinstance(shape, dict) else shape


def folded(value: Any) -> Any:
    """Add up the parts of a value."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        value = [folded(child) * (2 + len(key)) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return sum((folded(child) * (index + 1) for index, child in enumerate(value)), 0)
    return (
        {None: 1, True: 2}.get(value, 3)
        if value is None or isinstance(value, bool)
        else (len(value) if isinstance(value, str) else value)
    )


@pytest.mark.slow
@settings(max_examples=16, deadline=None, suppress_health_check=list(HealthCheck))
@given(argument=values, result=values)
def test_any_argument_and_any_result(argument: Any, result: Any) -> None:
    """Whatever goes in comes out as from the reference: eager, compiled, and for gradients."""

    @use_kernel_forward_from_hub("any")
    def anything(x: torch.Tensor, argument: Any) -> Any:
        return made_of(result, x * folded(argument))

    def kernel(x: torch.Tensor, argument: Any) -> Any:
        return _untraceable(made_of, result, _untraceable(lambda: x * folded(argument)))

    x = torch.linspace(0.1, 1.0, 3, requires_grad=True)
    taken = made_of(argument, x.detach())
    torch._dynamo.reset()
    for source in (opaque(kernel), reference_backward(kernel), opaque(reference_backward(kernel))):
        with serving(source, "any"), never(KernelsWarning):
            run = anything if not source.as_operator else compiled(anything)[0]
            expected = reference_of(anything)(x, taken)
            output = run(x, taken)
            assert type(output) is type(expected)
            one, spec = torch.utils._pytree.tree_flatten(output)
            other, expected_spec = torch.utils._pytree.tree_flatten(expected)
            assert spec == expected_spec
            for mine, theirs in zip(one, other, strict=True):
                if isinstance(theirs, torch.Tensor):
                    torch.testing.assert_close(mine, theirs)
                    (gradient,) = torch.autograd.grad(mine.sum(), x, retain_graph=True)
                    (right,) = torch.autograd.grad(theirs.sum(), x, retain_graph=True)
                    torch.testing.assert_close(gradient, right)
                else:
                    assert mine == theirs


def test_members_of_enums_in_results() -> None:
    """A result may be a dict with members of an enum as keys and values: compiled calls return it as eager ones do."""

    class Key(str, enum.Enum):
        OUT = "out"
        GATE = "gate"

    @use_kernel_forward_from_hub("OpaqueEnum")
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[Key, object]:
            return {Key.OUT: x * 2, Key.GATE: [x + 1, Key.OUT]}

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[Key, object]:
            return {Key.OUT: x + x, Key.GATE: [1 + x, Key.OUT]}

    x = torch.ones(3)
    with use_kernel_mapping({"OpaqueEnum": {"cpu": opaque(Kernel)}}), torch.no_grad():
        result: Any = torch.compile(Two(), backend="eager", fullgraph=True)(x)
        assert resolve(Two, device="cpu", mode=Mode.INFERENCE | Mode.TORCH_COMPILE).origin != "reference"
    assert list(result) == [Key.OUT, Key.GATE] and type(next(iter(result))) is Key
    assert torch.equal(result[Key.OUT], x * 2) and result[Key.GATE][1] is Key.OUT


# --- Calls that are passed on ----------------------------------------------------------------------


@pytest.mark.parametrize("declares", [False, True])
@pytest.mark.parametrize("make", [opaque, reference_backward])
def test_an_adapted_kernel_passes_calls_on(make: Callable[[object], object], declares: bool) -> None:
    """The next candidate serves, recorded and compiled too; in place of an operator that runs, the reference does."""

    @use_kernel_forward_from_hub("Sized")
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1

    def forward(self: Any, x: torch.Tensor) -> Any:
        if x.shape[-1] % 2:
            assert not declares  # else it is not asked
            return NotImplemented
        return torch.from_numpy(x.detach().numpy() * 1) + (x - x.detach())  # else it has no gradient

    class Next(nn.Module):
        can_torch_compile = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            served.append(1)
            return x * 1

    members = {"supports": lambda self, x: x.shape[-1] % 2 == 0} if declares else {}
    kernel, served, layer = type("Even", (nn.Module,), {"forward": forward, **members}), [], Sized()
    with use_kernel_mapping({"Sized": {"cpu": [make(kernel), Next]}}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelsWarning)
        for columns in (2, 3, 2, 3):
            for grad in False, True:
                x = torch.ones(columns, requires_grad=grad)
                y = layer(x)
                assert torch.equal(y, x) and len(served) == columns % 2, (columns, grad)
                served.clear()
                if grad:
                    y.sum().backward()
                    assert x.grad is not None and bool((x.grad == 1).all())
        assert not caught and not quarantined()
        if make is opaque:
            call, _ = compiled(Sized(), dynamic=False)
            for columns in (2, 3, 2, 3):
                x = torch.ones(columns, requires_grad=True)
                y = call(x)
                y.sum().backward()
                assert torch.equal(y, x) and x.grad is not None and bool((x.grad == 1).all())
            assert bool(served) == declares and not quarantined()
            assert [str(w.message) for w in caught if "passes on a call of compiled code" in str(w.message)] or declares
