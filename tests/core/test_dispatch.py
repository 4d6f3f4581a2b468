"""Which implementation a call of a decorated class or function runs."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from warned import ignored, never, noted

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelsWarning,
    Mode,
    NoKernelError,
    PluginManager,
    hookimpl,
    replace_kernel_forward_from_hub,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.testing import HookRecorder
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)


@use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    """A layer with state, at module level so that it can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 2.0))
        self.register_buffer("offset", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.offset


class ScaleKernel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.offset + 100


@use_kernel_forward_from_hub("double")
def double(x: torch.Tensor) -> torch.Tensor:
    """Return twice x."""
    return x + x


def devices_asked(recorder: HookRecorder, name: str) -> set[str]:
    """Return the devices of all requests for a layer."""
    requests = [call.arguments["request"] for call in recorder.of("kernels_find_candidates")]
    return {str(request.device) for request in requests if request.layer_name == name}


# --- What serves ---------------------------------------------------------------------------------


def test_reference_serves_where_nothing_is_offered(make_layer: Make) -> None:
    """Without any kernel, class and function run as they would undecorated, and nothing warns."""
    with never():
        assert make_layer()()(X)[0] == 1
        assert double(torch.ones(1)) == 2


def test_kernel_serves_a_class(make_layer: Make, make_kernel: Make) -> None:
    """A registered kernel class serves the instances of a decorated class, on their own state."""
    register_kernel_mapping({"Add": {"cpu": make_kernel(10)}, "Scale": {"cpu": ScaleKernel}})
    assert make_layer()()(X)[0] == 10
    scale = Scale()
    scale.weight.data.fill_(7)
    assert scale(torch.ones(2)).tolist() == [108, 108]


def test_kernel_serves_a_function() -> None:
    """A function is served by a function, or by the forward of a kernel class."""

    class DoubleKernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 20

    def double_kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 200

    with use_kernel_mapping({"double": {"cpu": DoubleKernel}}):
        assert double(torch.ones(1)) == 20
    with use_kernel_mapping({"double": {"cpu": double_kernel}}):
        assert double(torch.ones(1)) == 200
    assert double(torch.ones(1)) == 2


def test_function_is_dispatched_wherever_it_is_called_from() -> None:
    """Names bound before a mapping was registered call the kernel: an alias, a partial, another function."""
    alias, partial, table = double, functools.partial(double), {"act": double}

    def caller(x: torch.Tensor) -> torch.Tensor:
        return double(x)

    register_kernel_mapping({"double": {"cpu": lambda x: x * 50}})
    assert [f(torch.ones(1)).item() for f in (alias, partial, table["act"], caller)] == [50] * 4


def test_builtin_function_can_be_decorated() -> None:
    """A function of C without a readable signature keeps working, and a kernel for it serves or says why not."""
    add = use_kernel_forward_from_hub("builtin add")(torch.add)
    assert add(torch.ones(1), torch.ones(1)) == 2

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b + 100

    with noted() as caught, use_kernel_mapping({"builtin add": {"cpu": kernel}}):
        result = add(torch.ones(1), torch.ones(1))
        resolution = resolve(add, device="cpu", mode=Mode.INFERENCE)
    assert not any("'core' raised" in str(w.message) for w in caught), "the core blames itself"
    assert result == 102 or (resolution.refusals and "signature" in resolution.refusals[0].reason)


def test_replace_changes_a_third_party_class() -> None:
    """A class of another library is dispatched after replace_kernel_forward_from_hub, its instances too."""

    class Theirs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    before, undecorated = Theirs(), Theirs.forward
    replace_kernel_forward_from_hub(Theirs, "Theirs")
    assert before(X)[0] == 1
    register_kernel_mapping({"Theirs": {"cpu": type("K", (nn.Module,), {"forward": lambda self, x: x + 9})}})
    assert before(X)[0] == 9
    assert Theirs.forward.__wrapped__ is undecorated
    assert Theirs.kernel_layer_name == "Theirs"


def test_replace_renames_a_decorated_class(make_layer: Make, make_kernel: Make) -> None:
    """Decorating again changes name, condition and fallback, and keeps the first reference."""
    layer = make_layer("Old", use_fallback=False)
    reference = layer.forward.__wrapped__
    replace_kernel_forward_from_hub(layer, "New")
    register_kernel_mapping({"Old": {"cpu": make_kernel(10)}, "New": {"cpu": make_kernel(20)}})
    assert layer()(X)[0] == 20
    assert layer.forward.__wrapped__ is reference
    assert resolve(layer, device="cpu", mode=Mode.INFERENCE).request.layer_name == "New"


@pytest.mark.parametrize("name", ["", None, 3])
def test_layer_name_is_checked(name: Any) -> None:
    """A layer name that no mapping could hold is refused when decorating."""
    with pytest.raises(ArgumentError if name == "" else ArgumentTypeError):
        use_kernel_forward_from_hub(name)


@pytest.mark.parametrize("target", [3, int, nn.Linear(1, 1), "text", nn.Module], ids=repr)
def test_only_layers_and_functions_can_be_decorated(target: Any) -> None:
    """Anything but an nn.Module class with a forward, or a function, is refused with its name."""
    with pytest.raises(ArgumentTypeError):
        use_kernel_forward_from_hub("Name")(target)


def test_what_could_never_be_called_is_refused_when_decorating() -> None:
    """A forward that never gets its module, and a condition that is no function, are errors of the decorator."""

    class Unbindable:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    unbound = type("Unbound", (nn.Module,), {"forward": Unbindable()})
    with pytest.raises(ArgumentTypeError, match=r"Unbound.forward is .*Unbindable.*: .*make it take self"):
        use_kernel_forward_from_hub("Name")(unbound)
    for bad in (True, "training"):
        with pytest.raises(ArgumentTypeError, match=f"condition is a function .*not {bad!r}"):
            use_kernel_forward_from_hub("Name", bad)  # type: ignore[arg-type]
        with pytest.raises(ArgumentTypeError, match="condition is a function"):
            replace_kernel_forward_from_hub(nn.SiLU, "Name", bad)  # type: ignore[arg-type]
    assert not hasattr(nn.SiLU, "kernel_layer_name")


def test_resolve_refuses_what_is_not_decorated(make_layer: Make) -> None:
    """Asking about an undecorated class is an error, not an empty answer."""
    with pytest.raises(ArgumentTypeError, match="not decorated"):
        resolve(nn.Linear, device="cpu", mode=Mode.INFERENCE)
    layer = make_layer()
    for form in (layer, layer(), double):
        assert resolve(form, device="cpu", mode=Mode.INFERENCE).is_reference


# --- The device of a call ------------------------------------------------------------------------


CALLS: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "positional": lambda f, t: f(t),
    "keyword": lambda f, t: f(b=t),
    "second": lambda f, t: f(None, t),
    "after numbers": lambda f, t: f(1, 2.5, "text", t),
    "list": lambda f, t: f([t]),
    "tuple": lambda f, t: f((1, t)),
    "dict": lambda f, t: f({"k": t}),
    "keyword list": lambda f, t: f(b=[1, t]),
    "varargs": lambda f, t: f(1, 2, 3, 4, t),
    "varkw": lambda f, t: f(other=t),
    "list in varkw": lambda f, t: f(other=[t]),
    "list in a dict in a tuple": lambda f, t: f((1, {"k": [t]})),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_device_is_that_of_the_first_tensor(call: Any, hook_recorder: HookRecorder) -> None:
    """A tensor anywhere among the arguments, in containers too, decides the device, before the module's state."""

    @use_kernel_forward_from_hub("Where")
    class Where(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))  # on the CPU

        def forward(self, a: Any = None, b: Any = None, c: Any = 0, *rest: Any, **more: Any) -> str:
            return "ran"

    assert call(Where(), torch.ones(1, device="meta")) == "ran"
    assert devices_asked(hook_recorder, "Where") == {"meta"}


@pytest.mark.parametrize("first", ["cpu", "meta"])
def test_device_is_that_of_the_first_of_two_tensors(first: str, hook_recorder: HookRecorder) -> None:
    """Of two tensors on two devices, the first in the order of the signature counts."""

    @use_kernel_forward_from_hub("Two")
    def two(a: Any, b: Any) -> str:
        return "ran"

    second = {"cpu": "meta", "meta": "cpu"}[first]
    two(b=torch.ones(1, device=second), a=torch.ones(1, device=first))
    two([torch.ones(1, device=first)], torch.ones(1, device=second))
    assert devices_asked(hook_recorder, "Two") == {first}


@pytest.mark.parametrize("kind", ["parameter", "buffer", "inner parameter", "both"])
def test_device_falls_back_to_the_module(kind: str, hook_recorder: HookRecorder) -> None:
    """Without a tensor among the arguments, the first parameter, then the first buffer decides."""

    @use_kernel_forward_from_hub("State")
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if kind in ("parameter", "both"):
                self.weight = nn.Parameter(torch.ones(1, device="meta"))
            if kind == "inner parameter":
                self.inner = nn.Linear(1, 1, device="meta")
            if kind in ("buffer", "both"):
                self.register_buffer("offset", torch.ones(1, device="cpu" if kind == "both" else "meta"))

        def forward(self, n: int) -> str:
            return "ran"

    assert State()(3) == "ran"
    assert State()(SimpleNamespace(held=torch.ones(1))) == "ran"  # attributes of objects come last
    assert devices_asked(hook_recorder, "State") == {"meta"}


def test_reference_runs_without_any_device(make_kernel: Make, hook_recorder: HookRecorder) -> None:
    """A call with no tensor anywhere runs the reference and asks no plugin."""

    @use_kernel_forward_from_hub("Nowhere")
    class Nowhere(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1

    with use_kernel_mapping({"Nowhere": {"cpu": make_kernel(50)}}):
        assert Nowhere()(1) == 2
        assert Nowhere()(X)[0] == 50  # the next call has one
    assert devices_asked(hook_recorder, "Nowhere") == {"cpu"}


def test_without_any_device_and_without_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call with no tensor anywhere raises where the reference must not run, and says why, unless all is off."""

    @use_kernel_forward_from_hub("Nowhere", use_fallback=False)
    class Nowhere(nn.Module):
        def forward(self, x: Any, *, y: Any = 1) -> Any:
            return x + y

    with pytest.raises(NoKernelError, match=r"'Nowhere'.*use_fallback=False:\n  nothing says on which device"):
        Nowhere()(1)
    told = "nothing says on which device" if torch.__version__ >= "2.7" else "refuse"  # older ones tell no reasons
    with pytest.raises(Exception, match=told):
        torch.compile(Nowhere(), backend="eager", fullgraph=True)(1)
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    assert Nowhere()(1) == 2


def test_two_devices_resolve_apart(make_kernel: Make, make_layer: Make) -> None:
    """A kernel for one device does not serve calls on another, in either order."""
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        for _ in range(2):
            assert layer(X)[0] == 10
            assert layer(torch.zeros(2, device="meta")).device.type == "meta"
        assert resolve(layer, device="meta", mode=Mode.INFERENCE).is_reference


# --- Module hooks and serialization --------------------------------------------------------------


def test_module_hooks_fire_as_before(make_layer: Make, make_kernel: Make) -> None:
    """Forward pre-hooks, forward hooks and backward hooks fire around a kernel, in order, and can change results."""
    layer, fired = make_layer()(), []
    layer.register_forward_pre_hook(lambda m, a: fired.append("pre"))
    layer.register_forward_hook(lambda m, a, out: (fired.append("post"), out * 2)[1])
    layer.register_full_backward_hook(lambda m, gi, go: fired.append("backward"))
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        x = torch.zeros(2, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.tolist() == [20, 20]
    assert fired == ["pre", "post", "backward"]
    assert x.grad is not None and x.grad.tolist() == [2, 2]


def clone_state_dict(layer: nn.Module) -> nn.Module:
    fresh = Scale()
    fresh.load_state_dict(layer.state_dict())
    return fresh


def clone_torch_save(layer: nn.Module) -> nn.Module:
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    loaded: nn.Module = torch.load(stored, weights_only=False)
    return loaded


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), clone_state_dict, clone_torch_save],
    ids=["deepcopy", "copy", "pickle", "state_dict", "torch.save"],
)
def test_copies_behave_as_the_original(clone: Callable[[nn.Module], nn.Module], warm: bool) -> None:
    """Copies in any form keep state, carry nothing of ours, and are dispatched like the original."""
    layer = Scale()
    layer.weight.data.fill_(5)
    with use_kernel_mapping({"Scale": {"cpu": ScaleKernel}}):
        if warm:
            layer(torch.ones(2))
        twin = clone(layer)
        assert type(twin) is Scale
        assert list(twin.state_dict()) == ["weight", "offset"]
        assert set(vars(twin)) == set(vars(layer)) == set(vars(nn.Module()))
        assert twin(torch.ones(2)).tolist() == [106, 106]
    assert twin(torch.ones(2)).tolist() == [6, 6]


def test_decorated_function_can_be_pickled() -> None:
    """A decorated function is pickled by name, and is the dispatching one when it comes back."""
    assert pickle.loads(pickle.dumps(double)) is double
    assert copy.deepcopy(double) is double


def test_functional_call_serves_other_parameters() -> None:
    """torch.func.functional_call runs the kernel on the parameters that it is given."""
    with use_kernel_mapping({"Scale": {"cpu": ScaleKernel}}):
        out = torch.func.functional_call(Scale(), {"weight": torch.full((2,), 9.0)}, (torch.ones(2),))
    assert out.tolist() == [110, 110]


@pytest.mark.parametrize("given", ["argument", "in a list"])
def test_what_can_be_read_once_reaches_the_kernel_whole(given: str) -> None:
    """An iterator among the arguments is not read on the way: neither for the device nor for the mode."""

    @use_kernel_forward_from_hub("Total")
    class Total(nn.Module):
        def forward(self, numbers: Any, x: torch.Tensor) -> torch.Tensor:
            return x + sum(numbers[0] if isinstance(numbers, list) else numbers)

    class KernelTotal(nn.Module):
        has_backward = False  # so that the mode is looked for at each call

        def forward(self, numbers: Any, x: torch.Tensor) -> torch.Tensor:
            return x + sum(numbers[0] if isinstance(numbers, list) else numbers) + 100

    with use_kernel_mapping({"Total": {"cpu": KernelTotal}}), ignored():
        for x, expected in ((X, 106), (X.clone().requires_grad_(), 6), (X, 106)):
            numbers = iter([torch.tensor(1), torch.tensor(2), torch.tensor(3)])
            assert Total()(numbers if given == "argument" else [numbers], x)[0] == expected


def test_subclasses_of_tensors_and_replicas_of_modules_are_served(make_layer: Make, make_kernel: Make) -> None:
    """Arguments keep their class; a replica as DataParallel makes it, and a bound forward, are served like any."""
    mine = type("Mine", (torch.Tensor,), {})
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10, tensor_subclasses=(mine,))}}):
        output = layer(X.as_subclass(mine))
        assert type(output) is mine and output.tolist() == [10, 10]
        assert layer._replicate_for_data_parallel()(X)[0] == 10
        assert functools.partial(layer.forward, x=X)()[0] == 10
        assert torch.func.vmap(layer)(torch.zeros(3, 2)).tolist() == [[10, 10]] * 3


# --- Subclasses, condition, fallback -------------------------------------------------------------


def test_subclass_with_its_own_forward_runs_it(make_layer: Make, make_kernel: Make) -> None:
    """A subclass that overrides forward is not served; its super().forward is."""
    base = make_layer()

    class Own(base):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - 1

    class Super(base):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Plain(base):  # type: ignore[valid-type, misc]
        pass

    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert [module()(X)[0].item() for module in (Own, Super, Plain)] == [-1, 20, 10]
    with pytest.raises(ArgumentTypeError):
        resolve(Own, device="cpu", mode=Mode.INFERENCE)


def test_decorated_subclass_has_its_own_name(make_layer: Make, make_kernel: Make) -> None:
    """A decorated subclass without a forward gets its own layer name, and its base keeps the other."""
    base = make_layer("Base")

    @use_kernel_forward_from_hub("Derived")
    class Derived(base):  # type: ignore[valid-type, misc]
        pass

    with use_kernel_mapping({"Base": {"cpu": make_kernel(10)}, "Derived": {"cpu": make_kernel(20)}}):
        assert base()(X)[0] == 10
        assert Derived()(X)[0] == 20


def test_instance_forward_goes_first(make_layer: Make, make_kernel: Make) -> None:
    """A forward put on one instance runs there, as for any module."""
    layer = make_layer()()
    layer.forward = lambda x: x - 5
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert layer(X)[0] == -5


def test_condition_false_means_reference(make_layer: Make, make_kernel: Make) -> None:
    """The condition sees the module at each call, and where it is false the reference runs, whatever is offered."""
    layer = make_layer(condition=lambda module: module.fast, use_fallback=False)()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        layer.fast = True
        assert layer(X)[0] == 10
        layer.fast = False
        assert layer(X)[0] == 1
        layer.fast = True
        assert layer(X)[0] == 10


def test_condition_of_a_function_sees_its_arguments() -> None:
    """For a function the condition is called with the call's own arguments, defaults filled in."""
    seen = []

    def wide(x: torch.Tensor, *, scale: int = 2) -> bool:
        seen.append(scale)
        return x.shape[0] > 1

    @use_kernel_forward_from_hub("scaled", wide)
    def scaled(x: torch.Tensor, *, scale: int = 2) -> torch.Tensor:
        return x * scale

    def kernel(x: torch.Tensor, *, scale: int = 2) -> torch.Tensor:
        return x * scale * 10

    with use_kernel_mapping({"scaled": {"cpu": kernel}}):
        assert scaled(torch.ones(1)) == 2
        assert scaled(torch.ones(2), scale=3)[0] == 30
    assert seen == [2, 3]


def test_no_fallback_raises_with_every_refusal(make_layer: Make, make_kernel: Make) -> None:
    """use_fallback=False raises NoKernelError that holds request and each refusal, and works once a kernel fits."""
    layer = make_layer(use_fallback=False)()
    with pytest.raises(NoKernelError, match="no candidate was offered"):
        layer(X)
    unfit = [type("A", (nn.Module,), {"forward": lambda self: 0}), type("B", (nn.Module,), {"extra": 1})]
    with use_kernel_mapping({"Add": {"cpu": unfit}}), pytest.raises(NoKernelError) as caught:
        layer(X)
    assert caught.value.request.layer_name == "Add"
    assert [refusal.candidate.source for refusal in caught.value.refusals] == unfit
    assert all(refusal.reason in str(caught.value) for refusal in caught.value.refusals)
    with use_kernel_mapping({"Add": {"cpu": [*unfit, make_kernel(10)]}}), pytest.warns(KernelsWarning):
        assert layer(X)[0] == 10


def test_no_fallback_does_not_claim_another_mode(make_layer: Make) -> None:
    """The error of a call that autograd does not record does not speak of training, although gradients are enabled."""
    with pytest.raises(NoKernelError) as caught:
        make_layer(use_fallback=False)()(X)
    assert "training" not in str(caught.value)


# --- Changes count from the next call on -----------------------------------------------------------


def test_changes_take_effect_on_the_next_call(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager
) -> None:
    """Registering mappings and plugins, unregistering, entering and leaving scopes: each counts at once."""
    layer = make_layer()()

    class Brings:
        @hookimpl
        def kernels_mapping(self) -> Any:
            return {"Add": {"cpu": make_kernel(30)}}

    seen = [layer(X)[0].item()]
    isolated_plugins.register(Brings(), "brings")
    seen.append(layer(X)[0].item())
    register_kernel_mapping({"Add": {"cpu": make_kernel(20)}})
    seen.append(layer(X)[0].item())
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        seen.append(layer(X)[0].item())
        register_kernel_mapping({"Add": {"cpu": make_kernel(21)}})
        seen.append(layer(X)[0].item())
    seen.append(layer(X)[0].item())
    register_kernel_mapping({}, inherit_mapping=False)
    seen.append(layer(X)[0].item())
    register_kernel_mapping({"Add": {"cpu": make_kernel(22)}})
    seen.append(layer(X)[0].item())
    assert seen == [1, 30, 20, 10, 10, 21, 1, 22]


def test_unregistering_a_plugin_takes_effect(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager
) -> None:
    """After unregister, the next call is served without that plugin, also where it was warm."""
    layer = make_layer()()

    class Brings:
        @hookimpl
        def kernels_mapping(self) -> Any:
            return {"Add": {"cpu": make_kernel(30)}}

    plugin = Brings()
    isolated_plugins.register(plugin, "brings")
    assert layer(X)[0] == layer(X)[0] == 30
    assert isolated_plugins.unregister("brings") is plugin
    assert layer(X)[0] == 1


def test_warm_calls_ask_nobody(make_layer: Make, make_kernel: Make, hook_recorder: HookRecorder) -> None:
    """Once resolved, calls in whatever mode call no hook."""
    layer = make_layer()()
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10, can_torch_compile=False, has_backward=False)}}):
        calls = [X, torch.zeros(2, requires_grad=True)]
        with ignored(KernelsWarning):
            assert [layer(x)[0].item() for x in calls] == [10, 1]
        hook_recorder.clear()
        for _ in range(3):
            assert [layer(x)[0].item() for x in calls] == [10, 1]
    assert hook_recorder.names() == []


# --- Errors and warnings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError, AttributeError, IndexError, TypeError, KeyError, StopIteration, KeyboardInterrupt]
)
def test_errors_inside_a_kernel_are_unchanged(error: type[BaseException]) -> None:
    """An exception that kernel and reference raise reaches the caller as the same object, each time."""
    raised, runs = error("from the kernel"), []

    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(1)
            raise raised

    @use_kernel_forward_from_hub("Add")
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("from the reference")

    layer = Layer()
    with use_kernel_mapping({"Add": {"cpu": Raises}}):
        for attempt in (1, 2):
            with pytest.raises(error) as caught:
                layer(X)
            assert caught.value is raised
            assert len(runs) == attempt


def test_errors_inside_the_reference_are_unchanged() -> None:
    """An exception of the reference reaches the caller as it is, AttributeError too."""
    raised = AttributeError("from the reference")

    @use_kernel_forward_from_hub("Raises")
    def raises(x: torch.Tensor) -> torch.Tensor:
        raise raised

    for _ in range(2):
        with pytest.raises(AttributeError) as caught:
            raises(X)
        assert caught.value is raised


def test_warnings_come_once_per_reason(make_layer: Make) -> None:
    """A refused kernel is warned about once, whoever calls and however often; another reason warns again."""
    unfit = type("Unfit", (nn.Module,), {"forward": lambda self: 0})
    other = type("Other", (nn.Module,), {"forward": lambda self: 0})
    first, second = make_layer()(), make_layer()()
    with noted() as caught:
        for source in (unfit, unfit, other, unfit):
            with use_kernel_mapping({"Add": {"cpu": source}}):
                for layer in (first, second, first):
                    assert layer(X)[0] == 1
    messages = [str(warning.message) for warning in caught]
    assert all(warning.category is KernelsWarning for warning in caught)
    assert ["Unfit" in message for message in messages] == [True, False]
    assert "forward takes other parameters" in messages[0]


def test_warning_turned_into_an_error_leaves_things_usable(make_layer: Make) -> None:
    """With KernelsWarning filtered to raise, the call that would warn raises, and the next one runs."""
    layer = make_layer()()
    unfit = type("Unfit", (nn.Module,), {"forward": lambda self: 0})
    with use_kernel_mapping({"Add": {"cpu": unfit}}):
        with never(KernelsWarning):
            with pytest.raises(KernelsWarning, match="Unfit"):
                layer(X)
        assert layer(X)[0] == 1


def test_strict_raises_with_the_whole_reason(
    make_layer: Make, make_kernel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KERNELS_STRICT=1 raises NoKernelError where a kernel was offered and refused, and only there."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    layer = make_layer()()
    assert layer(X)[0] == 1  # nothing offered: nothing to be strict about

    class Broken:
        def load(self) -> Any:
            raise OSError("the disk is full")

        def __repr__(self) -> str:
            return "Broken()"

    unfit = type("Unfit", (nn.Module,), {"forward": lambda self: 0})
    with use_kernel_mapping({"Add": {"cpu": [Broken(), unfit]}}), pytest.raises(NoKernelError) as caught:
        layer(X)
    for part in ("Broken()", "OSError: the disk is full", "Unfit", "layer:  (x)", "kernel: ()", "KERNELS_STRICT"):
        assert part in str(caught.value)
    with use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        assert layer(X)[0] == 10
