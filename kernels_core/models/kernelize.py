"""Freeze the kernels of a whole model, so that its calls no longer choose one; and undo that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..decisions.agreement import TIMEOUT, group_of, reach
from ..device import Device, as_torch_device
from ..environment import strict
from ..errors import ArgumentError, ArgumentTypeError, KernelizeError
from ..generated import dispatched_layer
from ..guards.parts import for_module, reads_past
from ..layer import Layer
from ..mode import Mode, check_call_mode
from ..resolution import Cause, Refusal, Resolution
from ..resolver import decide, find_drift, no_kernel
from ..warning import warn
from .choice import Run
from .frozen import foreign_forward, freeze_class, frozen_choice, original_class, swap
from .functions import OF_TORCH, functions_of, held_by
from .modules import locate, required_device, tensor_device, walk
from .receipt import Receipt, receipt_of

Model = TypeVar("Model", bound=nn.Module)
Class = TypeVar("Class", bound=type[nn.Module])
_Classes = dict[tuple[torch.device, Sequence[Layer]], type[nn.Module]]


class KernelizeFallback(Flag):
    """Where `kernelize` may keep the reference of a layer instead of raising.

    Attributes:
        NONE: Nowhere.
        NO_LAYER: No kernel is offered for the layer name, or policy lets none of those serve.
        NO_DEVICE: None is offered for this type of device.
        NO_COMPATIBLE_PROPERTIES: None is offered for a device with these properties.
        NO_COMPATIBLE_MODE: None is offered for this mode, or those that are lack gradients or tracing.
        CANNOT_LOAD: The offered kernels cannot be used: not trusted, missing, broken, or of another signature.
        DEFAULT: In all of these cases but `CANNOT_LOAD`.
        ALL: In all of them.

    Example:
        >>> KernelizeFallback.CANNOT_LOAD in KernelizeFallback.DEFAULT
        False
    """

    NONE = 0
    NO_LAYER = auto()
    NO_DEVICE = auto()
    NO_COMPATIBLE_PROPERTIES = auto()
    NO_COMPATIBLE_MODE = auto()
    CANNOT_LOAD = auto()
    DEFAULT = NO_LAYER | NO_DEVICE | NO_COMPATIBLE_PROPERTIES | NO_COMPATIBLE_MODE
    ALL = DEFAULT | CANNOT_LOAD


_CASES = {
    Cause.DEVICE: (KernelizeFallback.NO_DEVICE, "no kernel is offered for this device"),
    Cause.PROPERTIES: (
        KernelizeFallback.NO_COMPATIBLE_PROPERTIES,
        "no kernel is offered for a device with these properties",
    ),
    Cause.MODE: (KernelizeFallback.NO_COMPATIBLE_MODE, "no kernel is offered for this mode"),
    Cause.POLICY: (KernelizeFallback.NO_LAYER, "no kernel that is offered may serve"),
    Cause.LOAD: (KernelizeFallback.CANNOT_LOAD, "no kernel that is offered can be used"),
}


def kernelize(
    model: Model,
    *,
    mode: Mode,
    device: str | torch.device | Device | None = None,
    use_fallback: bool | KernelizeFallback = True,
    group: Any = None,
) -> Model:
    """Choose a kernel for each decorated layer of a model now, and keep it.

    Without this, each call chooses by itself, at the price of one look-up. A kernelized model keeps its
    kernels when the scope is left in which it was kernelized, and no other model is changed.

    Args:
        model: The model, changed in place.
        mode: The mode of its calls: `Mode.INFERENCE` or `Mode.TRAINING`, each also combined with
            `Mode.TORCH_COMPILE`.
        device: The device that it will run on, such as `"cuda"`; by default, that of each module's
            own parameters.
        use_fallback: Whether layers may keep their reference where nothing better is offered. `True`
            is `KernelizeFallback.DEFAULT`, `False` is `KernelizeFallback.NONE`. One warning lists
            these layers, with the reasons.
        group: A process group, all of whose ranks call this: they keep the same kernels, as with `agree`. None for
            ranks that need not.

    Returns:
        The model.

    Raises:
        ArgumentError: If no call has that mode, PyTorch knows no such device, or no device is given and the
            model has none; or as `agree`.
        DisagreementError: If the ranks of the group would keep different kernels, or another one of them failed.
            Nothing is changed on any rank then.
        KernelizeError: If a layer would keep its reference where that is not allowed. Nothing is
            changed then.

    Example:
        >>> @use_kernel_forward_from_hub("Identity")
        ... class Identity(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> class FastIdentity(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> model = nn.Sequential(Identity(), nn.Linear(2, 2))
        >>> with use_kernel_mapping({"Identity": {"cpu": FastIdentity}}):
        ...     model = kernelize(model, mode=Mode.INFERENCE)
        >>> model[0].forward.__qualname__
        'FastIdentity.forward'
    """

    def plan() -> tuple[_Freeze, list[nn.Module], list[type[nn.Module]]]:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"kernelize takes an nn.Module, not {model!r}.")
        check_call_mode(mode)
        freeze = _Freeze(Run(mode), _flags(use_fallback))
        given = as_torch_device(device) if device is not None else None
        inferred = given or required_device(model, "kernelize")
        return freeze, *freeze.plan(model, inferred, given=given, exact=_names_index(device))

    if group is None:
        freeze, modules, classes = plan()
    else:

        def planned() -> Receipt:
            nonlocal freeze, modules, classes
            freeze, modules, classes = plan()
            return receipt_of(model, device, mode, dict(zip(modules, classes, strict=True)))

        reach(group_of(model, device, group, TIMEOUT), planned)
    freeze.warn()  # before anything is changed: a warning may be an error
    swap(modules, classes)
    return model


def unkernelize(model: Model) -> Model:
    """Undo `kernelize`: each call chooses by itself again.

    Args:
        model: The model, changed in place; modules that are not kernelized are not touched.

    Returns:
        The model.

    Raises:
        ArgumentTypeError: If the model is not a module.
        KernelizeError: If another library has changed the class of a kernelized module since. Nothing
            is changed then.

    Example:
        >>> @use_kernel_forward_from_hub("Identity")
        ... class Identity(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> class FastIdentity(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> with use_kernel_mapping({"Identity": {"cpu": FastIdentity}}):
        ...     model = kernelize(Identity(), mode=Mode.INFERENCE, device="cpu")
        >>> type(model) is Identity, type(unkernelize(model)) is Identity
        (False, True)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"unkernelize takes an nn.Module, not {model!r}.")
    modules = [module for module in walk(model) if frozen_choice(module) is not None]
    swap(modules, [original_class(module) for module in modules])
    return model


def use_kernelized_func(
    *functions: Callable[..., object], computes: Callable[[Any, Mode], Sequence[str]] | None = None
) -> Callable[[Class], Class]:
    """Declare to `kernelize` the decorated functions that the forward of a class calls.

    Calls of a decorated function are dispatched with or without this; with it, `kernelize` freezes them
    for this model, and for no other. Functions that a module holds in attributes need no declaration.

    Args:
        functions: Functions decorated with `use_kernel_forward_from_hub`.
        computes: Returns, for a module and the mode of a call, the paths of the children that the functions compute in
            place of calling them, for receipts; none where the forward does not call the functions then.

    Returns:
        A decorator that changes the class in place.

    Raises:
        ArgumentError: If one is not decorated.
        ArgumentTypeError: If applied to anything but an `nn.Module` class, or `computes` is no function.

    Example:
        >>> @use_kernel_forward_from_hub("double")
        ... def double(x: torch.Tensor) -> torch.Tensor:
        ...     return x + x
        >>> @use_kernelized_func(double)
        ... class Twice(nn.Module):
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return double(double(x))
        >>> Twice()(torch.ones(1))
        tensor([4.])
    """
    layers = []
    for function in functions:
        layer = dispatched_layer(function)
        if layer is None or not layer.is_function:
            name = getattr(function, "__name__", repr(function))
            raise ArgumentError(f"{name} is not a decorated function: put @use_kernel_forward_from_hub('name') on it.")
        layers.append(layer)
    if computes is not None and not callable(computes):
        raise ArgumentTypeError(f"computes is a function of a module and a mode, not {computes!r}.")

    def decorate(cls: Class) -> Class:
        if not isinstance(cls, type) or not issubclass(cls, nn.Module):
            raise ArgumentTypeError(f"@use_kernelized_func decorates an nn.Module class, not {cls!r}.")
        cls.kernels_functions = (*getattr(cls, "kernels_functions", ()), *layers)  # type: ignore[attr-defined]
        if computes is not None:
            known = getattr(cls, "kernels_computes", {})
            cls.kernels_computes = {**known, **dict.fromkeys(layers, computes)}  # type: ignore[attr-defined]
        return cls

    return decorate


# --- Choosing ------------------------------------------------------------------------------------


@dataclass
class _Freeze:
    """One run of `kernelize`: the cases in which a layer may keep its reference, and those that keep it."""

    run: Run
    allowed: KernelizeFallback
    kept: dict[Layer, Resolution] = field(default_factory=dict)

    def plan(
        self, model: nn.Module, inferred: torch.device, *, given: torch.device | None, exact: bool
    ) -> tuple[list[nn.Module], list[type[nn.Module]]]:
        """Return modules, and the class that each is to have; raise where a reference must not be kept.

        Args:
            model: The model to kernelize.
            inferred: The device of modules that have none.
            given: The device that the caller named, if any.
            exact: Whether that is one device, not a type of devices.
        """
        modules: list[nn.Module] = []  # two lists: ten thousand pairs would start the garbage collector
        classes: list[type[nn.Module]] = []
        # By class: a model has thousands of modules of a few.
        kinds: dict[type[nn.Module], tuple[type[nn.Module], Layer | None, Sequence[Layer], _Classes, _Classes]] = {}
        where: dict[int, torch.device] = {}
        partial: dict[type[nn.Module], Resolution] = {}
        hooked = False
        for module in walk(model):
            own = module.__dict__
            bare = own.keys() <= OF_TORCH
            # Inside of a module that is moved for its calls, tensors are where they wait for that.
            hooked = hooked or (not bare and ("_hf_hook" in own or "_diffusers_hook" in own))
            cls = type(module)
            kind = kinds.get(cls)
            if kind is None:
                original = original_class(module)
                kind = kinds[cls] = original, dispatched_layer(original.forward), functions_of(original), {}, {}
            original, layer, functions, served, unwanted = kind
            if not bare and (held := held_by(module)):
                # So modules that hold others get classes of their own.
                functions = tuple(dict.fromkeys((*functions, *held)))
            if layer is None and not functions:
                continue
            device = inferred
            if not exact:
                here = tensor_device(module) if not hooked else None
                if here is None:
                    # A walk of its own, for models with modules without tensors.
                    where = where or locate(model, inferred)
                    here = where[id(module)]
                if given is None or here.type == given.type:
                    device = here
            wanted = layer is not None and (layer.condition is None or layer.condition(module))
            # A forward that another library has put on the module stays, and what it kept would never be frozen.
            foreign = None
            if not bare and "forward" in own and frozen_choice(module) is None:
                foreign = foreign_forward(module)
            obstacle = foreign and (
                f"{foreign} was put on the module as its forward: kernelize before that, or take it off; until then, "
                "its calls decide by themselves"
            )
            if original.forward is nn.Module.forward:  # a container, whose functions are called from somewhere else
                obstacle = (
                    f"{original.__name__} holds it, and has no forward to freeze: hold it in the module that calls it"
                )
            known = served if wanted else unwanted
            frozen = known.get((device, functions)) if obstacle is None else None
            if frozen is None:
                if obstacle is not None or device.type == "meta":  # there, the device of its calls is not known yet
                    for each in (layer, *functions) if wanted else functions:
                        self._choose(cast(Layer, each), device, obstacle)
                    continue
                resolution = self._choose(layer, device) if layer is not None and wanted else None
                pins = {function: self._choose(function, device) for function in functions}
                frozen = known[device, functions] = freeze_class(original, layer, self.run, device, resolution, pins)
                if resolution is not None and reads_past(resolution):
                    partial[frozen] = resolution
            if partial and frozen in partial:  # it is frozen all the same: once a part is as it was, the kernel serves
                self._check(for_module(partial[frozen], module))
            modules.append(module)
            classes.append(frozen)
        return modules, classes

    def _choose(self, layer: Layer, device: torch.device, obstacle: str | None = None) -> Resolution:
        resolution = decide(layer, device, (self.run.mode,), notify="plugins")
        if obstacle is not None and not (resolution.note or resolution.is_reference):
            refusal = Refusal(obstacle, resolution.candidate, resolution.plugin, cause=Cause.POLICY)
            resolution = Resolution(resolution.request, refusals=(refusal,))
        return self._check(resolution)

    def _check(self, resolution: Resolution) -> Resolution:
        """Return a decision; raise if it is for the reference, and that must not be kept."""
        layer = resolution.request.layer
        if resolution.note or not resolution.is_reference or layer is None:
            return resolution
        if find_drift(resolution) is not None:
            raise no_kernel(resolution)
        want, case = _case(resolution)
        if want not in self.allowed or not layer.use_fallback or (strict() and resolution.refusals):
            rule = "use_fallback does not allow the reference there"
            otherwise = f", or allow the reference with kernelize(..., use_fallback=KernelizeFallback.{want.name})"
            if not layer.use_fallback:
                rule, otherwise = "the layer was decorated with use_fallback=False", ""
            elif want in self.allowed:
                rule, otherwise = "KERNELS_STRICT is on", ", or unset KERNELS_STRICT"
            raise KernelizeError(
                f"{resolution.subject}: {case}, and {rule}. The model was not changed.\n{_why(resolution)}"
                f"Register a kernel that fits{otherwise}.",
                request=resolution.request,
                refusals=resolution.refusals,
            )
        if resolution.refusals or resolution.misfits:  # without any offer, the reference is the expected result
            self.kept[layer] = resolution
        return resolution

    def warn(self) -> None:
        """Warn of the layers that keep their reference, with the reasons."""
        together: dict[str, list[str]] = {}  # layers by their reasons
        for layer, resolution in self.kept.items():
            reasons = f"{_case(resolution)[1]}\n{_why(resolution)}"
            together.setdefault(reasons, []).append(f"{resolution.request.place} ({layer.qualname})")
        if together:
            lines = "".join(f"  {', '.join(places)}: {reasons}" for reasons, places in together.items()).rstrip()
            counted = f"{len(self.kept)} layer{'s' * (len(self.kept) != 1)}"
            message = f"kernelize for {self.run.mode} keeps the reference of {counted}:\n{lines}"
            warn(message)


def _names_index(device: object) -> bool:
    """Whether the caller named a single device, such as `cuda:1` or `cpu`, and not a type of devices."""
    if isinstance(device, torch.device):
        return device.index is not None or device.type == "cpu"
    return isinstance(device, str) and (":" in device or device == "cpu")


def _flags(use_fallback: object) -> KernelizeFallback:
    if isinstance(use_fallback, bool):
        return KernelizeFallback.DEFAULT if use_fallback else KernelizeFallback.NONE
    if isinstance(use_fallback, KernelizeFallback):
        return use_fallback
    raise ArgumentTypeError(f"use_fallback is True, False or a KernelizeFallback, not {use_fallback!r}.")


def _case(resolution: Resolution) -> tuple[KernelizeFallback, str]:
    """Return the case of a layer without a kernel, by the candidate that came nearest to serving, and a sentence."""
    causes = [refusal.cause for refusal in (*resolution.refusals, *resolution.misfits)]
    if not causes:
        return KernelizeFallback.NO_LAYER, "no kernel is offered for this layer name"
    return _CASES[max(causes, key=list(Cause).index)]


def _why(resolution: Resolution) -> str:
    return "".join(f"    {refusal}\n" for refusal in (*resolution.refusals, *resolution.misfits))
