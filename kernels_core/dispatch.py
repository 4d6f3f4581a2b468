"""The hot path: the forward that stands where a decorated forward stood.

The wrapper is generated per layer with the layer's own parameters, as `dataclasses` does it: no
`*args` to pack, defaults and keywords as ever. A warm call reads the active frame, reads the
attribute of this layer and device from it, and calls what it finds (here on a CPU build):

```
def forward(self, x, eps=1e-6):
    if traced_by_dynamo or compiling:
        return traced(self, (x, eps))(self, x, eps)
    try:
        kernel = active_frame().layer7_cpu
        if not x.is_cpu:
            kernel = cold(self, (x, eps))
    except absent:
        kernel = cold(self, (x, eps))
    return kernel(self, x, eps)
```

Only Dynamo finds the first condition true, so eager and traced calls never meet: `cold` resolves
and publishes, `traced` reads a property that resolves by itself (`scope.Table`).
"""

from __future__ import annotations

import functools
import inspect
import linecache
import re
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from .answer import ModesDiffer
from .environment import mapping_disabled
from .errors import NoKernelError
from .forward_source import Source
from .guards.breaker import stand_in
from .guards.gradients import keeps_gradients, needs_proof, records_autograd, try_gradients
from .layer import Layer
from .mode import EAGER_MODES, TRACED_MODES, Mode
from .plugins import plugin_manager
from .resolution import Resolution
from .resolver import Notify, decide, must_raise, no_kernel, ready
from .scope import PATIENCE, Frame, Table, active_frame, publish, republish, resolving, root, withdraw
from .torch_internals import (
    EXPRESSION_NAMES,
    FORWARD_LEVEL,
    IS_TRACED,
    TraceError,
    constant_result,
    current_transform,
    disabled,
    disabled_lazily,
    on_cuda_start,
)

Forward = Callable[..., Any]

_ACCELERATOR = (
    "cuda"
    if torch.version.cuda or torch.version.hip
    else "xpu"
    if getattr(torch.version, "xpu", None)
    else "mps"
    if torch.backends.mps.is_built()
    else None
)
"""Type of the accelerators that this PyTorch is built for: they get the short way, any other the long one."""

_MAX_SHORT_INDEX = 8
"""How many accelerators get the short way."""


class _Hardware:
    """What calls ask about the machine: with one accelerator, there is no index to ask for; with none, nothing."""

    __slots__ = ("accelerators",)

    def __init__(self) -> None:
        self.accelerators = 0 if _ACCELERATOR in ("cuda", None) else 1 if _ACCELERATOR == "mps" else _MAX_SHORT_INDEX

    def count(self) -> None:
        """Count; run when CUDA starts, before which no tensor is there."""
        self.accelerators = torch.cuda.device_count()


_hardware = _Hardware()
if _ACCELERATOR == "cuda" and not on_cuda_start(_hardware.count):
    _hardware.accelerators = _MAX_SHORT_INDEX  # right for any number, one question slower


_ABSENT = (AttributeError, IndexError, TraceError)
"""What the short way raises where nothing is published, or the first argument is missing or no tensor."""


def make_forward(layer: Layer) -> Forward:
    """Return the dispatching forward of a layer, with the name, docstring and signature of its reference."""
    dispatcher = _Dispatcher(layer)
    forward = dispatcher.forward()
    functools.update_wrapper(forward, layer.reference)
    weakref.finalize(forward, _discard, dispatcher.names, dispatcher.files).atexit = False
    forward.__dict__["kernels_layer"] = layer
    return forward


def adapted(layer: Layer, kernel: Forward) -> Forward:
    """Return what can be called as the layer is: the kernel itself, unless its names or defaults are others."""
    if kernel is layer.reference or _as_called(kernel, layer) == _as_called(layer.reference, layer):
        return kernel
    dispatcher = _Dispatcher(layer)
    return functools.update_wrapper(dispatcher._calling(kernel, "adapted"), layer.reference)


def _as_called(function: Forward, layer: Layer) -> list[tuple[Any, ...]]:
    """What a caller can tell of a signature: names, kinds, and defaults, of which small ones are equal by value."""
    parameters = list(inspect.signature(function).parameters.values())[0 if layer.is_function else 1 :]
    plain = (bool, int, float, str, type(None), type(inspect.Parameter.empty))
    return [
        (p.name, p.kind, type(p.default), p.default if isinstance(p.default, plain) else id(p.default))
        for p in parameters
    ]


def dispatched_layer(forward: object) -> Layer | None:
    """Return the layer that `forward` dispatches for; None for anything else, such as a wrapper of it."""
    layer = getattr(forward, "kernels_layer", None)
    code = getattr(forward, "__code__", None)
    return layer if isinstance(layer, Layer) and code is not None and code.co_filename == _file(layer) else None


def _discard(names: set[str], files: set[str]) -> None:
    """Give back what the process keeps for a layer that nobody can call any more."""
    withdraw(names)
    for file in files:
        linecache.cache.pop(file, None)


class _Dispatcher:
    """Makes the functions of one layer, and answers them where they find nothing."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._source = Source(layer)
        self._names: dict[torch.device, str] = {}
        self._tables: dict[str, Table] = {}
        self._selectors: dict[str, Forward] = {}
        self._unproven: weakref.WeakValueDictionary[int, Forward] = weakref.WeakValueDictionary()
        self._flat: weakref.WeakValueDictionary[int, Forward] = weakref.WeakValueDictionary()
        self._busy = threading.RLock()
        self.names: set[str] = set()  # on frames, published or as tables
        self.files: set[str] = set()  # of generated source

    def _name(self, device: torch.device) -> str:
        name = self._names.get(device)
        if name is None:
            index = "" if device.index is None or device.type == "cpu" else f"_{device.index}"
            name = self._names[device] = f"layer{self.layer.number}_{device.type}{index}"
        return name

    # --- Eager calls ----------------------------------------------------------------------------

    def _cold(self) -> Callable[..., Forward]:
        """Return the function that an eager forward calls where it finds nothing."""
        reference, refusing = self._inner_reference, self._refusing()

        def cold(module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward:
            device = find_device(module, values)
            if device is None:
                return reference if refusing is None or mapping_disabled() else refusing
            return self._published(self._name(device), functools.partial(self._settle, EAGER_MODES, device))

        return cold

    def _published(self, name: str, resolve: Callable[[Frame], Forward]) -> Forward:
        """Return what is published in the active frame under `name`, resolved if it is not."""
        frame: Frame = root.active
        known: Forward | None = getattr(frame, name, None)
        if known is not None:
            return known
        if resolving.get():  # a plugin calls a decorated layer: no recursion, and no lock to wait for
            return self._inner_reference
        if not self._busy.acquire(timeout=PATIENCE):
            return self._inner_reference
        try:  # eight threads, one resolution
            known = getattr(frame, name, None)
            if known is not None:
                return cast(Forward, known)
            before = ready()
            forward = resolve(frame)
            self.names.add(name)
            publish(frame, name, forward, before)
            return forward
        finally:
            self._busy.release()

    def _refusing(self) -> Forward | None:
        """Return what serves a call that is on no device, where the reference must not; Dynamo leaves it alone."""
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

    # --- Traced calls ---------------------------------------------------------------------------

    def _traced(self) -> Callable[..., Forward]:
        """Return the function that a forward calls while it is traced, by Dynamo or by `torch.export`."""
        reference, refusing = self.layer.reference, self._refusing()

        @constant_result
        def table(kind: str, index: int | None) -> str:
            """Run at trace time, outside of the graph: name the property that Dynamo is to read."""
            device = torch.device(kind, index) if index is not None else torch.device(kind)
            ready()  # or finding plugins makes the first answer one that is not kept, and guards ask again
            resolve = functools.partial(self._settle, TRACED_MODES, device)
            return self._table(f"{self._name(device)}_traced", resolve)

        def traced(module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward:
            device = find_device(module, values)
            if device is None:
                return reference if refusing is None or mapping_disabled() else refusing
            forward: Forward = getattr(root.active, table(device.type, device.index))
            return forward

        return traced

    def _table(self, name: str, resolve: Callable[[Frame], Forward]) -> str:
        with self._busy:  # two tables of one name would each answer a part of the reads
            if name not in self._tables:
                self._tables[name] = Table(name, self.layer.reference, resolve)
                self.names.add(name)
        return name

    # --- Resolution -----------------------------------------------------------------------------

    def _settle(self, modes: tuple[Mode, Mode], device: torch.device, frame: Frame) -> Forward:
        """Return what serves: one function for both modes, or one that asks for the mode."""
        try:
            resolution = decide(self.layer, device, modes, frame=frame, notify=Notify.ALL)
        except ModesDiffer:
            return self._selector(modes, device)
        return self._forward_of(resolution, modes)

    def _decide(self, mode: Mode, modes: tuple[Mode, Mode], device: torch.device, frame: Frame) -> Forward:
        return self._forward_of(decide(self.layer, device, (mode,), frame=frame, notify=Notify.ALL), modes)

    def _forward_of(self, resolution: Resolution, modes: tuple[Mode, Mode]) -> Forward:
        if must_raise(resolution):

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise no_kernel(resolution)

            if modes is EAGER_MODES:
                return refuse
            return disabled(refuse, reason=str(no_kernel(resolution)))
        forward: Forward = resolution.implementation or self.layer.reference
        if modes is not EAGER_MODES:
            return forward
        if needs_proof(resolution):
            forward = self._until_proven(forward, resolution.origin)
        return self._inner(plugin_manager().wrap_forward(resolution, forward))

    def _until_proven(self, kernel: Forward, origin: str) -> Forward:
        """Return what calls a kernel that was not yet seen to keep all gradients, and looks at its recorded calls."""
        known = self._unproven.get(id(kernel))
        if known is not None:
            return known

        def prove(
            module: torch.nn.Module | None,
            values: tuple[Any, ...],
            call: Callable[[Forward], Any],
            call_inner: Callable[[Forward], Any],
        ) -> Any:
            if keeps_gradients(self.layer, kernel):
                republish(self._inner(unproven), self._inner(kernel))
                return call(kernel)
            if current_transform() is not None:
                return call(kernel)
            output, kept = try_gradients(self.layer, kernel, module, values, call, kernel=origin)
            if keeps_gradients(self.layer, kernel):
                republish(self._inner(unproven), self._inner(kernel))
            return output if kept is not False else call_inner(self._cold()(module, values))

        calls = f"lambda _kernel: _kernel({self._source.call}), lambda _kernel: _kernel({self._source.inner_call})"
        proving = self._generate(
            "prove",
            [f"return _kernels_prove({self._source.module}, {self._source.values}, {calls})"],
            _kernels_prove=prove,
        )
        unproven = self._generate(
            "unproven",
            [
                "if _kernels_grad():",
                f"    return _kernels_proving({self._source.call})",
                f"return _kernels_kernel({self._source.call})",
            ],
            _kernels_proving=proving,
            _kernels_kernel=kernel,
        )
        self._unproven[id(kernel)] = unproven  # which holds the kernel, so that the number stays its own
        return unproven

    def _selector(self, modes: tuple[Mode, Mode], device: torch.device) -> Forward:
        """Return the function that serves where training and inference differ; the same one each time."""
        inference, training = (f"{self._name(device)}_{str(mode.name or mode).lower()}" for mode in modes)
        inference, training = (re.sub(r"\W+", "_", name) for name in (inference, training))
        if inference in self._selectors:
            return self._selectors[inference]
        ways = {
            name: functools.partial(self._decide, mode, modes, device)
            for name, mode in zip((inference, training), modes, strict=True)
        }
        if modes is TRACED_MODES:
            for name, resolve in ways.items():
                self._table(name, resolve)
            found = "_kernels_getattr(_kernels_root.active, _name)"
        else:
            found = "(_kernels_getattr(_kernels_frame(), _name, None) or _kernels_published(_name))"
        records = f"_kernels_records({self._source.module}, {self._source.values})"
        if self._source.first is not None and self._source.first.isidentifier():  # quickly told, mostly
            records = f"(_kernels_getattr({self._source.first}, 'requires_grad', False) is True or {records})"
        lines = [
            f"_records = _kernels_grad() and {records} or {FORWARD_LEVEL} >= 0",
            f"_name = {training!r} if _records else {inference!r}",
            f"return {found}({self._source.inner_call if modes is EAGER_MODES else self._source.call})",
        ]
        selector = self._generate(
            f"select_{inference}", lines, _kernels_published=lambda name: self._published(name, ways[name])
        )
        self._selectors[inference] = self._inner(selector) if modes is EAGER_MODES else selector
        return self._selectors[inference]

    # --- Generated functions --------------------------------------------------------------------

    def forward(self) -> Forward:
        """Generate the forward."""
        first = self._source.first
        cold = f"_kernels_cold({self._source.module}, {self._source.values})"
        names: list[str] = []
        body = [f"_kernel = {cold}"]
        if first is not None:
            host = [
                f"_kernel = _kernels_frame().{self._name(torch.device('cpu'))}",
                f"if not {first}.is_cpu:",
                f"    _kernel = {cold}",
            ]
            short = host
            if _ACCELERATOR is not None:
                names = [self._name(torch.device(_ACCELERATOR, index)) for index in range(_MAX_SHORT_INDEX)]
                short = [
                    "if not _kernels_hardware.accelerators:",
                    *(f"    {line}" for line in host),
                    "elif _kernels_hardware.accelerators == 1:",
                    f"    if {first}.is_{_ACCELERATOR}:",
                    f"        _kernel = _kernels_frame().{names[0]}",
                    "    else:",
                    *(f"        {line}" for line in host),
                    "else:",  # one question instead of two
                    f"    _index = {first}.get_device()",
                    "    if _index >= 0:",
                    "        _kernel = _kernels_getattr(_kernels_frame(), _kernels_names[_index])",
                    "    else:",
                    *(f"        {line}" for line in host),
                ]
            body = ["try:", *(f"    {line}" for line in short), "except _kernels_absent:", f"    _kernel = {cold}"]
        lines = [
            *self._condition(),
            f"if {IS_TRACED}:",
            f"    return _kernels_traced({self._source.module}, {self._source.values})({self._source.call})",
            *body,
            "try:",  # which costs nothing from Python 3.11 on
            f"    return _kernel({self._source.inner_call})",
            "except _kernels_exception as _error:",
            f"    _kernel = _kernels_failed(_error, {self._source.module}, {self._source.values})",
            "    if _kernel is None:",
            "        raise",
            f"return _kernel({self._source.inner_call})",
        ]
        return self._generate(
            "forward",
            lines,
            _kernels_cold=self._cold(),
            _kernels_traced=self._traced(),
            _kernels_names=tuple(names),
            _kernels_exception=Exception,
            _kernels_failed=self._failed,
        )

    def _failed(self, error: Exception, module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward | None:
        """Return what is to be called in place of a kernel that has raised, None if the error must go on."""
        device = find_device(module, values)
        if device is None or resolving.get():
            return None
        records = torch.is_grad_enabled() and records_autograd(module, values)
        judge = stand_in(decide(self.layer, device, (Mode.TRAINING if records else Mode.INFERENCE,)), error, values)
        if judge is None:
            return None

        def replaced(*args: Any, **kwargs: Any) -> Any:
            output = judge(*args, **kwargs)
            self._cold()(module, values)  # decides anew at once, which tells why
            return output

        return self._inner(replaced)

    # --- Inside of a forward --------------------------------------------------------------------

    @functools.cached_property
    def _inner_reference(self) -> Forward:
        return self._inner(self.layer.reference)

    def _inner(self, forward: Forward) -> Forward:
        """Return what an eager forward calls in place of a function; the same one each time.

        The function itself, unless keywords are passed on as positions: then one of the same code that takes them
        as positions, or one that turns them into keywords again.
        """
        if not self._source.is_flat:
            return forward
        known = self._flat.get(id(forward))
        if known is None:
            known = self._source.flattened(forward) or self._source.flattened(self._calling(forward, "inner"))
            assert known is not None  # what is generated is a plain function
            self._flat[id(forward)] = known
            known.__dict__["kernels_flattened"] = forward  # held, so that the number stays its own
        return known

    def _calling(self, kernel: Forward, name: str) -> Forward:
        """Generate a function that is called as the layer is, and calls another."""
        return self._generate(name, [f"return _kernels_kernel({self._source.call})"], _kernels_kernel=kernel)

    def _generate(self, function: str, lines: Iterable[str], **names: object) -> Forward:
        source = f"def {function}{self._source.signature}:\n" + "\n".join(f"    {line}" for line in lines) + "\n"
        scope: dict[str, Any] = {  # no __name__: Dynamo would look these names up in that module
            "_kernels_root": root,
            "_kernels_hardware": _hardware,
            "_kernels_getattr": getattr,
            "_kernels_absent": _ABSENT,
            "_kernels_reference": self.layer.reference,
            "_kernels_condition": self.layer.condition,
            "_kernels_frame": active_frame,
            "_kernels_grad": torch.is_grad_enabled,
            "_kernels_records": records_autograd,
            **EXPRESSION_NAMES,
            **names,
        }
        file = _file(self.layer, function)
        exec(compile(source, file, "exec"), scope)
        self.files.add(file)
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        generated: Forward = scope.pop(function)  # Dynamo may keep the namespace: not the function with it
        self._source.give_defaults(generated)
        return generated

    def _condition(self) -> list[str]:
        if self.layer.condition is None:
            return []
        arguments = self._source.call if self.layer.is_function else self._source.module
        return [f"if not _kernels_condition({arguments}):", f"    return _kernels_reference({self._source.call})"]


def _file(layer: Layer, function: str = "forward") -> str:
    return f"<kernels_core {function} {layer.number} of {layer.qualname}>"


def find_device(module: torch.nn.Module | None, values: Iterable[Any]) -> torch.device | None:
    """Return the device of a call.

    That of the first tensor among the arguments, also one level inside a list, tuple or dict; then
    that of the module's first parameter or buffer; else None.
    """
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        for item in inner:
            if isinstance(item, torch.Tensor):
                return item.device
    if module is not None:
        for parameter in module.parameters():
            return parameter.device
        for buffer in module.buffers():
            return buffer.device
    return None
