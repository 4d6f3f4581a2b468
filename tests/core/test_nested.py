"""Tensors within arguments: whatever holds them, and however deep, a call is decided as if they were arguments."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import importlib.util
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from kernels_core import Mode, kernelize, quarantined, use_kernel_forward_from_hub
from kernels_core.nested import MOST, first_tensor, held_by
from kernels_core.testing import HookRecorder
from kernels_core.torch_internals import DYNAMO_LISTS_ATTRIBUTES
from kernels_plugins import use_kernel_mapping

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
X = torch.arange(4.0)


@dataclasses.dataclass
class Data:
    inner: Any


@dataclasses.dataclass(slots=True)
class Slots:
    inner: Any


class Named(NamedTuple):
    inner: Any


class Plain:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Called(Plain):
    def __call__(self) -> Any:
        return self.inner


class Items(list[Any]):
    pass


class Lazy(dict[str, Any]):
    def values(self) -> Any:
        raise RuntimeError("its values are loaded only by name")


def model_output(tensor: torch.Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(tensor, ((tensor.detach(), tensor),))


def cache(tensor: torch.Tensor) -> Any:
    from transformers import DynamicCache

    made = DynamicCache()
    for layer in range(3):
        states = tensor.view(1, 1, -1, 1)
        made.update(states if layer == 2 else states.detach(), states.detach(), layer)
    return made


Hold = Callable[[torch.Tensor], Any]
Take = Callable[[Any], torch.Tensor]
CONTAINERS: dict[str, tuple[Hold, Take]] = {
    "tuple of tuples": (lambda t: ((X, X), (X, t)), lambda a: a[1][1]),
    "dict of lists": (lambda t: {"a": [1, "b"], "k": [None, t]}, lambda a: a["k"][1]),
    "list of a dict of tuples": (lambda t: [{"k": (t,)}], lambda a: a[0]["k"][0]),
    "ten deep": (lambda t: functools.reduce(lambda a, _: [a], range(10), t), lambda a: a[0][0][0][0][0][0][0][0][0][0]),
    "named tuple": (lambda t: Named([t]), lambda a: a.inner[0]),
    "class of lists": (lambda t: Items([[t]]), lambda a: a[0][0]),
    "queue": (lambda t: collections.deque([[t]]), lambda a: a[0][0]),
    "model output": (model_output, lambda a: a.hidden_states[0][1]),
}
OBJECTS: dict[str, tuple[Hold, Take]] = {
    "dataclass": (lambda t: Data(t), lambda a: a.inner),
    "list in a dataclass": (lambda t: Data([t]), lambda a: a.inner[0]),
    "dataclass in a dict": (lambda t: {"k": Data((t,))}, lambda a: a["k"].inner[0]),
    "object in an object": (lambda t: Plain(Plain({"k": t})), lambda a: a.inner.inner["k"]),
    "object that can be called": (lambda t: Called(t), lambda a: a()),
    "cache": (lambda t: cache(t), lambda a: a.layers[2].keys.view(-1)[:4]),
}
ONLY_EAGER: dict[str, tuple[Hold, Take]] = {
    "slots": (lambda t: Slots([t]), lambda a: a.inner[0]),
    "class of dicts with values of its own": (lambda t: Lazy(k=t), lambda a: a["k"]),
    "attribute of a class of lists": (lambda t: vars(held := Items([1])).update(t=t) or held, lambda a: a.t),
    "partial": (lambda t: functools.partial(max, t), lambda a: a.args[0]),
    "distribution": (lambda t: torch.distributions.Normal(t, 1.0, validate_args=False), lambda a: a.loc),
}
OF_C: dict[str, tuple[Hold, Take]] = {
    "mapping that is read-only": (lambda t: types.MappingProxyType({"k": t}), lambda a: a["k"]),
    "namespace": (lambda t: types.SimpleNamespace(inner=[t]), lambda a: a.inner[0]),
}
(OBJECTS if DYNAMO_LISTS_ATTRIBUTES else ONLY_EAGER).update(OF_C)  # other versions ask for the module of the class
if importlib.util.find_spec("transformers") is None:
    del CONTAINERS["model output"], OBJECTS["cache"]
ALL = {**CONTAINERS, **OBJECTS, **ONLY_EAGER}
WARM = [kind for kind in ALL if kind in CONTAINERS or "dataclass" in kind or kind == "slots"]
"""The kinds that each call opens: other objects only for devices, and for gradients until a kernel is proven."""


def make(name: str, take: Take) -> Any:
    """Return a layer without parameters that adds a tensor in its second argument to the first."""

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor, held: Any = None) -> torch.Tensor:
            return x if held is None else x + 3 * take(held)

    return use_kernel_forward_from_hub(name)(Layer)()


def kernel(take: Take, ran: list[str], **declarations: Any) -> type[nn.Module]:
    """Return a kernel that computes the same outside of autograd."""

    class Kernel(nn.Module):
        def forward(self, x: Any, held: Any = None) -> Any:
            ran.append("kernel")
            y = x.detach() if held is None else x.detach() + 3 * take(held).detach()
            return y.clone()

    for name, value in declarations.items():
        setattr(Kernel, name, value)
    return Kernel


@pytest.fixture(params=["dispatched", "kernelized"])
def prepared(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Return the layer as it is, or kernelized in a mapping that is active."""
    if request.param == "dispatched":
        return lambda layer: layer
    return lambda layer: kernelize(layer, mode=Mode.INFERENCE, device="cpu")


# --- Gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", ["by mapping", "by has_backward", "not at all"])
@pytest.mark.parametrize("kind", ALL)
def test_no_gradient_is_lost_to_a_kernel_for_inference(prepared: Any, kind: str, declared: str) -> None:
    """A warm kernel without a backward serves no call that autograd records, wherever the tensor is that it derives."""
    hold, take = ALL[kind]
    ran: list[str] = []
    source: Any = kernel(take, ran, **({"has_backward": False} if declared == "by has_backward" else {}))
    mapping = {Mode.INFERENCE: source} if declared == "by mapping" else source
    with use_kernel_mapping({"Deep": {"cpu": mapping}}):
        layer = prepared(make("Deep", take))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                layer(X, hold(X.clone()))
        assert ran == ["kernel"] * 2  # with gradients enabled, too, where nothing requires one
        tensor = X.clone().requires_grad_()
        for _ in range(2):
            tensor.grad = None
            layer(X, hold(tensor)).sum().backward()
            assert tensor.grad is not None and torch.equal(tensor.grad, torch.full((4,), 3.0))
        with torch.no_grad():
            ran.clear()
            assert torch.equal(layer(X, hold(tensor)), 4 * X)
        assert ran == ["kernel"]


def test_a_loss_is_named_by_the_path_to_its_tensor() -> None:
    """The reason of a quarantine says where in the argument the tensor is."""
    hold, take = OBJECTS["dataclass in a dict"]
    with use_kernel_mapping({"Path": {"cpu": kernel(take, [])}}):
        make("Path", take)(X, hold(X.clone().requires_grad_())).sum().backward()
    assert "argument 'held'['k'].inner[0] requires grad" in quarantined()[0].reason


def test_a_module_as_argument_counts_with_its_parameters() -> None:
    """A function that is called with a module is recorded where a parameter of that is."""
    ran: list[str] = []

    @use_kernel_forward_from_hub("Apply")
    def apply(x: torch.Tensor, modules: Any) -> torch.Tensor:
        return modules[0](x)

    def fast(x: torch.Tensor, modules: Any) -> torch.Tensor:
        ran.append("kernel")
        return modules[0](x).detach()

    linear = nn.Linear(4, 4)
    with use_kernel_mapping({"Apply": {"cpu": {Mode.INFERENCE: fast}}}):
        with torch.no_grad():
            apply(X, [linear])
        apply(X, [linear]).sum().backward()
    assert ran == ["kernel"] and linear.weight.grad is not None


def test_a_list_that_is_an_attribute_counts(prepared: Any) -> None:
    """A module that keeps tensors in lists of its own trains them."""
    ran: list[str] = []

    class Layer(nn.Module):
        weights: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weights[0][1]

    class Fast(nn.Module):
        def forward(self, x: Any) -> Any:
            ran.append("kernel")
            return (x * self.weights[0][1]).detach()

    layer: Any = use_kernel_forward_from_hub("Listed")(Layer)()
    layer.weights = [("weight", torch.ones(4, requires_grad=True))]
    with use_kernel_mapping({"Listed": {"cpu": {Mode.INFERENCE: Fast}}}):
        served = prepared(layer)
        with torch.no_grad():
            served(X)
        assert ran == ["kernel"]
        served(X).sum().backward()
    assert torch.equal(layer.weights[0][1].grad, X)


@pytest.mark.parametrize("kind", {**CONTAINERS, **OBJECTS})
def test_no_gradient_is_lost_in_compiled_code(prepared: Any, kind: str) -> None:
    """Dynamo finds such tensors as well, without breaking the graph."""
    hold, take = ALL[kind]

    class Fast(nn.Module):
        can_torch_compile = True
        has_backward = False

        def forward(self, x: Any, held: Any = None) -> Any:
            return x if held is None else x + 3 * take(held).detach()

    torch.compiler.reset()
    with use_kernel_mapping({"Compiled": {"cpu": Fast}}):
        layer = torch.compile(prepared(make("Compiled", take)), fullgraph=True, backend="aot_eager")
        tensor = X.clone().requires_grad_()
        layer(X, hold(tensor)).sum().backward()
    assert tensor.grad is not None and torch.equal(tensor.grad, torch.full((4,), 3.0))


@pytest.mark.skipif(not DYNAMO_LISTS_ATTRIBUTES or "cache" not in OBJECTS, reason="no attributes, or no cache")
def test_compiled_code_does_not_depend_on_what_a_cache_holds() -> None:
    """A cache that grows in other layers than this one compiles nothing anew: no guard is on them under `no_grad`."""
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    class Fast(nn.Module):
        can_torch_compile = True

        def forward(self, x: Any, held: Any = None) -> Any:
            return x + held.layers[0].keys.sum()

    torch.compiler.reset()
    take: Take = lambda a: a.layers[0].keys.sum()  # noqa: E731
    with use_kernel_mapping({"Grows": {"cpu": Fast}}), torch.no_grad():
        layer, held = torch.compile(make("Grows", take), backend=backend), cache(X)
        for _ in range(4):
            layer(X, held)
            held.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 1)
    assert len(compiled) == 1


# --- Other questions -----------------------------------------------------------------------------------


class Mine(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", WARM)
def test_tensors_of_a_subclass_are_found(prepared: Any, kind: str) -> None:
    """None reaches a kernel that does not declare it; plain calls do, before and after."""
    hold, take = ALL[kind]
    ran: list[str] = []
    with use_kernel_mapping({"Odd": {"cpu": kernel(take, ran)}}), torch.no_grad():
        layer = prepared(make("Odd", take))
        layer(X, hold(X.clone()))
        assert type(layer(X, hold(X.as_subclass(Mine)))) is Mine and ran == ["kernel"]
        layer(X, hold(X.clone()))
    assert ran == ["kernel"] * 2 and not quarantined()


@pytest.mark.parametrize("kind", ["tuple of tuples", "dict of lists", "dataclass in a dict", "slots"])
def test_fake_tensors_are_found(prepared: Any, kind: str) -> None:
    """A call with a fake tensor is one that is traced."""
    hold, take = ALL[kind]
    ran: list[str] = []
    with use_kernel_mapping({"Fake": {"cpu": kernel(take, ran)}}), torch.no_grad():
        layer = prepared(make("Fake", take))
        layer(X, hold(X.clone()))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer(X, hold(mode.from_tensor(X)))
    assert ran == ["kernel"]


@pytest.mark.parametrize("kind", ALL)
def test_the_device_is_found(kind: str, hook_recorder: HookRecorder) -> None:
    """Where no tensor is outside of an object or container, that in it decides."""
    hold, _ = ALL[kind]

    @use_kernel_forward_from_hub("Where")
    def where(n: int, held: Any) -> str:
        return "ran"

    where(3, hold(torch.ones(4, device="meta")) if kind != "tuple of tuples" else ((1,), (1, X.to("meta"))))
    requests = [call.arguments["request"] for call in hook_recorder.of("kernels_find_candidates")]
    assert {request.device.type for request in requests} == {"meta"}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process only."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", WARM)
def test_pending_collectives_are_waited_for_or_left_to_the_reference(group: None, prepared: Any, kind: str) -> None:
    """No kernel gets one: in a container, it gets the result; one in an object cannot be replaced there."""
    hold, take = ALL[kind]
    seen: list[type] = []

    class Kernel(nn.Module):
        def forward(self, x: Any, held: Any = None) -> Any:
            seen.append(type(take(held)))
            return x + 3 * take(held)

    with use_kernel_mapping({"Pending": {"cpu": Kernel}}), torch.no_grad():
        layer = prepared(make("Pending", take))
        result = layer(X, hold(AsyncCollectiveTensor(X.clone())))
    assert torch.equal(result, 4 * X) and set(seen) <= {torch.Tensor}
    if kind in CONTAINERS and kind not in ("class of lists", "model output"):
        assert seen  # the kernel served


def test_distributed_tensors_in_containers_reach_no_kernel(group: None, prepared: Any) -> None:
    """A legacy cache of `DTensor`s takes the reference."""
    hold, take = CONTAINERS["tuple of tuples"]
    ran: list[str] = []
    mesh = init_device_mesh("cpu", (1,))
    with use_kernel_mapping({"Shards": {"cpu": kernel(take, ran)}}), torch.no_grad(), warnings.catch_warnings():
        layer = prepared(make("Shards", take))
        distributed = [DTensor.from_local(X, mesh, [Replicate()]) for _ in range(2)]
        assert torch.equal(layer(distributed[0], hold(distributed[1])).full_tensor(), 4 * X)
    assert ran == []


# --- The walk ------------------------------------------------------------------------------------------


def test_cycles_end() -> None:
    """An object, a dict and a list that hold themselves are opened once."""
    node = Plain({"tensor": X})
    node.inner["back"] = node
    assert held_by([node]) == ([X], [], True)
    loop: list[Any] = [X.clone().requires_grad_()]
    loop.append(loop)
    tensors, _, complete = held_by([loop])
    assert not complete and tensors[0] is loop[0]


def test_more_than_can_be_looked_at_counts_as_recorded(prepared: Any) -> None:
    """A tensor beyond the limit may be one that requires grad: the kernel for inference leaves the call."""
    ran: list[str] = []
    take: Take = lambda a: a[-1][0]  # noqa: E731
    with use_kernel_mapping({"Huge": {"cpu": {Mode.INFERENCE: kernel(take, ran)}}}):
        layer = prepared(make("Huge", take))
        tensor = X.clone().requires_grad_()
        layer(X, [*([0] for _ in range(MOST)), [tensor]]).sum().backward()
        assert tensor.grad is not None and ran == []


def test_many_numbers_are_no_reason_to_leave_a_kernel() -> None:
    """Numbers and texts do not count to the limit, in a list or an object: one of 20,000 does not end kernels."""
    ran: list[str] = []
    take: Take = lambda a: a["tensor"]  # noqa: E731

    class Kernel(nn.Module):
        def forward(self, x: Any, held: Any = None) -> Any:
            ran.append("kernel")
            return x + take(held) * 3

    with use_kernel_mapping({"Numbers": {"cpu": Kernel}}):
        layer, tensor = make("Numbers", take), X.clone().requires_grad_()
        layer(X, {"tensor": tensor, "ids": list(range(2 * MOST)), "more": Plain(["a"] * 2 * MOST)}).sum().backward()
    assert tensor.grad is not None and ran == ["kernel"]


def test_values_that_load_when_asked_are_not_asked() -> None:
    """The check of gradients reads lists and dicts by no method of their class, and leaves other mappings closed."""

    class AskedError(RuntimeError):
        pass

    class Files(collections.abc.Mapping[str, Any]):
        def __getitem__(self, key: str) -> Any:
            raise AskedError

        __iter__ = __len__ = __getitem__  # type: ignore[assignment]

    class Rows(Items):
        def __iter__(self) -> Iterator[Any]:
            raise AskedError

    class Columns(Lazy):
        items = __iter__ = Lazy.values

    ran: list[str] = []
    take: Take = lambda a: list.__getitem__(a[0], 0)  # noqa: E731

    class Kernel(nn.Module):
        def forward(self, x: Any, held: Any = None) -> Any:
            ran.append("kernel")
            return x + 3 * take(held)

    with use_kernel_mapping({"Asked": {"cpu": Kernel}}):
        layer, tensor = make("Asked", take), X.clone().requires_grad_()
        layer(X, [Rows([tensor]), Files(), Columns(k=X)]).sum().backward()
    assert tensor.grad is not None and ran == ["kernel"]


def test_the_first_tensor_is_in_order_and_not_in_attributes() -> None:
    """What the signature has first decides, a container with its items; attributes come after all of these."""
    a, b, c = X.clone(), X.clone(), X.clone()
    assert first_tensor((1, [[a]], b)) is a
    assert first_tensor((Data(c), [], {"k": (b,)}, a)) is b
    assert first_tensor((Data([c]),)) is c
    assert first_tensor((Data([c]),), attributes=False) is None


def test_no_code_of_an_object_runs() -> None:
    """A property, `__getattr__` or `__class__` that raises is not asked, and nothing is left open in functions."""

    class Raises:
        def __init__(self) -> None:
            vars(self)["tensor"] = X

        def __getattribute__(self, name: str) -> Any:
            if name == "__dict__":
                return object.__getattribute__(self, name)
            raise RuntimeError(name)

    assert held_by([Raises()]) == ([X], [], True)
    assert held_by([lambda: X, Data, torch.float32, torch.nn, iter([X])]) == ([], [], True)
