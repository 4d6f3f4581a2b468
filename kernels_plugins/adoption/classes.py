"""The classes of adopted modules: as the original one, with a forward that dispatches, or calls functions that do.

Nothing is stored on a module, so that its state dict stays as it is, and undoing is exact. A copy of an adopted module
is adopted; a pickle holds a module of the original class, and can be read without kernels-core.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any, cast

from torch import nn

from kernels_core import (
    Layer,
    Mode,
    decorated_layer,
    replace_kernel_forward_from_hub,
    require_type,
    set_module,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)

from .rule import Rule

_rules: weakref.WeakKeyDictionary[Layer, Rule] = weakref.WeakKeyDictionary()


def adopted_rule(layer: Layer | None) -> Rule | None:
    """Return the rule by which a layer was adopted; None for one that was decorated.

    Packs offer kernels for adopted layers only: such a layer was measured to compute what its name says.

    Args:
        layer: That of a request, for example.

    Example:
        >>> adopted = adopt(torch.nn.Sequential(torch.nn.RMSNorm(4)))
        >>> adopted_rule(find_layer(adopted.model[0])).name
        'RMSNorm'
    """
    require_type(layer, (Layer, NoneType), "A layer")
    return _rules.get(layer) if layer is not None else None


@functools.lru_cache(maxsize=256)
def dispatching(function: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    """Return the function that adopted classes call in place of this one; the same one again."""
    made = use_kernel_forward_from_hub(rule.layer_name)(function)
    _rules[decorated_layer(made)] = rule
    return made


def make_class(
    module: nn.Module,
    rule: Rule | None,
    forward: Any,
    functions: Sequence[Callable[..., Any]],
    computes: Callable[[nn.Module, Mode], Sequence[str]] | None = None,
) -> type[nn.Module]:
    """Return the class that modules like this one get; the same one again, so that compiled code can be used again.

    Args:
        module: One of them.
        rule: The rule that it fits; None for one that only calls functions.
        forward: The forward of the class: that of the module, or a copy that calls dispatching functions.
        functions: Those functions.
        computes: Names the parts that they compute in place of calling them.
    """
    original: Any = type(module)
    binds = rule.binds if rule is not None else ()
    reads = {name: cast(Rule, rule).bound(module, name) for name in binds if name not in module.__dict__}
    # Liger and others replace the forward of a class: then, one made before would run the old one.
    bound = tuple((name, read) for name, read in reads.items() if read)
    return _make_class(original, forward, rule, bound, tuple(functions), computes, _as_measured(_loose(module, rule)))


def _loose(module: nn.Module, rule: Rule | None) -> tuple[tuple[str, Any, object], ...]:
    """Return activations and dropouts of a module, which its kernels take to stay as they are, by name."""
    if rule is None:
        return ()
    names = {path.partition(".")[0] for path in rule.parts}
    children = [(name, type(child), getattr(child, "p", None)) for name, child in module.named_children()]
    functions = [(name, None, value) for name, value in vars(module).items() if isinstance(value, _FUNCTIONS)]
    return tuple(each for each in (*children, *functions) if each[0] not in names)


_FUNCTIONS = (FunctionType, BuiltinFunctionType)


@functools.lru_cache(maxsize=256)
def _as_measured(loose: tuple[tuple[str, Any, object], ...]) -> Callable[[nn.Module], bool] | None:
    """Return a condition: whether those of a module are as they were when it was measured; None where there is none."""

    def condition(module: nn.Module) -> bool:
        for name, kind, value in loose:
            if kind is None:
                if module.__dict__.get(name) is not value:
                    return False
                continue
            child: Any = module._modules.get(name)
            if not isinstance(child, kind) or (value is not None and child.p != value):  # it may be adopted itself
                return False
        return True

    return condition if loose else None


@functools.lru_cache(maxsize=256)  # weak entries would not do: a class that is made refers to its original
def _make_class(
    original: Any,
    forward: Any,
    rule: Rule | None,
    reads: tuple[tuple[str, Any], ...],
    functions: tuple[Callable[..., Any], ...],
    computes: Callable[[nn.Module, Mode], Sequence[str]] | None,
    condition: Callable[[nn.Module], bool] | None,
) -> type[nn.Module]:
    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduced,
        "__copy__": _copied,  # no __deepcopy__: wrappers that pass attributes on would copy the module without them
        "kernels_adopted": original,
        "adopted_as": rule.layer_name if rule is not None else "",
        **{canonical: property(read) for canonical, read in reads},
    }
    if functions:
        members["forward"] = forward
    made = cast("type[nn.Module]", type(original)(original.__name__, (original,), members))
    if rule is not None:
        replace_kernel_forward_from_hub(made, rule.layer_name, condition)
        _rules[decorated_layer(made)] = rule
    return use_kernelized_func(*functions, computes=computes)(made)


def original_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class that an adopted one was made of; None for any other, also one that derives from it."""
    return vars(cls).get("kernels_adopted")


def _original_of(module: nn.Module) -> type[nn.Module]:
    """Return the original class of a module that is copied or pickled."""
    original = original_class(type(module))
    if original is None:
        name = type(module).__qualname__
        raise TypeError(f"cannot copy or pickle a {name} that was made of an adopted module: undo what made that class")
    return original


class _Class:
    """A class of a module in a copy or in a pickle: the adopted one, or the original one."""

    def __init__(self, adopted: type[nn.Module], original: type[nn.Module]) -> None:
        self._adopted, self._original = adopted, original

    def __deepcopy__(self, memo: object) -> type[nn.Module]:
        return self._adopted

    def __reduce__(self) -> Any:
        return copy.copy, (self._original,)  # which returns the class itself


def _copied(self: nn.Module) -> nn.Module:
    """Copy an adopted module, which shares its tensors: the copy is adopted, too."""
    original: Any = _original_of(self)
    if hasattr(original, "__copy__"):
        clone = original.__copy__(self)
        object.__setattr__(clone, "__class__", type(self))
        return cast(nn.Module, clone)
    answer = original.__reduce_ex__(self, 4)
    if isinstance(answer, str):  # the name of a global: there is one of it
        return self
    make, arguments, *more = answer
    clone = make(*arguments)
    if more and more[0] is not None:
        clone.__setstate__(more[0])
    object.__setattr__(clone, "__class__", type(self))
    return cast(nn.Module, clone)


def _reduced(self: nn.Module, protocol: Any) -> Any:
    """Copy as a module of this class; pickle as one of the original class."""
    cls, original = type(self), _original_of(self)
    answer = original.__reduce_ex__(self, protocol)  # the module keeps its class: other threads may call it meanwhile
    if not isinstance(answer, tuple):
        return answer
    if answer[1] == (cls,):  # as any class without a way of its own
        return (object.__new__, (_Class(cls, original),), *answer[2:])
    return (answer[0], tuple(original if each is cls else each for each in answer[1]), *answer[2:])


set_module("kernels_plugins", globals())
