"""A kernel that raises where the reference does not: it is quarantined, and the reference answers if that is safe."""

from __future__ import annotations

import contextlib
import re
import signal
import traceback
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from ..environment import strict
from ..errors import KernelsError, KernelsWarning
from ..layer import Forward
from ..nested import held_by
from ..raised import detached, error_text, message_of
from ..replay import CONSTANTS, Call
from ..resolution import Resolution
from ..torch_internals import dispatch_mode_count, in_forward_ad, in_transform, is_traced, version
from ..warning import warn, warn_once
from .limits import first_dtype, unlimited
from .quarantine import quarantine
from .tensors import is_odd, is_odd_module

_NEVER = (KernelsError, KernelsWarning, MemoryError, torch.OutOfMemoryError)
"""Errors that are not the fault of a kernel, or not for a guard to judge."""

_UNCHANGED = (torch.Tensor, torch.nn.Module, *CONSTANTS)
"""Arguments that a kernel cannot have changed in silence: a tensor counts its changes.

Modules and parameters are taken to be as they were, like those of a layer that is a module: optimizers change them, and
no kernel does.
"""


_NAMES: dict[torch.dtype | None, tuple[str, ...]] = {
    torch.bfloat16: ("bf16",),
    torch.float16: ("half", "fp16"),
    torch.float32: ("float", "fp32"),
    torch.float64: ("double", "fp64"),
    torch.int8: ("char",),
    torch.uint8: ("byte",),
    torch.int16: ("short",),
    torch.int32: ("int",),
    torch.int64: ("long",),
}
"""The names that errors of C++ and of compilers have for dtypes, besides those of Python."""


def stand_in(
    resolution: Resolution, error: Exception, module: torch.nn.Module | None, values: Iterable[Any]
) -> Forward | None:
    """Return the function to call in place of a kernel that has raised; None if the error is to be raised.

    It runs the reference. If that raises too, the error is the caller's. If not, the kernel is quarantined (for calls
    of this dtype, if the error names it), unless it may serve others (`_why_spared`). If the kernel may have changed an
    argument before it failed, the reference runs on copies, to judge, and the error is raised; a call whose arguments
    cannot be copied, such as a generator, is not judged.
    """
    layer, implementation = resolution.request.layer, resolution.implementation
    if (
        layer is None
        or implementation is None
        or not _is_judged(error)
        or not _raised(unlimited(implementation), error)
    ):
        return None
    values = list(values)  # read several times, and it may be an iterator
    spared = _why_spared(error, module, values)
    # Whether the answer of the reference may be returned.
    safe = layer.use_fallback and not strict() and not _may_be_changed(values)

    def judge(*args: Any, **kwargs: Any) -> Any:
        reference_fails = True
        with contextlib.suppress(Exception):  # a handler would make the error of the reference the context of the other
            if safe:
                output = layer.reference(*args, **kwargs)
            else:
                module, given = (None, args) if layer.is_function else (args[0], args[1:])
                with Call(module, given, kwargs).replayed(layer.reference, objects=True, changes=False):
                    output = None
            reference_fails = False
        if reference_fails:
            raise error
        if spared:
            if not safe:
                raise error
            warn_once(
                f"{resolution.origin} raised in layer {layer.name!r} {spared}, where the reference does not: the "
                f"reference serves such calls, and the kernel all others ({error_text(error)})",
                (layer.name, resolution.origin, spared),
            )
            return output
        dtype = _dtype_named(error, values) if not layer.kind else None  # a coroutine cannot pass calls of one dtype on
        # Below an empty line, PyTorch may list every kernel of an operator.
        reason = error_text(error).partition("\n\n")[0].rstrip(".")
        quarantine(
            layer,
            implementation,
            kernel=resolution.origin,
            device=resolution.request.device,
            dtype=dtype,
            reason=f"it raised {reason}, where the reference does not. Report it to its author",
            error=detached(error, copied=not safe),  # one that goes to the caller keeps its frames
        )
        if safe:
            return output
        warn(
            f"{resolution.origin} raised in layer {layer.name!r}, where the reference does not: it is in quarantine "
            f"from now on{f' for {dtype}' if dtype is not None else ''}. This call was not made anew, for arguments "
            "may have been changed already, or the reference must not serve.",
        )
        raise error

    return judge


def _is_judged(error: Exception) -> bool:
    """Whether an error can be the fault of a kernel: not while a call is traced, nor if the device is lost."""
    traced = dispatch_mode_count() or is_traced()
    # Activation checkpointing also stops a recomputation by raising, and the class of that error is private.
    of_checkpointing = type(error).__module__ == CheckpointError.__module__
    return not (isinstance(error, _NEVER) or of_checkpointing or _is_sticky(error) or traced or _is_interrupt(error))


def _why_spared(error: Exception, module: torch.nn.Module | None, values: Iterable[Any]) -> str:
    """Return in which calls a kernel has raised, if it may serve others; else ""."""
    if any(tensor.layout is not torch.strided or tensor.is_nested for tensor in held_by(values)[0]):
        return "for a tensor that is sparse or nested"
    if isinstance(error, Warning):
        return "where warnings are errors"
    if torch.are_deterministic_algorithms_enabled() and "use_deterministic_algorithms" in error_text(error):
        return "where algorithms are to be deterministic"
    if in_transform() or in_forward_ad():
        return "under torch.func or in forward-mode differentiation"
    if (mode := _mode_passed(error)) is not None:
        return f"under the mode {mode}"
    odd = is_odd(values) or (module is not None and is_odd_module(module))
    return "for a tensor of a subclass" if odd else ""


def _is_interrupt(error: Exception) -> bool:
    """Whether the handler of a signal has raised an error, such as that of an alarm: it ends whatever runs."""
    handlers = [getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()]
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


def _mode_passed(error: Exception) -> str | None:
    """Return the class of a mode that an error came through, and that may have raised it; those of PyTorch do not."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        first = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:1]]  # `self`, in a method of a mode
        for kind in map(type, first):
            if issubclass(kind, TorchFunctionMode) and not kind.__module__.startswith("torch."):
                return kind.__name__
    return None


def _raised(kernel: Forward, error: Exception) -> bool:
    """Whether an error went through a kernel, and not only through the wrappers of plugins."""
    function = kernel.__func__ if isinstance(kernel, types.MethodType) else kernel
    if not isinstance(function, types.FunctionType):  # a traceback has no frame of it
        return True
    place = (function.__code__.co_filename, function.__code__.co_firstlineno)  # also that of copies of the code
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any((frame.f_code.co_filename, frame.f_code.co_firstlineno) == place for frame in frames)


def _is_sticky(error: Exception) -> bool:
    """Whether a CUDA context is in an error from which this process cannot recover."""
    accelerator: type[Exception] | None = getattr(torch, "AcceleratorError", None)  # from PyTorch 2.8 on
    return (accelerator is not None and isinstance(error, accelerator)) or "CUDA error" in message_of(error)


def _dtype_named(error: Exception, values: Sequence[Any]) -> torch.dtype | None:
    """Return the dtype of the first tensor of a call, if an error is about it: the kernel may serve others."""
    dtype = first_dtype(values)
    words = set(re.findall(r"\w+", message_of(error).lower()))  # whole words: "pointer" holds "int"
    return dtype if words & {str(dtype).removeprefix("torch."), *_NAMES.get(dtype, ())} else None


def _may_be_changed(values: list[Any]) -> bool:
    """Whether a tensor among the arguments was ever changed in place, or an argument does not record changes."""
    changed = (tensor for tensor in held_by(values)[0] if version(tensor) != 0)  # at any time: not only in this call
    if not all(isinstance(tensor, torch.nn.Parameter) for tensor in changed):
        return True
    return not all(isinstance(item, _UNCHANGED) for value in values for item in _inside(value))


def _inside(value: Any) -> Iterable[Any]:
    """Yield a value, or the items of a tuple, which cannot be changed."""
    if isinstance(value, tuple):
        for item in value:
            yield from _inside(item)
    else:
        yield value
