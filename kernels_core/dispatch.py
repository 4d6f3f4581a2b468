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
        if x.__class__ is not Tensor or not x.is_cpu:
            kernel = cold(self, (x, eps))
        if unproven and autograd_may_record(self, x, eps):
            kernel = find_proving(kernel) or kernel
    except absent:
        kernel = cold(self, (x, eps))
    return kernel(self, x, eps)
```

Only Dynamo finds the first condition true: `cold` resolves and publishes, `traced_kernel` reads a property that
resolves by itself (`scope.FrameTable`). Other tracers, and tensors of subclasses, take the way of cold calls each time.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .answer import ModesDiffer
from .device import ACCELERATOR, MAX_INDEX, find_device, hardware
from .environment import mapping_disabled
from .errors import NoKernelError
from .generated import Generator, made_once, passed_back, unused_texts
from .guards.breaker import stand_in
from .guards.gradients import is_recorded
from .guards.joining import join
from .guards.quarantine import excluded_dtypes, without_dtypes
from .guards.tensors import odd_classes, pending_among, subclasses_traced, waiting
from .guards.watch import Watch
from .layer import Forward, Layer
from .mode import EAGER_MODES, TRACED_MODES, Mode
from .plugins import plugin_manager
from .resolution import Resolution
from .resolver import decide, must_raise, no_kernel, ready
from .scopes.frame import PATIENCE, ForkLock, Frame, FrameTable, here, publish, resolving, root, withdraw
from .scopes.kept import keep_scopes, notice_checkpoint
from .torch_internals import constant_result, disabled, disabled_lazily, is_traced

Odd = frozenset[type[torch.Tensor]]
"""The classes of the tensors of a call that are not plain."""


def make_forward(
    layer: Layer, after: int = 0, settled: Callable[[_Dispatcher, Frame], None] | None = None, **decided: Any
) -> Forward:
    """Return the dispatching forward of a layer, with the name, docstring and signature of its reference.

    Args:
        layer: The layer.
        after: How many kernels have passed on the calls of this forward: see `decide`.
        settled: Called with the dispatcher of the forward, and a frame in which functions were published.
        **decided: Further arguments for `decide`: `scopes` and `passed_on`.
    """
    dispatcher = _Dispatcher(layer, after, settled, **decided)  # kept alive by the functions that it makes
    forward = dispatcher.forward()
    functools.update_wrapper(forward, layer.reference)
    weakref.finalize(forward, withdraw, dispatcher.names).atexit = False
    weakref.finalize(
        forward, unused_texts.extend, dispatcher.generator.files
    ).atexit = False  # Dynamo may keep the layer
    forward.__dict__["kernels_layer"] = layer
    return forward


_following = itertools.count()


class _Dispatcher:
    """Makes the functions of one layer, and answers them where nothing is published.

    Calls that kernels pass on go to the forward of another dispatcher, whose decisions are those after these kernels:
    what holds for calls, of devices, modes, proofs and tracers, holds for these, too.
    """

    def __init__(
        self,
        layer: Layer,
        after: int = 0,
        settled: Callable[[_Dispatcher, Frame], None] | None = None,
        **decided: Any,
    ) -> None:
        self.layer, self.after, self.settled, self.decided = layer, after, settled, decided
        self.prefix = f"layer{layer.number}" + (f"_next{next(_following)}" if after or decided else "")
        self._decide: Callable[..., Resolution] = functools.partial(decide, layer, after=after, **decided)
        self._has_kernel = False  # whether a kernel was ever served
        # Serves where the reference returned `NotImplemented`, or the kernel that did is out by now: then, that runs.
        self._last = layer.reference if layer.kind or after else passed_back
        self._nowhere = self._last if after else layer.reference
        self.generator = Generator(layer)
        self.source = self.generator.source
        self._names: dict[tuple[torch.device, Odd], str] = {}
        self._numbers = itertools.count()
        self._tables: dict[str, FrameTable] = {}
        self._selectors: dict[str, Forward] = {}
        self.plain = weakref.WeakSet[Forward]()
        self.watch = Watch(layer, self._cold)
        self._following: _Dispatcher | None = None
        self._leading: weakref.ref[_Dispatcher] | None = None  # no strong reference: it has one to this
        self._busy = ForkLock()
        self.names = set[str]()  # on frames, published or as tables
        weakref.finalize(self, withdraw, self.names).atexit = False  # for a copied forward, which has no finalizer

    def __reduce__(self) -> Any:
        return _Dispatcher, (self.layer,)  # for a forward that is pickled by value; its code finds nothing in frames

    def _name(self, device: torch.device, odd: Odd = frozenset()) -> str:
        name = self._names.get((device, odd))
        if name is None:
            # PyTorch has one CPU: a tensor on "cpu:0" is where one on "cpu" is.
            index = "" if device.index is None or device.type == "cpu" else f"_{device.index}"
            index += f"_odd{next(self._numbers)}" if odd else ""
            name = self._names.setdefault((device, odd), f"{self.prefix}_{device.type}{index}")
        return name

    # --- Eager calls ----------------------------------------------------------------------------

    def _cold(self, module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward:
        """Return the function that serves a call for which the forward has found nothing, or that is not plain."""
        odd = odd_classes(module, values)
        if is_traced(odd):
            return self._traced(module, values)
        device = find_device(module, values)
        if device is None:
            return self._on_no_device()
        pending = pending_among(odd, values) if odd else odd
        odd -= pending
        kernel = self._published(self._name(device, odd), functools.partial(self._settle, device, odd))
        if self.watch.unproven and is_recorded(module, values):
            kernel = self.watch.find_proving(kernel) or kernel
        return waiting(kernel) if pending and kernel is not self.layer.reference else kernel

    def _published(self, name: str, decide: Callable[[Frame], Forward]) -> Forward:
        """Return the function that is published in the active frame; decide and publish if there is none."""
        keep_scopes()
        frame = here()
        known: Forward | None = getattr(frame, name, None)
        if known is not None:
            return known
        # A plugin calls a decorated layer: no recursion, and no lock to wait for. Or another thread takes too long.
        lock = self._busy.lock  # a child that is forked meanwhile has another one
        if resolving.get() or not lock.acquire(timeout=PATIENCE):
            return self.layer.reference
        try:  # eight threads, one resolution
            meanwhile: Forward | None = getattr(frame, name, None)
            if meanwhile is not None:
                return meanwhile
            # Read before the decision: `publish` keeps none that a change of mappings has overtaken.
            before = ready()
            if root.active is not root:
                notice_checkpoint()
            served = decide(frame)
            self.names.add(name)
            publish(frame, name, served, before)
            if self._following is not None or self._leading is not None or self.settled is not None:
                self._join(frame)
            return served
        finally:
            lock.release()

    def _join(self, frame: Frame) -> None:
        """Let kernels that pass calls on call the next ones themselves, the last ones first."""
        leading: _Dispatcher | None = self
        while leading is not None:
            if leading._following is not None:
                join(leading, leading._following, frame)
            if leading.settled is not None:
                leading.settled(leading, frame)
            leading = leading._leading() if leading._leading is not None else None

    def _settle(self, device: torch.device, odd: Odd, frame: Frame) -> Forward:
        """Return one function for both modes, or the selector that asks for the mode."""
        try:
            return self._served(self._decide(device, EAGER_MODES, frame=frame, notify="all", subclasses=odd))
        except ModesDiffer:
            return self._selector(device, odd)

    def _served(self, resolution: Resolution) -> Forward:
        if self._was_reference(resolution) and not must_raise(resolution):
            return self._last
        if must_raise(resolution):
            return self._refusing(resolution)
        kernel: Forward = resolution.implementation or self.layer.reference
        proving: Forward | None = None
        if resolution.implementation is not None:
            self.watch.add(resolution, kernel)
            proving = self.watch.find_proving(kernel)
        served = without_dtypes(resolution, plugin_manager().wrap_forward(resolution, proving or kernel))
        served = kernel if served is proving else served  # a plugin wraps the proof with the kernel
        if served is kernel:
            self.plain.add(kernel)
        return served

    def _selector(self, device: torch.device, odd: Odd) -> Forward:
        """Return the function that serves where training and inference differ; the same one each time."""
        base = self._name(device, odd)
        name = f"{base}_select"
        if name not in self._selectors:
            decisions: dict[str, Callable[[Frame], Forward]] = {}
            for mode in EAGER_MODES:

                def decide_mode(frame: Frame, mode: Mode = mode) -> Forward:
                    return self._served(self._decide(device, (mode,), frame=frame, notify="all", subclasses=odd))

                decisions[f"{base}_{str(mode.name).lower()}"] = decide_mode

            def published(name: str) -> Forward:
                kernel = self._published(name, decisions[name])
                return self.watch.find_proving(kernel) or kernel

            self._selectors[name] = self._generate(
                "select", self.source.select(*decisions), file=name, _kernels_published=published
            )
        return self._selectors[name]

    def _refusing(self, resolution: Resolution) -> Forward:
        """Return the function that raises, where the reference must not serve."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise no_kernel(resolution)

        return refuse

    def _on_no_device(self) -> Forward:
        """Return the function that serves calls on no device: the reference, or one that raises."""
        refusing = self._refusing_no_device
        return self._nowhere if refusing is None or mapping_disabled() else refusing

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
        resolution = self._decide(device, (mode,))  # the decision is not kept with the function: ask for it
        judge = stand_in(resolution, error, module, values)
        if judge is None:  # it was not raised in this kernel: perhaps in one that is joined to it
            return self._following._failed(error, module, values) if self._following is not None else None

        def replaced(*args: Any, **kwargs: Any) -> Any:
            output = judge(*args, **kwargs)
            self._cold(module, values)  # decides anew at once, and warns of the reason
            if excluded_dtypes(resolution):
                self._decide(device, (mode,), after=self.after + 1, notify="all")
            return output

        return replaced

    # --- Calls that a kernel has passed on ------------------------------------------------------

    def _make_next(self) -> Forward | None:
        """Make the forward that serves such calls; a dispatcher that has served only the reference ends the chain."""
        if not self._has_kernel:
            return None
        forward = make_forward(self.layer, self.after + 1, **self.decided)
        self._following = forward.__globals__["_kernels_cold"].__self__
        self._following._leading = weakref.ref(self)
        return forward

    def _was_reference(self, resolution: Resolution) -> bool:
        """Whether no kernel is decided any more that could have passed the call on: the reference has the last word."""
        self._has_kernel = self._has_kernel or not resolution.is_reference
        return len(resolution.request.passed_on) < self.after + len(self.decided.get("passed_on", ()))

    # --- Traced calls ---------------------------------------------------------------------------

    @functools.cached_property
    def _traced(self) -> Callable[..., Forward]:
        """The function that a forward calls while a tracer records it."""
        nowhere, refusing = self._nowhere, self._refusing_no_device

        @constant_result
        def table(kind: str, index: int | None, odd: tuple[type[torch.Tensor], ...], kept: bool) -> str:
            """Run at trace time, outside of the graph: name the property that Dynamo is to read."""
            device = torch.device(kind, index) if index is not None else torch.device(kind)
            ready()  # or finding plugins makes the first answer one that is not kept, and guards ask again
            name = f"{self._name(device, frozenset(odd))}_traced"
            return self._table(name, functools.partial(self._settle_traced, device, frozenset(odd)))

        def traced(module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward:
            device = find_device(module, values)
            if device is None:
                return nowhere if refusing is None or mapping_disabled() else refusing
            frame = root.active
            kept = frame.keeps_scopes  # as an argument, it has a guard, which keeps them
            odd = subclasses_traced(module, values)
            forward: Forward = getattr(frame, table(device.type, device.index, odd, kept))
            return forward

        return traced

    def _table(self, name: str, resolve: Callable[[Frame], Forward]) -> str:
        with self._busy.lock:  # two tables of one name would each answer a part of the reads
            if name not in self._tables:
                self._tables[name] = FrameTable(name, self.layer.reference, resolve)
                self.names.add(name)
        return name

    def _settle_traced(self, device: torch.device, odd: Odd, frame: Frame) -> Forward:
        """Return one function for both modes, or the selector that reads the table of one of them."""
        try:
            found = self._decide(device, TRACED_MODES, frame=frame, notify="all", subclasses=odd)
            return self._served_traced(found)
        except ModesDiffer:
            return self._selector_traced(device, odd)

    def _served_traced(self, resolution: Resolution) -> Forward:
        if self._was_reference(resolution) and not must_raise(resolution):
            return self._last
        if must_raise(resolution):
            return disabled(self._refusing(resolution), reason=str(no_kernel(resolution)))
        return without_dtypes(resolution, resolution.implementation or self.layer.reference)

    def _selector_traced(self, device: torch.device, odd: Odd) -> Forward:
        """Return the same for traced calls: it reads one of two properties."""
        base = self._name(device, odd)
        name = f"{base}_select_traced"
        if name not in self._selectors:
            tables = []
            for mode in TRACED_MODES:

                def decide_mode(frame: Frame, mode: Mode = mode) -> Forward:
                    found = self._decide(device, (mode,), frame=frame, notify="all", subclasses=odd)
                    return self._served_traced(found)

                word = "training" if Mode.TRAINING in mode else "inference"
                tables.append(self._table(f"{base}_{word}_traced", decide_mode))
            self._selectors[name] = self._generate("select_traced", self.source.select_traced(*tables), file=name)
        return self._selectors[name]

    # --- Generated functions --------------------------------------------------------------------

    def forward(self) -> Forward:
        """Generate the forward."""
        names = [self._name(torch.device(ACCELERATOR, index)) for index in range(MAX_INDEX) if ACCELERATOR]
        has_condition = self.layer.condition is not None and self.prefix == f"layer{self.layer.number}"
        source = self.source.forward(self.prefix, accelerator=ACCELERATOR, has_condition=has_condition)
        return self._generate(
            "forward",
            source,
            file=f"forward{self.after or ''}",
            _kernels_cold=self._cold,
            _kernels_condition=self.layer.condition,
            _kernels_exception=() if "generator" in self.layer.kind else Exception,  # parts were yielded already
            _kernels_failed=self._failed,
            _kernels_hardware=hardware,
            _kernels_names=tuple(names),
            _kernels_next=made_once(self._make_next, self._last),
            _kernels_reference=self.layer.reference,
            _kernels_traced=self._traced,
        )

    def _generate(self, function: str, source: str, *, file: str = "", **names: object) -> Forward:
        return self.generator.generate(
            function,
            source,
            file=file,
            _kernels_watched=self.watch.any,
            _kernels_unproven=self.watch.unproven,
            _kernels_unfit=self.watch.unfit,
            _kernels_untraceable=self.watch.untraceable,
            _kernels_find_proving=self.watch.find_proving,
            **names,
        )
