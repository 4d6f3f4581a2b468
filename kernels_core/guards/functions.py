"""Is this call made in the forward of a custom autograd function, which may make it again in its backward?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from ..torch_internals import forward_grad_enabled

_GENERATED = ("GeneratedBackwardFor_", "CompiledFunctionBackward")
"""Functions that PyTorch makes for operators of `torch.library` and compiled code: their backward calls no layer."""


_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)
"""The code around a forward that gets no context; None where that is written in C, as in PyTorch 2.15."""


def function_contexts() -> Iterator[Any]:
    """Yield the contexts of the custom autograd functions in whose forward this is, innermost first.

    Of a function with `setup_context`, whose forward gets no context, yield the class.
    """
    frame = sys._getframe(1)
    # Autograd gives Python no way to ask: the context is the first argument of a `forward` in the stack.
    while (caller := frame.f_back) is not None:
        frame, code = caller, caller.f_code
        if code.co_name == "forward":
            context = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(context, FunctionCtx) and not type(context).__name__.startswith(_GENERATED):
                yield context
            elif _APPLY is None and _code_of(type(context)) is not code:  # not a module's own
                yield from (function for function in _functions() if _code_of(function) is code)
        elif code is _APPLY:
            function = frame.f_locals.get("cls")
            if getattr(function, "setup_context", None) is not torch.autograd.Function.setup_context:
                yield function


def _code_of(cls: Any) -> object:
    return getattr(getattr(cls, "forward", None), "__code__", None)


def _functions() -> Iterator[Any]:
    """Yield the custom autograd functions of this process that have a `setup_context`."""
    waiting = torch.autograd.Function.__subclasses__()
    while waiting:
        function: Any = waiting.pop()
        waiting += function.__subclasses__()
        if function.setup_context is not torch.autograd.Function.setup_context:
            yield function


outside_functions: Callable[[], bool] = forward_grad_enabled or (lambda: next(function_contexts(), None) is None)
"""Whether a call is surely not in the forward of a custom autograd function; `in_function` finds out."""


def in_function() -> bool:
    """Whether this is the forward of a custom autograd function, such as that of a reentrant checkpoint.

    Autograd records nothing there, and its backward may make the same calls again, with recording. So the kernels for
    training serve both: output and gradient have to be of one function.
    """
    # Inference mode switches the same flag off.
    return not outside_functions() and not torch.is_inference_mode_enabled()
