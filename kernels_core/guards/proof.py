"""A kernel that was not yet proven to keep gradients: the first calls that autograd records are checked."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.autograd import forward_ad

from ..layer import Forward, Layer
from ..nested import held_by
from ..torch_internals import in_forward_ad, in_transform
from ..warning import warn_once
from .gradients import keeps_gradients, records_autograd, try_gradients, unreached

_FINDS_LOCALS = {"super", "locals", "vars", "eval", "exec"}
"""Functions that read the first argument of their caller without being given it."""


def until_proven(
    layer: Layer,
    kernel: Forward,
    forward: Forward,
    *,
    origin: str,
    when_proven: Callable[[], None],
    decide_anew: Callable[[torch.nn.Module | None, tuple[Any, ...]], Forward],
) -> Forward:
    """Return a function that calls `forward`, and checks the calls that autograd records until the kernel is proven.

    Args:
        layer: The layer that the kernel serves.
        kernel: The implementation, as in `Resolution.implementation`.
        forward: The function that calls the kernel; often the kernel itself.
        origin: Where the kernel came from, for messages.
        when_proven: Called when nothing is left to prove: replaces the function that is returned here.
        decide_anew: Returns the function that serves a call of which the kernel has lost a gradient; takes the module
            and the arguments of that call.
    """

    @functools.wraps(forward)
    def proving(*args: Any, **kwargs: Any) -> Any:
        if keeps_gradients(layer, kernel):  # proven by another call meanwhile
            when_proven()
            return forward(*args, **kwargs)
        module, values = _arguments(layer, args, kwargs)
        changed_part = getattr(kernel, "kernels_changed_part", None)  # then the reference runs, and proves nothing
        transformed = in_transform()
        recorded = torch.is_grad_enabled() and (transformed or records_autograd(module, values))
        if torch.compiler.is_compiling() or not (recorded or in_forward_ad()):
            return forward(*args, **kwargs)
        if changed_part is not None and changed_part(module) is not None:
            return forward(*args, **kwargs)
        if transformed or in_forward_ad():  # where the reference cannot run on copies
            output = forward(*args, **kwargs)
            given = [*values, *([] if module is None else [*module.parameters(), *module.buffers()])]
            hidden = transformed and _may_hide(output)
            if output is NotImplemented or not ((lost := _lost(given, output)) or hidden):
                return output
            expected = layer.reference(*args, **kwargs)
            if not lost - _lost(given, expected):  # the reference has none either: not recorded around a transform
                if hidden:
                    warn_once(
                        f"Layer {layer.name!r}: before PyTorch 2.7, it is not known whether a transform of torch.func "
                        f"derives a call: the reference serves there until a recorded call has proven {origin}."
                    )
                return expected if hidden else output
            warn_once(
                f"Layer {layer.name!r}: {origin} loses gradients under torch.func or in forward-mode "
                "differentiation: the reference serves such calls."
            )
            return expected

        def call(function: Forward) -> Any:
            return (forward if function is kernel else function)(*args, **kwargs)

        output, kept = try_gradients(layer, kernel, module, values, call, kernel=origin)
        if keeps_gradients(layer, kernel):
            when_proven()
        return decide_anew(module, values)(*args, **kwargs) if kept is False else output

    return proving


_unwrapped: Callable[..., Any] | None = getattr(torch.func, "debug_unwrap", None)  # from PyTorch 2.7 on


def _lost(given: Any, output: Any) -> set[str]:
    """Return the tensors among those given, by number, whose derivative the output of a call does not have."""
    sources = {str(number): tensor for number, tensor in enumerate(_with_wrapped(given))}
    outputs = list(_with_wrapped(output))
    recorded = {name: tensor for name, tensor in sources.items() if tensor.requires_grad and torch.is_grad_enabled()}
    lost = set(unreached(recorded, outputs))
    if outputs and not any(map(_has_tangent, outputs)):
        lost.update(name for name, tensor in sources.items() if _has_tangent(tensor))
    return lost


def _with_wrapped(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a nested value, and those that transforms have wrapped: each has the derivatives of one."""
    for tensor in held_by([values])[0]:
        inner: torch.Tensor | None = tensor
        while inner is not None:
            yield inner
            outer, inner = inner, _unwrapped(inner, recurse=False) if _unwrapped is not None else None
            inner = inner if inner is not outer else None


def _may_hide(output: Any) -> bool:
    """Whether a transform around this one may derive a call, where PyTorch does not show what is wrapped."""
    return _unwrapped is None and not any(t.requires_grad or _has_tangent(t) for t in _with_wrapped(output))


def _has_tangent(tensor: torch.Tensor) -> bool:
    with contextlib.suppress(RuntimeError):  # of `vmap`, which has no rule for this question
        return cast(Any, forward_ad).unpack_dual(tensor).tangent is not None
    return False


def _arguments(
    layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.nn.Module | None, tuple[Any, ...]]:
    """Return the module, and all arguments in the order of the signature, as generated functions have them."""
    module, args = (None, args) if layer.is_function else (args[0], args[1:])
    try:
        bound = layer.signature.bind(*args, **kwargs)
    except (TypeError, ValueError):  # the kernel raises its own error, or its signature cannot be read
        return module, (*args, *kwargs.values())
    bound.apply_defaults()
    values: list[Any] = []
    for name, value in bound.arguments.items():
        kind = layer.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            values += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            values += value.values()
        else:
            values.append(value)
    return module, tuple(values)


def read_attributes(layer: Layer) -> frozenset[str] | None:
    """Return the names of the attributes that the reference of a layer reads of its module; None if it may read any.

    A kernel can lose only a gradient that the reference has, so these and the arguments are all that a check must ask.
    Reads the byte code: the module may only be used to read or to set an attribute.
    """
    reference = layer.reference
    if layer.is_function:
        return frozenset()
    if type(reference) is not types.FunctionType or reference.__code__.co_argcount == 0:
        return None
    code = reference.__code__
    if _FINDS_LOCALS.intersection(code.co_names):
        return None
    module, names = code.co_varnames[0], set()
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]  # a prefix of the next one
    for step, following in itertools.pairwise([*steps, steps[-1]]):
        loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)  # from Python 3.13 on, two at once
        if module not in loaded:
            continue
        if "LOAD_FAST" not in step.opname or loaded.index(module) != len(loaded) - 1:
            return None  # such as that of a closure
        if following.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.add(following.argval)
        elif following.opname != "STORE_ATTR":
            return None
    return frozenset(names)


class Unproven(dict[int, "tuple[weakref.ref[Forward], str]"]):
    """Kernels that are not proven, by their id, with their origin; they live in frames, which are not pickled."""

    def __reduce__(self) -> Any:
        return dict, ()
