"""Notes which kernels a model runs, and runs the reference in place of those that are to be off.

Eager calls are switched by a wrapper of the hook `kernels_wrap_forward`: nothing on the model changes.
That does not reach code that is compiled, nor kernels that `kernelize` froze for it. Such modules get the reference
as a `forward` of their own while they are off, which Dynamo notices; compiled functions get it by a scope.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernels_core import (
    Layer,
    Mode,
    Resolution,
    find_layer,
    frozen_choice,
    functions_of,
    hookimpl,
    module_paths,
    plugin_manager,
    references,
)

from .result import BisectError

Forward = Callable[..., Any]
Key = tuple[int, int]
"""A place of a kernel: a module by its `id`, or 0 for all; and a layer by its number."""

_runs = itertools.count(1)
_ABSENT = object()


@dataclass
class Kernel:
    """A kernel in use at one place of a model: see `Culprit`; several origins if calls differ."""

    key: Key
    path: str
    also: tuple[str, ...]
    layer: str
    place: int  # of its module in the order of the model
    origins: dict[str, None] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """All origins in one line."""
        return ", ".join(self.origins)


def find_caller(modules: Container[int]) -> nn.Module | None:
    """Return the innermost module with an `id` among `modules` whose method is running; reads the stack."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:  # a function does not know which module has called it
        code = frame.f_code
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if id(first) in modules and isinstance(first, nn.Module):
                return first
        frame = frame.f_back
    return None


class Switch:
    """A plugin that knows the kernels of one model, and switches them."""

    def __init__(self, model: nn.Module) -> None:
        """Look at the model; nothing is switched, and nothing is noted."""
        self.kernels: dict[Key, Kernel] = {}
        self.found_elsewhere = False  # whether a kernel ran for a module that is no part of the model
        self._modules = {id(module): module for module in model.modules()}
        self._paths = {id(module): paths for module, paths in module_paths(model).items()}
        self._places = {key: place for place, key in enumerate(self._modules)}
        self._bound: dict[Key, Layer] = {}
        self._traced: dict[Layer, str] = {}
        self._noting = False
        self._on: frozenset[Key] | None = None

    @property
    def has_layers(self) -> bool:
        """Whether anything of the model is known to be decorated."""
        return any(
            find_layer(module) is not None or frozen_choice(module) is not None or functions_of(module)
            for module in self._modules.values()
        )

    # --- For the bisection -----------------------------------------------------------------------

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Be a plugin of this process."""
        name = f"bisect run {next(_runs)}"
        plugin_manager().register(self, name)
        try:
            yield
        finally:
            plugin_manager().unregister(name)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Leave all kernels as they are, and note which of them are in use."""
        self._noting = True
        try:
            yield
        finally:
            self._noting = False
        self._note_frozen()
        self._note_traced()

    @contextlib.contextmanager
    def only(self, on: frozenset[Key]) -> Iterator[None]:
        """Let some kernels be on, and every other decorated layer of the model run its reference."""
        bound = [(self._modules[key[0]], layer) for key, layer in self._bound.items() if key not in on]
        before = [vars(module).get("forward", _ABSENT) for module, _ in bound]
        functions = [layer for layer in self._traced if layer.is_function and (0, layer.number) not in on]
        self._on = on
        try:
            for module, layer in bound:  # no method: `kernelize` would take one for its own
                vars(module)["forward"] = functools.partial(layer.reference, module)
            with references(layers=functions, mode=Mode.TORCH_COMPILE) if functions else contextlib.nullcontext():
                yield
        finally:
            self._on = None
            for (module, _), forward in zip(bound, before, strict=True):
                vars(module)["forward"] = forward  # past `__setattr__`, and in the place where it was
                if forward is _ABSENT:
                    del vars(module)["forward"]

    # --- Eager calls -----------------------------------------------------------------------------

    @hookimpl(trylast=True)
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward] | None:
        """Ask at each call whether this kernel is on here; last, so that it is around the wrappers of other plugins."""
        layer = resolution.request.layer
        if layer is None or resolution.is_reference:
            return None
        decided, origin = layer, resolution.origin

        def decorate(forward: Forward) -> Forward:
            @functools.wraps(forward)
            def switched(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():
                    return forward(*args, **kwargs)
                module = find_caller(self._modules) if decided.is_function else args[0]
                key = (id(module), decided.number)
                if key[0] not in self._modules:
                    self.found_elsewhere = True
                elif self._noting:
                    self._note(key, decided, origin)
                elif self._on is not None and key not in self._on:
                    return decided.reference(*args, **kwargs)
                return forward(*args, **kwargs)

            return switched

        return decorate

    def _note(self, key: Key, layer: Layer, origin: str) -> None:
        kernel = self.kernels.get(key)
        if kernel is None:
            name = f":{layer.reference.__name__}" if layer.is_function else ""
            path, *also = (path + name for path in self._paths.get(key[0], ["*"]))
            place = self._places.get(key[0], len(self._places))
            kernel = self.kernels[key] = Kernel(key, path, tuple(also), layer.name, place)
        kernel.origins[origin] = None

    # --- Compiled and frozen calls ---------------------------------------------------------------

    @hookimpl
    def kernels_resolved(self, resolution: Resolution) -> None:
        """Note the kernels of compiled code: its calls are not wrapped."""
        request = resolution.request
        if self._noting and request.layer and not resolution.is_reference and Mode.TORCH_COMPILE in request.mode:
            self._traced[request.layer] = resolution.origin  # by layer: the request does not name the module

    def _note_frozen(self) -> None:
        """Note the choices of `kernelize`: if such a model is compiled, no hook is called."""
        for key, module in self._modules.items():
            frozen = frozen_choice(module)
            if frozen is None or frozen.layer is None or frozen.resolution is None or frozen.resolution.is_reference:
                continue
            if not frozen.serves(module):
                continue  # suspended, or in quarantine: it decides by itself
            self._bind(key, module, frozen.layer, frozen.resolution.origin, frozen.original)

    def _note_traced(self) -> None:
        for traced, origin in self._traced.items():
            if traced.is_function:
                self._note((0, traced.number), traced, origin)
        for key, module in self._modules.items():
            layer = find_layer(module)
            if layer is not None and layer in self._traced and frozen_choice(module) is None:
                self._bind(key, module, layer, self._traced[layer], type(module))

    def _bind(self, key: int, module: nn.Module, layer: Layer, origin: str, original: type[nn.Module]) -> None:
        """Note a kernel that is switched by a `forward` of the module's own."""
        own = module.__dict__.get("forward")
        # One that a suspended choice has put there may go.
        if own is not None and getattr(own, "__func__", None) is not original.forward:
            raise BisectError(
                f"Module {self._paths[key][0]!r} is compiled or kernelized, and has a forward of its own, such as a "
                "hook of another library: it cannot be put on its reference without losing that. Take it off first."
            )
        self._bound[(key, layer.number)] = layer
        self._note((key, layer.number), layer, origin)
