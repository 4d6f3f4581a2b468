"""The hot path: the forward that stands where a decorated forward stood.

The wrapper is generated per layer with the layer's own parameters, as `dataclasses` does it: no
`*args` to pack, defaults and keywords as ever. A warm call reads the active frame, reads the
attribute of this layer and device from it, and calls what it finds (here on a CPU build):

```
def forward(self, x, eps=1e-6):
    try:
        _kernel = root.active.layer7_cpu if x.is_cpu is True else cold(self, (x, eps))
    except absent:
        _kernel = cold(self, (x, eps))
    return _kernel(self, x, eps)
```

The same code is traced by Dynamo; `scope.Table` tells how it stays right there.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.fx.proxy import TraceError

from .layer import Layer
from .mode import Mode
from .request import Resolution
from .resolver import decide, must_raise, no_kernel, settle
from .scope import Frame, Table, root

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


def _count_accelerators() -> None:
    """Let calls skip the device index where there is one device only; run when CUDA starts."""
    Frame.one_accelerator = torch.cuda.device_count() == 1


if _ACCELERATOR == "cuda":
    cast(Any, torch.cuda)._lazy_call(_count_accelerators)
elif _ACCELERATOR == "mps":
    Frame.one_accelerator = True


_ABSENT = (AttributeError, IndexError, TraceError)
"""What the short way raises where nothing is published, or the first argument is missing or no tensor."""

# Typed as what it is: a decorator that returns what it is given.
_assume_constant = cast(Callable[[Callable[..., str]], Callable[..., str]], torch.compiler.assume_constant_result)


def _untraced(function: Forward, *, reason: str) -> Forward:
    """Keep Dynamo out of a function; from PyTorch 2.7 on, it tells the reason where that is an error."""
    disable: Any = torch.compiler.disable
    known = "reason" in inspect.signature(disable).parameters
    return cast(Forward, disable(function, reason=reason) if known else disable(function))


_MODE_NAMES = {
    Mode.INFERENCE: "inference",
    Mode.TRAINING: "training",
    Mode.INFERENCE | Mode.TORCH_COMPILE: "inference_compile",
    Mode.TRAINING | Mode.TORCH_COMPILE: "training_compile",
}


def make_forward(layer: Layer) -> Forward:
    """Return the dispatching forward of a layer, with the name, docstring and signature of its reference."""
    dispatcher = _Dispatcher(layer)
    forward = dispatcher.forward()
    functools.update_wrapper(forward, layer.reference)
    weakref.finalize(forward, dispatcher.discard).atexit = False
    forward.__dict__["kernels_layer"] = layer
    return forward


def dispatched_layer(forward: object) -> Layer | None:
    """Return the layer that `forward` dispatches for; None for anything else, such as a wrapper of it."""
    layer = getattr(forward, "kernels_layer", None)
    code = getattr(forward, "__code__", None)
    return layer if isinstance(layer, Layer) and code is not None and code.co_filename == _file(layer) else None


class _Dispatcher:
    """Makes the functions of one layer, and owns its tables."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._tables: dict[torch.device, Table] = {}
        self._mode_tables: dict[str, Table] = {}
        self._making = threading.RLock()
        self._selectors: dict[str, Forward] = {}
        self._parameters = _parameters(layer.reference)
        for index in (None, *range(_MAX_SHORT_INDEX if _ACCELERATOR else 0)):
            # The names that generated code reads exist from the start.
            self._table(torch.device(_ACCELERATOR or "cpu", index) if index is not None else torch.device("cpu"))

    # --- Tables: what serves on a device, and, where that matters, in a mode --------------------

    def _table(self, device: torch.device) -> Table:
        table = self._tables.get(device)
        if table is not None:
            return table
        with self._making:  # two tables of one name would each answer a part of the reads
            if device not in self._tables:
                resolve = functools.partial(self._settle, device)
                self._tables[device] = Table(self._attribute(device), self.layer.reference, resolve)
            return self._tables[device]

    def _mode_table(self, device: torch.device, mode: Mode) -> str:
        name = f"{self._attribute(device)}_{_MODE_NAMES[mode]}"
        with self._making:
            if name not in self._mode_tables:
                resolve = functools.partial(self._decide, device, mode)
                self._mode_tables[name] = Table(name, self.layer.reference, resolve)
            return self._mode_tables[name].sure

    def _attribute(self, device: torch.device) -> str:
        index = "" if device.index is None or device.type == "cpu" else f"_{device.index}"
        return f"layer{self.layer.number}_{device.type}{index}"

    def _settle(self, device: torch.device, frame: Frame) -> Forward:
        mode = Mode.TRAINING if torch.is_grad_enabled() else Mode.INFERENCE
        resolution = settle(self.layer, device, frame, mode)
        return self._selector(device) if resolution is None else self._forward_of(resolution)

    def _decide(self, device: torch.device, mode: Mode, frame: Frame) -> Forward:
        return self._forward_of(decide(self.layer, device, frame, mode))

    def _forward_of(self, resolution: Resolution) -> Forward:
        if must_raise(resolution):

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise no_kernel(resolution)

            return _untraced(refuse, reason=str(no_kernel(resolution)))
        forward: Forward = resolution.implementation or self.layer.reference
        return forward

    def discard(self) -> None:
        """Give back what the process keeps for the layer: nobody can call it any more."""
        for table in [*self._tables.values(), *self._mode_tables.values()]:
            table.discard()

    # --- Cold: find the device, resolve, publish ------------------------------------------------

    def _cold(self) -> Callable[..., Forward]:
        """Return the function that generated code calls where it finds nothing."""
        reference = self.layer.reference

        @_assume_constant
        def sure(kind: str, index: int | None) -> str:
            """Run at trace time, outside of the graph: name what Dynamo is to read."""
            table = self._table(torch.device(kind, index) if index is not None else torch.device(kind))
            table.keep_sure()
            return table.sure

        def cold(module: torch.nn.Module | None, values: tuple[Any, ...]) -> Forward:
            device = find_device(module, values)
            if device is None:
                return reference
            if torch.compiler.is_dynamo_compiling():
                forward: Forward = getattr(root.active, sure(device.type, device.index))
                return forward
            return self._table(device).publish(root.active)

        return cold

    # --- Generated functions --------------------------------------------------------------------

    def forward(self) -> Forward:
        """Generate the forward."""
        cpu = self._attribute(torch.device("cpu"))
        first = self._first
        cold = f"_kernels_cold({self._module}, {self._values})"
        names = []
        body = [f"_kernel = {cold}"]
        if first is not None:
            # "is True": of an argument that is no tensor, Dynamo knows an attribute only that far.
            lookup = f"_kernel = _kernels_root.active.{cpu} if {first}.is_cpu is True else {cold}"
            body = ["try:", f"    {lookup}", "except _kernels_absent:", f"    _kernel = {cold}"]
        if first is not None and _ACCELERATOR is not None:
            names = [self._attribute(torch.device(_ACCELERATOR, index)) for index in range(_MAX_SHORT_INDEX)]
            body[1:2] = [
                f"    if {first}.is_{_ACCELERATOR} is True:",
                f"        _kernel = (_kernels_root.active.{names[0]} if _kernels_root.one_accelerator",
                "                   else _kernels_getattr(_kernels_root.active,",
                f"                                         _kernels_names[{first}.get_device()]))",
                "    else:",
                f"        {lookup}",
            ]
        lines = [*self._condition(), *body, f"return _kernel({self._call})"]
        return self._generate("forward", lines, _kernels_cold=self._cold(), _kernels_names=tuple(names))

    def _selector(self, device: torch.device) -> Forward:
        """Generate the function that serves where the mode of the call makes a difference."""
        name = self._attribute(device)
        if name not in self._selectors:
            modes = {mode_name: self._mode_table(device, mode) for mode, mode_name in _MODE_NAMES.items()}
            records = f"_kernels_records({self._module}, {self._values})"
            if self._first is not None and self._first.isidentifier():  # quickly told, mostly
                records = f"(_kernels_getattr({self._first}, 'requires_grad', False) or {records})"
            lines = [
                f"if _kernels_grad() and {records}:",
                "    if _kernels_compiling():",
                f"        return _kernels_root.active.{modes['training_compile']}({self._call})",
                f"    return _kernels_root.active.{modes['training']}({self._call})",
                "if _kernels_compiling():",
                f"    return _kernels_root.active.{modes['inference_compile']}({self._call})",
                f"return _kernels_root.active.{modes['inference']}({self._call})",
            ]
            self._selectors[name] = self._generate("select", lines)
        return self._selectors[name]

    def _generate(self, function: str, lines: Iterable[str], **names: object) -> Forward:
        source = f"def {function}{self._signature}:\n" + "\n".join(f"    {line}" for line in lines) + "\n"
        scope: dict[str, Any] = {  # no __name__: Dynamo would look these names up in that module
            "_kernels_root": root,
            "_kernels_getattr": getattr,
            "_kernels_absent": _ABSENT,
            "_kernels_reference": self.layer.reference,
            "_kernels_condition": self.layer.condition,
            "_kernels_grad": torch.is_grad_enabled,
            "_kernels_compiling": torch.compiler.is_compiling,
            "_kernels_records": records_autograd,
            **names,
        }
        file = _file(self.layer, function)
        exec(compile(source, file, "exec"), scope)
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        generated: Forward = scope[function]
        if self._parameters is not None:
            generated.__defaults__ = tuple(
                p.default for p in self._parameters if p.kind is not p.KEYWORD_ONLY and p.default is not p.empty
            )
            generated.__kwdefaults__ = {
                p.name: p.default for p in self._parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
            }
        return generated

    def _condition(self) -> list[str]:
        if self.layer.condition is None:
            return []
        arguments = self._call if self.layer.is_function else self._module
        return [f"if not _kernels_condition({arguments}):", f"    return _kernels_reference({self._call})"]

    # --- Pieces of source -----------------------------------------------------------------------

    @property
    def _signature(self) -> str:
        if self._parameters is None:
            return "(*args, **kwargs)"
        bare = [
            p.replace(annotation=p.empty, default=None if p.default is not p.empty else p.empty)
            for p in self._parameters
        ]
        return str(inspect.Signature(bare))

    @property
    def _call(self) -> str:
        if self._parameters is None:
            return "*args, **kwargs"
        form: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "*{0}",
            inspect.Parameter.VAR_KEYWORD: "**{0}",
            inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
        }
        return ", ".join(form.get(p.kind, "{0}").format(p.name) for p in self._parameters)

    @property
    def _arguments(self) -> list[inspect.Parameter]:
        """The parameters that a caller fills: all but `self`."""
        return list(self._parameters or ())[0 if self._self_is_packed or self.layer.is_function else 1 :]

    @property
    def _self_is_packed(self) -> bool:
        """Whether a method takes its `self` as the first of `*args`."""
        if self.layer.is_function or not self._parameters:
            return False
        return self._parameters[0].kind is inspect.Parameter.VAR_POSITIONAL

    @property
    def _module(self) -> str:
        if self.layer.is_function:
            return "None"
        if self._parameters is None:
            return "args[0]"
        return self._parameters[0].name + ("[0]" if self._self_is_packed else "")

    @property
    def _values(self) -> str:
        """A tuple of all arguments in the order of the signature."""
        if self._parameters is None:
            return "(*args, *kwargs.values())" if self.layer.is_function else "(*args[1:], *kwargs.values())"
        form: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "*{0}",
            inspect.Parameter.VAR_KEYWORD: "*{0}.values()",
        }
        if self._self_is_packed:
            form[inspect.Parameter.VAR_POSITIONAL] = "*{0}[1:]"
        inside = "".join(form.get(p.kind, "{0}").format(p.name) + ", " for p in self._arguments)
        return f"({inside})"

    @property
    def _first(self) -> str | None:
        """Source of the first argument, which is mostly the tensor that says where the call is."""
        if self._parameters is None:
            return "args[0]" if self.layer.is_function else "args[1]"
        for parameter in self._arguments:
            if parameter.kind is parameter.VAR_POSITIONAL:
                return f"{parameter.name}[{int(self._self_is_packed)}]"
            return None if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        return None


def _parameters(reference: Forward) -> tuple[inspect.Parameter, ...] | None:
    """Return the parameters that the reference really has, or None where there is nothing to read."""
    try:
        signature = inspect.signature(reference, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    parameters = tuple(signature.parameters.values())
    taken = any(p.name.startswith("_kernel") for p in parameters)
    return None if taken else parameters


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


def records_autograd(module: torch.nn.Module | None, values: Iterable[Any]) -> bool:
    """Whether autograd has something to record in a call: an argument or parameter that requires grad."""
    for value in values:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for item in inner:
            if isinstance(item, torch.Tensor) and item.requires_grad:
                return True
    return module is not None and _has_trainable(module)


def _has_trainable(module: torch.nn.Module) -> bool:
    """Whether a parameter requires grad; asks the dictionaries, for `parameters()` takes microseconds."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    return any(_has_trainable(child) for child in module._modules.values() if child is not None)
