"""Compiles the texts of `forward_source` for one layer, and shows them to debuggers and tracebacks."""

from __future__ import annotations

import functools
import inspect
import linecache
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch

from .forward_source import PLAIN, ForwardSource, read_parameters, set_defaults
from .guards.functions import outside_functions
from .guards.gradients import (
    has_trainable,
    is_recorded,
    is_transformed,
    reads_trainable,
    records_autograd,
    requires_grad,
)
from .guards.proof import read_attributes
from .guards.tensors import is_odd, is_odd_module, is_odd_traced, odd_parameters
from .layer import Forward, Layer
from .scopes.frame import active_frame, root
from .scopes.kept import keep_scopes
from .torch_internals import (
    EXPRESSION_NAMES,
    FORWARD_LEVEL,
    IS_RECORDED,
    IS_TRACED,
    TraceError,
    constant_result,
    in_transform,
)

_ABSENT = (AttributeError, IndexError, TraceError)
"""Raised by a generated forward where nothing is published, or the first argument is missing or not a tensor."""


unused_texts: list[str] = []
"""Files in `linecache` of layers that are gone, dropped later: a finalizer may run inside of `linecache.checkcache`."""


class Generator:
    """Makes functions with the signature of one layer.

    Attributes:
        layer: The layer.
        source: Writes their texts.
        files: The names under which `linecache` has them.
    """

    def __init__(self, layer: Layer) -> None:
        """Read the signature and the byte code of the reference."""
        self.layer = layer
        self.files = set[str]()
        names = read_attributes(layer)
        self._reads_trainable = has_trainable if names is None else functools.partial(reads_trainable, names)
        self.source = ForwardSource(
            read_parameters(layer.reference),
            layer.is_function,
            names != frozenset(),
            IS_TRACED,
            FORWARD_LEVEL,
            IS_RECORDED,
            layer.kind,
        )

    def generate(self, function: str, source: str, *, file: str = "", **names: object) -> Forward:
        """Compile a text of `forward_source`, and show it to debuggers and tracebacks."""
        scope: dict[str, Any] = {  # no __name__: Dynamo would look names up in that module
            "_kernels_watched": None,  # in `names`; first, for each call reads it
            **_SHARED_NAMES,
            "_kernels_reads_trainable": self._reads_trainable,
            **names,
        }
        path = _file(self.layer, file or function)
        exec(compile(source, path, "exec"), scope)  # a name for `linecache`: tracebacks show its lines
        self.files.add(path)
        while unused_texts:
            linecache.cache.pop(unused_texts.pop(), None)
        if path not in linecache.cache:  # once, however often a model is kernelized
            weakref.finalize(self.layer, unused_texts.append, path).atexit = False
        # Without a time of change, `linecache.checkcache` does not look for such a file on disk.
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        generated: Forward = scope.pop(function)  # Dynamo may keep the namespace: not the function with it
        set_defaults(generated, self.source.parameters)
        return generated


def adapted(layer: Layer, kernel: Forward) -> Forward:
    """Return a kernel with the names and defaults of the layer: the kernel itself, unless it has others."""
    if kernel is layer.reference or _as_called(kernel, layer) == _as_called(layer.reference, layer):
        return kernel
    generator = Generator(layer)
    function = generator.generate("adapted", generator.source.adapted(), _kernels_kernel=kernel)
    return functools.update_wrapper(function, layer.reference)


def frozen(layer: Layer, kernel: Forward, **names: Any) -> Forward:
    """Return the forward of a class that is kernelized with a kernel; its globals are the state of its choice."""
    generator = Generator(layer)
    names = {f"_kernels_{name}": value for name, value in names.items()}
    function = generator.generate(
        "frozen", generator.source.frozen(), _kernels_first=kernel, _kernels_kernel=kernel, **names
    )
    return functools.update_wrapper(function, kernel)


def _as_called(function: Forward, layer: Layer) -> list[tuple[Any, ...]]:
    """Return the parts of a signature that a caller relies on: names, kinds, and defaults, plain ones by value."""
    parameters = list(inspect.signature(function).parameters.values())[0 if layer.is_function else 1 :]
    return [
        # Others by identity: to compare tensors gives a tensor, and any class may raise.
        (p.name, p.kind, type(p.default), p.default if type(p.default) in PLAIN else id(p.default))
        for p in parameters
    ]


def dispatched_layer(forward: object) -> Layer | None:
    """Return the layer that `forward` dispatches for; None for anything else, such as a wrapper of it."""
    layer = getattr(forward, "kernels_layer", None)
    # `functools.wraps` copies the first, so a wrapper has it, too.
    cold = getattr(forward, "__globals__", {}).get("_kernels_cold")
    return layer if isinstance(layer, Layer) and cold is not None and cold.__self__.layer is layer else None


class _Made:
    """Holds a forward, where guards of Dynamo find it."""

    forward: Forward | None = None

    def __reduce__(self) -> Any:
        return _Made, ()  # in a forward that is pickled by value: the copy makes its own


def made_once(make: Callable[[], Forward | None], otherwise: Forward) -> Callable[[], Forward]:
    """Return a function that returns the forward that `make` makes, which it calls until there is one."""
    made = _Made()

    @constant_result
    def prepare() -> bool:
        """Run at trace time, outside of the graph; Dynamo reads the attribute afterwards (2.6 reads a list before)."""
        made.forward = made.forward or make()
        return made.forward is not None

    def get() -> Forward:
        return cast(Forward, made.forward) if prepare() else otherwise

    return get


def answer(_kernel_output: Any, _kernels_next: Callable[[], Forward], /, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a traced call, or that of the next candidate where a kernel has passed the call on.

    The output is stored in no variable: Dynamo would name a node of its graph after that.
    """
    return _kernels_next()(*args, **kwargs) if _kernel_output is NotImplemented else _kernel_output


def passed_back(*args: Any, **kwargs: Any) -> Any:
    """Return `NotImplemented`: it was the answer of a reference, which no other function has to replace."""
    return NotImplemented


_SHARED_NAMES: dict[str, object] = {
    "_kernels_frame": active_frame,  # first the names that each call reads: they share cache lines then
    **EXPRESSION_NAMES,
    "_kernels_tensor": torch.Tensor,
    "_kernels_passed_on": NotImplemented,
    "_kernels_absent": _ABSENT,
    "_kernels_answer": answer,
    "_kernels_getattr": getattr,
    "_kernels_grad": torch.is_grad_enabled,
    "_kernels_has_trainable": has_trainable,
    "_kernels_is_recorded": is_recorded,
    "_kernels_keep_scopes": keep_scopes,
    "_kernels_outside_functions": outside_functions,
    "_kernels_is_transformed": is_transformed,
    "_kernels_is_odd": is_odd,
    "_kernels_is_odd_module": is_odd_module,
    "_kernels_is_odd_traced": is_odd_traced,
    "_kernels_odd_parameters": odd_parameters,
    "_kernels_parameter": torch.nn.Parameter,
    "_kernels_plain": PLAIN,
    "_kernels_records": records_autograd,
    "_kernels_requires_grad": requires_grad,
    "_kernels_root": root,
    "_kernels_in_transform": in_transform,
}
"""Names that generated functions use, besides those of their own."""


def _file(layer: Layer, function: str) -> str:
    return f"<kernels_core {function} {layer.number} of {layer.qualname}>"
