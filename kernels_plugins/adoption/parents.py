"""Parents: modules whose forward is written anew, so that one function computes several of their parts.

The parts stay where they are, and are called as before in each call where one of them is not plain.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from types import FunctionType
from typing import Any

import torch
from torch import nn

from kernels_core import Mode

from .functions import replacing
from .rule import Rule

_TEXT = """\
def forward{signature}:
    if _kernel_plain({module}):
        return _kernel_oracle({module}, _kernel_function, _kernel_own, {arguments})
    return _kernel_own({call})
"""
_AS_GIVEN: dict[Any, str] = {Parameter.KEYWORD_ONLY: "{0}={0}", Parameter.VAR_KEYWORD: "**{0}"}
_PLAIN = (nn.Parameter, torch.Tensor, type(None))


@functools.cache
def plain(rule: Rule, *, sharded: bool = False) -> Callable[[Any], bool]:
    """Return a test whether a function may read the parts of a parent: no hook is on them, and no class is another.

    The layer name of an adopted class is that of classes derived from it, too: a kernelized part is plain.
    """
    parts = [(path.split("."), kind, isinstance(kind, str)) for path, kind in rule.parts.items()]

    def is_plain(module: Any) -> bool:
        for steps, kind, adopted in parts:
            part = module
            for step in steps:
                part = part._modules[step]
            cls = part.__class__
            if (getattr(cls, "adopted_as", None) != kind) if adopted else (cls is not kind):
                return False
            if part._forward_hooks or part._backward_hooks or part._backward_pre_hooks or "forward" in part.__dict__:
                return False
            for tensor in part._parameters.values():
                if tensor.__class__ not in _PLAIN and not (sharded and hasattr(tensor, "full_tensor")):
                    return False
            for hook in part._forward_pre_hooks.values():
                if not hasattr(hook, "observes"):
                    return False
        return True

    return is_plain


@functools.cache  # equal classes are one class: the same one again
def computed(rule: Rule) -> Callable[[nn.Module, Mode], tuple[str, ...]]:
    """Return a function that names the parts of a parent that are computed, not called, as it is now."""
    # FSDP shards the weights between calls, and gathers them for each.
    may = plain(rule, sharded=True)
    return lambda module, mode: tuple(rule.parts) if rule.mode in (None, mode) and may(module) else ()


@functools.lru_cache(maxsize=256)  # the same one again, so that compiled code can be used again
def parent_forward(forward: Any, rule: Rule, function: Callable[..., Any]) -> FunctionType:
    """Return the forward of parents: the oracle of a rule, inside of the decorators of the class's own forward.

    Raises:
        ValueError: If no such forward can be written; the text says why.
    """
    return replacing(forward, lambda own: rewritten(own, rule, function))


def rewritten(own: FunctionType, rule: Rule, function: Callable[..., Any]) -> FunctionType:
    """Return a function with the parameters of a forward that calls the oracle of a rule, where the parts are plain.

    It is written as text: Python then binds the arguments, and raises for wrong ones, as for the forward itself.
    """
    parameters = list(inspect.signature(own, follow_wrapped=False).parameters.values())
    leading = sum(each.kind is Parameter.POSITIONAL_OR_KEYWORD for each in _parameters(rule.oracle)) - 3
    by_place = [each for each in parameters if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, *_AS_GIVEN)
    if len(by_place) < 1 + leading or any(each.kind not in kinds for each in parameters):
        raise ValueError("its forward takes arguments in another way than the layer")
    module, *others = parameters
    given = [each.name for each in others[:leading]]
    given += [_AS_GIVEN.get(each.kind, "{0}={0}").format(each.name) for each in others[leading:]]
    bare = [
        each.replace(annotation=each.empty, default=None if each.default is not each.empty else each.empty)
        for each in parameters
    ]
    text = _TEXT.format(
        signature=inspect.Signature(bare),
        module=module.name,
        arguments=", ".join(given),
        call=", ".join(_AS_GIVEN.get(each.kind, "{0}").format(each.name) for each in parameters),
    )
    names: dict[str, Any] = {  # no __name__: Dynamo would look names up in that module
        "_kernel_plain": plain(rule),
        "_kernel_oracle": rule.oracle,
        "_kernel_function": function,
        "_kernel_own": own,
    }
    exec(compile(text, f"<forward of {own.__qualname__}, for rule {rule.name!r}>", "exec"), names)
    made: FunctionType = names.pop("forward")
    made.__defaults__, made.__kwdefaults__ = own.__defaults__, own.__kwdefaults__
    return functools.wraps(own)(made)  # type: ignore[return-value]


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    return list(inspect.signature(function).parameters.values())
