"""The texts of generated functions: pure, importable without PyTorch, and the same calls whatever the machine."""

from __future__ import annotations

import dis
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels_core import decorated_layer, forward_source, use_kernel_forward_from_hub
from kernels_core.forward_source import PLAIN, ForwardSource, read_parameters
from kernels_core.guards.gradients import is_recorded, requires_grad
from kernels_core.guards.proof import read_attributes

from .test_signature import build, calls, same, signatures

ACCELERATORS = [None, "cuda", "xpu", "mps"]
TRACED, LEVEL = "_kernels_traced_flag", "_kernels_level"


def make_source(signature: inspect.Signature, *, with_self: bool, reads: bool) -> ForwardSource:
    """Return the source for a function of that signature that was made just now."""
    function = build(signature, "reference", with_self=with_self)
    return ForwardSource(read_parameters(function), not with_self, reads, TRACED, LEVEL)


def texts(source: ForwardSource) -> list[str]:
    """Return all texts that one source gives."""
    forwards = [
        source.forward("layer0", accelerator=accelerator, has_condition=has_condition)
        for accelerator in ACCELERATORS
        for has_condition in (False, True)
    ]
    return [*forwards, source.frozen(), source.select("a", "b"), source.select_traced("a", "b"), source.adapted()]


def test_it_needs_no_torch() -> None:
    """The file is imported by a Python that has only the standard library."""
    file = Path(forward_source.__file__)
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('forward_source', {str(file)!r})\n"
        "sys.modules['forward_source'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.ForwardSource((), True).forward('layer0'))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def forward():\n")


@settings(max_examples=60, deadline=None)
@given(signatures(), st.booleans(), st.booleans())
def test_the_same_signature_gives_the_same_text(signature: inspect.Signature, with_self: bool, reads: bool) -> None:
    """Two functions with one signature get equal texts, which compile, and name nothing else than they are given."""
    one, other = (texts(make_source(signature, with_self=with_self, reads=reads)) for _ in range(2))
    assert one == other
    for text in one:
        (code,) = [c for c in compile(text, "text", "exec").co_consts if inspect.iscode(c)]
        assert all(name.startswith("_kernels_") or not is_global(code, name) for name in code.co_names), text


def is_global(code: Any, name: str) -> bool:
    """Whether a function reads a name that is neither an argument nor an attribute."""
    return any(each.argval == name and each.opname == "LOAD_GLOBAL" for each in dis.get_instructions(code))


class Mapped:
    """Replaces a tensor on some device, without PyTorch: cheaper than one, and there need be no such device."""

    def __init__(self, kind: str, index: int, requires_grad: bool) -> None:
        self.is_cpu, self.is_cuda, self.is_xpu, self.is_mps = (kind == name for name in ("cpu", "cuda", "xpu", "mps"))
        self._index = index
        self.requires_grad = requires_grad

    def get_device(self) -> int:
        return self._index


def compiled(text: str, **names: Any) -> Any:
    """Compile a generated function in a namespace like that of the dispatcher."""
    scope: dict[str, Any] = {
        TRACED: False,
        LEVEL: -1,
        "_kernels_absent": (AttributeError, IndexError),
        "_kernels_exception": Exception,
        "_kernels_failed": lambda error, *_: None,
        "_kernels_getattr": getattr,
        "_kernels_grad": lambda: True,
        "_kernels_has_trainable": lambda module: False,
        "_kernels_reads_trainable": lambda module: False,
        "_kernels_is_recorded": lambda module, values: any(getattr(v, "requires_grad", False) for v in values),
        "_kernels_outside_functions": lambda: True,
        "_kernels_in_transform": lambda: False,
        "_kernels_lossy": False,
        "_kernels_root": None,
        "_kernels_is_odd": lambda values: False,
        "_kernels_is_odd_module": lambda module: False,
        "_kernels_odd_parameters": [],
        "_kernels_parameter": nn.Parameter,
        "_kernels_passed_on": NotImplemented,
        "_kernels_plain": PLAIN,
        "_kernels_unfit": [],
        "_kernels_untraceable": [],
        "_kernels_watched": [True],
        "_kernels_requires_grad": lambda value: getattr(value, "requires_grad", False),
        "_kernels_tensor": Mapped,
        **names,
    }
    exec(text, scope)
    return scope[text.partition("(")[0].removeprefix("def ")]


@pytest.mark.parametrize("accelerator", ["cuda", "xpu", "mps"])
@pytest.mark.parametrize(
    ("accelerators", "where"),
    [(number, where) for number in (0, 1, 2) for where in ("cpu", "other", "first", "second")[: number + 2]],
)
def test_each_device_finds_its_kernel(accelerator: str, accelerators: int, where: str) -> None:
    """With no, one or several accelerators, a tensor on each gets its own kernel, and others go the cold way."""

    def function(x: Any, y: int = 1) -> None: ...

    def found(name: str) -> Any:
        return lambda *args: (name, args)

    class Frame:
        parent = None
        layer0_cpu = staticmethod(found("cpu"))

    names = [f"layer0_{accelerator}_{index}" for index in range(8)]
    for name in names[:accelerators]:
        setattr(Frame, name, staticmethod(found(name)))
    source = ForwardSource(read_parameters(function), True, False, TRACED, LEVEL)
    forward = compiled(
        source.forward("layer0", accelerator=accelerator),
        _kernels_frame=Frame,
        _kernels_hardware=type("Hardware", (), {"accelerators": accelerators}),
        _kernels_names=names,
        _kernels_unproven={},
        _kernels_cold=lambda module, values: found("cold"),
    )
    index = {"first": 0, "second": 1}.get(where, -1)
    x = Mapped(where if where in ("cpu", "other") else accelerator, index, False)
    expected = {"cpu": "cpu", "other": "cold"}.get(where, f"layer0_{accelerator}_{index}")
    assert forward(x, 2) == (expected, (x, 2))
    assert forward([x], 2)[0] == "cold"
    assert forward(None, 2)[0] == "cold"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_arguments_arrive_unchanged(data: Any) -> None:
    """Every generated function passes its arguments on to its kernel, for any signature."""
    signature, with_self = data.draw(signatures()), data.draw(st.booleans())
    args, kwargs = data.draw(calls(signature))
    if with_self:
        args = [nn.Module(), *args]
    source = make_source(signature, with_self=with_self, reads=data.draw(st.booleans()))
    expected = build(signature, "kernel", with_self=with_self)
    try:
        bound = inspect.signature(expected).bind(*args, **kwargs)
    except TypeError:
        return  # test_signature has the calls that do not fit
    bound.apply_defaults()
    frame = type("Frame", (), {"layer0_cpu": staticmethod(expected), "a": staticmethod(expected)})
    finding = {
        "_kernels_frame": lambda: frame,
        "_kernels_cold": lambda module, values: expected,
        "_kernels_find_proving": lambda kernel: None,
        "_kernels_published": lambda name: expected,
        "_kernels_unproven": data.draw(st.sampled_from([{}, {0: "a function"}])),
    }
    calling = {"_kernels_kernel": expected, "_kernels_proving": expected, "_kernels_elsewhere": expected}
    calling |= {"_kernels_unfit": lambda module, values: expected, "_kernels_dispatched": expected}
    calling |= {"_kernels_isinstance": lambda module, cls: cls is nn.Linear}
    calling |= {
        "_kernels_class": data.draw(st.sampled_from([nn.Module, nn.Linear, None])),
        "_kernels_unproven": data.draw(st.booleans()),
    }
    shared = {"_kernels_tensor": torch.Tensor, "_kernels_is_recorded": is_recorded}
    shared["_kernels_requires_grad"] = requires_grad
    want = expected(*args, **kwargs)
    for names, texts in (
        (finding, (source.forward("layer0"), source.select("a", "b"))),
        (calling, (source.frozen(), source.adapted())),
    ):
        for text in texts:
            function = compiled(text, **shared, **names)
            forward_source.set_defaults(function, source.parameters)
            assert same(function(*args, **kwargs), want), text


def wrapped(function: Any) -> Any:
    """Wrap as decorators in the wild do."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Base(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


def in_closure(self: Any, x: Any) -> Any:
    return next(self.weight for _ in (1,)) * x


def by_super(self: Any, x: Any) -> Any:
    return super(type(x), x) and x


def assigns(self: Any, x: Any) -> Any:
    self.count = x
    return x


def second_of_two(self: Any, x: Any) -> Any:
    return x * self.weight


def passes_on(self: Any, x: Any) -> Any:
    return abs(self, x)


def swaps(self: Any, x: Any) -> Any:
    self, x = x, self
    return x.weight * self


class CallsBase(Base):
    def forward(self, x: Any) -> Any:
        return super().forward(x)


READS = [in_closure, by_super, passes_on, swaps, CallsBase.forward, wrapped(Base.forward)]
READS += [lambda self, x: locals()["self"].weight, lambda self, x: eval("self.weight"), lambda *args: args[0].weight]


def ignores(self: Any, x: Any, *, scale: float = 1.0) -> Any:
    y = [x * scale for _ in range(2)]
    return sum(y)


@pytest.mark.parametrize("reference", READS, ids=lambda f: f.__qualname__)
def test_a_reference_that_may_read_its_module(reference: Any) -> None:
    """Everything through which a forward can reach tensors of its module is noticed."""
    layer = decorated_layer(use_kernel_forward_from_hub("Reads")(type("Reads", (nn.Module,), {"forward": reference})))
    assert read_attributes(layer) is None


@pytest.mark.parametrize(
    ("reference", "names"),
    [
        (ignores, []),
        (Base.forward, []),
        (lambda self, x: x, []),
        (assigns, []),
        (second_of_two, ["weight"]),
        (lambda self, x: self.inner.weight * self.scale(x), ["inner", "scale"]),
    ],
)
def test_a_reference_that_reads_some_attributes(reference: Any, names: list[str]) -> None:
    """A forward can lose gradients of its arguments, and of the attributes that it names."""
    layer = decorated_layer(use_kernel_forward_from_hub("Reads")(type("Reads", (nn.Module,), {"forward": reference})))
    assert read_attributes(layer) == set(names)


def test_a_function_has_no_module() -> None:
    """Also one whose first argument is named as that of a method."""
    assert read_attributes(decorated_layer(use_kernel_forward_from_hub("reads")(lambda self: self))) == set()
