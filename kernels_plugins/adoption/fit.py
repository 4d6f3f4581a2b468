"""Does a module compute what a rule says? Measured on a copy with random weights, once for each kind of module."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from .rule import Rule

_AT_MOST = 2e-5
"""Largest difference to the oracle, in units of its largest number: classes may compute in float32."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None))

Kind = tuple[object, ...]


def kind_of(module: nn.Module) -> Kind:
    """Return the kind of a module: its class, plain attributes and children, for which one measurement is enough."""
    plain = sorted((name, repr(value)) for name, value in module.__dict__.items() if _is_plain(name, value))
    tensors = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
    children = tuple((name, kind_of(child)) for name, child in module.named_children())
    return (type(module), tuple(plain), tensors, children)


def _is_plain(name: str, value: object) -> bool:
    return name != "training" and (isinstance(value, _PLAIN) or inspect.isroutine(value))


def has_parts(module: nn.Module, rule: Rule) -> bool:
    """Whether a module has the parts of a rule, of whatever class."""
    return all(_part(module, path) is not None for path in rule.parts)


def misfit(module: nn.Module, rule: Rule) -> str | None:
    """Return why a module with the parts of a rule is no layer of it, or None."""
    for path, kinds in rule.parts.items():
        part = _part(module, path)
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if type(part) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            return f"its part {path} is a {_name(type(part))}, not a plain {names}"
    for path, part in module.named_modules():
        if path and (part.__dict__.get("forward") is not None or any(part.__dict__.get(name) for name in _HOOKS)):
            return f"its part {path} has a hook or a forward of its own, which a kernel would not run"
    if getattr(module, "weight", module) is None:
        return "its weight is None"
    try:
        for canonical in rule.binds:
            rule.bound(module, canonical)
        return _measured(module, rule)
    except Exception as error:  # of code that was written for other purposes: one more class that is not adopted
        return f"it cannot be measured: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _part(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _measured(module: nn.Module, rule: Rule) -> str | None:
    ours, theirs = (_required(function) for function in (rule.oracle, type(module).forward))
    if ours != theirs:
        return f"its forward takes {theirs} argument{'s' * (theirs != 1)}, and the layer takes {ours}"
    small = _narrowed(module, rule)
    try:
        reason = _difference(module, rule, small)
    except Exception:  # its forward relies on its own width
        if not small:
            raise
        reason = "unknown"
    return _difference(module, rule, {}) if small and reason is not None else reason


def _difference(module: nn.Module, rule: Rule, narrowed: dict[int, nn.Linear]) -> str | None:
    """Return how a random copy of a module differs from the oracle, or None."""
    copied = _random_copy(module, narrowed)
    view = _View(copied, rule)
    for training in (False, True):  # dropout shows in one of them only
        copied.train(training)
        inputs = rule.inputs(view)
        with torch.no_grad():
            wanted = rule.oracle(view, *(value.clone() for value in inputs))
            found = type(module).forward(copied, *(value.clone() for value in inputs))
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            return f"it returns {_described(found)}, and the layer returns {_described(wanted)}"
        error = float((found.double() - wanted).abs().max() / wanted.abs().max())
        if not error <= _AT_MOST:
            return f"it computes something else: it differs by {error:.1g} of the largest number"
    return None


def _required(function: Any) -> int:
    """Return the number of arguments of a forward: all, since a kernel takes them all."""
    return len(inspect.signature(function).parameters) - 1


def _described(value: object) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


_LARGE = 1 << 20


def _narrowed(module: nn.Module, rule: Rule) -> dict[int, nn.Linear]:
    """Return a narrow layer for each large linear part, by its id: all sizes are divided by one number."""
    parts = [module.get_submodule(path) for path in rule.parts]
    linear = [part for part in parts if type(part) is nn.Linear]
    if sum(part.weight.numel() for part in linear) < _LARGE:
        return {}
    divisor = max(1, math.gcd(*(size for part in linear for size in part.weight.shape)) // 8)
    sizes = [(part, part.in_features // divisor, part.out_features // divisor) for part in linear]
    return {
        id(part): nn.Linear(inner, outer, part.bias is not None, "meta", torch.float64).to_empty(device="cpu")
        for part, inner, outer in sizes
    }


def _random_copy(module: nn.Module, replaced: dict[int, nn.Linear]) -> nn.Module:
    """Copy a module with random numbers in float64, on the CPU; its own tensors are never copied, nor read."""
    generator = torch.Generator().manual_seed(1)
    memo: dict[int, Any] = dict(replaced)
    kept = {id(tensor) for part in module.modules() if id(part) in replaced for tensor in part.parameters()}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) in kept:
            continue
        made: Tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.is_floating_point():
            made = _random(torch.empty(tensor.shape, dtype=torch.float64), generator)
        memo[id(tensor)] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made
    for part in replaced.values():
        for parameter in part.parameters():
            _random(parameter.data, generator)
    return copy.deepcopy(module, memo)


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.normal_(0.0, max(1, tensor.shape[-1] if tensor.dim() > 1 else 1) ** -0.5, generator=generator)


class _View:
    """A module with the canonical attributes of a rule."""

    def __init__(self, module: nn.Module, rule: Rule) -> None:
        self._module, self._bound = module, {name: rule.bound(module, name) for name in rule.binds}

    def __getattr__(self, name: str) -> Any:
        read = self._bound.get(name)
        return read(self._module) if read is not None else getattr(self._module, name)
