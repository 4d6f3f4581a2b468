"""Processes in which PyTorch calls one of its private names otherwise, as a release to come may do.

Run as a script, it is a server: it imports PyTorch once and forks a process for each name that it reads. In that
process the name is renamed everywhere in PyTorch, so that PyTorch itself still works where this is possible; then
`kernels_core` is imported for the first time, and used. One line of JSON comes back: each use, and how it went.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import json
import os
import pkgutil
import re
import select
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from patience import PATIENCE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

MARKERS = ("_torchdynamo_inline", "_torchdynamo_disable", "_dynamo_marked_constant")
"""Attributes of functions that Dynamo reads."""

INSTANCES = ("OpOverload._schema", "_OpNamespace._dir")
"""Attributes that no class has, but each instance."""

REFERENCE, INFERENCE, TRAINING = 0.0, 1000.0, 2000.0
"""Added to the right answer by each of the forwards, to tell who served."""


_functions: list[types.FunctionType] = []
"""All functions of PyTorch."""


# --- Renaming ----------------------------------------------------------------------------------------


def new(old: str) -> str:
    """Return the name by which PyTorch calls something from now on; the old one is no part of it."""
    return f"{old[:-1]}_renamed"


def replaced(code: types.CodeType, old: str) -> types.CodeType:
    """Return code that calls something otherwise: as a name, an attribute, or a string such as that of `getattr`."""
    constants = tuple(
        replaced(c, old) if isinstance(c, types.CodeType) else new(c) if isinstance(c, str) and c == old else c
        for c in code.co_consts
    )
    names = tuple(new(name) if name == old else name for name in code.co_names)
    return (
        code
        if (constants, names) == (code.co_consts, code.co_names)
        else code.replace(co_consts=constants, co_names=names)
    )


def rename(path: str) -> None:
    """Let PyTorch call something otherwise; `module:name`, `module:Class.name`, a module, or a marker."""
    old = re.split("[.:]", path)[-1]
    theirs = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "torch" and m is not None]
    for function in _functions:
        code = replaced(function.__code__, old)
        if code is not function.__code__:
            function.__code__ = code
        if old in MARKERS and old in function.__dict__:
            function.__dict__[new(old)] = function.__dict__.pop(old)
    if path in MARKERS:
        torch.__version__ = "2.99.0"  # within one release, a marker does not change
        get_data = pkgutil.get_data
        pkgutil.get_data = lambda *where: (get_data(*where) or b"").replace(old.encode(), new(old).encode())
        return
    owner: Any = pkgutil.resolve_name(path[: -len(old) - 1])
    if isinstance(owner, type):
        _rename_member(owner, old)
    elif old in vars(owner):
        value = vars(owner)[old]
        for module in theirs:
            if vars(module).get(old) is value:
                setattr(module, new(old), value)
                delattr(module, old)
        assert not is_there(path)
    elif old in getattr(owner, "_config", ()):  # an option of Dynamo
        owner._config[new(old)] = owner._config.pop(old)
        assert not is_there(path)
    else:
        _rename_member(type(owner), old)


def is_there(path: str) -> bool:
    """Whether PyTorch has a name."""
    if path in MARKERS:
        return True
    with contextlib.suppress(ImportError, AttributeError):
        pkgutil.resolve_name(path)
        return True
    return path.endswith(INSTANCES)


def _rename_member(cls: type[Any], old: str) -> None:
    """Rename a method, a descriptor of a class written in C, or an attribute of instances."""
    member = inspect.getattr_static(cls, old, None)
    if old in vars(cls):
        setattr(cls, new(old), member)
        delattr(cls, old)
        return

    def gone(instance: Any, *value: Any) -> Any:
        raise AttributeError(f"{cls.__name__} has no attribute {old!r}")

    def get(instance: Any) -> Any:
        return instance.__dict__[old] if member is None else member.__get__(instance)

    def put(instance: Any, value: Any) -> None:
        instance.__dict__[old] = value

    setattr(cls, new(old), property(get, put))
    setattr(cls, old, property(gone, gone))


# --- Plain uses of PyTorch, to find out whether it lives without a name -----------------------------------


class Plain(nn.Module):
    """Multiplies by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def x() -> torch.Tensor:
    """Return an input."""
    return torch.tensor([1.0, -1.0, 2.0])


def compiled(layer: Any) -> Any:
    """Compile a layer anew, without graph breaks."""
    torch._dynamo.reset()
    return torch.compile(layer, backend="eager", fullgraph=True)


def derived(run: Callable[..., Any], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of a recorded call, and the gradient of the weight."""
    output = run(x())
    return output.detach(), torch.autograd.grad(output.sum(), weight)[0]


def tangent(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and tangent of a call with forward-mode differentiation, under `no_grad`."""
    with torch.no_grad(), forward_ad.dual_level():
        output = forward_ad.unpack_dual(layer(forward_ad.make_dual(x(), torch.ones(3))))
        return output.primal.clone(), output.tangent.clone()


def exported(layer: nn.Module) -> Any:
    """Export a layer, by running it under modes rather than by Dynamo."""
    with torch.no_grad():
        return torch.export.export(layer, (x(),), strict=False).module()


def plain_operator() -> None:
    """Compile a custom operator."""
    name = f"renamed_torch::twice_{os.getpid()}"
    twice: Any = torch.library.custom_op(name, lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor")
    twice.register_fake(torch.empty_like)
    torch.testing.assert_close(compiled(twice)(x()), x() * 2)


PLAIN: dict[str, Callable[[], object]] = {
    "compiled": lambda: (compiled(Plain())(x()), derived(compiled(m := Plain()), m.weight)),
    "operator": plain_operator,
    "exported": lambda: exported(Plain())(x()),
    "transformed": lambda: torch.func.grad(lambda t: torch.func.vmap(Plain())(t[None]).sum())(x()),
    "forward mode": lambda: tangent(Plain()),
    "checkpointed": lambda: derived(lambda t: checkpoint(m, t, use_reentrant=False), (m := Plain()).weight),
    "traced": lambda: torch.jit.trace(Plain(), (x(),)),
}
"""By use: the same without us. Where this fails, PyTorch does not live without the name."""


# --- Uses of kernels_core ------------------------------------------------------------------------------


def right(output: torch.Tensor, *served: float) -> None:
    """Raise unless an output is right, and came from one of the forwards, each known by the number that it adds."""
    added = round(float((output.detach() - x() * torch.tensor([1.0, 2.0, 3.0]))[0]))
    torch.testing.assert_close(output.detach(), x() * torch.tensor([1.0, 2.0, 3.0]) + added)
    assert added in served, f"{added} was added, not one of {served}"


def make_layer(name: str, **kernels: Any) -> nn.Module:
    """Make a decorated layer, and map its kernels."""
    from kernels_core import Mode, use_kernel_forward_from_hub
    from kernels_plugins import register_kernel_mapping

    by_mode: dict[Any, Any] = {Mode[mode.upper()]: kernel for mode, kernel in kernels.items() if mode != "any"}
    by_mode |= {mode | Mode.TORCH_COMPILE: kernel for mode, kernel in by_mode.items()}
    register_kernel_mapping({name: {"cpu": by_mode or kernels["any"]}})
    return use_kernel_forward_from_hub(name)(type(name, (Plain,), {"forward": lambda self, x: x * self.weight}))()


def make_kernel(added: float, *, backward: bool = True, compiles: bool = True) -> type[nn.Module]:
    """Make a kernel that adds a number of its own; without backward, it computes outside autograd."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + added

    def detached(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach() * self.weight.detach() + added

    members = {"can_torch_compile": compiles, "has_backward": backward}
    return type("Kernel", (nn.Module,), {**members, "forward": forward if backward else detached})


def eager() -> None:
    """Call a layer with one kernel."""
    layer = make_layer("Eager", any=make_kernel(TRAINING))
    with torch.no_grad():
        right(layer(x()), TRAINING)
    for _ in range(2):
        output, gradient = derived(layer, layer.weight)
        right(output, TRAINING)
        torch.testing.assert_close(gradient, x())


def modes() -> nn.Module:
    """Call a layer with one kernel for each mode."""
    layer = make_layer("Modes", inference=make_kernel(INFERENCE, backward=False), training=make_kernel(TRAINING))
    for _ in range(2):
        with torch.no_grad():
            right(layer(x()), INFERENCE, TRAINING)
        output, gradient = derived(layer, layer.weight)
        right(output, TRAINING)
        torch.testing.assert_close(gradient, x())
    return layer


def compiled_modes() -> None:
    """Compile such a layer."""
    layer = modes()
    run = compiled(layer)
    with torch.no_grad():
        right(run(x()), INFERENCE, TRAINING)
    output, gradient = derived(run, layer.weight)
    right(output, TRAINING)
    torch.testing.assert_close(gradient, x())


def operator() -> None:
    """Compile a layer whose kernel is an operator."""
    from kernels_plugins import opaque

    layer = make_layer("Opaque", any=opaque(make_kernel(TRAINING, compiles=False)))
    run = compiled(layer)
    output, gradient = derived(run, layer.weight)
    right(output, TRAINING, REFERENCE)
    torch.testing.assert_close(gradient, x())
    right(layer(x()), TRAINING)


def transformed() -> None:
    """Differentiate and vectorize a layer that has not proven to keep gradients."""
    layer = make_layer("Transformed", any=make_kernel(TRAINING))
    torch.testing.assert_close(torch.func.grad(lambda t: torch.func.vmap(layer)(t[None]).sum())(x()), layer.weight.data)
    right(derived(layer, layer.weight)[0], TRAINING)  # no transform has put it into quarantine


def forward_mode() -> None:
    """Differentiate such a layer forwards, where the kernel for inference would lose it."""
    layer = modes()
    output, gradient = tangent(layer)
    right(output, TRAINING)
    torch.testing.assert_close(gradient, layer.weight.data)


def checkpointed() -> None:
    """Recompute a layer that has not proven to keep gradients."""
    layer = make_layer("Checkpointed", any=make_kernel(TRAINING))
    output, gradient = derived(lambda t: checkpoint(layer, t, use_reentrant=False), layer.weight)
    right(output, TRAINING)
    torch.testing.assert_close(gradient, x())


def breaking() -> None:
    """Call a kernel that raises, where the reference does not."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken kernel")

    layer = make_layer("Breaking", any=type("Broken", (nn.Module,), {"forward": forward}))
    right(layer(x()), REFERENCE)


def losing() -> None:
    """Call a kernel that loses gradients and does not say so."""
    kernel = make_kernel(TRAINING, backward=False)
    kernel.has_backward = True  # type: ignore[attr-defined]
    layer = make_layer("Losing", any=kernel)
    output, gradient = derived(layer, layer.weight)
    right(output, REFERENCE)
    torch.testing.assert_close(gradient, x())


def internals() -> None:
    """Call everything that torch_internals offers, with ordinary values."""
    from kernels_core import torch_internals as ours

    tensor, other = x(), x()
    before = ours.version(tensor)
    tensor.add_(1)
    assert before == ours.version(tensor) == -1 or before + 1 == ours.version(tensor)
    assert ours.storage_key(tensor) == ours.storage_key(tensor[1:]) != ours.storage_key(other)
    assert not ours.is_watched() and not ours.in_forward_ad() and ours.saved_tensors_hooks() is None
    assert not ours.in_transform() and ours.dispatch_mode_count() == 0
    with ours.no_dispatch_modes(), ours.no_torch_function():
        assert type(torch.ones(2)) is torch.Tensor
    pair = type("Pair", (tuple,), {})
    nested = {"a": [1, (2, 3)], "b": inspect.FrameInfo}
    assert ours.tree_leaves(nested) == [1, 2, 3, inspect.FrameInfo] and ours.tree_leaves(pair([1])) == [pair([1])]
    assert ours.tree_map(lambda leaf: leaf, nested) == nested
    with ours.fake_copies([tensor]) as (fake,):
        assert fake.shape == tensor.shape
    inplace, plain = torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor
    assert next(id(t) for t in ours.written_arguments(inplace, (tensor, other), {})) == id(tensor)
    assert list(ours.written_arguments(plain, (tensor, other), {})) == []
    with ours.many_compilations():
        pass
    assert ours.on_cuda_start(lambda: None) is hasattr(torch.cuda, "_lazy_call")
    assert ours.disabled_when_called(lambda: 5)() == 5 == ours.disabled_lazily(lambda: 5, reason="none")()


def watched() -> None:
    """Notice who looks at a call."""
    from kernels_core import torch_internals as ours

    noticed = []
    torch.func.vmap(lambda t: (noticed.append(ours.is_watched()), t)[1])(x())
    torch.jit.trace(lambda t: (noticed.append(ours.is_watched()), t + 1)[1], (x(),), check_trace=False)
    with FakeTensorMode():
        noticed.append(ours.is_watched())
    assert noticed == [True, True, True], noticed


def marked() -> None:
    """Compile a call of a function that Dynamo must not trace."""
    from kernels_core import torch_internals as ours

    look = ours.disabled_lazily(lambda: None, reason="it looks")
    try:
        compiled(lambda t: (look(), t + 1)[1])(x())
    except Exception as error:
        assert "it looks" in str(error) or ours.release < (2, 7), error
    else:
        raise AssertionError("it was traced")


USES: dict[str, tuple[Callable[[], object], str | None]] = {
    "eager": (eager, None),
    "modes": (modes, None),
    "breaking": (breaking, None),
    "losing": (losing, None),
    "internals": (internals, None),
    "watched": (watched, "traced"),
    "compiled": (compiled_modes, "compiled"),
    "marked": (marked, "compiled"),
    "operator": (operator, "operator"),
    "exported": (lambda: right(exported(make_layer("Exported", any=make_kernel(TRAINING)))(x()), TRAINING), "exported"),
    "transformed": (transformed, "transformed"),
    "forward mode": (forward_mode, "forward mode"),
    "checkpointed": (checkpointed, "checkpointed"),
}
"""By name: a use of ours, and the plain use that PyTorch must be capable of for it."""

PROTECTED = ("breaking", "losing")
"""Uses in which one warning has to be given; in others, none."""


# --- Processes ---------------------------------------------------------------------------------------------


def attempt(use: Callable[[], object]) -> str:
    """Return "ok", or how it failed, warnings of ours included."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            use()
            outcome = "ok"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
    ours = [str(entry.message) for entry in caught if entry.category.__name__ == "KernelsWarning"]
    return outcome if not ours else f"{outcome}; {len(ours)} warnings: {ours}"


def run(path: str) -> dict[str, str]:
    """Rename something, and return how each use went."""
    if path.startswith("version "):
        torch.__version__ = path.removeprefix("version ")
    elif missing := [name for name in path.split() if not is_there(name)]:
        return {"absent": ", ".join(missing)}
    else:
        for name in path.split():
            rename(name)
    outcomes: dict[str, str] = {}
    plain = {name: attempt(use) for name, use in PLAIN.items()}
    outcomes["import"] = attempt(lambda: importlib.import_module("kernels_plugins"))
    for name, (use, needed) in USES.items():
        broken = needed is not None and plain[needed] != "ok"
        outcomes[name] = f"PyTorch: {plain[str(needed)]}" if broken else attempt(use)
    return outcomes


def serve() -> None:
    """Fork a process for each line of standard input."""
    engine = torch.autograd.Variable._execution_engine
    # Builds for accelerators start threads with the first backward, and such a process cannot run one after a fork.
    torch.autograd.Variable._execution_engine = types.SimpleNamespace(run_backward=lambda *args, **kwargs: ())
    for use in PLAIN.values():  # so that PyTorch has imported all modules that it imports late
        attempt(use)
    torch.autograd.Variable._execution_engine = engine
    assert "kernels_core" not in sys.modules
    _functions.extend(
        found
        for found in gc.get_objects()
        if type(found) is types.FunctionType and (found.__module__ or "").partition(".")[0] == "torch"
    )
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), os.fdopen(writing, "w") as pipe:
                try:
                    outcomes = run(line.strip())
                except BaseException:
                    outcomes = {"process": traceback.format_exc()}
                json.dump(outcomes, pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            ready, _, _ = select.select([pipe], [], [], PATIENCE)
            if not ready:
                os.kill(child, signal.SIGKILL)
            print(pipe.read() or json.dumps({"process": "hung" if not ready else "died"}), flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    serve()
