"""Look at a whole model: `receipt`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..device import Device, as_torch_device
from ..dispatch import dispatched_layer
from ..errors import ArgumentError, ArgumentTypeError
from ..layer import Layer
from ..mode import Mode, check_call_mode
from ..resolution import Resolution
from ..resolver import peek
from .counting import calls_of
from .frozen import frozen_choice
from .modules import device_of, functions_of, locate, paths
from .receipt import Receipt, ReceiptRow


def receipt(
    model: nn.Module,
    *,
    device: str | torch.device | Device | None = None,
    mode: Mode | None = None,
) -> Receipt:
    """Tell what serves each decorated layer of a model, where it comes from, and why nothing else does.

    Decides as a call would, without running anything: it may download and import kernels.

    Args:
        model: The model; it is not changed.
        device: The device of the calls, such as `"cuda"`; by default, that of each module's own
            parameters.
        mode: The mode of the calls; by default `Mode.TRAINING` for a model in training mode, else
            `Mode.INFERENCE`. What `kernelize` has chosen is told as it was chosen.

    Returns:
        A row for each decorated layer, and for each decorated function that `use_kernelized_func` names.

    Raises:
        ArgumentError: If device or mode cannot be those of a call, or the device cannot be told.
        ArgumentTypeError: If `model` is no module.

    Example:
        >>> @use_kernel_forward_from_hub("Identity")
        ... class Identity(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> (row,) = receipt(nn.Sequential(Identity()), device="cpu").rows
        >>> row.path, row.layer_name, row.origin
        ('0', 'Identity', 'reference')
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"receipt takes an nn.Module, not {model!r}.")
    given = as_torch_device(device) if device is not None else None
    inferred = given or device_of(model)
    chosen = check_call_mode(mode) if mode is not None else Mode.TRAINING if model.training else Mode.INFERENCE
    where = locate(model, inferred) if given is None and inferred is not None else {}
    known: dict[tuple[Layer, torch.device], Resolution] = {}

    def decide(layer: Layer, module: nn.Module) -> Resolution:
        here = given if given is not None else where.get(id(module))
        if here is None:
            raise ArgumentError(
                "The device of the model cannot be told, for it has no parameters: say it with "
                "receipt(..., device='cuda')."
            )
        key = (layer, here)
        if key not in known:
            known[key] = peek(layer, here, chosen)
        return known[key]

    return Receipt(tuple(row for module, places in paths(model).items() for row in _rows(places, module, decide)))


def _rows(
    places: Sequence[str], module: nn.Module, decide: Callable[[Layer, nn.Module], Resolution]
) -> Iterator[ReceiptRow]:
    """Yield what serves one module, and the functions that it calls."""
    frozen = frozen_choice(module)
    original = type(module) if frozen is None else frozen.original
    if frozen is not None and not frozen.serves(module):
        frozen = None
    layer = dispatched_layer(original.forward)
    if layer is not None:
        resolution = frozen.resolution if frozen is not None else None
        if resolution is None and layer.condition is not None and not layer.condition(module):
            resolution = replace(decide(layer, module), implementation=None, candidate=None, origin="reference")
            resolution = replace(resolution, refusals=(), misfits=(), checked={}, note="its condition is not met")
        row = ReceiptRow.of(resolution or decide(layer, module), *places, frozen=frozen is not None)
        yield replace(row, calls=calls_of(module))
    for function in functions_of(original):
        chosen = frozen.functions[function] if frozen is not None else decide(function, module)
        names = [f"{place}:{function.reference.__name__}" for place in places]
        yield replace(ReceiptRow.of(chosen, *names, frozen=frozen is not None), calls=calls_of(function))
