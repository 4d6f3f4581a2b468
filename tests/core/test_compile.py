"""Under torch.compile and torch.export: no graph break, the kernel inlined, as few compilations as answers."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from warned import noted

from kernels_core import KernelsWarning, NoKernelError, use_kernel_forward_from_hub
from kernels_core.testing import HookRecorder
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)
WARM = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")


@pytest.fixture
def traceable(make_kernel: Make) -> Make:
    """Make kernels that can be traced."""
    return lambda added, **more: make_kernel(added, can_torch_compile=True, **more)


def operations(counter: Any, graph: int = -1) -> list[str]:
    """Return the names of the operations in one of the graphs whose results are used."""
    nodes = [node for node in counter.graphs[graph].graph.nodes if node.op.startswith("call_") and node.users]
    return [getattr(node.target, "__name__", str(node.target)) for node in nodes]


@WARM
def test_reference_compiles_into_one_graph(make_layer: Make, compiled: Make, warm: bool) -> None:
    """A decorated layer without kernels compiles fullgraph, once, to nothing but its reference."""
    layer = make_layer()()
    if warm:
        layer(X)
    run, counter = compiled(layer)
    for _ in range(3):
        assert run(X)[0] == 1
    assert counter.frame_count == 1
    assert operations(counter) == ["add"]


@WARM
def test_kernel_graph_is_inlined(compiled: Make, warm: bool) -> None:
    """The graph holds the kernel's own operations, and none of the reference or of the dispatcher."""

    @use_kernel_forward_from_hub("Trig")
    class Trig(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cos(x)

    class Kernel(nn.Module):
        can_torch_compile = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x) * 2

    layer = Trig()
    with use_kernel_mapping({"Trig": {"cpu": Kernel}}):
        if warm:
            layer(X)
        run, counter = compiled(layer)
        run(X), run(X)
    assert counter.frame_count == 1
    assert operations(counter) == ["sin", "mul"]


@WARM
def test_decorated_function_is_inlined(compiled: Make, warm: bool) -> None:
    """A decorated function called from compiled code is one graph with its caller, and follows scopes."""

    @use_kernel_forward_from_hub("act")
    def act(x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x)

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)

    kernel.can_torch_compile = True  # type: ignore[attr-defined]

    def caller(x: torch.Tensor) -> torch.Tensor:
        return act(x + 1) * 2

    inside = use_kernel_mapping({"act": {"cpu": kernel}})
    if warm:
        act(X)
        with inside:
            act(X)
    run, counter = compiled(caller)
    for _ in range(3):
        assert torch.equal(run(X), torch.cos(X + 1) * 2)
        with inside:
            assert torch.equal(run(X), torch.sin(X + 1) * 2)
    assert counter.frame_count == 2
    assert [operations(counter, i) for i in (0, 1)] == [["add", "cos", "mul"], ["add", "sin", "mul"]]


@WARM
def test_model_of_several_layers(make_layer: Make, traceable: Make, compiled: Make, warm: bool) -> None:
    """A model of several layers, some served and some not, is one graph, and one more per mapping."""
    first, second, third = make_layer("First"), make_layer("Second"), make_layer("Third")
    model = nn.Sequential(first(), second(), nn.ReLU(), third(), first(), first())
    if warm:
        model(X)
    run, counter = compiled(model)
    assert run(X)[0] == 5
    scopes = [
        use_kernel_mapping({"First": {"cpu": traceable(10)}}),
        use_kernel_mapping({"Second": {"cpu": traceable(100)}, "Third": {"cpu": traceable(1000)}}),
    ]
    for _ in range(3):
        for inside, expected in zip(scopes, (32, 1103), strict=True):
            with inside:
                assert run(X)[0] == expected
        with scopes[0], scopes[1]:
            assert run(X)[0] == 1130
        assert run(X)[0] == 5
    assert counter.frame_count == 4


@WARM
def test_scopes_recompile_once_each(make_layer: Make, traceable: Make, compiled: Make, warm: bool) -> None:
    """A scope compiles once when first entered, gives its result, and never compiles again."""
    layer = make_layer()()
    scopes = {0: contextlib.nullcontext(), **{n: use_kernel_mapping({"Add": {"cpu": traceable(n)}}) for n in (10, 20)}}
    if warm:
        layer(X)
    run, counter = compiled(layer)
    for turn in range(4):
        for number, inside in scopes.items():
            with inside:
                assert run(X)[0] == (number or 1)
            if not turn:
                assert counter.frame_count == len([n for n in scopes if n <= number])
    assert counter.frame_count == 3


@WARM
def test_registering_recompiles_once_each(make_layer: Make, traceable: Make, compiled: Make, warm: bool) -> None:
    """A registered mapping compiles once, gives its result, and coming back to it compiles nothing."""
    layer = make_layer()()
    if warm:
        layer(X)
    run, counter = compiled(layer)
    assert run(X)[0] == 1
    ten, twenty = traceable(10), traceable(20)
    for _ in range(4):
        for number, kernel in ((10, ten), (20, twenty)):
            register_kernel_mapping({"Add": {"cpu": kernel}})
            assert run(X)[0] == run(X)[0] == number
        register_kernel_mapping({}, inherit_mapping=False)
        assert run(X)[0] == 1
    assert counter.frame_count == 3


@WARM
def test_unrelated_changes_do_not_recompile(
    make_layer: Make, traceable: Make, compiled: Make, isolated_plugins: Any, warm: bool
) -> None:
    """Mappings and scopes of other layers, plugins, and newly decorated layers leave compiled code alone."""
    from kernels_core import hookimpl

    class Offers:
        @hookimpl
        def kernels_mapping(self) -> Any:
            return {"Elsewhere": {"cpu": traceable(5)}}

    layer = make_layer()()
    if warm:
        layer(X)
    run, counter = compiled(layer)
    run(X)
    register_kernel_mapping({"Other": {"cpu": traceable(3)}})
    assert run(X)[0] == 1
    isolated_plugins.register(Offers(), "offers")
    assert run(X)[0] == 1
    other = make_layer("Other")()
    assert other(X)[0] == 3
    assert run(X)[0] == 1
    assert counter.frame_count == 1
    for _ in range(3):
        with use_kernel_mapping({"Other": {"cpu": traceable(4)}}):
            assert other(X)[0] == 4
            assert run(X)[0] == 1
    assert counter.frame_count <= 2  # the first of those scopes may cost one


@WARM
def test_transient_scopes_with_equal_kernels(make_layer: Make, traceable: Make, compiled: Make, warm: bool) -> None:
    """A new scope object on each step, with the same kernel inside, compiles once and not at each step."""
    layer, kernel = make_layer()(), traceable(10)
    if warm:
        layer(X)
    run, counter = compiled(layer)
    for _ in range(6):
        assert run(X)[0] == 1
        with use_kernel_mapping({"Add": {"cpu": kernel}}):
            assert run(X)[0] == 10
    assert counter.frame_count == 2


@pytest.mark.parametrize("seed", range(6))
def test_interleaved_eager_and_compiled_calls(make_layer: Make, traceable: Make, compiled: Make, seed: int) -> None:
    """In any order of eager calls, compiled calls, scopes and registrations: right, with at most one graph extra."""
    chance = random.Random(seed)
    layer = make_layer()()
    kernels = {number: traceable(number) for number in (10, 20)}
    scopes = {number: use_kernel_mapping({"Add": {"cpu": kernel}}) for number, kernel in kernels.items()}
    run, counter = compiled(layer)
    registered, answers = 1, set()
    for _ in range(60):
        step = chance.choice(["eager", "compiled", "compiled in scope", "eager in scope", "register", "drop"])
        number = chance.choice(list(kernels))
        if step == "register":
            register_kernel_mapping({"Add": {"cpu": kernels[number]}}, inherit_mapping=False)
            registered = number
        elif step == "drop":
            register_kernel_mapping({}, inherit_mapping=False)
            registered = 1
        else:
            inside = "scope" in step
            with scopes[number] if inside else contextlib.nullcontext():
                expected = number if inside else registered
                call = layer if "eager" in step else run
                assert call(X)[0] == expected
                answers |= {expected} if call is run else set()
    assert counter.frame_count <= len(answers) + 1


@WARM
def test_mode_decides_under_compile(make_layer: Make, make_kernel: Make, compiled: Make, warm: bool) -> None:
    """A kernel without backward is traced for inference only, and one that cannot be traced never."""
    layer = make_layer()()
    no_backward = use_kernel_mapping({"Add": {"cpu": make_kernel(10, can_torch_compile=True, has_backward=False)}})
    untraceable = use_kernel_mapping({"Add": {"cpu": make_kernel(20)}})
    recorded = torch.zeros(2, requires_grad=True)
    if warm:
        for inside in (no_backward, untraceable):
            with inside:
                layer(X), layer(recorded)
    run, counter = compiled(layer)
    for _ in range(3):
        with no_backward:
            assert run(X)[0] == 10
            assert run(recorded)[0] == 1
            with torch.no_grad():
                assert run(recorded)[0] == 10
            with torch.inference_mode():
                assert run(torch.zeros(2))[0] == 10
        with untraceable:
            assert run(X)[0] == 1
            assert layer(X)[0] == 20
    settled = counter.frame_count
    with no_backward:
        run(X), run(recorded)
    with untraceable:
        run(X)
    assert counter.frame_count == settled <= 6


def test_sources_for_each_mode(make_layer: Make, traceable: Make, compiled: Make) -> None:
    """A source registered for compiled inference serves compiled calls, and another one eager calls."""
    from kernels_core import Mode

    layer = make_layer()()
    mapping = {
        Mode.INFERENCE | Mode.TORCH_COMPILE: traceable(10),
        Mode.INFERENCE: traceable(20),
        Mode.TRAINING | Mode.TORCH_COMPILE: traceable(30),
        Mode.TRAINING: traceable(40),
    }
    recorded = torch.zeros(2, requires_grad=True)
    with use_kernel_mapping({"Add": {"cpu": mapping}}):
        run, counter = compiled(layer)
        for _ in range(2):
            assert [run(X)[0].item(), run(recorded)[0].item()] == [10, 30]
            assert [layer(X)[0].item(), layer(recorded)[0].item()] == [20, 40]
    assert counter.frame_count == 2


def takes_list(xs: list[torch.Tensor], scale: int = 2) -> torch.Tensor:
    return xs[0] * scale


def takes_dict(*, d: dict[str, torch.Tensor]) -> torch.Tensor:
    return d["a"] * 2


def takes_none_first(mask: torch.Tensor | None = None, x: torch.Tensor | None = None) -> torch.Tensor:
    assert x is not None
    return x * 2


def takes_anything(*xs: torch.Tensor, **more: Any) -> torch.Tensor:
    return xs[0] * 2


def takes_number_first(n: int, x: torch.Tensor) -> torch.Tensor:
    return x * n


def takes_keyword_only(*, x: torch.Tensor, scale: int = 2) -> torch.Tensor:
    return x * scale


KINDS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "list": (takes_list, ([torch.ones(2)],), {}),
    "tuple": (takes_list, ((torch.ones(2),),), {}),
    "dict": (takes_dict, (), {"d": {"a": torch.ones(2)}}),
    "None first": (takes_none_first, (), {"x": torch.ones(2)}),
    "varargs": (takes_anything, (torch.ones(2), torch.ones(2)), {"k": 3}),
    "number first": (takes_number_first, (2, torch.ones(2)), {}),
    "keyword only": (takes_keyword_only, (), {"x": torch.ones(2)}),
}


@WARM
@pytest.mark.parametrize("kind", KINDS)
def test_signatures_compile(compiled: Make, kind: str, warm: bool) -> None:
    """Calls whose first argument is no tensor compile without a graph break, too, and are served."""
    plain, args, kwargs = KINDS[kind]
    decorated = use_kernel_forward_from_hub("Kinds")(plain)

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = plain(*args, **kwargs) * 10
        return result

    import inspect

    kernel.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    kernel.can_torch_compile = True  # type: ignore[attr-defined]
    inside = use_kernel_mapping({"Kinds": {"cpu": kernel}})
    if warm:
        decorated(*args, **kwargs)
        with inside:
            decorated(*args, **kwargs)
    run, counter = compiled(decorated)
    for _ in range(2):
        assert run(*args, **kwargs)[0] == 2
        with inside:
            assert run(*args, **kwargs)[0] == 20
    assert counter.frame_count == 2


@WARM
def test_device_from_parameters_under_compile(compiled: Make, warm: bool) -> None:
    """A call without a tensor argument takes the device of the module's parameter under compile, too."""

    @use_kernel_forward_from_hub("Weights")
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, n: int) -> torch.Tensor:
            return self.weight * n

    class Kernel(nn.Module):
        can_torch_compile = True
        has_backward = False

        def forward(self, n: int) -> torch.Tensor:
            return self.weight * n * 10

    layer = Weights()
    with use_kernel_mapping({"Weights": {"cpu": Kernel}}):
        if warm:
            with torch.no_grad():
                layer(2)
        run, counter = compiled(layer)
        for _ in range(2):
            with torch.no_grad():
                assert run(2)[0] == 20
            assert run(2)[0] == 2
    assert counter.frame_count == 2


@WARM
def test_condition_is_traced(make_layer: Make, traceable: Make, compiled: Make, warm: bool) -> None:
    """The condition decides under compile as it does eagerly, and a change of it has an effect."""
    layer = make_layer(condition=lambda module: module.fast)()
    layer.fast = True
    with use_kernel_mapping({"Add": {"cpu": traceable(10)}}):
        if warm:
            layer(X)
        run, counter = compiled(layer)
        for _ in range(2):
            layer.fast = True
            assert run(X)[0] == 10
            layer.fast = False
            assert run(X)[0] == 1
    assert counter.frame_count == 2


def test_warm_compiled_calls_ask_nobody(
    make_layer: Make, traceable: Make, compiled: Make, hook_recorder: HookRecorder
) -> None:
    """Once compiled, calls in and out of scopes call no hook."""
    layer, inside = make_layer()(), use_kernel_mapping({"Add": {"cpu": traceable(10)}})
    run, _ = compiled(layer)

    def both() -> None:
        assert run(X)[0] == 1
        with inside:
            assert run(X)[0] == 10

    both()
    hook_recorder.clear()
    both()
    assert hook_recorder.names() == []


def test_no_fallback_raises_under_compile(make_layer: Make) -> None:
    """use_fallback=False raises NoKernelError with the reasons in compiled code where graph breaks are allowed."""
    torch._dynamo.reset()
    run = torch.compile(make_layer(use_fallback=False)(), backend="eager")
    with pytest.raises(NoKernelError, match="no candidate was offered"):
        run(X)
    torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__ < "2.7", reason="this Dynamo tells no reasons")
def test_no_fallback_says_why_under_fullgraph(make_layer: Make, compiled: Make) -> None:
    """With fullgraph=True the error that the user sees tells that no kernel serves which layer."""
    run, _ = compiled(make_layer("Important", use_fallback=False)())
    with pytest.raises(Exception, match=r"No kernel serves layer 'Important'"):
        run(X)


def test_warning_while_tracing(make_layer: Make, make_kernel: Make, compiled: Make) -> None:
    """A kernel that cannot be traced is warned about once while compiling, and breaks no graph."""
    layer = make_layer()()
    with noted() as caught, use_kernel_mapping({"Add": {"cpu": make_kernel(10)}}):
        run, counter = compiled(layer)
        assert run(X)[0] == run(X)[0] == 1
    ours = [str(warning.message) for warning in caught if warning.category is KernelsWarning]
    assert len(ours) == 1 and "can_torch_compile" in ours[0]
    assert counter.frame_count == 1


@pytest.mark.skipif(torch.__version__ < "2.7", reason="this PyTorch exports no tensors that code refers to")
def test_tensor_made_while_loading_is_real(make_layer: Make, compiled: Make) -> None:
    """A kernel that makes a tensor when it is loaded, cold under tracing, gets a real one."""
    made = []

    class Source:
        def load(self) -> type[nn.Module]:
            table = torch.full((2,), 10.0)
            made.append(type(table))

            class Table(nn.Module):
                can_torch_compile = True

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    return x + table

            return Table

    for strict in (None, False, True):
        layer = make_layer()()
        with use_kernel_mapping({"Add": {"cpu": Source()}}):
            if strict is None:
                run, _ = compiled(layer)
            else:
                run = torch.export.export(layer, (X,), strict=strict).module()
            assert run(X)[0] == 10
    assert made == [torch.Tensor] * 3


@WARM
@pytest.mark.parametrize("strict", [True, False])
def test_export(make_layer: Make, traceable: Make, make_kernel: Make, strict: bool, warm: bool) -> None:
    """torch.export holds the kernel of the scope it ran in, for good; untraceable kernels are left out."""
    layer = make_layer()()
    if warm:
        layer(X)
    plain = torch.export.export(layer, (X,), strict=strict)
    with use_kernel_mapping({"Add": {"cpu": traceable(10)}}):
        if warm:
            layer(X)
        served = torch.export.export(layer, (X,), strict=strict)
        assert plain.module()(X)[0] == 1
    with use_kernel_mapping({"Add": {"cpu": make_kernel(20)}}):
        assert torch.export.export(layer, (X,), strict=strict).module()(X)[0] == 1
        assert layer(X)[0] == 20
    assert served.module()(X)[0] == 10
    assert layer(X)[0] == 1


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_model_with_state(traceable: Make, strict: bool) -> None:
    """Exporting a model with parameters keeps them, dynamic shapes work, and the numbers are the eager ones."""

    @use_kernel_forward_from_hub("Gain")
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    class Kernel(nn.Module):
        can_torch_compile = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x * 10

    model = nn.Sequential(nn.Linear(2, 2), Gain())
    batch = torch.export.Dim("batch", min=2, max=16)
    with use_kernel_mapping({"Gain": {"cpu": Kernel}}):
        expected = model(torch.ones(5, 2))
        exported = torch.export.export(model, (torch.ones(3, 2),), dynamic_shapes=({0: batch},), strict=strict)
    assert {"0.weight", "0.bias", "1.weight"} <= set(exported.state_dict)
    assert torch.allclose(exported.module()(torch.ones(5, 2)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_under_compile(compiled: Make, backend: str) -> None:
    """Gradients through compiled kernels are those of the eager kernel, and no kernel without backward is used."""
    if backend == "inductor" and not any(os.access(f"{d}/g++", os.X_OK) for d in os.environ["PATH"].split(":")):
        pytest.skip("inductor needs a C++ compiler on the CPU")

    @use_kernel_forward_from_hub("Square")
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x * self.weight

    class Good(nn.Module):
        can_torch_compile = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x * self.weight * 5

    class NoBackward(nn.Module):
        can_torch_compile = True
        has_backward = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * x * self.weight).detach() * 7

    layer = Square()
    run, counter = compiled(layer, backend)
    for kernel, factor in ((Good, 5), (NoBackward, 1)):
        with use_kernel_mapping({"Square": {"cpu": kernel}}):
            x = torch.tensor([1.0, 2.0], requires_grad=True)
            layer.weight.grad = None
            run(x).sum().backward()
            assert x.grad is not None and x.grad.tolist() == [4 * factor, 12 * factor]
            assert layer.weight.grad is not None and layer.weight.grad.tolist() == [factor, 4 * factor]
    assert counter.frame_count == 2


def test_compiled_code_in_threads_follows_their_scopes(make_layer: Make, traceable: Make, compiled: Make) -> None:
    """Compiled code called by two threads in different scopes gives each its own result."""
    import threading

    layer, wrong = make_layer()(), []
    run, counter = compiled(layer)
    scopes = {n: use_kernel_mapping({"Add": {"cpu": traceable(n)}}) for n in (10, 20)}
    for number, inside in scopes.items():
        with inside:
            assert run(X)[0] == number
    run(X)
    assert counter.frame_count == 3  # one after the other, each answer is compiled once

    def work(number: int) -> None:
        with scopes[number]:
            for _ in range(50):
                if run(X)[0] != number:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in (10, 20, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    # Dynamo compiles an entry again now and then when threads look it up at once, for undecorated code as well.
    assert counter.frame_count <= 3 + len(threads)
