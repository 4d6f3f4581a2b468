"""A call, taken apart into tensors, numbers and the rest, and put together again.

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

from kernels_core.replay import CONSTANTS
from kernels_core.torch_internals import DYNAMO_LISTS_ATTRIBUTES, constant_result, is_fake_class

Structure = Any
"""Nested tuples of strings, bools, None and other constants, compared by value."""

_DEEPEST = 24
"""How deep a call may be nested: a deeper one refers to itself."""

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes in which `nn.Module` itself keeps its state."""


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
    function = getattr(function, "__wrapped__", function)  # a decorator names nothing of the forward
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


class Unfit(Exception):  # noqa: N818 - it is the reason, and never reaches a user as an error
    """The reason why a layer or kernel cannot be an operator."""


class Parts:
    """The parts of a call, in the order in which `take` meets them."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []  # each as often as it is met
        self.ints: list[int] = []  # may be symbolic while traced
        self.floats: list[float] = []
        self.objects: list[Any] = []
        self.inside: list[Any] = []  # modules and dataclasses that are being taken: one may refer to itself


def take_call(is_function: bool, args: Any, kwargs: Any, parts: Parts) -> Structure:
    """Take a call apart: module or None, other arguments, and keyword arguments."""
    module, args = (None, args) if is_function else (args[0], args[1:])
    return (take(module, parts), take(tuple(args), parts), take(dict(kwargs), parts))


def take(value: Any, parts: Parts, depth: int = 0) -> Structure:
    """Take a value apart; the module of a call is the only one at depth 0."""
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
    if isinstance(value, (list, tuple)):
        kind = "tuple" if type(value) is tuple else "list" if type(value) is list else "sequence"
        if kind == "sequence":
            kind = "named" if hasattr(value, "_fields") else kind
            parts.objects.append(type(value))
        # Lists, not generators: Dynamo traces this.
        return (kind, tuple([take(child, parts, depth + 1) for child in value]))
    if type(value) is dict:
        return ("dict", _take_items(value.items(), parts, depth))
    is_module = isinstance(value, nn.Module)
    by_attributes = is_module or (not sees_all and torch.compiler.is_dynamo_compiling())
    if not isinstance(value, CONSTANTS) and (by_attributes or _is_record(type(value))):
        if True in [outer is value for outer in parts.inside]:  # by identity: `in` would compare tensors
            return ("deep",)
        parts.objects.append(type(value))
        parts.inside.append(value)
        structure = (
            _take_module(value, parts, depth)
            if is_module
            else ("instance", _take_items(_attributes(value), parts, depth))
        )
        parts.inside.pop()
        return structure
    parts.objects.append(value)
    return ("object",)


def _take_items(items: Iterable[tuple[Any, Any]], parts: Parts, depth: int) -> Structure:
    return tuple([(name, take(value, parts, depth + 1)) for name, value in items])


def _take_module(module: nn.Module, parts: Parts, depth: int) -> Structure:
    own = [
        (name, value)
        for name, value in _attributes(module)
        if name not in _INTERNAL and (depth > 0 or name != "forward")  # the operator replaces that forward
    ]
    attributes = _take_items(own, parts, depth)
    parameters = _take_items(module._parameters.items(), parts, depth)
    buffers = _take_items(module._buffers.items(), parts, depth)
    modules = _take_items(module._modules.items(), parts, depth)
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    hooks += len(module._backward_hooks) + len(module._backward_pre_hooks)
    return ("module", (attributes, parameters, buffers, modules), depth > 0 and hooks > 0)


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


def _attributes(value: Any) -> Any:
    """Return the attributes of an instance, names and values."""
    if sees_all or not torch.compiler.is_dynamo_compiling():
        return value.__dict__.items()
    return [(name, getattr(value, name)) for name in _names_of(type(value)).split() if name in value.__dict__]


# --- Putting together ----------------------------------------------------------------------------


def rebuild(structures: Iterable[Structure], *parts: Iterable[Any]) -> list[Any]:
    """Put values together from their tensors, ints, floats and objects, in the order in which `take` met them."""
    sources = dict(zip(("tensor", "int", "float", "object"), map(iter, parts), strict=True))
    sources["special"] = sources["tensor"]

    def items(entries: Iterable[tuple[Any, Structure]]) -> dict[Any, Any]:
        return {name: build(child) for name, child in entries}

    def build(structure: Structure) -> Any:
        kind = structure[0]
        if kind in sources:
            return next(sources[kind])
        content = structure[1]
        if kind == "constant":
            return content
        if kind == "dict":
            return items(content)
        if kind in ("tuple", "list"):
            children = [build(child) for child in content]
            return tuple(children) if kind == "tuple" else children
        cls = next(sources["object"])
        if kind in ("named", "sequence"):
            children = [build(child) for child in content]
            return cls(*children) if kind == "named" else cls(children)
        made = cls.__new__(cls)  # without its constructor, which may want other arguments
        if kind == "instance":
            made.__dict__.update(items(content))
            return made
        nn.Module.__init__(made)  # that of its class would make parameters anew
        for held, entries in zip((made.__dict__, made._parameters, made._buffers, made._modules), content, strict=True):
            held.update(items(entries))
        return made

    return [build(structure) for structure in structures]


def result_code(structure: Structure, parts: Parts, names: dict[str, Any]) -> str:
    """Return an expression that makes a result from the list `t` of its tensors; `Unfit` if other parts may change."""
    if problem := find_problem([structure]):
        raise Unfit(f"its result: {problem}")
    tensors, ints = iter(range(len(parts.tensors))), iter(parts.ints)
    floats, objects = iter(parts.floats), iter(parts.objects)

    def named(value: Any) -> str:
        name = f"_{len(names)}"
        names[name] = value
        return name

    def code(node: Structure) -> str:
        kind = node[0]
        if kind == "tensor":
            return f"t[{next(tensors)}]"
        if kind == "constant":
            return repr(node[1])
        if kind == "int":
            number = next(ints)
            if isinstance(number, torch.SymInt):
                raise Unfit("it returns a number that depends on the sizes of its inputs")
            return repr(number)
        if kind == "float":
            real = next(floats)
            if isinstance(real, torch.SymFloat):
                raise Unfit("it returns a number that depends on its inputs")
            return f"float({str(real)!r})"  # NaN and infinity have no other way to be written
        if kind == "dict":
            if not all(isinstance(key, str | int | enum.Enum) for key, _ in node[1]):
                raise Unfit("it returns a dictionary with other keys than texts, integers and members of enums")
            keys = (repr(key) if type(key) in (str, int, bool) else named(key) for key, _ in node[1])
            return "{" + ", ".join(f"{key}: {code(child)}" for key, (_, child) in zip(keys, node[1], strict=True)) + "}"
        value: Any = next(objects) if kind not in ("tuple", "list") else None
        if kind in _BRACKETS:
            before, after = _BRACKETS[kind]
            made_by = named(value) if value is not None else ""
            return made_by + before + "".join(code(child) + ", " for child in node[1]) + after
        if isinstance(value, (torch.dtype, torch.device, enum.Enum)):
            return named(value)
        raise Unfit(f"it returns a {(type(value) if kind == 'object' else value).__name__}")

    return code(structure)


_BRACKETS = {"tuple": "()", "list": "[]", "named": "()", "sequence": ("([", "])")}


# --- Calls that cannot be taken apart ------------------------------------------------------------


def find_problem(nodes: Iterable[Structure], objects: Iterable[Any] = ()) -> str | None:
    """Return why a call or result with these structures and objects cannot be made from its parts, or None."""
    for entry in itertools.chain.from_iterable(map(_entries, nodes)):
        if entry[0] == "deep":
            return "an argument or attribute is nested too deep, or refers to itself"
        if entry[0] == "special":
            return "a tensor is sparse, nested, quantized or of a class of its own: more than its data would matter"
        if entry[0] == "module" and entry[2]:
            return "a module inside of it has hooks, which would not be called"
    return next(filter(None, map(_problem_of_object, objects)), None)


def _entries(structure: Structure) -> Iterator[Structure]:
    """Yield a structure and all inside it."""
    yield structure
    kind = structure[0]
    children: Iterable[Structure] = ()
    if kind in _BRACKETS:
        children = structure[1]
    elif kind in ("dict", "instance"):
        children = [child for _, child in structure[1]]
    elif kind == "module":
        children = [child for group in structure[1] for _, child in group]
    for child in children:
        yield from _entries(child)


def _problem_of_object(value: Any, depth: int = 0) -> str | None:
    """Return why an object cannot be a constant of a call."""
    if isinstance(value, CONSTANTS) or depth > 3:
        return None
    if isinstance(value, torch.Generator):
        return "it uses a torch.Generator, whose state is no tensor"
    if isinstance(value, (torch.Tensor, nn.Module)):
        return f"a {type(value).__name__} is hidden in an object, where compiled code cannot notice changes of it"
    if isinstance(value, types.MethodType):
        return _problem_of_object(value.__self__, depth + 1)
    held = (
        value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set, frozenset)) else ()
    )
    for child in (*held, *getattr(value, "__dict__", {}).values()):
        if isinstance(child, _WHERE_TENSORS_HIDE) and (problem := _problem_of_object(child, depth + 1)):
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
