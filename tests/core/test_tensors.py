"""Calls that are not plain: tensors of subclasses, pending collectives, other tracers than Dynamo, transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from warned import noted

from kernels_core import (
    KernelsWarning,
    Mode,
    NoKernelError,
    kernelize,
    quarantined,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.guards import tensors
from kernels_plugins import use_kernel_mapping

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
X = torch.arange(4.0)
Served = list[type]


@pytest.fixture(autouse=True)
def _unnoticed() -> Iterator[None]:
    """Leave with no parameter noticed."""
    before = list(tensors.odd_parameters)
    yield
    tensors.odd_parameters[:] = before


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A process group of this process only."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def weighted(self: Any, x: Any, other: Any = None) -> Any:
    y = x * self.weight
    return y if other is None else y + other


def make(name: str, **options: Any) -> nn.Module:
    """Return a new decorated layer with a weight of twos."""
    cls = type(name, (nn.Module,), {"forward": weighted})
    layer = use_kernel_forward_from_hub(name, **options)(cls)()
    layer.weight = nn.Parameter(torch.full((4,), 2.0))
    return layer


def native(served: Served, **declarations: Any) -> type[nn.Module]:
    """Return a kernel that needs addresses, and whose result is that of the reference."""

    def forward(self: Any, x: Any, other: Any = None) -> Any:
        for tensor in (x, self.weight, *([other] if other is not None else [])):
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                served.append(type(tensor))
                raise RuntimeError("no address")
        served.append(type(x))
        return weighted(self, x, other)

    return type("Native", (nn.Module,), {"forward": forward, **declarations})


@pytest.fixture(params=["dispatched", "kernelized"])
def prepared(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    """Return the layer as it is, or kernelized in a mapping that is active."""
    if request.param == "dispatched":
        return lambda layer: layer
    return lambda layer: kernelize(layer, mode=Mode.INFERENCE, device="cpu")


Prepare = Callable[[nn.Module], nn.Module]


# --- Subclasses --------------------------------------------------------------------------------------


class Mine(torch.Tensor):
    pass


@pytest.mark.parametrize("where", ["first", "second", "list"])
def test_tensors_of_a_subclass_take_the_reference(prepared: Prepare, where: str) -> None:
    """No subclass reaches a kernel that does not declare it: one warning, no quarantine, and plain calls as before."""
    served: Served = []
    odd = X.as_subclass(Mine)
    call = {"first": (odd,), "second": (X, odd), "list": ([odd][0], None)}[where]
    with use_kernel_mapping({f"Odd{where}": {"cpu": native(served)}}), torch.no_grad():
        layer = prepared(make(f"Odd{where}"))
        with pytest.warns(KernelsWarning, match="Mine") as caught:
            results = [layer(*call) for _ in range(3)]
        assert all(type(result) is Mine and torch.equal(result, weighted(layer, *call)) for result in results)
        reasons = {str(w.message) for w in caught if issubclass(w.category, KernelsWarning)}
        assert len(reasons) == len(caught) <= 2 and served == []  # of the kernelized module, and of its own decision
        layer(X)
    assert served == [torch.Tensor] and not quarantined()


@pytest.mark.parametrize("where", ["rest", "keyword", "in a keyword", "first of all", "after the first of all"])
def test_tensors_of_a_subclass_among_all_other_arguments(prepared: Prepare, where: str) -> None:
    """A tensor of a subclass in `*args` or `**kwargs` takes the reference, as one in a named argument does."""
    served: list[int] = []
    packed = where.endswith("of all")

    @use_kernel_forward_from_hub(f"OddRest-{where}")
    class Layer(nn.Module):
        if packed:

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return args[0] * 2

        else:

            def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
                return x * 2

    class Kernel(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            served.append(len(args) + len(kwargs))
            return args[0] * 2

    kernel = Kernel
    if not packed:

        class Named(nn.Module):
            def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
                return Kernel.forward(self, x, *args, **kwargs)

        kernel = Named

    mine: Any = X.as_subclass(Mine)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "rest": ((X, 1, mine), {}),
        "keyword": ((X,), {"scale": mine}),
        "in a keyword": ((X,), {"scale": {"a": [mine]}}),
        "first of all": ((mine,), {}),
        "after the first of all": ((X, mine), {}),
    }
    args, kwargs = calls[where]
    with use_kernel_mapping({f"OddRest-{where}": {"cpu": kernel}}), torch.no_grad():
        layer = prepared(Layer())
        layer(X, 1, scale=2)
        with pytest.warns(KernelsWarning, match="Mine"):
            assert torch.equal(layer(*args, **kwargs), 2 * X)
        layer(X)
    assert served == [3, 1]


def test_a_parameter_as_argument_is_plain() -> None:
    """The kernel serves `nn.Parameter`s as it does tensors."""
    served: Served = []
    with use_kernel_mapping({"OddParameter": {"cpu": native(served)}}), torch.no_grad():
        make("OddParameter")(nn.Parameter(X))
    assert served == [nn.Parameter]


def test_a_kernel_may_declare_what_it_accepts() -> None:
    """A declared subclass, or a base of it, is served; the next candidate serves those that the first rejects."""
    for number, declared in enumerate(((Mine,), (torch.Tensor,))):
        served: Served = []

        def forward(self: Any, x: Any, other: Any = None, served: Served = served) -> Any:
            served.append(type(x))
            return weighted(self, x, other)

        kernel = type("Accepts", (nn.Module,), {"tensor_subclasses": declared, "forward": taking_two(forward)})
        with use_kernel_mapping({f"Accepts{number}": {"cpu": kernel}}), torch.no_grad():
            assert type(make(f"Accepts{number}")(X.as_subclass(Mine))) is Mine
        assert served == [Mine]


def taking_two(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x, other=None: forward(self, x, other)


def test_strict_layers_refuse_such_calls() -> None:
    """Where the reference must not serve, the call raises with the reason."""
    with use_kernel_mapping({"OddStrict": {"cpu": native([])}}), torch.no_grad():
        layer = make("OddStrict", use_fallback=False)
        with pytest.raises(NoKernelError, match="tensor_subclasses"):
            layer(X.as_subclass(Mine))
        layer(X)


def test_dtensors_as_arguments_and_parameters(mesh: DeviceMesh, prepared: Prepare) -> None:
    """A `DTensor` takes the reference, also as a parameter that a module gets after its first call."""
    served: Served = []
    with use_kernel_mapping({"Distributed": {"cpu": native(served)}}):
        layer = prepared(make("Distributed"))
        layer(X)
        served.clear()
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
        x = distribute_tensor(X.clone().requires_grad_(), mesh, [Shard(0)])
        with pytest.warns(KernelsWarning, match="DTensor"):
            result = layer(x)
        assert isinstance(result, DTensor) and torch.equal(result.full_tensor(), 2 * X)
        result.sum().backward()
        assert torch.equal(x.grad.full_tensor(), torch.full((4,), 2.0))
        with pytest.raises(Exception, match="mixed"):  # the error of the reference: the kernel is not asked
            layer(X)
    assert served == [] and not quarantined()


@pytest.mark.parametrize("by", ["register_buffer", "distribute_module"])
def test_buffers_that_are_dtensors(mesh: DeviceMesh, by: str) -> None:
    """A kernel whose module has a `DTensor` as a buffer, which has no address, is not called; nor is it accused."""
    served: Served = []

    class Kernel(nn.Module):
        def forward(self, x: Any) -> Any:
            served.append(type(self.factor))
            return x * 2

    @use_kernel_forward_from_hub(f"Buffered-{by}")
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.full((4,), 2.0))

        def forward(self, x: Any) -> Any:
            return x * self.factor

    with use_kernel_mapping({f"Buffered-{by}": {"cpu": Kernel}}), torch.no_grad():
        layer, plain = Layer(), Layer()
        if by == "register_buffer":
            plain(X)
            layer.register_buffer("factor", distribute_tensor(layer.factor, mesh, [Replicate()]))
        else:
            distribute_module(layer, mesh)
        with pytest.raises(Exception, match="mixed"):  # the error of the reference
            layer(X)
        served.clear()
        plain(X)
    assert served == [torch.Tensor] and not quarantined()


@pytest.mark.parametrize("declares", [False, True])
def test_compiled_calls_with_dtensors(
    mesh: DeviceMesh, prepared: Prepare, declares: bool, request: pytest.FixtureRequest
) -> None:
    """In compiled code, too, the reference serves such calls, with one reason and its gradients; others the kernel."""
    torch._dynamo.reset()

    class Kernel(nn.Module):
        can_torch_compile = True
        tensor_subclasses = (DTensor,) if declares else ()

        def forward(self, x: Any, other: Any = None) -> Any:
            return 10 * weighted(self, x, other)

    factor, replicated, name = 20.0 if declares else 2.0, [Replicate()], request.node.name
    with use_kernel_mapping({name: {"cpu": Kernel}}), noted() as caught:
        layer = prepared(make(name))
        plain = layer.weight
        run = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(run(X), 20 * X)
        layer.weight = weight = nn.Parameter(distribute_tensor(plain.detach(), mesh, replicated))
        x = distribute_tensor(X.clone(), mesh, [Shard(0)]).requires_grad_()
        for call, added in (((x,), 0), ((x, distribute_tensor(X, mesh, replicated)), factor / 2)):
            x.grad = weight.grad = None
            result = run(*call)
            assert isinstance(result, DTensor) and torch.equal(result.full_tensor()[1:], (factor + added) * X[1:])
            result.sum().backward()
            assert torch.equal(x.grad.full_tensor(), torch.full((4,), factor))
            assert torch.equal(weight.grad.full_tensor(), factor / 2 * X)
        layer.weight = plain
        assert torch.equal(run(X), 20 * X)
    reasons = [str(w.message) for w in caught if issubclass(w.category, KernelsWarning)]
    assert len(reasons) == (not declares) and all("DTensor" in reason for reason in reasons)
    assert not quarantined()


def test_pending_collectives_are_waited_for(mesh: DeviceMesh, prepared: Prepare) -> None:
    """The kernel gets the result of a collective, in any argument, and gradients flow to the collective's input."""

    class Pending(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return AsyncCollectiveTensor(x.clone())

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    served: Served = []
    with use_kernel_mapping({"Pending": {"cpu": native(served)}}):
        layer, x = prepared(make("Pending")), X.clone().requires_grad_()
        for call in ((Pending.apply(x),), (X, Pending.apply(x))):
            x.grad = None
            layer(*call).sum().backward()
            assert torch.equal(x.grad, torch.full((4,), 2.0 if len(call) == 1 else 1.0))
    assert served and set(served) == {torch.Tensor}


# --- Tracers -----------------------------------------------------------------------------------------


def onnx(layer: Callable[..., Any]) -> Any:
    seen: list[Any] = []

    class Model(nn.Module):
        def forward(self, x: Any) -> Any:
            seen.append(layer(x))
            return seen[-1]

    torch.jit._get_trace_graph(Model(), (X,))  # what the TorchScript-based export of ONNX calls
    return lambda x: layer(x)


def fake(layer: Callable[..., Any]) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(layer(mode.from_tensor(X))).__name__ == "FakeTensor"
    return lambda x: 2 * x


TRACERS: dict[str, Callable[[Any], Any]] = {
    "jit.trace of a module": lambda layer: torch.jit.trace(layer, (X,), check_trace=False),
    "jit.trace of a function": lambda layer: torch.jit.trace(lambda x: layer.forward(x), (X,), check_trace=False),
    "onnx": onnx,
    "make_fx": lambda layer: make_fx(lambda x: layer(x))(X),
    "make_fx, fake": lambda layer: make_fx(lambda x: layer(x), tracing_mode="fake", _allow_non_fake_inputs=True)(X),
    "symbolic_trace": lambda layer: torch.fx.symbolic_trace(nn.Sequential(layer)),
    "fake": fake,
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("declares", [False, True])
def test_tracers_run_only_kernels_that_declare_it(prepared: Prepare, tracer: str, declares: bool) -> None:
    """Under every tracer the reference serves in place of an undeclared kernel, and the trace is right."""
    if declares and "fake" in tracer:
        pytest.skip("the kernel needs addresses")
    ran: list[bool] = []
    name = f"Traced{list(TRACERS).index(tracer)}{declares}"

    class Kernel(nn.Module):
        can_torch_compile = declares

        def forward(self, x: Any, other: Any = None) -> Any:
            ran.append(True)
            return weighted(self, x, other)

    with use_kernel_mapping({name: {"cpu": Kernel}}), torch.no_grad():
        layer = prepared(make(name).requires_grad_(False))
        layer(X)
        ran.clear()
        traced = TRACERS[tracer](layer)
        assert bool(ran) is declares
        ran.clear()
        layer(X)
        assert ran
    assert torch.equal(traced(X + 1), 2 * (X + 1))


def test_modes_that_only_watch_are_no_tracers() -> None:
    """Counting operators, as profilers and selective checkpoints do, runs the kernel."""
    from torch.utils.flop_counter import FlopCounterMode

    served: Served = []
    with use_kernel_mapping({"Watched": {"cpu": native(served)}}), torch.no_grad(), FlopCounterMode(display=False):
        make("Watched")(X)
    assert served == [torch.Tensor]


# --- Transforms --------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    """Knows neither vmap nor forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * 2


def set_up(*, rules: bool) -> type[torch.autograd.Function]:
    """Return a function with `setup_context`, which transforms need, with or without rules for them."""

    class SetUp(torch.autograd.Function):
        generate_vmap_rule = rules

        @staticmethod
        def forward(x: Any, factor: Any) -> Any:
            return x * factor

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[1]), ctx.save_for_forward(inputs[1])

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient * ctx.saved_tensors[0], None

        if rules:

            @staticmethod
            def jvp(ctx: Any, x: Any, factor: Any) -> Any:
                return x * ctx.saved_tensors[0]

    return SetUp


def forward_mode(f: Callable[..., Any]) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, torch.ones(4)))).tangent


def vmap_recorded(f: Callable[..., Any]) -> Any:
    x = X[None].clone().requires_grad_()
    return torch.autograd.grad(torch.func.vmap(f)(x).sum() + x.sum(), x)[0][0] - 1


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], torch.Tensor]] = {
    "vmap": lambda f: torch.func.vmap(f)(X[None].repeat(2, 1))[0] / X.clamp(min=1),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(X),
    "jacrev": lambda f: torch.func.jacrev(f)(X).sum(0),
    "jacfwd": lambda f: torch.func.jacfwd(f)(X).sum(0),
    "jvp": lambda f: torch.func.jvp(f, (X,), (torch.ones(4),))[1],
    "forward mode": forward_mode,
    "nested": lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x[None]).sum())(X),
    "nested, forward": lambda f: torch.func.jacfwd(lambda x: torch.func.vmap(f)(x[None])[0])(X).sum(0),
    "vmap, recorded": vmap_recorded,
    "per sample": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(X[None]).squeeze(0),
}


@pytest.mark.parametrize(
    "kind", ["function without rules", "set up", "set up with rules", "detached", "declared", "item"]
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_right_and_not_held_against_a_kernel(transform: str, kind: str) -> None:
    """Values and derivatives are those of the reference, no kernel goes into quarantine, and it serves plain calls."""
    ran: list[bool] = []
    name = f"Transformed {transform} {kind}"

    class Kernel(nn.Module):
        def forward(self, x: Any, other: Any = None) -> Any:
            if kind == "item":
                x = x + 0 * x.detach().sum().item()
            if kind.startswith("set up"):
                result = set_up(rules="rules" in kind).apply(x, self.weight.detach())
            else:
                result = Double.apply(x) if kind == "function without rules" else x * 2
            ran.append(True)
            return result.detach() if kind in ("detached", "declared") else result

    if kind == "declared":
        Kernel.has_backward = False  # type: ignore[attr-defined]
    with use_kernel_mapping({name: {"cpu": Kernel}}):
        layer = make(name)
        layer.weight.requires_grad_(False)
        with torch.no_grad():
            layer(X)
        ran.clear()
        result = TRANSFORMS[transform](layer)
        assert ran or kind != "set up with rules"
        expected = torch.full((4,), 2.0)
        expected[0] = 0.0 if transform == "vmap" else 2.0
        torch.testing.assert_close(result, expected)
        assert not quarantined(), [str(entry) for entry in quarantined()]
        ran.clear()
        with torch.no_grad():
            layer(X)
    assert ran


F = torch.func
Computes = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def by_autograd(f: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def rows(f: Computes, w: torch.Tensor) -> Callable[..., Any]:
    return lambda x: F.vmap(lambda row: f(row, w))(x[None])[0]


def beside(f: Computes, w: torch.Tensor) -> Callable[..., Any]:
    """Return a derivative by another argument: the tensor that `f` gets requires no gradient within it."""
    return lambda x: F.grad(lambda y, z: (f(z, w) * y).sum())(torch.ones(4), x)


NESTED: dict[str, Callable[[Computes, torch.Tensor], torch.Tensor]] = {
    "grad, vmap": lambda f, w: F.grad(lambda x: rows(f, w)(x).sum())(X),
    "grad, vmap, of both": lambda f, w: torch.cat(F.grad(lambda x, w: rows(f, w)(x).sum(), (0, 1))(X, w)),
    "grad, vmap of weights": lambda f, w: F.grad(lambda w: F.vmap(lambda w: f(X, w))(w[None]).sum())(w),
    "grad, two vmaps": lambda f, w: F.grad(lambda x: F.vmap(rows(f, w))(x[None]).sum())(X),
    "autograd, vmap": lambda f, w: by_autograd(rows(f, w), X),
    "autograd, vmap, of weights": lambda f, w: by_autograd(lambda w: rows(f, w)(X), w),
    "grad, grad beside": lambda f, w: F.grad(lambda x: beside(f, w)(x).sum())(X),
    "autograd, grad beside": lambda f, w: by_autograd(beside(f, w), X),
    "grad, vmap, grad beside": lambda f, w: F.grad(lambda x: F.vmap(beside(f, w))(x[None]).sum())(X),
    "grad, functionalize": lambda f, w: F.grad(lambda x: F.functionalize(lambda x: f(x, w))(x).sum())(X),
    "per sample, of both": lambda f, w: torch.cat(
        F.vmap(F.grad(lambda x, w: f(x, w).sum(), (0, 1)), (0, None))(X[None], w), 1
    ),
    "grad, of both": lambda f, w: torch.cat(F.grad(lambda x, w: f(x, w).sum(), (0, 1))(X, w)),
    "jvp, vmap": lambda f, w: F.jvp(rows(f, w), (X,), (torch.ones(4),))[1],
    "vmap, jvp": lambda f, w: F.vmap(lambda x: F.jvp(lambda x: f(x, w), (x,), (torch.ones(4),))[1])(X[None]),
    "jacrev, vmap": lambda f, w: F.jacrev(rows(f, w))(X),
    "jacfwd, vmap": lambda f, w: F.jacfwd(rows(f, w))(X),
    "hessian": lambda f, w: F.hessian(lambda x: f(x, w).sum())(X),
    "hessian, vmap": lambda f, w: F.hessian(lambda x: rows(f, w)(x).sum())(X),
    "vmap, hessian": lambda f, w: F.vmap(F.hessian(lambda x: f(x, w).sum()))(X[None]),
}


def squared(self: Any, x: Any) -> Any:
    return x * x * self.weight


def packed(self: Any, *args: Any) -> Any:
    return squared(self, *args)


def called(form: str, name: str, kernel: Computes) -> tuple[dict[str, Any], Computes]:
    """Return a mapping, and a function that calls a layer of a form: `x * x * weight` by its reference."""

    def serving(self: Any, *args: Any) -> Any:
        return kernel(args[0], self.weight)

    def function_kernel(x: Any, weight: Any) -> Any:
        return kernel(x, weight)

    kernel_class = type("Kernel", (nn.Module,), {"forward": lambda self, x: serving(self, x)})
    if form == "packed":
        kernel_class.forward = serving  # type: ignore[method-assign]
    is_function = "function" in form
    chosen: Any = function_kernel if is_function else kernel_class
    if form == "modes":
        chosen = {mode: type("Kernel", (kernel_class,), {}) for mode in (Mode.INFERENCE, Mode.TRAINING)}
    mapping = {name: {"cpu": chosen}}
    if is_function:
        function = use_kernel_forward_from_hub(name)(lambda x, weight: x * x * weight)
        if form == "function":
            return mapping, function
        cls = type("Calls", (nn.Module,), {"forward": lambda self, x: self.function(x, self.weight)})
    else:
        cls = type(name, (nn.Module,), {"forward": packed if form == "packed" else squared})
        cls = use_kernel_forward_from_hub(name)(cls)
    layer = cls()
    if form == "buffer":
        layer.register_buffer("weight", torch.full((4,), 2.0))
    else:
        layer.weight = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
    if is_function:
        layer.function = function
    if "kernelized" in form:
        mode = Mode.TRAINING if "training" in form else Mode.INFERENCE
        with use_kernel_mapping(mapping):
            kernelize(layer, mode=mode, device="cpu")
        mapping = {}
    return mapping, lambda x, weight: F.functional_call(layer, {"weight": weight}, (x,))


FORMS = [
    "module",
    "buffer",
    "packed",
    "modes",
    "function",
    "kernelized",
    "kernelized, training",
    "function, kernelized",
]
LOSING: dict[str, Computes] = {
    "all": lambda x, w: (x * x * w).detach(),
    "the input": lambda x, w: (x * x).detach() * w,
    "the weight": lambda x, w: x * x * w.detach(),
}


@pytest.mark.parametrize("transform", NESTED)
@pytest.mark.parametrize("form", FORMS)
def test_no_transform_hides_a_lost_derivative(form: str, transform: str) -> None:
    """A warm kernel that loses gradients, and was never trained, gives those of the reference: all and some of them."""
    weight, compute = torch.full((4,), 2.0), NESTED[transform]
    expected = compute(lambda x, w: x * x * w, weight)
    for number, (lost, kernel) in enumerate(LOSING.items()):
        mapping, layer = called(form, f"Hidden{FORMS.index(form)}_{list(NESTED).index(transform)}_{number}", kernel)
        with use_kernel_mapping(mapping):
            for enabled in (False, True):
                with torch.set_grad_enabled(enabled):
                    torch.testing.assert_close(layer(X, weight), X * X * 2)
            torch.testing.assert_close(compute(layer, weight), expected, msg=f"lost: {lost}")
    assert not quarantined()


@pytest.mark.parametrize("transform", NESTED)
def test_a_kernel_that_keeps_derivatives_serves_transforms(transform: str) -> None:
    """The reference does not run beside a kernel that is right, whatever transforms the call."""
    ran: list[bool] = []
    name = f"Keeps{list(NESTED).index(transform)}"

    def forward(self: Any, x: Any) -> Any:
        ran.append(True)
        return squared(self, x)

    layer = use_kernel_forward_from_hub(name)(type(name, (nn.Module,), {"forward": forward}))()
    layer.weight = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
    with use_kernel_mapping({name: {"cpu": type("Kernel", (nn.Module,), {"forward": squared})}}):
        layer(X)
        NESTED[transform](lambda x, w: F.functional_call(layer, {"weight": w}, (x,)), layer.weight)
    # Before PyTorch 2.7, a wrapped tensor cannot be asked for.
    assert not ran or torch.__version__ < "2.7"


COMPILED = ["grad", "jacrev", "jvp", "per sample", "nested", "vmap, recorded"]


@pytest.mark.parametrize("kernelized", [False, True])
@pytest.mark.parametrize("transform", COMPILED)
def test_compiled_transforms_lose_no_derivative(transform: str, kernelized: bool) -> None:
    """A kernel that declares to have no backward serves no compiled call that a transform may derive, or autograd."""
    if "nested" in transform and torch.__version__ < "2.7":
        pytest.skip("this Dynamo does not trace vmap of a module")
    torch._dynamo.reset()
    name = f"Compiled {transform} {kernelized}"

    class Kernel(nn.Module):
        can_torch_compile, has_backward = True, False

        def forward(self, x: Any, other: Any = None) -> Any:
            return (x * self.weight).detach()

    with use_kernel_mapping({name: {"cpu": Kernel}}):
        layer = make(name).requires_grad_(False)
        if kernelized:
            kernelize(layer, mode=Mode.INFERENCE | Mode.TORCH_COMPILE, device="cpu")
        # The recorded call is compiled without the derivation, which Dynamo does not trace.
        inner = (lambda x: torch.func.vmap(layer)(x)) if "recorded" in transform else None
        run: Any = torch.compile(inner or (lambda: TRANSFORMS[transform](layer)), backend="eager")
        if inner is not None:
            x = X[None].clone().requires_grad_()
            result = torch.autograd.grad(run(x).sum() + x.sum(), x)[0][0] - 1
        else:
            result = run()
    torch.testing.assert_close(result, torch.full((4,), 2.0))


def test_a_decision_is_still_about_plain_calls() -> None:
    """`resolve` is not concerned: the kernel is the choice for plain calls."""
    with use_kernel_mapping({"Resolved": {"cpu": native([])}}):
        assert "Native" in resolve(make("Resolved"), device="cpu", mode=Mode.INFERENCE).origin
