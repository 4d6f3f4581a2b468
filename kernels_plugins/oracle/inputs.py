"""Inputs for layers: recorded from real calls, and others that are derived from them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels_core import Layer, Resolution, find_layer, hookimpl, module_paths, plugin_manager
from kernels_core.replay import Call, each_tensor

Forward = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Recorded:
    """A call of a decorated layer, as it was at its start; `path` leads to the module, or is the function's name."""

    path: str
    layer: Layer
    call: Call


@dataclass(frozen=True, eq=False)
class Case:
    """A call to try, with or without autocast around it, and with contiguous gradients of its outputs or others.

    `name` is its special property, and `given` whether it is a real call rather than one that is derived from it.
    """

    name: str
    call: Call
    autocast: torch.dtype | None = None
    contiguous: bool = True
    given: bool = False


# --- Recorded -------------------------------------------------------------------------------------


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[Recorded]]:
    """Record the eager calls of decorated layers and functions while a model runs; results are not changed.

    Of calls of one module with the same shapes, dtypes and devices, only the first is kept.

    Example:
        >>> @use_kernel_forward_from_hub("Identity")
        ... class Identity(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> model = torch.nn.Sequential(Identity())
        >>> with record(model) as calls:
        ...     y = model(torch.ones(2, 3))
        >>> [(call.path, list(call.call.inputs)) for call in calls]
        [('0', ['x'])]
    """
    calls: list[Recorded] = []
    known: set[object] = set()

    def keep(path: str, layer: Layer, call: Call) -> None:
        tensors = tuple((name, t.shape, t.dtype, t.device) for name, t in call.inputs.items())
        key = (id(call.module) if call.module is not None else layer.number, tensors)
        if key not in known:
            known.add(key)
            calls.append(Recorded(path, layer, call.snapshot()))

    def hook(path: str, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():  # a trace has no numbers to record
            keep(path, layer, Call(module, args, kwargs, layer.signature))

    with contextlib.ExitStack() as stack:
        for path, module, layer in decorated(model):
            watch: Any = functools.partial(hook, path, layer)
            watch.observes = True  # functions that compute this module together with others are called all the same
            handle = module.register_forward_pre_hook(watch, with_kwargs=True)
            stack.callback(handle.remove)
        name = f"oracle-recorder-{id(calls)}"
        plugin_manager().register(_Functions(keep), name)
        stack.callback(plugin_manager().unregister, name)
        yield calls


def decorated(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layer]]:
    """Yield the modules of decorated layers, with the first path of each."""
    for module, (path, *_) in module_paths(model).items():
        layer = find_layer(module)
        if layer is not None:
            yield path, module, layer


class _Functions:
    """A plugin that records the calls of decorated functions."""

    def __init__(self, keep: Callable[[str, Layer, Call], None]) -> None:
        self.keep = keep

    @hookimpl
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward] | None:
        """Record the arguments."""
        layer = resolution.request.layer
        if layer is None or not layer.is_function:
            return None

        def wrap(forward: Forward) -> Forward:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                self.keep(layer.qualname.rpartition(".")[2], layer, Call(None, args, kwargs, layer.signature))
                return forward(*args, **kwargs)

            return recorded

        return wrap


# --- Derived --------------------------------------------------------------------------------------


def cases(call: Call) -> Iterator[Case]:
    """Yield other calls like a given one: where the reference raises, one does not apply.

    Other values, other dtypes, inputs that are not contiguous, empty ones, odd sizes, a batch of one, and
    autocast.

    Example:
        >>> [case.name for case in cases(Call(None, (torch.ones(4, 8),)))][:4]
        ['other values', 'bfloat16', 'float16', 'strided']
    """
    call = call.snapshot()  # the caller may change its inputs before the next case
    main = next((t for t in call.inputs.values() if t.is_floating_point() and t.numel()), None)
    if main is None:  # its dtype and sizes are varied
        return
    yield Case("other values", _changed(call, _other_values))
    given = main.dtype
    for dtype in DTYPES:
        if dtype is not given and given in DTYPES:
            yield Case(str(dtype).removeprefix("torch."), call.converted(given, dtype))
    yield Case("strided", _changed(call, _strided), contiguous=False)
    transposed = _changed(call, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t)
    yield Case("transposed", transposed, contiguous=False)
    has_batch = main.dim() > 1 and main.shape[0] > 1
    if has_batch:
        expanded = _changed(call, lambda t: t[:1].expand_as(t) if t.dim() > 1 and t.shape[0] else t)
        yield Case("expanded", expanded)
    yield Case("offset by one element", _changed(call, _offset))
    if main.dim() > 1:
        yield Case("empty", resized(call, main, 0, 0))
        if has_batch:
            yield Case("batch of one", resized(call, main, 0, 1))
        size = main.shape[-2]
        odd = size - 1 if size > 1 and size % 2 == 0 else size + 2 if size % 2 else 3
        yield Case("odd size", resized(call, main, main.dim() - 2, odd))
    bare = call.module is None or not [*call.module.parameters(), *call.module.buffers()]
    if bare and main.dim() and main.shape[-1] > 4:  # nothing in the module has that size, too
        yield Case("odd width", resized(call, main, main.dim() - 1, main.shape[-1] - 2 + main.shape[-1] % 2))
    # In 16 bits, autocast has nothing to cast.
    if given is torch.float32 and main.device.type in ("cpu", "cuda", "xpu"):
        yield Case("autocast bfloat16", call, autocast=torch.bfloat16)


def with_gradients(call: Call) -> Call:
    """Return a call that autograd records: where nothing requires grad, let all floating inputs do."""
    if call.records:
        return call
    return call.replaced(each_tensor(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t))


def _changed(call: Call, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """Return a call with every tensor changed."""

    def made(tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return change(tensor.detach()).detach().requires_grad_(tensor.requires_grad)

    with torch.inference_mode(False):
        return call.replaced(each_tensor(made))


def _other_values(tensor: torch.Tensor) -> torch.Tensor:
    turned = tensor.flip(0) if tensor.dim() else tensor
    # Integers may be indices: other values could be out of range.
    return turned * 0.75 if tensor.is_floating_point() else tensor


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """Put other numbers between the numbers of a tensor: a kernel that ignores strides reads them."""
    filler = torch.full_like(tensor, _filler(tensor))
    return torch.stack([tensor, filler], dim=-1)[..., 0] if tensor.dim() else tensor


def _offset(tensor: torch.Tensor) -> torch.Tensor:
    """Let a tensor start one element after its memory, at an address that is less round."""
    if not tensor.numel():
        return tensor
    # The element before is read by a kernel that ignores the offset.
    memory = tensor.new_full((tensor.numel() + 1,), _filler(tensor))
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def _filler(tensor: torch.Tensor) -> Any:
    """Return a number that a kernel must not read: NaN, which spoils every result, or 0."""
    return torch.nan if tensor.is_floating_point() or tensor.is_complex() else 0


def resized(call: Call, main: torch.Tensor, dim: int, size: int) -> Call:
    """Change a size, counted from the end, in every input that has the same size there."""
    from_end, old = dim - main.dim(), main.shape[dim]

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < -from_end or tensor.shape[from_end] != old:
            return tensor
        if size <= old:
            return tensor.narrow(from_end, 0, size).clone()
        times = -(-size // old)  # rounded up
        return torch.cat([tensor] * times, from_end).narrow(from_end, 0, size)

    return _changed(call, change)
