"""`references`: decorated layers run on their references, in a `with` block."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import NoneType

from torch import nn

from ..errors import require_type
from ..layer import Layer
from ..mode import Mode
from ..resolution import LayerRequest, Resolution
from ..resolver import Decided
from ..scopes.scope import ForwardScope
from .choice import blocks
from .frozen import frozen_choice
from .modules import own_device


def _reference(numbers: frozenset[int] | None, mode: Mode | None, request: LayerRequest) -> Resolution | None:
    """Return the decision for the reference, if the layer has one of these numbers (None: any), in this mode."""
    named = numbers is None or (request.layer is not None and request.layer.number in numbers)
    if named and (mode is None or mode in request.mode):
        return Resolution(request, note="references() is open")
    return None


_everywhere = ForwardScope(Decided(functools.partial(_reference, None, None)))


@contextmanager
def references(*models: nn.Module, layers: Collection[Layer] | None = None, mode: Mode | None = None) -> Iterator[None]:
    """Run decorated layers on their references in this thread or task, whatever mappings are open.

    Calls of kernelized modules read no scope, so the models that have some must be named. While the block is open,
    their kernelized modules decide by themselves in every thread.

    Args:
        *models: Models whose kernelized modules run on their references, too.
        layers: The layers that run on their references; None for all.
        mode: The mode of the calls that do, such as `Mode.TORCH_COMPILE`; None for all.

    Example:
        >>> @use_kernel_forward_from_hub("Double")
        ... def double(x):
        ...     return x + x
        >>> with use_kernel_mapping({"Double": {"cpu": lambda x: x * 3}}):
        ...     with references():
        ...         y = double(torch.ones(1))
        ...     y, double(torch.ones(1))
        (tensor([2.]), tensor([3.]))
    """
    for model in models:
        require_type(model, nn.Module, "A model")
    require_type(layers, (Collection, NoneType), "layers")
    for layer in () if layers is None else layers:
        require_type(layer, Layer, "An item of layers")
    scope = _everywhere
    if layers is not None or mode is not None:
        numbers = frozenset(layer.number for layer in layers) if layers is not None else None
        scope = ForwardScope(Decided(functools.partial(_reference, numbers, mode)))
    suspended = [
        (module, choice, module.training)
        # Each once: models may share modules.
        for module in dict.fromkeys(inner for model in models for inner in model.modules())
        if (choice := frozen_choice(module)) is not None
        and choice.suspended_by(module) is None  # suspended for another reason: that one stays in force
        and (layers is None or any(layer in layers for layer in (choice.layer, *choice.functions)))
    ]
    block = object()
    blocks[block] = []
    try:
        for module, choice, _ in suspended:
            choice.suspend(module, "references")
        with scope:
            yield
    finally:
        returned = blocks.pop(block)
        for module, choice, trained in suspended:
            if choice.suspended_by(module) == "references":
                choice.resume(module)
            elif (device := own_device(module)) is not None:  # it was moved meanwhile
                choice.notice_move(module, device)
            # `train()` was called inside of the block, where a suspended choice did not notice it.
            if module.training and not trained and frozen_choice(module) is choice:
                choice.notice_train(module, True)
        for reference, choice, came_to in returned:
            if (moved := reference()) is not None:
                choice.notice_move(moved, own_device(moved) or came_to)
