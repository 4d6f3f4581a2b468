"""May this kernel layer stand in for that layer? If not, a refusal says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from torch import nn

from kernels_core import KernelsWarning, Mode, resolve, use_kernel_forward_from_hub
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)
T = TypeVar("T")

pytestmark = pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")


def kernel(parameters: str, **members: Any) -> type[nn.Module]:
    """Make a kernel class whose forward takes `self` and these parameters."""
    scope: dict[str, Any] = {}
    exec(f"def forward(self{', ' + parameters if parameters else ''}):\n    return 'kernel'", scope)
    return type("Kernel", (nn.Module,), {"forward": scope["forward"], **members})


def layer(parameters: str) -> type[nn.Module]:
    """Make a decorated class whose forward takes `self` and these parameters."""
    cls = kernel(parameters)
    cls.forward.__code__ = cls.forward.__code__.replace(co_consts=("reference",) * len(cls.forward.__code__.co_consts))
    return use_kernel_forward_from_hub("Contract")(cls)


def reason(cls: Any, source: Any) -> str | None:
    """Return why a source does not serve, or None if it does."""
    with use_kernel_mapping({"Contract": {"cpu": source}}):
        resolution = resolve(cls, device="cpu", mode=Mode.INFERENCE)
    assert resolution.is_reference == bool(resolution.refusals)
    return resolution.refusals[0].reason if resolution.refusals else None


FITTING = [
    ("x", "x"),
    ("x", "y"),  # names of positional parameters are free
    ("x, y=1", "a, b"),  # a default that the kernel lacks is filled by the layer
    ("x, y", "x, y=3"),
    ("x, /, y", "a, /, b"),
    ("x, *, eps=1", "a, *, eps"),
    ("*, a, b", "*, b, a"),
    ("*args", "*rest"),
    ("x, *args, k, **kw", "y, *more, k, **others"),
    ("", ""),
    ("x: int", "x: str"),
]
UNFIT = [
    ("x", ""),
    ("x", "x, y"),
    ("x", "x, y=1"),  # more parameters, even with defaults
    ("x, y", "x"),
    ("x", "x, /"),
    ("x", "*, x"),
    ("x", "*x"),
    ("x", "**x"),
    ("*, eps", "*, epsilon"),  # passed by name
    ("x, *args", "x"),
    ("x, **kw", "x"),
    ("x", "x, *args, **kw"),
]


@pytest.mark.parametrize(("ours", "theirs"), FITTING)
def test_fitting_signatures(ours: str, theirs: str) -> None:
    """The same number and kinds of parameters fit, whatever their names, defaults and annotations."""
    assert reason(layer(ours), kernel(theirs)) is None


@pytest.mark.parametrize(("ours", "theirs"), UNFIT)
def test_unfit_signatures_are_refused(ours: str, theirs: str) -> None:
    """Another number or kind of parameters is refused, with both signatures, one above the other."""
    why = reason(layer(ours), kernel(theirs))
    assert why is not None
    lines = why.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("layer:"))
    assert lines[at].split(":", 1)[1].strip() == f"({ours})"
    assert lines[at + 1].split(":", 1)[1].strip() == f"({theirs})"
    assert lines[at].index("(") == lines[at + 1].index("("), "not aligned"


@pytest.mark.parametrize(("ours", "theirs"), FITTING + UNFIT)
def test_functions_are_held_to_the_same(ours: str, theirs: str) -> None:
    """Functions follow the rule of classes, also where a class serves a function."""
    scope: dict[str, Any] = {}
    exec(f"def reference({ours}): ...\ndef function({theirs}): ...", scope)
    decorated = use_kernel_forward_from_hub("Contract")(scope["reference"])
    fits = (ours, theirs) in FITTING
    assert (reason(decorated, scope["function"]) is None) == fits
    assert (reason(decorated, kernel(theirs)) is None) == fits


def test_kernel_is_called_with_its_own_names() -> None:
    """A kernel with other parameter names is called right, however the caller passes its arguments."""
    decorated = layer("x, y=2, *, eps=3")

    class Kernel(nn.Module):
        def forward(self, a: Any, b: Any, *, eps: Any) -> Any:
            return (a, b, eps)

    register_kernel_mapping({"Contract": {"cpu": Kernel}})
    assert decorated()(X) == (X, 2, 3)
    assert decorated()(y=5, x=X, eps=7) == (X, 5, 7)


def test_each_layer_is_checked_by_itself() -> None:
    """One kernel under one name is checked against every layer that it would serve."""
    fits, does_not, source = layer("x"), layer("x, y"), kernel("x")
    with use_kernel_mapping({"Contract": {"cpu": source}}):
        assert fits()(X) == "kernel"
        assert does_not()(X, X) == "reference"
        assert fits()(X) == "kernel"


class Declared(nn.Module):
    """Members that a kernel may have."""

    can_torch_compile: ClassVar[bool] = True
    has_backward: ClassVar[bool] = False
    weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> Any:
        return "kernel"


class GenericKernel(nn.Module, Generic[T]):
    def forward(self, x: T) -> Any:
        return "kernel"


class Inherits(Declared):
    """A kernel that inherits from a kernel."""


@pytest.mark.parametrize("source", [Declared, GenericKernel, Inherits])
def test_declarations_and_annotations_are_no_members(source: Any) -> None:
    """can_torch_compile, has_backward, annotations, docstrings and generics are allowed."""
    assert reason(layer("x"), source) is None


def init(self: Any) -> None:
    nn.Module.__init__(self)


BAD_MEMBERS = {
    "constructor": (kernel("x", __init__=init), "constructor"),
    "method": (kernel("x", helper=lambda self: 0), "helper"),
    "attribute": (kernel("x", scale=2), "scale"),
    "property": (kernel("x", scale=property(lambda self: 2)), "scale"),
    "inherited method": (type("Sub", (kernel("x", helper=lambda self: 0),), {}), "helper"),
    "call": (kernel("x", __call__=lambda self, x: 0), "__call__"),
    "new": (kernel("x", __new__=lambda cls: object.__new__(cls)), "__new__"),
    "getattr": (kernel("x", __getattr__=lambda self, name: 0), "__getattr__"),
    "no forward": (type("Empty", (nn.Module,), {}), "no forward"),
    "linear": (nn.Linear, "constructor"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_members_are_refused_by_name(name: str) -> None:
    """A constructor or any member besides forward is a refusal that names it."""
    source, part = BAD_MEMBERS[name]
    why = reason(layer("x"), source)
    assert why is not None and part in why


class Returns:
    """A source that loads whatever it is given."""

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded

    def load(self) -> Any:
        return self.loaded


@pytest.mark.parametrize(
    ("loaded", "part"),
    [
        (3, "int"),
        (None, "NoneType"),
        (str, "not a subclass of torch.nn.Module"),
        (nn.Identity(), "it is a module, where its class is wanted"),
        (lambda x: x, "it is a function, and this layer is a class"),
        (len, "function"),
    ],
    ids=["number", "None", "other class", "instance", "function", "builtin"],
)
def test_what_is_no_layer_class_is_refused(loaded: Any, part: str) -> None:
    """A source for a class must load a class of nn.Module."""
    why = reason(layer("x"), Returns(loaded))
    assert why is not None and part in why


@dataclasses.dataclass
class Unhashable:
    factor: int = 3

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Unreferable:
    __slots__ = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


@pytest.mark.parametrize("kernel", [Unhashable(), Unreferable()], ids=lambda kernel: type(kernel).__name__)
def test_an_object_of_which_nothing_can_be_remembered_is_refused(kernel: Any) -> None:
    """Proof and quarantine need a hash and weak references of a kernel: without, it is refused, and no call fails."""

    @use_kernel_forward_from_hub("Object")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with use_kernel_mapping({"Object": {"cpu": Returns(kernel)}}):
        with pytest.warns(KernelsWarning, match="weak references"):
            assert double(torch.ones(2))[0] == 2
        assert double(torch.ones(2, requires_grad=True))[0] == 2


def test_source_may_tell_its_provenance() -> None:
    """An object whose load() returns a LoadedLayer is taken at its word about origin and checks."""
    from kernels_core import LoadedLayer

    with use_kernel_mapping({"Contract": {"cpu": Returns(LoadedLayer(kernel("x"), "the shelf", {"digest": "ok"}))}}):
        resolution = resolve(layer("x"), device="cpu", mode=Mode.INFERENCE)
    assert (resolution.origin, resolution.checked) == ("the shelf", {"digest": "ok"})


def test_name_alone_is_checked_as_far_as_it_goes() -> None:
    """Asked about a name, without a layer to compare with, members still count and signatures do not."""
    assert reason("Contract", kernel("x, y, z")) is None
    assert "helper" in str(reason("Contract", kernel("x", helper=1)))


def test_layer_behind_another_decorator_is_compared_by_its_real_signature() -> None:
    """A reference wrapped with functools.wraps has the signature that it shows, and no kernel is called wrong."""
    import functools

    def passing_on(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs)

        return wrapper

    class Wrapped(nn.Module):
        @passing_on
        def forward(self, x: Any, y: Any = 2) -> Any:
            return "reference"

    decorated = use_kernel_forward_from_hub("Contract")(Wrapped)
    assert reason(decorated, kernel("x, y=2")) is None
    assert reason(decorated, kernel("x")) is not None
    for parameters in ("x, y=2", "a, b"):
        register_kernel_mapping({"Contract": {"cpu": kernel(parameters)}})
        answers = {decorated()(X), decorated()(X, y=3), decorated()(x=X, y=3)}
        assert answers == {"kernel"} or (parameters == "a, b" and answers == {"reference"})
