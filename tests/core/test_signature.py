"""Any signature works, and looks as before."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels_core import ArgumentTypeError, replace_kernel_forward_from_hub, use_kernel_forward_from_hub
from kernels_core.replay import leaves
from kernels_plugins.mapping import use_kernel_mapping

P = inspect.Parameter
NAMES = ["x", "y", "mask", "args", "kwargs", "self_", "out", "cls", "forward", "root", "module", "z"]
TENSOR = torch.ones(1)
VALUES = st.sampled_from([TENSOR, [TENSOR], {"t": TENSOR}, None, 3, "text", ()])


@st.composite
def signatures(draw: Any) -> inspect.Signature:
    """Draw a signature with parameters of every kind, with and without defaults."""
    names = draw(st.permutations(NAMES))
    positional = draw(st.lists(st.sampled_from([P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD]), max_size=4))
    positional.sort()
    first_default = draw(st.integers(0, len(positional)))
    parameters = [
        P(names.pop(), kind, default=P.empty if index < first_default else draw(VALUES))
        for index, kind in enumerate(positional)
    ]
    if draw(st.booleans()):
        parameters.append(P(names.pop(), P.VAR_POSITIONAL))
    for has_default in draw(st.lists(st.booleans(), max_size=3)):
        parameters.append(P(names.pop(), P.KEYWORD_ONLY, default=draw(VALUES) if has_default else P.empty))
    if draw(st.booleans()):
        parameters.append(P(names.pop(), P.VAR_KEYWORD))
    return inspect.Signature(parameters)


def build(signature: inspect.Signature, answer: str, with_self: bool) -> Any:
    """Make a function of that signature that returns `answer` and everything it was called with."""
    scope: dict[str, Any] = {}
    parameters = list(signature.parameters.values())
    if with_self:
        kind = P.POSITIONAL_ONLY if any(p.kind is P.POSITIONAL_ONLY for p in parameters) else P.POSITIONAL_OR_KEYWORD
        parameters.insert(0, P("self", kind))
    bare = inspect.Signature([p if p.default is P.empty else p.replace(default=None) for p in parameters])
    names = ", ".join(signature.parameters)
    exec(f"def function{bare}:\n    return ({answer!r}, {names})", scope)
    function = scope["function"]
    function.__defaults__ = tuple(
        p.default for p in parameters if p.kind < P.VAR_POSITIONAL and p.default is not P.empty
    )
    function.__kwdefaults__ = {
        p.name: p.default for p in parameters if p.kind is P.KEYWORD_ONLY and p.default is not P.empty
    }
    return function


@st.composite
def calls(draw: Any, signature: inspect.Signature) -> tuple[list[Any], dict[str, Any]]:
    """Draw arguments that fit, mostly: positional or by name, defaults left out or not."""
    positional, by_name, positional_so_far = [], {}, True
    for p in signature.parameters.values():
        given_ = p.default is P.empty or draw(st.booleans())
        if p.kind is P.POSITIONAL_ONLY:
            positional_so_far = positional_so_far and given_
            if positional_so_far:
                positional.append(draw(VALUES))
        elif p.kind is P.POSITIONAL_OR_KEYWORD:
            positional_so_far = positional_so_far and given_ and draw(st.booleans())
            if positional_so_far:
                positional.append(draw(VALUES))
            elif given_:
                by_name[p.name] = draw(VALUES)
        elif p.kind is P.VAR_POSITIONAL:
            if positional_so_far:
                positional += draw(st.lists(VALUES, max_size=3))
        elif p.kind is P.KEYWORD_ONLY:
            if given_:
                by_name[p.name] = draw(VALUES)
        else:
            by_name.update({f"more_{i}": draw(VALUES) for i in range(draw(st.integers(0, 2)))})
    if draw(st.integers(0, 9)) == 0:
        positional.append("one too many, perhaps")
    return positional, by_name


def outcome(function: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[str, Any]:
    """Return the result of a call, or the type of error that it raises."""
    try:
        return "returned", function(*args, **kwargs)
    except TypeError as error:
        return "raised", str(error).split("()", 1)[1]


def same(ours: Any, theirs: Any) -> bool:
    """Compare by identity of tensors, which == would compare by element."""
    if isinstance(ours, (tuple, list)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    return ours is theirs or (not isinstance(ours, torch.Tensor) and bool(ours == theirs))


def has_tensor(args: Any) -> bool:
    """Whether dispatch can find a device: a tensor, also inside of containers."""
    return any(isinstance(leaf, torch.Tensor) for _, leaf in leaves(list(args)))


@settings(max_examples=150, deadline=None)
@given(st.data())
@pytest.mark.parametrize("kind", ["function", "class"])
def test_any_signature_is_called_as_undecorated(kind: str, data: Any) -> None:
    """Whatever the signature and the call, the decorated one gets the same arguments or raises the same TypeError."""
    signature = data.draw(signatures())
    args, kwargs = data.draw(calls(signature))
    if kind == "function":
        plain: Any = build(signature, "reference", with_self=False)
        decorated: Any = use_kernel_forward_from_hub("Any")(build(signature, "reference", with_self=False))
        kernel: Any = build(signature, "kernel", with_self=False)
    else:
        reference = build(signature, "reference", with_self=True)
        plain = type("Layer", (nn.Module,), {"forward": reference})()
        cls = type("Layer", (nn.Module,), {"forward": reference})
        replace_kernel_forward_from_hub(cls, "Any")
        decorated = cls()
        kernel = type("Kernel", (nn.Module,), {"forward": build(signature, "kernel", with_self=True)})
    expected = outcome(plain, args, kwargs)
    got = outcome(decorated, args, kwargs)
    assert got[0] == expected[0]
    assert same(got[1], expected[1])

    with use_kernel_mapping({"Any": {"cpu": kernel}}):
        served = outcome(decorated, args, kwargs)
    if expected[0] == "raised":
        assert served == expected
        return
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values: list[Any] = []
    for name, value in bound.arguments.items():
        kind_ = signature.parameters[name].kind
        values += value if kind_ is P.VAR_POSITIONAL else value.values() if kind_ is P.VAR_KEYWORD else [value]
    assert served[1][0] == ("kernel" if has_tensor(values) else "reference")
    assert same(served[1][1:], expected[1][1:])


@settings(max_examples=100, deadline=None)
@given(signatures())
def test_looks_are_kept(signature: inspect.Signature) -> None:
    """Signature, defaults, name, docstring, module and __wrapped__ are those of the undecorated function."""
    plain = build(signature, "reference", with_self=False)
    plain.__doc__, plain.__name__, plain.__qualname__ = "Say it.", "said", "Place.said"
    decorated = use_kernel_forward_from_hub("Any")(plain)
    assert inspect.signature(decorated) == inspect.signature(plain)
    assert inspect.signature(decorated, follow_wrapped=False) == inspect.signature(plain)
    assert decorated.__wrapped__ is plain
    for name in ("__doc__", "__name__", "__qualname__", "__module__"):
        assert getattr(decorated, name) == getattr(plain, name)
    assert (decorated.__defaults__ or ()) == (plain.__defaults__ or ())


def test_annotations_are_kept() -> None:
    """Annotations, and attributes put on the function, are there after decorating."""

    def plain(x: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
        return x

    plain.marked = True  # type: ignore[attr-defined]
    decorated = use_kernel_forward_from_hub("Any")(plain)
    assert decorated.__annotations__ == plain.__annotations__
    assert decorated.marked
    assert str(inspect.signature(decorated)) == str(inspect.signature(plain))


def passing_on(function: Any) -> Any:
    """Wrap as decorators in the wild do."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("call", [lambda m: m(torch.zeros(1)), lambda m: m(x=torch.zeros(1)), lambda m: m(1)])
def test_forward_wrapped_by_another_decorator(call: Any) -> None:
    """A forward behind a decorator with (*args, **kwargs), self among them, is dispatched like any."""

    @use_kernel_forward_from_hub("Wrapped")
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        @passing_on
        def forward(self, x: Any, y: int = 2) -> Any:
            return x + y

    class Kernel(nn.Module):
        def forward(self, x: Any, y: int = 2) -> Any:
            return x + y + 100

    module = Wrapped()
    assert call(module) in (2, 3)
    with use_kernel_mapping({"Wrapped": {"cpu": Kernel}}):
        assert call(module) in (102, 103)


def test_forward_without_a_named_self() -> None:
    """A forward that takes everything, self too, as *args keeps working and is served."""

    @use_kernel_forward_from_hub("Star")
    class Star(nn.Module):
        def forward(*args: Any) -> Any:
            return args[1] + 1

    assert Star()(torch.zeros(1)) == 1
    assert Star()(1) == 2


def test_static_forward() -> None:
    """A forward that is a staticmethod works as before, or is refused when decorating; never when called."""

    class Static(nn.Module):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x + 1

    try:
        replace_kernel_forward_from_hub(Static, "Static")
    except ArgumentTypeError as error:
        assert "static" in str(error)
    assert Static()(torch.zeros(1)) == 1


@pytest.mark.parametrize("name", ["getattr", "AttributeError", "IndexError", "_kernels_root", "_kernel", "_index"])
@pytest.mark.parametrize("value", [torch.zeros(1), [torch.zeros(1)]], ids=["tensor", "list"])
def test_parameter_names_cannot_clash(name: str, value: Any) -> None:
    """Parameters with the names of variables of the generated code work, also where the mode makes a difference."""
    scope: dict[str, Any] = {}
    exec(f"def function({name}, y=0):\n    return 'reference', {name}", scope)
    exec(f"def kernel({name}, y=0):\n    return 'kernel', {name}", scope)
    scope["kernel"].has_backward = False
    decorated = use_kernel_forward_from_hub("Clash")(scope["function"])
    with use_kernel_mapping({"Clash": {"cpu": scope["kernel"]}}):
        assert decorated(value) == ("kernel", value)
        assert decorated(**{name: value}) == ("kernel", value)
    assert decorated(value) == ("reference", value)


def test_empty_varargs_with_a_kernel_that_depends_on_the_mode() -> None:
    """*args left empty finds the device in the module and the mode in its parameters."""

    @use_kernel_forward_from_hub("Sum")
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, *tensors: torch.Tensor) -> str:
            return "reference"

    class Kernel(nn.Module):
        has_backward = False

        def forward(self, *tensors: torch.Tensor) -> str:
            return "kernel"

    with use_kernel_mapping({"Sum": {"cpu": Kernel}}):
        with torch.no_grad():
            assert Sum()() == "kernel"
        with pytest.warns(UserWarning, match="has_backward"):
            assert Sum()() == "reference"


def test_mutable_default_is_the_same_object() -> None:
    """A default that is an object is that object in the kernel, too, not a copy and not its text."""
    default = [torch.zeros(1)]

    @use_kernel_forward_from_hub("Default")
    def reference(x: Any = default) -> Any:
        return x

    assert reference() is default
    with use_kernel_mapping({"Default": {"cpu": lambda x: [x]}}):
        assert reference()[0] is default
