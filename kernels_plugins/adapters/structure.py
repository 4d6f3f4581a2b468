"""A call, taken apart into tensors, numbers and the rest.

Dynamo traces `take`, so it is written in terms that Dynamo knows: loops, lists and `isinstance`. The remains of a call
are its *structure*: nested tuples of constants, with a place for each part.
"""

from __future__ import annotations

import enum
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from kernels_core.torch_internals import DYNAMO_LISTS_ATTRIBUTES, constant_result, is_fake_class

Structure = Any
"""Nested tuples of strings, bools, None and other constants, compared by value."""

_DEEPEST = 24
"""How deep a call may be nested: a deeper one refers to itself."""

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes in which `nn.Module` itself keeps its state."""


_PLAIN = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
"""Types of values that are the same object in every call."""

# --- Attributes that older Dynamos do not list -----------------------------------------------------

sees_all = DYNAMO_LISTS_ATTRIBUTES
"""Where this is false, only attributes are taken whose names occur in the code of forwards and methods."""

_named: set[str] = set()


def learn_names(*functions: Any) -> None:
    """Take the attributes, too, that these functions name."""
    for function in functions:
        _named.update(_names_in(function, 3))


def _names_in(function: Any, depth: int) -> set[str]:
    """Return all names in the code of a function, and of those that it calls by name."""
    function = getattr(function, "__func__", function)
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return set()
    found, codes = set(), [code]
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for name in list(found) if depth else []:
        called = function.__globals__.get(name)
        if isinstance(called, types.FunctionType):
            found |= _names_in(called, depth - 1)
    return found


@constant_result
def _names_of(cls: type[Any]) -> str:
    """Return the names of attributes to take; run at trace time."""
    found = set(_named) | {"training"}
    for base in cls.__mro__:
        if base not in nn.Module.__mro__:
            for member in vars(base).values():
                found |= _names_in(getattr(member, "fget", member), 0)
    return " ".join(sorted(found - _INTERNAL))


class Parts:
    """The parts of a call, in the order in which `take` meets them.

    Attributes:
        tensors: Tensors, each as often as it is met.
        ints: Integers, which may be symbolic while traced.
        floats: Floats.
        objects: Anything else that is no constant.
        inside: Modules and dataclasses whose attributes are being taken, to notice one that refers to itself.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.tensors: list[torch.Tensor] = []
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.objects: list[Any] = []
        self.inside: list[Any] = []


def take_call(module: nn.Module | None, args: Any, kwargs: Any, parts: Parts) -> Structure:
    """Take a call apart."""
    taken = ("constant", None) if module is None else _take_module(module, parts, 0)
    return (taken, take(tuple(args), parts, 0), take(dict(kwargs), parts, 0))


def take(value: Any, parts: Parts, depth: int = 0) -> Structure:
    """Take a value apart."""
    if isinstance(value, torch.Tensor):
        parts.tensors.append(value)
        return ("tensor",) if _is_plain(value) else ("special",)
    if value is None or type(value) is str:
        return ("constant", value)
    if isinstance(value, (bool, torch.SymBool)):
        # Where this depends on sizes, the question makes it a constant, and Dynamo guards the answer.
        return ("constant", True if value else False)  # noqa: SIM210 - bool() would keep the symbol
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, enum.Enum):
        parts.ints.append(value)  # type: ignore[arg-type]
        return ("int",)
    if isinstance(value, (float, torch.SymFloat)):
        parts.floats.append(value)  # type: ignore[arg-type]
        return ("float",)
    if depth > _DEEPEST:
        return ("deep",)
    if isinstance(value, nn.Module):
        return _take_module(value, parts, depth)
    if isinstance(value, (list, tuple)):
        kind = type(value)
        children = tuple([take(child, parts, depth + 1) for child in value])
        if kind is tuple:
            return ("tuple", children)
        if kind is list:
            return ("list", children)
        parts.objects.append(kind)
        return ("named" if hasattr(value, "_fields") else "sequence", children)
    if type(value) is dict:
        return ("dict", tuple([(key, take(child, parts, depth + 1)) for key, child in value.items()]))
    by_attributes = not sees_all and torch.compiler.is_dynamo_compiling()
    if not isinstance(value, _PLAIN) and (by_attributes or _is_record(type(value))):
        if _refers_to_itself(value, parts):
            return ("deep",)
        parts.objects.append(type(value))
        parts.inside.append(value)
        attributes = [(name, take(child, parts, depth + 1)) for name, child in _attributes(value)]
        parts.inside.pop()
        return ("instance", tuple(attributes))
    parts.objects.append(value)
    return ("object",)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no more than its data: neither sparse, nested or quantized, nor of a class of its own."""
    if not torch.compiler.is_dynamo_compiling() and (tensor.is_nested or tensor.is_quantized):  # Dynamo takes neither
        return False
    return tensor.layout is torch.strided and _is_plain_class(type(tensor))


@constant_result
def _is_plain_class(cls: type[Any]) -> bool:
    """Whether tensors of a class are plain, or replace plain ones while a call is traced; run at trace time."""
    return cls in (torch.Tensor, nn.Parameter, nn.Buffer) or is_fake_class(cls)


@constant_result
def _is_record(cls: type[Any]) -> bool:
    """Whether instances of a class are those of a dataclass, with attributes and nothing else; run at trace time.

    They are often made for one call. As a constant, one that is made in compiled code would have no attributes yet.
    """
    return hasattr(cls, "__dataclass_fields__") and not issubclass(cls, dict) and bool(cls.__dictoffset__)


def _refers_to_itself(value: Any, parts: Parts) -> bool:
    return True in [outer is value for outer in parts.inside]


def _attributes(value: Any) -> Any:
    """Return the attributes of an instance, names and values."""
    if sees_all or not torch.compiler.is_dynamo_compiling():
        return value.__dict__.items()
    return [(name, getattr(value, name)) for name in _names_of(type(value)).split() if name in value.__dict__]


def _take_module(module: nn.Module, parts: Parts, depth: int) -> Structure:
    if _refers_to_itself(module, parts):
        return ("deep",)
    parts.objects.append(type(module))
    parts.inside.append(module)
    attributes = []
    for name, value in _attributes(module):
        if name in _INTERNAL or (depth == 0 and name == "forward"):
            continue  # the forward that the operator replaces
        attributes.append((name, take(value, parts, depth + 1)))
    parameters = [(name, take(value, parts, depth + 1)) for name, value in module._parameters.items()]
    buffers = [(name, take(value, parts, depth + 1)) for name, value in module._buffers.items()]
    modules = [(name, take(value, parts, depth + 1)) for name, value in module._modules.items()]
    parts.inside.pop()
    hooked = depth > 0 and _has_hooks(module)
    return ("module", tuple(attributes), tuple(parameters), tuple(buffers), tuple(modules), hooked)


def _has_hooks(module: nn.Module) -> bool:
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        if len(hooks) > 0:
            return True
    return False


# --- Calls that cannot be taken apart ------------------------------------------------------------


def find_problem(nodes: Iterable[Structure], objects: Iterable[Any]) -> str | None:
    """Return why a call or result with these structures and objects cannot be made from its parts, or None."""
    return problem_of_structures(nodes) or next(filter(None, map(_problem_of_object, objects)), None)


def problem_of_structures(nodes: Iterable[Structure]) -> str | None:
    """Return why values with these structures cannot be put together from their parts, or None."""
    for entry in itertools.chain.from_iterable(map(_entries, nodes)):
        if entry[0] == "deep":
            return "an argument or attribute is nested too deep, or refers to itself"
        if entry[0] == "special":
            return "a tensor is sparse, nested, quantized or of a class of its own: more than its data would matter"
        if entry[0] == "module" and entry[5]:
            return "a module inside of it has hooks, which would not be called"
    return None


def _entries(structure: Structure) -> Iterator[Structure]:
    """Yield a structure and all inside it."""
    yield structure
    kind = structure[0]
    children: Iterable[Structure] = ()
    if kind in ("tuple", "list", "named", "sequence"):
        children = structure[1]
    elif kind in ("dict", "instance"):
        children = [child for _, child in structure[1]]
    elif kind == "module":
        children = [child for group in structure[1:5] for _, child in group]
    for child in children:
        yield from _entries(child)


def _problem_of_object(value: Any, depth: int = 0) -> str | None:
    """Return why an object cannot be a constant of a call."""
    if isinstance(value, _PLAIN) or depth > 3:
        return None
    if isinstance(value, torch.Generator):
        return "it uses a torch.Generator, whose state is no tensor"
    if isinstance(value, (torch.Tensor, nn.Module)):
        return f"a {type(value).__name__} is hidden in an object, where compiled code cannot notice changes of it"
    if isinstance(value, types.MethodType):
        return _problem_of_object(value.__self__, depth + 1)
    inner: list[Any] = list(value.values()) if isinstance(value, dict) else []
    if isinstance(value, (list, tuple, set, frozenset)):
        inner += list(value)
    inner += list(getattr(value, "__dict__", {}).values())
    for child in inner:
        if isinstance(child, _WHERE_TENSORS_HIDE):
            problem = _problem_of_object(child, depth + 1)
            if problem is not None:
                return f"{problem} (in a {type(value).__name__})" if depth == 0 else problem
    return None


def find_unmade(objects: Iterable[Any]) -> str | None:
    """Return why one of the constants of a traced call is none, or None.

    Dynamo traces a constructor instead of running it, so an object that is made in compiled code has no attributes
    while that is traced, and at best those of its class.
    """
    for value in objects:
        cls = type(value)
        if isinstance(cls.__init__, types.FunctionType) and getattr(value, "__dict__", None) == {}:
            return f"a {cls.__name__} has no attributes: those are not known yet where it is made in compiled code"
    return None


_WHERE_TENSORS_HIDE = (torch.Tensor, nn.Module, torch.Generator, types.MethodType, list, tuple, dict)


def object_key(value: Any, other: Callable[[Any], object] = id) -> object:
    """Return a cache key: by value for dtypes, devices and types, by `other` for the rest."""
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format, type)):
        return value
    return other(value)
