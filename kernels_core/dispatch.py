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
import threading
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
from .guards.gradients import is_recorded, needs_proof
from .guards.proof import Unproven, until_proven
from .guards.quarantine import excluded_dtypes, without_dtypes
from .guards.tensors import is_pending, odd_classes, odd_parameters, subclasses_traced, waiting
from .layer import Forward, Layer
from .mode import EAGER_MODES, TRACED_MODES, Mode
from .plugins import plugin_manager
from .resolution import Resolution
from .resolver import decide, must_raise, no_kernel, ready
from .scope import PATIENCE, ForkLock, Frame, FrameTable, keep_scopes, publish, resolving, root, withdraw
from .torch_internals import constant_result, disabled, disabled_lazily, is_traced

Odd = frozenset[type[torch.Tensor]]
"""The classes of the tensors of a call that are not plain."""


def make_forward(layer: Layer, after: int = 0, **decided: Any) -> Forward:
    """Return the dispatching forward of a layer, with the name, docstring and signature of its reference.

    Args:
        layer: The layer.
        after: How many kernels have passed on the calls of this forward: see `decide`.
        **decided: Further arguments for `decide`: `scopes` and `passed_on`.
    """
    dispatcher = _Dispatcher(layer, after, **decided)  # kept alive by the functions that it makes
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

    def __init__(self, layer: Layer, after: int = 0, **decided: Any) -> None:
        self.layer, self.after, self.decided = layer, after, decided
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
        self._unproven = Unproven()
        self._untraceable, self._watched = list[bool](), list[bool]()  # not empty: some kernel is; a call must ask more
        self._watching = threading.Lock()
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
        pending = frozenset(filter(is_pending, odd))
        odd -= pending
        kernel = self._published(self._name(device, odd), functools.partial(self._settle, device, odd))
        if is_recorded(module, values):
            kernel = self._find_proving(kernel) or kernel
        return waiting(kernel) if pending and kernel is not self.layer.reference else kernel

    def _published(self, name: str, decide: Callable[[Frame], Forward]) -> Forward:
        """Return the function that is published in the active frame; decide and publish if there is none."""
        keep_scopes()
        frame: Frame = root.active
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
            served = decide(frame)
            self.names.add(name)
            publish(frame, name, served, before)
            return served
        finally:
            lock.release()

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
            self._watch(resolution, kernel)
            proving = self._find_proving(kernel)
        served = without_dtypes(resolution, plugin_manager().wrap_forward(resolution, proving or kernel))
        return kernel if served is proving else served  # a plugin wraps the proof with the kernel

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
                return self._find_proving(kernel) or kernel

            self._selectors[name] = self._generate(
                "select", self.source.select(*decisions), file=name, _kernels_published=published
            )
        return self._selectors[name]

    def _watch(self, resolution: Resolution, kernel: Forward) -> None:
        """Let warm calls ask more, if the kernel is not proven or not fit for all calls."""
        number = id(kernel)
        with self._watching:  # or another thread takes the kernel before it for the last one to watch
            if not resolution.can_be_traced:
                self._untraceable[:] = [True]
            if needs_proof(resolution) and number not in self._unproven:
                gone = weakref.ref(kernel, lambda _: self._unproven.pop(number, None))
                self._unproven[number] = gone, resolution.origin
            if self._untraceable or self._unproven or odd_parameters:
                self._watched[:] = [True]

    def _find_proving(self, kernel: Forward) -> Forward | None:
        """Return a function that proves a kernel; None if it is proven.

        Whether it is does not depend on what is published: another thread may drop that at any time.
        """
        number = id(kernel)
        known = self._unproven.get(number)
        if known is None:
            return None

        def forget() -> None:
            with self._watching:
                self._unproven.pop(number, None)
                if not (self._untraceable or self._unproven or odd_parameters):
                    self._watched.clear()

        return until_proven(self.layer, kernel, kernel, origin=known[1], when_proven=forget, decide_anew=self._cold)

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
        if judge is None:
            return None

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
        return make_forward(self.layer, self.after + 1, **self.decided) if self._has_kernel else None

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
            kept = frame is not root and frame.in_function  # as an argument, it has a guard, which keeps the scopes
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
            _kernels_watched=self._watched,
            _kernels_unproven=self._unproven,
            _kernels_untraceable=self._untraceable,
            _kernels_find_proving=self._find_proving,
            **names,
        )
