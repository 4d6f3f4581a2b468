"""`Digests`: notes a digest of all that goes into and out of each layer of a model, in the order of the calls.

A digest is a few bytes for each tensor, so what is kept does not grow with the tensors. The tensors of one event are
held if a second run asks for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pickle
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from kernels_core import Layer, Resolution, find_layer, hookimpl, module_paths, plugin_manager
from kernels_core.replay import (
    RandomStates,
    generators_of,
    host_random_states,
    leaves,
    numpy_random,
    random_states,
    same_random_states,
)
from kernels_core.torch_internals import disabled, version

from ..bisect.switch import find_caller
from .bits import digest, has_bits

Forward = Callable[..., Any]
Key = tuple[str, str, int]
"""An event: its kind, the path of its layer, and which call of that layer it is, counted from 1."""

INPUT, PARAMETERS, OUTPUT, LEFT = "input", "parameter", "output", "input after the call"
GRADIENT_OUTPUT, GRADIENT_INPUT, GRADIENT = "gradient of the output", "gradient of the input", "gradient"

_CONSTANTS = (bool, int, float, str)
_NO_NUMBERS = (type(None), type, torch.dtype, torch.device)
_names = itertools.count(1)


@dataclass
class Event:
    """The values at the start or the end of one call of a layer.

    Attributes:
        key: Which.
        parent: The path of the layer around it; None for the model.
        whole: By name of each value: its dtype, its shape, and the digest of each part of the batch as a whole; for
            constants, the value.
        objects: The names of objects that hold tensors and are not opened.
        parts: The digest of each row of the batch, where the first dimension is a multiple of the rows.
        held: The tensors, if they are asked for, for each part of the batch.
    """

    key: Key
    parent: str | None
    whole: dict[str, list[Any]] = field(default_factory=dict)
    objects: dict[str, None] = field(default_factory=dict)
    parts: dict[str, list[Any]] = field(default_factory=dict)
    held: list[dict[str, torch.Tensor]] = field(default_factory=list)


class Digests:
    """Records runs of one model, as a plugin that also notes decorated functions and implementations.

    Args:
        model: The model.
        seed: Random generators start from it at each start and end of a layer, so that a layer that draws more numbers
            than the other model's changes nothing after it.
        by_row: Whether digests of rows are made, to compare batches of other sizes.
        hold: The event whose tensors are held.
        only: The modules that are looked at; None for all.
        compiled: Whether a part of the model is compiled.
        parameters: Whether the parameters and buffers of each layer that runs are compared, too.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int,
        *,
        by_row: bool = False,
        hold: Key | None = None,
        only: Iterable[nn.Module] | None = None,
        compiled: bool = False,
        parameters: bool = False,
    ) -> None:
        self.events: dict[Key, Event] = {}
        self.random: dict[str, None] = {}
        self.opaque: dict[str, None] = {}  # the paths with values whose bits are not known
        self.origins: dict[str, dict[str, None]] = {}
        self.paths = {module: paths for module, paths in module_paths(model).items()}
        self._modules = {id(module): module for module in self.paths}
        # Of a wrapper and the module in it, which have one path, the module in it.
        self._watched = list(
            {paths[0]: module for module, paths in self.paths.items()}.values() if only is None else only
        )
        self._seed, self._by_row, self._hold, self._compiled = seed, by_row, hold, compiled
        self._parameters = parameters
        self._stack: list[tuple[str, int, list[tuple[torch.Tensor, int]], frozenset[int]]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._rows = 1
        self._random: Any = None
        self._host_random = b""
        self._recomputes = False
        self._generators = generators_of(model)
        self._devices = list(dict.fromkeys(tensor.device for tensor in (*model.parameters(), *model.buffers())))

    @property
    def where(self) -> str | None:
        """The path of the layer that is running; None between runs."""
        return self._stack[-1][0] if self._stack else None

    def begin(self, rows: int) -> None:
        """Begin to record the run of a part of the batch, of so many rows."""
        self._stack.clear()
        self._counts.clear()
        self._rows = rows
        self._random = None
        self._recomputes = False

    def begin_backward(self) -> None:
        """Layers that run from now on are recomputed: they get the random numbers of their first run, and no event."""
        self._counts.clear()
        self._random = None
        self._recomputes = True

    @contextlib.contextmanager
    def installed(self, gradients: bool = False) -> Iterator[None]:
        """Put hooks on the modules, and be a plugin; take all off afterwards."""
        handles: list[Any] = []
        name = f"consistency run {next(_names)}"
        with contextlib.ExitStack() as stack:
            plugin_manager().register(self, name)
            stack.callback(plugin_manager().unregister, name)
            stack.callback(lambda: [handle.remove() for handle in handles])
            for module in self._watched:
                if not isinstance(module, torch.jit.ScriptModule):  # its code calls no hooks of Python
                    self._put_hooks(module, handles, gradients)
            yield

    def _put_hooks(self, module: nn.Module, handles: list[Any], gradients: bool) -> None:
        path = self.paths[module][0]

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.enter(path, args, kwargs)
            if self._parameters and (PARAMETERS, path, 1) not in self.events:
                tensors = {name: tensor for name, tensor in own_tensors(module) if tensor.is_floating_point()}
                self._note(PARAMETERS, path, None, tensors)

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.leave(output)

        hooks: list[Any] = [before, after]
        if self._compiled:  # its code ends where a hook must not be traced, so each layer is compiled by itself
            hooks = [disabled(hook, reason="digests are taken between layers") for hook in hooks]
        handles.append(module.register_forward_pre_hook(hooks[0], with_kwargs=True))
        handles.append(module.register_forward_hook(hooks[1], with_kwargs=True))
        if not gradients:
            return

        def arrived(_: nn.Module, gradient: Any) -> None:
            self._note(GRADIENT_OUTPUT, path, path.rpartition(".")[0] if path else None, {"": gradient})

        def passed(_: nn.Module, gradient: Any, __: Any) -> None:
            self._note(GRADIENT_INPUT, path, None, {"": gradient})

        handles.append(module.register_full_backward_pre_hook(arrived))
        handles.append(module.register_full_backward_hook(passed))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:

                def arrived_at(parameter: torch.Tensor, kind: str = f"{GRADIENT} of {name!r}") -> None:
                    self._note(kind, path, None, {"": parameter.grad})

                handles.append(cast(Any, parameter).register_post_accumulate_grad_hook(arrived_at))

    # --- Decorated layers and functions ------------------------------------------------------------

    @hookimpl(trylast=True)
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward] | None:
        """Note the implementation of each decorated layer, and the calls of decorated functions."""
        layer = resolution.request.layer
        return None if layer is None else lambda forward: self._noted(layer, resolution.origin, forward)

    def _noted(self, layer: Layer, origin: str, forward: Forward) -> Forward:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return forward(*args, **kwargs)
            module: Any = find_caller(self._modules) if layer.is_function else args[0]
            if id(module) not in self._modules or not self._stack:
                return forward(*args, **kwargs)
            path = self.paths[module][0]
            if not layer.is_function:
                output = forward(*args, **kwargs)
            else:
                path = f"{path}:{layer.reference.__name__}"
                self.enter(path, args, kwargs)
                output = forward(*args, **kwargs)
                if output is NotImplemented:  # another kernel serves this call, and notes it
                    self._cancel()
                else:
                    self.leave(output)
            if output is not NotImplemented:
                self.origins.setdefault(path, {})[origin] = None
            return output

        return noted

    # --- Events ------------------------------------------------------------------------------------

    def enter(self, path: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Note the start of a call."""
        values = {f"argument {place + 1}": value for place, value in enumerate(args)} | dict(kwargs)
        found = [value for _, value in _leaves(values)]
        tensors = [value for value in found if isinstance(value, torch.Tensor)]
        objects = frozenset(id(value) for value in found if not isinstance(value, (torch.Tensor, *_CONSTANTS)))
        if not self._stack:
            self._devices = list(dict.fromkeys((*self._devices, *(each.device for each in tensors))))
        versions = [(each, -1 if each.is_inference() else version(each)) for each in tensors]
        self._boundary(path, INPUT)
        call = self._note(INPUT, path, self.where, {} if self._recomputes else values)
        self._stack.append((path, call, versions, objects))

    def leave(self, output: Any) -> None:
        """Note the end of the call that started last."""
        path, call, versions, given = self._stack.pop()
        self._boundary(path, OUTPUT)
        if self._recomputes:
            return
        # Before the output, which may be such an input.
        changed = {str(i): each for i, (each, was) in enumerate(versions) if was >= 0 and version(each) != was}
        if changed:
            self._note(LEFT, path, self.where, changed, call)
        self._note(OUTPUT, path, self.where, {"": output}, call, given)

    def _cancel(self) -> None:
        path, call, *_ = self._stack.pop()
        self._counts[INPUT, path] -= 1
        event = self.events[INPUT, path, call]
        for values in (*event.whole.values(), *event.parts.values()):
            values.pop()

    def _boundary(self, path: str, kind: str) -> None:
        """Note who drew random numbers since the last boundary, and set the generators."""
        if self._random is not None and not (
            same_random_states(self._random, self._states()) and self._host_random == _host_random()
        ):
            self.random[path if kind == OUTPUT or self.where is None else self.where] = None
        call = self._counts[INPUT, path]
        seed = zlib.crc32(f"{self._seed} {kind} {path} {call}".encode())
        # Not `torch.manual_seed`, which formats a trace for each device that has not started.
        torch.default_generator.manual_seed(seed)
        for device in {device.type for device in self._devices} - {"cpu"}:
            torch.get_device_module(device).manual_seed_all(seed)
        for generator in self._generators:
            generator.manual_seed(seed)
        random.seed(seed)
        if numpy := numpy_random():
            numpy.seed(seed)
        self._random, self._host_random = self._states(), _host_random()

    def _states(self) -> RandomStates:
        return random_states([*self._devices, *self._generators])

    def _note(
        self,
        kind: str,
        path: str,
        parent: str | None,
        values: Any,
        call: int | None = None,
        given: frozenset[int] | None = None,
    ) -> int:
        if call is None:
            self._counts[kind, path] += 1
            call = self._counts[kind, path]
        key = (kind, path, call)
        event = self.events.setdefault(key, Event(key, parent))
        held: dict[str, torch.Tensor] = {}
        for name, value in _leaves(values, whole=key[:2] == (OUTPUT, ""), given=given):
            if not isinstance(value, (torch.Tensor, *_CONSTANTS)) and key[:2] != (OUTPUT, ""):
                if holds_tensors(value):
                    event.objects[name] = None
                continue
            if isinstance(value, _CONSTANTS):
                event.whole.setdefault(name, []).append(value)
                continue
            if not isinstance(value, torch.Tensor) or not has_bits(value):  # such as sparse, or of another library
                event.whole.setdefault(name, []).append(type(value).__name__)
                self.opaque[path] = None
                continue
            event.whole.setdefault(name, []).append((value.dtype, tuple(value.shape), digest(value)))
            is_batch = self._by_row and value.dim() > 0 and value.shape[0] % self._rows == 0
            event.parts.setdefault(name, []).append(digest(value, self._rows) if is_batch else None)
            if key == self._hold:
                held[name] = value.detach().clone()
        if key == self._hold:
            event.held.append(held)
        return call

    def finish(self) -> None:
        """Read the digests from the devices; not before the end, for each reading waits."""
        for event in self.events.values():
            event.whole = {name: [_read(value) for value in values] for name, values in event.whole.items()}
            event.parts = {name: [_read(value) for value in values] for name, values in event.parts.items()}

    def module(self, path: str) -> nn.Module | None:
        """Return the module at a path, None for a function; of a wrapper and the module in it, the latter."""
        return next((module for module in reversed(list(self.paths)) if path in self.paths[module]), None)

    def implementation(self, path: str) -> str:
        """Return the implementation of the layer at a path: the origins of kernels, or the class of its module."""
        module = self.module(path)
        return ", ".join(self.origins.get(path, [type(module).__qualname__ if module is not None else "reference"]))

    def layer_name(self, path: str) -> str:
        """Return the name of the layer at a path: that of mappings, or its class, or the name of a function."""
        module = self.module(path)
        layer = find_layer(module) if module is not None else None
        return layer.name if layer is not None else type(module).__qualname__ if module else path.rpartition(":")[2]


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of a module, without those of modules in it."""
    return itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))


def _host_random() -> bytes:
    """Return the states of the generators of Python and NumPy, as bytes, for arrays are not compared by `==`."""
    return pickle.dumps(host_random_states())


def _read(value: Any) -> Any:
    if isinstance(value, tuple) and isinstance(value[-1], torch.Tensor):
        return (*value[:-1], *value[-1].tolist())
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _leaves(
    value: Any, path: str = "", *, whole: bool = False, given: frozenset[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield tensors and constants in tuples, lists, mappings and dataclasses, and other objects.

    Objects are opened only where a layer returns them, and was not given them: a cache has the tensors of all layers
    before, which would be digested again at each layer. The output of the model is opened as a `whole`.

    Args:
        value: The value.
        path: The path to it.
        whole: Whether all objects are opened, and noted where they cannot be: no layer comes after it.
        given: The `id` of each object that a layer was given, where this is its output.
    """
    if isinstance(value, (torch.Tensor, *_CONSTANTS)):
        yield path, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name), whole=whole, given=given)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{place}]", whole=whole, given=given)
    elif whole or dataclasses.is_dataclass(value) or (given is not None and id(value) not in given):
        for where, leaf in leaves(value, path):
            if isinstance(leaf, (torch.Tensor, *_CONSTANTS)) or (whole and not isinstance(leaf, _NO_NUMBERS)):
                yield where, leaf
    elif not isinstance(value, _NO_NUMBERS):
        yield path, value


def holds_tensors(value: object) -> bool:
    """Whether an object holds tensors, to any depth."""
    return any(isinstance(leaf, torch.Tensor) for _, leaf in leaves(value))
