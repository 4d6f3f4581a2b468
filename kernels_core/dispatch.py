"""The hot path: the forward that stands where a decorated forward stood.

The wrapper is generated per layer with the layer's own parameters, as `dataclasses` does it: no
`*args` to pack, defaults and keywords as ever. `forward_source` has its text. A warm call reads the active frame,
reads the attribute of this layer and device from it, and calls the function that it finds (here on a CPU build,
simplified):

```
def forward(self, x, eps=1e-6):
    if traced:
        return traced_kernel(self, (x, eps))(self, x, eps)
    try:
        kernel = active_frame().layer7_cpu
        if not x.is_cpu:
            kernel = cold(self, (x, eps))
        if unproven and autograd_may_record(self, x, eps):
            kernel = find_proving(kernel) or kernel
    except absent:
        kernel = cold(self, (x, eps))
    return kernel(self, x, eps)
```

Only tracers find the first condition true, so eager and traced calls never meet: `cold` resolves and publishes,
`traced_kernel` reads a property that resolves by itself (`scope.FrameTable`).
"""

from __future__ import annotations

import functools
import inspect
import linecache
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .answer import ModesDiffer
from .device import ACCELERATOR, MAX_INDEX, find_device, hardware
from .environment import mapping_disabled
from .errors import NoKernelError
from .forward_source import PLAIN, ForwardSource, read_parameters, set_defaults
from .guards.breaker import stand_in
from .guards.functions import outside_functions
from .guards.gradients import has_trainable, is_recorded, needs_proof, reads_trainable, records_autograd, requires_grad
from .guards.proof import read_attributes, until_proven
from .layer import Forward, Layer
from .mode import EAGER_MODES, TRACED_MODES, Mode
from .plugins import plugin_manager
from .resolution import Resolution
from .resolver import decide, must_raise, no_kernel, ready
from .scope import PATIENCE, Frame, FrameTable, active_frame, keep_scopes, publish, resolving, root, withdraw
from .torch_internals import (
    EXPRESSION_NAMES,
    FORWARD_LEVEL,
    IS_TRACED,
    TraceError,
    constant_result,
    disabled,
    disabled_lazily,
)

Served = tuple[Forward, Forward | None]
"""A function that serves a layer, and the one that proves it; None if there is nothing to prove."""

_ABSENT = (AttributeError, IndexError, TraceError)
"""Raised by a generated forward where nothing is published, or the first argument is missing or not a tensor."""


def make_forward(layer: Layer) -> Forward:
    """Return the dispatching forward of a layer, with the name, docstring and signature of its reference."""
    dispatcher = _Dispatcher(layer)
    forward = dispatcher.forward()
    functools.update_wrapper(forward, layer.reference)
    weakref.finalize(forward, withdraw, dispatcher.names).atexit = False
    weakref.finalize(forward, _unused_texts.extend, dispatcher.files).atexit = False  # Dynamo may keep the layer
    forward.__dict__["kernels_layer"] = layer
    return forward


def adapted(layer: Layer, kernel: Forward) -> Forward:
    """Return a kernel with the names and defaults of the layer: the kernel itself, unless it has others."""
    if kernel is layer.reference or _as_called(kernel, layer) == _as_called(layer.reference, layer):
        return kernel
    dispatcher = _Dispatcher(layer)
    function = dispatcher.generate("adapted", dispatcher.source.adapted(), _kernels_kernel=kernel)
    return functools.update_wrapper(function, layer.reference)


def frozen(layer: Layer, kernel: Forward, elsewhere: Forward) -> Forward:
    """Return the forward of a class that is kernelized with a kernel; its globals are the state of its choice."""
    dispatcher = _Dispatcher(layer)
    names: dict[str, Any] = {"_kernels_kernel": kernel, "_kernels_elsewhere": elsewhere}
    function = dispatcher.generate("frozen", dispatcher.source.frozen(), **names)
    return functools.update_wrapper(function, kernel)


def _as_called(function: Forward, layer: Layer) -> list[tuple[Any, ...]]:
    """Return the parts of a signature that a caller relies on: names, kinds, and defaults, plain ones by value."""
    parameters = list(inspect.signature(function).parameters.values())[0 if layer.is_function else 1 :]
    return [
        (p.name, p.kind, type(p.default), p.default if type(p.default) in PLAIN else id(p.default)) for p in parameters
    ]


def dispatched_layer(forward: object) -> Layer | None:
    """Return the layer that `forward` dispatches for; None for anything else, such as a wrapper of it."""
    layer = getattr(forward, "kernels_layer", None)
    code = getattr(forward, "__code__", None)
    return layer if isinstance(layer, Layer) and code is not None and code.co_filename == _file(layer) else None


_unused_texts: list[str] = []
"""Files in `linecache` of layers that are gone, dropped later: a finalizer may run inside of `linecache.checkcache`."""


class _Dispatcher:
    """Makes the functions of one layer, and answers them where nothing is published."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        names = read_attributes(layer)
        self._reads_trainable = has_trainable if names is None else functools.partial(reads_trainable, names)
        self.source = ForwardSource(
            read_parameters(layer.reference), layer.is_function, names != frozenset(), IS_TRACED, FORWARD_LEVEL
        )
        self._names: dict[torch.device, str] = {}
        self._tables: dict[str, FrameTable] = {}
        self._selectors: dict[str, Forward] = {}
        self._unproven: dict[int, weakref.ref[Forward]] = {}  # by kernel; frames hold the functions that prove them
        self._busy = threading.RLock()
        self.names, self.files = set[str](), set[str]()  # on frames, published or as tables; of generated source

    def _name(self, device: torch.device) -> str:
        name = self._names.get(device)
        if name is None:
            index = "" if device.index is None or device.type == "cpu" else f"_{device.index}"
            name = self._names[device] = f"layer{self.layer.number}_{device.type}{index}"
        return name

    # --- Eager calls ----------------------------------------------------------------------------

    def _cold(self, module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward:
        """Return the function that serves a call for which the forward has found nothing."""
        device = find_device(module, values)
        if device is None:
            return self._on_no_device()
        kernel, proving = self._published(self._name(device), functools.partial(self._settle, device))
        return proving if proving is not None and is_recorded(module, values) else kernel

    def _published(self, name: str, decide: Callable[[Frame], Served]) -> Served:
        """Return the functions that are published in the active frame; decide and publish if there are none."""
        keep_scopes()
        frame: Frame = root.active
        known: Forward | None = getattr(frame, name, None)
        if known is not None:
            return known, self._find_proving(known)
        # A plugin calls a decorated layer: no recursion, and no lock to wait for. Or another thread takes too long.
        if resolving.get() or not self._busy.acquire(timeout=PATIENCE):
            return self.layer.reference, None
        try:  # eight threads, one resolution
            known = getattr(frame, name, None)
            if known is not None:
                return known, self._find_proving(known)
            before = ready()
            served, proving = decide(frame)
            self.names.update((name, f"{name}_proving"))
            if proving is not None:  # first, for it lives as long as it is published
                publish(frame, f"{name}_proving", proving, before)
            publish(frame, name, served, before)
            return served, proving
        finally:
            self._busy.release()

    def _settle(self, device: torch.device, frame: Frame) -> Served:
        """Return one function for both modes, or the selector that asks for the mode."""
        try:
            return self._served(decide(self.layer, device, EAGER_MODES, frame=frame, notify="all"))
        except ModesDiffer:
            return self._selector(device), None

    def _served(self, resolution: Resolution) -> Served:
        if must_raise(resolution):
            return self._refusing(resolution), None
        kernel = resolution.implementation or self.layer.reference
        proving = self._until_proven(kernel, resolution.origin) if needs_proof(resolution) else None
        served = plugin_manager().wrap_forward(resolution, proving or kernel)
        return (kernel, proving) if served is proving else (served, None)  # a plugin wraps the proof with the kernel

    def _selector(self, device: torch.device) -> Forward:
        """Return the function that serves where training and inference differ; the same one each time."""
        name = f"{self._name(device)}_select"
        if name not in self._selectors:
            decisions: dict[str, Callable[[Frame], Served]] = {}
            for mode in EAGER_MODES:

                def decide_mode(frame: Frame, mode: Mode = mode) -> Served:
                    return self._served(decide(self.layer, device, (mode,), frame=frame, notify="all"))

                decisions[f"{self._name(device)}_{str(mode.name).lower()}"] = decide_mode

            def published(name: str) -> Forward:
                kernel, proving = self._published(name, decisions[name])
                return proving or kernel

            self._selectors[name] = self.generate(
                "select", self.source.select(*decisions), file=name, _kernels_published=published
            )
        return self._selectors[name]

    def _until_proven(self, kernel: Forward, origin: str) -> Forward:
        """Return the function that serves recorded calls until a kernel is proven; the same one in all frames."""
        proving = self._find_proving(kernel)
        if proving is None:
            number = id(kernel)  # of this kernel only while the function that proves it lives, which holds it

            def forget(dead: object = None) -> None:
                if dead is None or self._unproven.get(number) is dead:  # not one that another thread made meanwhile
                    self._unproven.pop(number, None)

            proving = until_proven(
                self.layer, kernel, kernel, origin=origin, when_proven=forget, decide_anew=self._cold
            )
            self._unproven[number] = weakref.ref(proving, forget)
        return proving

    def _find_proving(self, kernel: Forward) -> Forward | None:
        """Return the function that proves a kernel; None if it is proven."""
        reference = self._unproven.get(id(kernel))
        return reference() if reference is not None else None

    def _refusing(self, resolution: Resolution) -> Forward:
        """Return the function that raises, where the reference must not serve."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise no_kernel(resolution)

        return refuse

    def _on_no_device(self) -> Forward:
        """Return the function that serves calls on no device: the reference, or one that raises."""
        refusing = self._refusing_no_device
        return self.layer.reference if refusing is None or mapping_disabled() else refusing

    @functools.cached_property
    def _refusing_no_device(self) -> Forward | None:
        if self.layer.use_fallback:
            return None
        error = (
            f"No kernel serves layer {self.layer.name!r}, and the layer was decorated with use_fallback=False:\n"
            "  nothing says on which device: no argument is a tensor, nor has a module a parameter or a buffer\n"
            "Call it with a tensor, or allow the reference."
        )

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NoKernelError(error)

        return disabled_lazily(refuse, reason=error)

    def _failed(self, error: Exception, module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward | None:
        """Return the function to call in place of a kernel that has raised; None if the error is to be raised."""
        device = find_device(module, values)
        if device is None or resolving.get():
            return None
        mode = Mode.TRAINING if is_recorded(module, values) else Mode.INFERENCE
        judge = stand_in(decide(self.layer, device, (mode,)), error, values)
        if judge is None:
            return None

        def replaced(*args: Any, **kwargs: Any) -> Any:
            output = judge(*args, **kwargs)
            self._cold(module, values)  # decides anew at once, and warns of the reason
            return output

        return replaced

    # --- Traced calls ---------------------------------------------------------------------------

    def _traced(self) -> Callable[..., Forward]:
        """Return the function that a forward calls while it is traced, by Dynamo or by `torch.export`."""
        reference, refusing = self.layer.reference, self._refusing_no_device

        @constant_result
        def table(kind: str, index: int | None) -> str:
            """Run at trace time, outside of the graph: name the property that Dynamo is to read."""
            device = torch.device(kind, index) if index is not None else torch.device(kind)
            ready()  # or finding plugins makes the first answer one that is not kept, and guards ask again
            return self._table(f"{self._name(device)}_traced", functools.partial(self._settle_traced, device))

        def traced(module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward:
            device = find_device(module, values)
            if device is None:
                return reference if refusing is None or mapping_disabled() else refusing
            frame = root.active
            if frame is not root:
                bool(frame.in_function)  # a value that is used has a guard, which keeps the scopes
            forward: Forward = getattr(frame, table(device.type, device.index))
            return forward

        return traced

    def _table(self, name: str, resolve: Callable[[Frame], Forward]) -> str:
        with self._busy:  # two tables of one name would each answer a part of the reads
            if name not in self._tables:
                self._tables[name] = FrameTable(name, self.layer.reference, resolve)
                self.names.add(name)
        return name

    def _settle_traced(self, device: torch.device, frame: Frame) -> Forward:
        """Return one function for both modes, or the selector that reads the table of one of them."""
        try:
            return self._served_traced(decide(self.layer, device, TRACED_MODES, frame=frame, notify="all"))
        except ModesDiffer:
            return self._selector_traced(device)

    def _served_traced(self, resolution: Resolution) -> Forward:
        if must_raise(resolution):
            return disabled(self._refusing(resolution), reason=str(no_kernel(resolution)))
        return resolution.implementation or self.layer.reference

    def _selector_traced(self, device: torch.device) -> Forward:
        """Return the same for traced calls: it reads one of two properties."""
        name = f"{self._name(device)}_select_traced"
        if name not in self._selectors:
            tables = []
            for mode in TRACED_MODES:

                def decide_mode(frame: Frame, mode: Mode = mode) -> Forward:
                    return self._served_traced(decide(self.layer, device, (mode,), frame=frame, notify="all"))

                word = "training" if Mode.TRAINING in mode else "inference"
                tables.append(self._table(f"{self._name(device)}_{word}_traced", decide_mode))
            self._selectors[name] = self.generate("select_traced", self.source.select_traced(*tables), file=name)
        return self._selectors[name]

    # --- Generated functions --------------------------------------------------------------------

    def forward(self) -> Forward:
        """Generate the forward."""
        names = [self._name(torch.device(ACCELERATOR, index)) for index in range(MAX_INDEX) if ACCELERATOR]
        source = self.source.forward(
            f"layer{self.layer.number}", accelerator=ACCELERATOR, has_condition=self.layer.condition is not None
        )
        return self.generate(
            "forward",
            source,
            _kernels_cold=self._cold,
            _kernels_condition=self.layer.condition,
            _kernels_exception=Exception,
            _kernels_failed=self._failed,
            _kernels_hardware=hardware,
            _kernels_names=tuple(names),
            _kernels_reference=self.layer.reference,
            _kernels_traced=self._traced(),
        )

    def generate(self, function: str, source: str, *, file: str = "", **names: object) -> Forward:
        """Compile a text of `forward_source`, and show it to debuggers and tracebacks."""
        scope: dict[str, Any] = {  # no __name__: Dynamo would look names up in that module
            "_kernels_unproven": self._unproven,
            **_SHARED_NAMES,
            "_kernels_find_proving": self._find_proving,
            "_kernels_reads_trainable": self._reads_trainable,
            **names,
        }
        path = _file(self.layer, file or function)
        exec(compile(source, path, "exec"), scope)
        self.files.add(path)
        while _unused_texts:
            linecache.cache.pop(_unused_texts.pop(), None)
        if path not in linecache.cache:  # once, however often a model is kernelized
            weakref.finalize(self.layer, _unused_texts.append, path).atexit = False
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        generated: Forward = scope.pop(function)  # Dynamo may keep the namespace: not the function with it
        set_defaults(generated, self.source.parameters)
        return generated


_SHARED_NAMES: dict[str, object] = {
    "_kernels_frame": active_frame,  # first the names that each call reads: they share cache lines then
    **EXPRESSION_NAMES,
    "_kernels_absent": _ABSENT,
    "_kernels_getattr": getattr,
    "_kernels_grad": torch.is_grad_enabled,
    "_kernels_has_trainable": has_trainable,
    "_kernels_is_recorded": is_recorded,
    "_kernels_keep_scopes": keep_scopes,
    "_kernels_outside_functions": outside_functions,
    "_kernels_plain": PLAIN,
    "_kernels_records": records_autograd,
    "_kernels_requires_grad": requires_grad,
    "_kernels_root": root,
    "_kernels_tensor": torch.Tensor,
}
"""Names that generated functions use, besides those of their own."""


def _file(layer: Layer, function: str = "forward") -> str:
    return f"<kernels_core {function} {layer.number} of {layer.qualname}>"
