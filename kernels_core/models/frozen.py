"""The classes of kernelized modules: the chosen kernel is their `forward`, and they notice what makes it wrong.

Nothing is stored on a module, so undoing is exact, and a call costs as much as one of an undecorated layer.
"""

from __future__ import annotations

import contextlib
import functools
import types
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..dispatch import adapted, proved
from ..errors import KernelizeError
from ..guards.gradients import needs_proof
from ..guards.proof import until_proven
from ..guards.quarantine import find_quarantined
from ..layer import Forward, Layer
from ..mode import Mode
from ..plugins import plugin_manager
from ..resolution import LayerRequest, Resolution
from ..resolver import Decided, decide
from ..scope import Scope, listeners
from ..torch_internals import constant_result
from ..warning import WarnOnce, warn
from .copies import copied, reduced
from .modules import own_device


@dataclass
class Run:
    """One run of `kernelize`.

    Attributes:
        mode: The mode that the model is kernelized for.
        warn: Issues each warning about the models of this run once.
        token: Identifies this run, also in a pickle.
    """

    mode: Mode
    warn: WarnOnce = field(default_factory=WarnOnce)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(eq=False)
class FrozenChoice:
    """The choice that `kernelize` made for modules of one class on one device.

    Attributes:
        original: The class that the modules had before.
        layer: The layer of its forward, None if the class only calls decorated functions.
        mode: The mode that the model was kernelized for.
        device: The device that the modules are to run on.
        resolution: The decision for the forward; None if the layer has none, or its condition is not met.
        functions: The decisions for the decorated functions that the forward calls.
    """

    original: type[nn.Module]
    layer: Layer | None
    mode: Mode
    device: torch.device
    resolution: Resolution | None
    functions: Mapping[Layer, Resolution]
    run: Run = field(repr=False)
    chosen: Forward = field(init=False, repr=False)
    unproven: Forward | None = field(init=False, default=None, repr=False)

    def serves(self, module: nn.Module) -> bool:
        """Whether calls of a module run the choice: not while it trains after `train()`, nor in quarantine."""
        return "forward" not in module.__dict__ and type(module).forward is not self.original.forward

    def is_suspended(self, module: nn.Module) -> bool:
        """Whether the module runs its original forward since `train()`, not one that another library put on it."""
        put = module.__dict__.get("forward")
        return isinstance(put, types.MethodType) and put.__func__ is self.original.forward

    def notice_train(self, module: nn.Module, training: bool) -> None:
        """Suspend the frozen kernel while a model that was frozen for inference trains; restore it on `eval()`."""
        if Mode.INFERENCE not in self.mode:
            return
        if not training:
            if self.is_suspended(module):
                del module.__dict__["forward"]
        elif "forward" not in module.__dict__:
            module.__dict__["forward"] = types.MethodType(self.original.forward, module)
            self.run.warn(
                f"train() on a model that was kernelized for {self.mode}: its kernels are suspended until eval(), and "
                "each call decides by itself. To freeze for training: kernelize(model, mode=Mode.TRAINING).",
            )

    def notice_move(self, module: nn.Module, device: torch.device) -> None:
        """Drop the choice when the module was moved to another device."""
        if device.type == "meta" or (device.type, device.index) == (self.device.type, self.device.index):
            return
        if device.type == self.device.type and None in (device.index, self.device.index):
            return
        swap([module], [original_class(module)])
        self.run.warn(
            f"A model that was kernelized for {self.device} was moved to {device}: its kernels are dropped, and "
            "each call decides by itself. To freeze again: kernelize(model, mode=...).",
        )


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
    frozen.chosen = _pinned(forward, functions) if functions else forward
    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "kernels_frozen": frozen,
        "kernels_layer": layer,
        "forward": frozen.chosen,
        "train": _train,
        "_apply": _apply,
        "__reduce_ex__": reduced,
        "__copy__": copied,  # no __deepcopy__: wrappers that pass attributes on would copy the module without them
    }
    bases: tuple[type, ...] = (original,)
    if _is_parametrized(original):  # removing that deletes properties of the class, then takes its first base for it
        bases = original.__bases__
        members = {key: value for key, value in vars(original).items() if not hasattr(value, "__objclass__")} | members
    cls: Any = cast(Any, type(original))(original.__name__, bases, members)
    _classes.add(cls)
    _refresh(cls)
    return cast("type[nn.Module]", cls)


_classes: weakref.WeakSet[type[nn.Module]] = weakref.WeakSet()


def _refresh(cls: Any) -> None:
    """Give a class the forward that it is to have now: proven or not, in quarantine or not, wrapped or not."""
    frozen: FrozenChoice = cls.kernels_frozen
    resolution, forward = frozen.resolution, frozen.chosen
    if resolution is not None:
        kernel = resolution.implementation
        if kernel is not None and find_quarantined(resolution.request, kernel) is not None:
            forward = frozen.original.forward  # decides by itself, and gives the reason
        else:
            if kernel is not None and needs_proof(resolution):
                frozen.unproven = frozen.unproven or _until_proven(cls, frozen, resolution, kernel)
                forward = frozen.unproven
            if Mode.TORCH_COMPILE not in frozen.mode:
                forward = plugin_manager().wrap_forward(resolution, forward)
    if vars(cls)["forward"] is not forward:
        cls.forward = forward


def _refresh_all() -> None:
    for cls in list(_classes):
        _refresh(cls)


listeners.append(_refresh_all)


def _pinned(forward: Forward, functions: Mapping[Layer, Resolution]) -> Forward:
    """Return a forward that runs in a scope in which the chosen functions serve."""

    def choice_for(request: LayerRequest) -> Resolution | None:
        """Return the choice for a function, unless it is for another device or its kernel is in quarantine."""
        choice = functions.get(request.layer) if request.layer else None
        if choice is None or choice.request.device != request.device:
            return None
        kernel = choice.implementation
        return None if kernel is not None and find_quarantined(request, kernel) else replace(choice, request=request)

    scope = Scope(Decided(choice_for))

    @constant_result
    def compare() -> None:
        """Warn of functions that compiled code gets from another place; runs at trace time, outside of the graph."""
        for layer, choice in functions.items():
            found = decide(layer, choice.request.device, (choice.request.mode | Mode.TORCH_COMPILE,), notify="plugins")
            if found.implementation is not choice.implementation:
                warn(
                    f"Function {layer.qualname} was kernelized with {choice.origin}, but compiled code gets the "
                    f"kernel that is mapped where it is traced: {found.origin}. Register the mapping for the process.",
                )

    @functools.wraps(forward)
    def pinned(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # Dynamo cannot open a scope inside of its graph
            compare()
            return forward(self, *args, **kwargs)
        with scope:
            return forward(self, *args, **kwargs)

    pinned.__dict__.pop("kernels_layer", None)
    return pinned


def _until_proven(cls: Any, frozen: FrozenChoice, resolution: Resolution, kernel: Forward) -> Forward:
    """Return a forward that checks recorded calls, until the class can have the chosen forward itself."""
    layer = cast(Layer, frozen.layer)

    def decide_anew(module: nn.Module | None, values: tuple[Any, ...]) -> Forward:
        # The mapping that it came from may be gone, so that the decision of this call gives no reason.
        frozen.run.warn(
            f"Layer {layer.name!r} was kernelized with {resolution.origin}, which loses "
            "gradients that the reference has: it is in quarantine, and each call decides by itself.",
        )
        return frozen.original.forward

    proving = until_proven(
        layer,
        kernel,
        frozen.chosen,
        origin=resolution.origin,
        when_proven=lambda: _refresh(cls),
        decide_anew=decide_anew,
    )
    return proved(layer, frozen.chosen, proving)


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Set training mode, as ever, and notice it."""
    frozen: FrozenChoice = type(self).kernels_frozen  # type: ignore[attr-defined]
    frozen.original.train(self, mode)
    frozen.notice_train(self, mode)
    return self


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
    """Change all tensors, as ever, and notice where they are now."""
    frozen: FrozenChoice = type(self).kernels_frozen  # type: ignore[attr-defined]
    cast(Any, frozen.original)._apply(self, fn, *args, **kwargs)
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
    if _is_parametrized(frozen.original):  # parametrizations may have been added or removed since
        now, before = (dict(filter(_is_property, vars(each).items())) for each in (cls, frozen.original))
        for name in before.keys() - now.keys():
            delattr(frozen.original, name)
        for name in now.keys() - before.keys():
            setattr(frozen.original, name, now[name])
    return frozen.original


def _is_parametrized(cls: type) -> bool:
    """Whether a class was made by `torch.nn.utils.parametrize`, for a single module."""
    return cls.__module__ == parametrize.__name__


def _is_property(item: tuple[str, object]) -> bool:
    return isinstance(item[1], property)


def swap(modules: Sequence[nn.Module], classes: Sequence[type[nn.Module]]) -> None:
    """Give all modules their new classes, or none."""
    before = [type(module) for module in modules]
    suspended = {  # these run their original forward: `notice_train` has put it on them
        index: modules[index].__dict__.pop("forward")
        for index, cls in enumerate(before)
        if hasattr(cls, "kernels_frozen") and "forward" in modules[index].__dict__
    }
    try:
        for module, cls in zip(modules, classes, strict=True):
            object.__setattr__(module, "__class__", cls)  # nn.Module's own takes a microsecond
    except BaseException:
        for index, cls in enumerate(before):
            object.__setattr__(modules[index], "__class__", cls)
        for index, forward in suspended.items():
            modules[index].__dict__["forward"] = forward
        raise
