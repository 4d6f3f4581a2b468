"""Does a module compute the layer of a rule? Measured on a copy with random weights, once for each kind of module."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, ModuleType, NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels_core import change_class, error_text, references

from .parents import plain, rewritten
from .rule import Rule, UnfitError

_AT_MOST = 2e-5
"""Largest difference to the oracle in a row, in units of its largest number: classes may compute in float32."""

UNMEASURED = "it cannot be measured"
_BIG, _NARROW = 2**20, 16
"""Projections of more numbers than this are measured at a fraction of their size, no narrower than that."""

_OBJECTS = 10_000
"""Objects to search for modules: configurations have hundreds."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)

Kind = tuple[object, ...]


def kind_of(module: nn.Module, without: Collection[str] = ()) -> Kind:
    """Return the kind of a module: its class, attributes, hooks and children, for which one measurement is enough.

    Args:
        module: The module.
        without: Names of children that do not matter.
    """
    own = tuple((name, _frozen(value)) for name, value in module.__dict__.items() if name not in _OF_EVERY_MODULE)
    tensors = tuple((name, tuple(tensor.shape)) for name, tensor in _tensors(module, recurse=False))
    children = tuple((name, kind_of(child)) for name, child in module.named_children() if name not in without)
    return (type(module), own, tensors, _is_hooked(module), children)


def kind_of_parent(module: nn.Module, rules: Sequence[Rule], adopted: Mapping[nn.Module, type[nn.Module]]) -> Kind:
    """Return the kind of a module whose parts rules fuse: those that are only called do not matter."""
    with _aside():
        called = {name for rule in rules for name in rule.stubs(module)}
    parts = tuple(adopted.get(module.get_submodule(path)) for rule in rules for path in rule.parts)
    return (*kind_of(module, called), parts)


def _frozen(value: object) -> object:
    """Return a value that is equal for attributes of equal effect; objects of other types count as themselves."""
    if type(value) in (bool, int, float, str, NoneType):
        return (type(value), value)
    if isinstance(value, partial):
        return (partial, _frozen(value.func), _frozen(value.args), _frozen((*value.keywords.items(),)))
    return (type(value), *map(_frozen, value)) if isinstance(value, tuple) else id(value)


def _is_hooked(part: nn.Module) -> bool:
    return part.__dict__.get("forward") is not None or any(part.__dict__.get(name) for name in _HOOKS)


def has_parts(module: nn.Module, rule: Rule) -> bool:
    """Whether a module has the parts of a rule, of whatever class."""
    return all(_part(module, path) is not None for path in rule.parts)


def may_fuse(module: nn.Module, rule: Rule, adopted: Mapping[nn.Module, type[nn.Module]]) -> bool:
    """Whether a module has the parts of a rule that fuses, adopted under the layer names that it names."""
    named = {path: kind for path, kind in rule.parts.items() if isinstance(kind, str)}
    known = {path: adopted.get(part) for path in named if (part := _part(module, path)) is not None}
    return has_parts(module, rule) and all(
        getattr(known[path], "adopted_as", None) == kind for path, kind in named.items()
    )


def misfit(subject: Any, rule: Rule) -> str | None:
    """Return why a function, or a module with the parts of a rule, is no layer of it; or None."""
    if not rule.function:
        return _misfit_of_module(subject, rule)
    with _aside():
        return _takes_other(rule, subject) or _differs(rule.oracle, subject, _calls(rule, subject))


def _misfit_of_module(module: nn.Module, rule: Rule) -> str | None:
    for path, kind in rule.parts.items():
        part = _part(module, path)
        kinds: tuple[Any, ...] = kind if isinstance(kind, tuple) else (kind,)
        if type(part) not in kinds:
            names = " or ".join(each.__name__ for each in kinds)
            return f"its part {path} is a {_name(type(part))}, not a plain {names}"
    for path, part in module.named_modules():
        if path and _is_hooked(part):
            return f"its part {path} has a hook or a forward of its own, which a kernel would not run"
        for name, value in (*part.__dict__.items(), *_tensors(part, recurse=False)):
            if isinstance(value, Tensor) and (name in part.__dict__ or not value.is_floating_point()):
                return f"its {name} is no floating-point parameter or buffer: its numbers are part of what it computes"
    if getattr(module, "weight", module) is None:
        return "its weight is None"
    for canonical in rule.binds:
        rule.bound(module, canonical)
    return _measured(module, rule)


def misfit_of_parent(module: nn.Module, rule: Rule, adopted: Mapping[nn.Module, type[nn.Module]]) -> str | None:
    """Return why a module is no parent of a rule that fuses; or None.

    Args:
        module: A module that has the parts of the rule, and all that it calls.
        rule: The rule.
        adopted: The classes of modules that are adopted together with it.
    """
    own = inspect.unwrap(type(module).forward)
    ours = rewritten(cast(FunctionType, own), rule, cast("Callable[..., Any]", rule.fuses))
    called: list[object] = []

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        called.append((part, [each for each in args if not isinstance(each, Tensor)], sorted(kwargs), known))

    if hooked := [path for path in rule.parts if _is_hooked(module.get_submodule(path))]:
        return f"its part {hooked[0]} has a hook or a forward of its own, which a kernel would not run"
    with _aside(), references():
        stubs = rule.stubs(module)
        copied = _random_copy(module, 1, stubs=stubs)
        for part in copied.modules():  # hooks are called as before, and must not notice this
            part.__dict__.pop("forward", None)
            for name in _HOOKS:
                getattr(part, name).clear()
        for path, stub in stubs.items():
            if path not in rule.parts:
                stub.register_forward_pre_hook(note, with_kwargs=True)
        for path in rule.parts:
            if (cls := adopted.get(module.get_submodule(path))) is not None:
                change_class(copied.get_submodule(path), cls)
        if not plain(rule)(copied):
            kinds = {path: type(copied.get_submodule(path)) for path in rule.parts}
            found = (f"{path} is {_name(kind)}{_adopted_as(kind)}" for path, kind in kinds.items())
            return f"a part, or a parameter of it, is of another class than the rule names: {', '.join(found)}"
        for training in (False, True):
            copied.train(training)
            for *arguments, given in _calls(rule, copied):
                called.clear()
                written, before = (partial(_loss_or_output, each, copied, given) for each in (ours, own))
                if reason := _differs(written, before, [tuple(arguments)], copied):
                    return reason
                if called[: len(called) // 2] != called[len(called) // 2 :]:
                    return "it calls its parts with other arguments"
    return None


def _loss_or_output(forward: Callable[..., Any], module: nn.Module, given: Mapping[str, Any], *arguments: Any) -> Any:
    output = forward(module, *arguments, **given)
    return output["loss"] if isinstance(output, Mapping) else output


def unmeasured(error: Exception) -> str:
    """Return as a reason the error of a class that was not written to be measured."""
    return str(error) if isinstance(error, UnfitError) else f"{UNMEASURED}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return error_text(error).partition("\n")[0]


def _part(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _adopted_as(cls: type) -> str:
    name = getattr(cls, "adopted_as", None)
    return "" if name is None else f" (adopted, so a rule names it as {name!r})"


def _measured(module: nn.Module, rule: Rule) -> str | None:
    if reason := _takes_other(rule, type(module).forward, without=1):
        return reason
    fraction = _fraction(module, rule)
    try:
        return _compared(module, rule, fraction)
    except Exception:  # the forward knows the size of its projections, or does not run here at all, as one in Triton
        if fraction == 1:
            raise
        copied = _random_copy(module, 1, "meta")
        type(module).forward(copied, *(value.to("meta") for value in _calls(rule, _View(copied, rule))[0]))
    return _compared(module, rule, 1)


def _fraction(module: nn.Module, rule: Rule) -> int:
    """Return by how much the projections of a module can be smaller: the computation does not depend on their size."""
    parts = [part for path in rule.parts if type(part := _part(module, path)) is nn.Linear]
    ours = {id(tensor) for part in parts for _, tensor in _tensors(part)}
    theirs = {id(tensor): tensor.numel() for _, tensor in _tensors(module)}
    if sum(theirs.values()) <= _BIG or ours != set(theirs):
        return 1
    sizes = [size for part in parts for size in (part.in_features, part.out_features)]
    common, least = math.gcd(*sizes), min(sizes)
    return next((each for each in range(common, 1, -1) if common % each == 0 and least // each >= _NARROW), 1)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Measure without a default device, autocast and generators of the caller's."""
    with (
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


def _compared(module: nn.Module, rule: Rule, fraction: int) -> str | None:
    with _aside():
        copied = _random_copy(module, fraction)
        for path in rule.parts if fraction > 1 else ():
            part: Any = copied.get_submodule(path)
            part.in_features, part.out_features = part.in_features // fraction, part.out_features // fraction
        view, before, theirs = _View(copied, rule), kind_of(copied), partial(type(module).forward, copied)
        for training in (False, True):  # dropout shows in one of them only
            copied.train(training)
            calls = _calls(rule, view)
            if reason := _differs(partial(rule.oracle, view), theirs, calls, copied):
                return reason
        if kind_of(copied) != before:
            return "its forward sets attributes of the module, which a kernel would not do"
        with contextlib.suppress(Exception), torch.no_grad():  # some run in one dtype only
            copied.bfloat16()
            halves = [each.bfloat16() if _is_floating(each) else each for each in calls[0]]
            found, wanted = _described(theirs(*halves)), _described(rule.oracle(view, *halves))
            if found != wanted:
                return f"for torch.bfloat16, it returns {found}, and the layer returns {wanted}"
    return None


def _takes_other(rule: Rule, theirs: Callable[..., Any], *, without: int = 0) -> str | None:
    """Compare the numbers of arguments: of all, since a kernel takes them all."""
    wanted, found = (len(inspect.signature(each).parameters) - without for each in (rule.oracle, theirs))
    return f"it takes {found} argument{'s' * (found != 1)}, and the layer takes {wanted}" if found != wanted else None


def _calls(rule: Rule, subject: Any) -> list[tuple[Any, ...]]:
    """Return the arguments of the calls that measure a module or a function."""
    inputs = rule.inputs(subject)
    calls = inputs if isinstance(inputs, list) else [inputs]
    if not calls or not all(isinstance(each, tuple) for each in calls):
        raise TypeError(f"inputs of rule {rule.name!r} returned no tuple of arguments, nor a list of such")
    return calls


def _differs(
    ours: Callable[..., Any], theirs: Callable[..., Any], calls: list[tuple[Any, ...]], module: nn.Module | None = None
) -> str | None:
    """Return how a function differs from an oracle in some calls: in numbers, gradients or effects on arguments."""
    for arguments in calls:
        given = [each.clone().requires_grad_() if _is_floating(each) else each for each in arguments]
        passed, spare = ([each.clone() if isinstance(each, Tensor) else each for each in given] for _ in range(2))
        wanted = ours(*spare)
        try:
            found = theirs(*passed)
        except Exception as fault:
            shapes = ", ".join(str(tuple(each.shape)) for each in passed if isinstance(each, Tensor))
            taken = (
                f"for float64 tensors of {shapes} on a CPU, which the layer takes" if shapes else "with its arguments"
            )
            raise UnfitError(f"{UNMEASURED}: {taken}, it raises {_first_line(fault)}") from fault
        if _described(found) != _described(wanted):
            return f"it returns {_described(found)}, and the layer returns {_described(wanted)}"
        pairs = list(zip(*(each if isinstance(each, tuple) else (each,) for each in (wanted, found)), strict=True))
        for one, other in ((one.detach(), other.detach()) for one, other in pairs):
            difference, largest = (other - one).abs().amax(-1), one.abs().amax(-1)
            error = float(torch.where(difference == 0, 0.0, difference / largest).max())  # a row may be all zeros
            if not error <= _AT_MOST:
                return f"it computes something else: it differs by {error:.1g} of the largest number of a row"
        if not all(torch.equal(a, b) for a, b in zip(passed, given, strict=True) if isinstance(a, Tensor)):
            return "it writes into its arguments, which a kernel would not do"
        leaves = [each for each in (*given, *(module.parameters() if module else ())) if _is_floating(each)]
        if not all(_have_equal_gradients(one, other, leaves) for one, other in pairs):
            return "it computes other gradients"
    return None


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _have_equal_gradients(wanted: Tensor, found: Tensor, leaves: list[Tensor]) -> bool:
    """Whether neither stops a gradient that the other has; roughly, for classes may compute in float32."""
    if not wanted.requires_grad or not found.requires_grad:
        return wanted.requires_grad == found.requires_grad
    weights = torch.linspace(-1.0, 1.0, wanted.numel(), dtype=wanted.dtype).view(wanted.shape)
    # Several outputs of a call, such as both of a rotary embedding, may share a graph.
    ours, theirs = (
        torch.autograd.grad(output, leaves, weights, allow_unused=True, retain_graph=True) for output in (wanted, found)
    )
    return all(
        one is other or (one is not None and other is not None and bool((one - other).norm() <= 1e-3 * one.norm()))
        for one, other in zip(ours, theirs, strict=True)
    )


def _described(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    return (
        f"a {value.dtype} tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    )


def _random_copy(
    module: nn.Module, fraction: int, device: str = "cpu", stubs: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """Copy a module with random numbers in float64, on the CPU; its own tensors are never copied, nor read.

    Other modules may stand for some of its children.
    """
    generator = torch.Generator().manual_seed(1)
    memo: dict[int, Any] = {id(module.get_submodule(name)): stub for name, stub in (stubs or {}).items()}
    left_out = {id(tensor) for name in stubs or {} for _, tensor in _tensors(module.get_submodule(name))}
    for _, tensor in _tensors(module):
        if id(tensor) in left_out:
            memo[id(tensor)] = nn.Parameter(torch.empty(0))  # for whatever else refers to it
            continue
        shape = [size // fraction for size in tensor.shape]
        made = torch.empty(shape, dtype=torch.float64, device=device)
        if device == "cpu":
            _random(made, generator)
        memo[id(tensor)] = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
    memo.update((id(other), other) for other in _others(module) if id(other) not in memo)
    return copy.deepcopy(module, memo)


def _others(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a module refers to and does not contain, such as its parent: no copy needs these."""
    seen = {id(each) for each in module.modules()}
    waiting: list[Any] = [value for each in module.modules() for value in each.__dict__.values()]
    while waiting and len(seen) < _OBJECTS:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (type, FunctionType, ModuleType, Tensor)):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        else:
            waiting += gc.get_referents(value)


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.normal_(0.0, max(1, tensor.shape[-1] if tensor.dim() > 1 else 1) ** -0.5, generator=generator)


def _tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


class _View:
    """A module with the canonical attributes of a rule."""

    def __init__(self, module: nn.Module, rule: Rule) -> None:
        self._module, self._bound = module, {name: rule.bound(module, name) for name in rule.binds}

    def __getattr__(self, name: str) -> Any:
        read = self._bound.get(name)
        return read(self._module) if read is not None else getattr(self._module, name)
