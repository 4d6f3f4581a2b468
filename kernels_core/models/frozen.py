"""The classes of kernelized modules: the chosen kernel is their `forward`, and they notice what makes it wrong.

Nothing is stored on a module, so undoing is exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..errors import KernelizeError
from ..generated import adapted
from ..layer import Forward, Layer
from ..resolution import Resolution
from .choice import FrozenChoice, Run, choices, is_parametrized, make_forward, refresh
from .copies import copied, reduced
from .modules import own_device, put_class
from .pinned import pinned


def freeze_class(
    original: type[nn.Module],
    layer: Layer | None,
    run: Run,
    device: torch.device,
    resolution: Resolution | None,
    functions: Mapping[Layer, Resolution],
) -> type[nn.Module]:
    """Make the class of kernelized modules."""
    frozen = FrozenChoice(original, layer, run.mode, device, resolution, functions, run)
    forward: Forward = original.forward
    if layer is not None:
        chosen = resolution.implementation if resolution is not None else None
        forward = adapted(layer, chosen or layer.reference)
    frozen.chosen = frozen.active = pinned(forward, functions) if functions else forward
    frozen.members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "kernels_frozen": frozen,
        "kernels_layer": layer,  # `forward` may be the kernel, which has no layer
        "train": _train,
        "_apply": _apply,
        "__reduce_ex__": reduced,
        "__copy__": copied,  # no __deepcopy__: wrappers that pass attributes on would copy the module without them
    }
    frozen.cls = frozen.make_class(forward=make_forward(frozen))
    choices.add(frozen)  # before the first `refresh`: a change meanwhile refreshes it again
    refresh(frozen)
    return frozen.cls


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Set training mode, as ever, and notice it."""
    frozen: FrozenChoice = type(self).kernels_frozen  # type: ignore[attr-defined]
    frozen.original.train(self, mode)  # first: a `train` of the class may change more modules
    frozen.notice_train(self, mode)
    return self


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
    """Change all tensors, as ever, and notice where they are now."""
    frozen: FrozenChoice = type(self).kernels_frozen  # type: ignore[attr-defined]
    cast(Any, frozen.original)._apply(self, fn, *args, **kwargs)
    # Asked after the change: the function decides where each tensor goes.
    device = own_device(self)
    if device is None:
        with contextlib.suppress(Exception):  # a function that fails for an empty tensor moves nothing
            device = fn(torch.empty(0, device=frozen.device)).device
    if device is not None:
        frozen.notice_move(self, device)
    return self


# --- Modules ---------------------------------------------------------------------------------------


def frozen_choice(module: nn.Module) -> FrozenChoice | None:
    """Return the choice that `kernelize` made for a module; None if it is not kernelized.

    Example:
        >>> @use_kernel_forward_from_hub("Identity")
        ... class Identity(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> choice = frozen_choice(kernelize(Identity(), mode=Mode.INFERENCE, device="cpu"))
        >>> choice.original.__name__, choice.layer.name, choice.resolution.origin
        ('Identity', 'Identity', 'reference')
    """
    return getattr(type(module), "kernels_frozen", None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before it was kernelized."""
    cls = type(module)
    frozen = frozen_choice(module)
    if frozen is None:
        return cls
    if "kernels_frozen" not in vars(cls):
        raise KernelizeError(
            f"The class of a kernelized {frozen.original.__qualname__} was changed since, to {cls.__qualname__}: "
            "undo that first, or kernelize after it (fully_shard, parametrize and the like)."
        )
    if is_parametrized(frozen.original):  # parametrizations may have been added or removed since
        classes = (cls, frozen.original)
        now, before = ({n: one for n, one in vars(each).items() if isinstance(one, property)} for each in classes)
        for name in before.keys() - now.keys():  # parametrize keeps its properties on the class
            delattr(frozen.original, name)
        for name in now.keys() - before.keys():
            setattr(frozen.original, name, now[name])
    return frozen.original


def swap(modules: Sequence[nn.Module], classes: Sequence[type[nn.Module]]) -> None:
    """Give all modules their new classes, or none."""
    before = [type(module) for module in modules]
    try:
        for module, cls in zip(modules, classes, strict=True):
            put_class(module, cls)
    except BaseException:  # also an interrupt: no model is half kernelized
        for index, cls in enumerate(before):
            put_class(modules[index], cls)
        raise
    for module in modules:
        if "forward" in module.__dict__ and foreign_forward(module) is None:
            del module.__dict__["forward"]


def foreign_forward(module: nn.Module) -> str | None:
    """Return the name of a forward that another library has put on a module, unless that has put back its own one."""
    put = module.__dict__.get("forward")
    if put is None:
        return None
    if getattr(put, "__self__", None) is module:
        function, choice = put.__func__, frozen_choice(module)
        if function is (choice.original if choice else type(module)).forward or hasattr(function, "kernels_elsewhere"):
            return None
    function = getattr(put, "func", put)  # a partial may show the name of the forward that it wraps
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(put).__name__)}"
