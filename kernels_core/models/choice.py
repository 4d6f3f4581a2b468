"""The choice of kernelized modules of one class: the function that its forward calls now, and why it is suspended.

What suspends a kernel changes the class of a module: a forward of the module's own would replace one that another
library has put there. Such a library has kept the forward that it found, so that each generated forward asks for the
class at every call, and goes to the forward of that.
"""

from __future__ import annotations

import functools
import types
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..contract import check_call
from ..device import hardware
from ..dispatch import make_forward as dispatching_forward
from ..environment import mapping_disabled
from ..generated import frozen as frozen_forward
from ..generated import made_once, passed_back
from ..guards.gradients import is_recorded, keeps_gradients
from ..guards.joining import Dispatched, joined, published
from ..guards.proof import until_proven
from ..guards.quarantine import find_quarantined, names_of, without_dtypes
from ..guards.shards import runs_on_shards
from ..guards.tensors import odd_classes, pending_among, waiting
from ..layer import Forward, Layer
from ..mode import Mode
from ..plugins import plugin_manager
from ..resolution import Resolution
from ..scopes.frame import Frame, generation, listeners
from ..torch_internals import constant_result, is_fake_class, is_traced
from ..warning import WarnOnce
from .modules import own_device, put_class
from .pinned import pinned


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
    active: Forward = field(init=False, repr=False)
    """The function that serves now, where no module is suspended: `chosen`, or the original forward."""
    unproven: Forward | None = field(init=False, default=None, repr=False)
    next: tuple[Dispatched, Frame] | None = field(init=False, default=None, repr=False)
    """The dispatcher of the calls that the kernel passes on, and the frame where it has last published a function."""
    members: dict[str, Any] = field(init=False, repr=False)
    """The members of its classes, besides the forward."""
    cls: type[nn.Module] = field(init=False, repr=False)
    suspended: dict[str, type[nn.Module]] = field(init=False, default_factory=dict, repr=False)
    """Classes of modules whose choice is suspended, by the reason."""

    def serves(self, module: nn.Module) -> bool:
        """Whether calls of a module run the choice: not while it trains after `train()`, nor in quarantine."""
        return self.active is not self.original.forward and self.suspended_by(module) is None

    def advising(self, advice: str) -> Forward:
        """Return the original forward, whose calls warn once."""

        @constant_result
        def warn() -> None:
            self.run.warn(advice)

        @functools.wraps(self.original.forward)
        def advising(*args: Any, **kwargs: Any) -> Any:
            warn()
            return self.original.forward(*args, **kwargs)

        return advising

    def make_class(self, **members: Any) -> type[nn.Module]:
        """Make a class like the original one, with other members."""
        original, inherited = self.original, dict[str, Any]()
        bases: tuple[type, ...] = (original,)
        if is_parametrized(original):  # removing that deletes properties of the class, then takes its first base for it
            bases = original.__bases__
            inherited = {key: value for key, value in vars(original).items() if not hasattr(value, "__objclass__")}
        made = cast(Any, type(original))(original.__name__, bases, {**inherited, **self.members, **members})
        return cast("type[nn.Module]", made)

    def is_suspended(self, module: nn.Module) -> bool:
        """Whether a module has its original forward as its own: `suspend` has put it on one whose class is not ours."""
        put = module.__dict__.get("forward")
        return isinstance(put, types.MethodType) and put.__func__ is self.original.forward

    def suspended_by(self, module: nn.Module) -> str | None:
        """Return why a choice is suspended for a module: `"train"`, `"references"`, `"move to ..."`; else None."""
        return "train" if self.is_suspended(module) else getattr(type(module), "kernels_suspended", None)

    def suspend(self, module: nn.Module, why: str) -> None:
        """Let a module run its original forward, by a class that differs in that only."""
        if "kernels_frozen" not in vars(type(module)):  # of a class that others made of it, which is theirs
            module.__dict__.setdefault("forward", types.MethodType(self.original.forward, module))
            return
        if why not in self.suspended:
            # The advice waits for a call: after `train()`, a library may kernelize anew, or move the module back.
            where = f"train() on a model that was kernelized for {self.mode}"
            until, freeze = "eval()", "for training: kernelize(model, mode=Mode.TRAINING)"
            if (device := why.removeprefix("move to ")) != why:
                where = f"A model that was kernelized for {self.device} was moved to {device}"
                until, freeze = "it is moved back", "there: kernelize(model, mode=...)"
            advice = f"{where}: its kernels are suspended until {until}, and each call decides by itself. "
            advice += f"To freeze {freeze}."
            forward = self.original.forward if why == "references" else self.advising(advice)
            self.suspended[why] = self.make_class(forward=forward, kernels_suspended=why)
        put_class(module, self.suspended[why])

    def resume(self, module: nn.Module) -> None:
        """Undo `suspend`."""
        if type(module) in self.suspended.values():
            put_class(module, self.cls)
        elif self.is_suspended(module):
            del module.__dict__["forward"]

    def notice_train(self, module: nn.Module, training: bool) -> None:
        """Suspend the frozen kernel while a model that was frozen for inference trains; restore it on `eval()`."""
        why = self.suspended_by(module)  # `train()` of a model reaches a shared module twice
        if Mode.INFERENCE in self.mode and training and why is None:
            self.suspend(module, "train")
        elif not training and why == "train" and not self.is_elsewhere(own_device(module)):
            self.resume(module)

    def is_elsewhere(self, device: torch.device | None) -> bool:
        """Whether a module with tensors there runs on another device than the one that the choice is for."""
        if device is None or device.type == "meta":  # from or to the memory in which its tensors wait for calls
            return False
        ours = self.device
        # "cuda" without an index is any of them.
        return device.type != ours.type or (device.index != ours.index and None not in (device.index, ours.index))

    def notice_move(self, module: nn.Module, device: torch.device) -> None:
        """Suspend the kernel of a module that was moved to another device, and restore it on the way back.

        Libraries move whole models to a device and back for each call, such as accelerate's `cpu_offload_with_hook`.
        """
        if self.is_elsewhere(device):
            self.suspend(module, f"move to {device}")
        elif (self.suspended_by(module) or "").startswith("move") and device.type != "meta":
            if open_blocks := list(blocks.values()):
                open_blocks[-1].append((weakref.ref(module), self, device))
                return
            self.resume(module)
            self.notice_train(module, module.training)


blocks: dict[object, list[tuple[weakref.ref[nn.Module], FrozenChoice, torch.device]]] = {}
"""The open blocks of `references`, and the modules that came back to their device there: kernels wait for the end."""

choices: weakref.WeakSet[FrozenChoice] = weakref.WeakSet()


def is_parametrized(cls: type) -> bool:
    """Whether a class was made by `torch.nn.utils.parametrize`, for a single module."""
    return cls.__module__ == parametrize.__name__


def make_forward(frozen: FrozenChoice) -> Forward:
    """Return the forward of a kernelized class."""

    def elsewhere(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a call of a module that is of another class by now: suspended, kernelized anew, or not any more."""
        return cast(Any, type(self)).forward(self, *args, **kwargs)

    def serve(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a call that the kernel was found to be fit for: not by the generated forward, which would ask again."""
        state = forward.__globals__
        # First whether it matters: the question takes microseconds.
        recorded = state["_kernels_unproven"] and is_recorded(self, (*args, *kwargs.values()))
        return state["_kernels_proving" if recorded else "_kernels_first"](self, *args, **kwargs)

    def unfit(module: nn.Module | None, values: tuple[Any, ...]) -> Forward:
        """Return the function for a call that a tracer records, or with tensors that are not plain."""
        odd = odd_classes(module, values)
        pending = pending_among(odd, values)
        others = [kind for kind in odd if kind not in pending and not is_fake_class(kind)]
        choice = frozen.resolution
        if choice is not None and runs_on_shards(others, choice.kernel_layer):
            return on_shards()
        reason = check_call(choice, others, traced=is_traced(odd)) if choice is not None else None
        if choice is not None and reason is not None:
            subject = f"{choice.request.place}, kernelized with {choice.origin}"
            frozen.run.warn(f"A call of {subject}, decides by itself, for {reason}")
            return frozen.original.forward
        return waiting(serve) if pending else serve

    @functools.partial(made_once, otherwise=frozen.original.forward)
    def on_shards() -> Forward | None:
        """Make the forward for calls with distributed tensors: it decides in the scopes of the choice."""
        assert frozen.layer is not None and frozen.resolution is not None
        return dispatching_forward(frozen.layer, scopes=frozen.resolution.request.scopes)

    def following() -> Forward | None:
        """Make the forward that serves the calls which the kernel passes on, from the scopes of the choice."""
        choice = frozen.resolution
        if frozen.layer is None or choice is None or choice.implementation is None:
            return None
        # Other calls, such as traced ones, may have another first candidate: it is this kernel that passed them on.
        scopes = choice.request.scopes
        passed_on = (choice.implementation,)
        if frozen.functions:
            return pinned(dispatching_forward(frozen.layer, scopes=scopes, passed_on=passed_on), frozen.functions)
        return dispatching_forward(frozen.layer, settled=settled, scopes=scopes, passed_on=passed_on)

    def settled(part: Dispatched, frame: Frame) -> None:
        frozen.next = part, frame
        _join(frozen)

    forward: Any
    if frozen.layer is not None:
        forward = frozen_forward(
            frozen.layer,
            frozen.chosen,
            elsewhere=elsewhere,
            unfit=unfit,
            next=made_once(following, passed_back),
            dispatched=frozen.original.forward,
            untraceable=[] if frozen.resolution is None or frozen.resolution.can_be_traced else [True],
        )
    else:

        @functools.wraps(frozen.chosen)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (frozen.active if isinstance(self, frozen.cls) else elsewhere)(self, *args, **kwargs)

    forward.__dict__["kernels_elsewhere"] = elsewhere  # tells it where a library has kept it
    return cast(Forward, forward)


def refresh(frozen: FrozenChoice) -> None:
    """Let the forward of a kernelized class call the function that is to serve now."""
    resolution, frozen.active = frozen.resolution, frozen.chosen
    state: dict[str, Any] = {"_kernels_class": frozen.cls, "_kernels_isinstance": isinstance}  # others derive from it
    state.update(_kernels_lossy=False, _kernels_unproven=False)
    kernel = resolution.implementation if resolution is not None else None
    provisional = resolution is not None and resolution.is_provisional  # decides by itself, and gets the kernel later
    off = (kernel is not None or frozen.functions) and (mapping_disabled() or plugin_manager().missing() is not None)
    if provisional or off:
        frozen.active = frozen.original.forward
    elif resolution is not None and kernel is not None and frozen.layer is not None:
        recorded, names = resolution.request.in_mode(Mode.TRAINING), names_of(resolution)
        if find_quarantined(resolution.request, kernel, *names) is not None:
            frozen.active = frozen.original.forward  # decides by itself, and gives the reason
        elif resolution.inference_only or find_quarantined(recorded, kernel, *names) is not None:
            advice = (
                f"Layer {frozen.layer.name!r} was kernelized for {frozen.mode} with {resolution.origin}, which has no "
                "gradients, and autograd records a call: such calls decide by themselves. Call the model under "
                "torch.no_grad() to run the kernel; to train it, kernelize(model, mode=Mode.TRAINING)."
            )
            state.update(_kernels_unproven=True, _kernels_lossy=True, _kernels_proving=frozen.advising(advice))
        elif not keeps_gradients(frozen.layer, kernel):
            frozen.unproven = frozen.unproven or _until_proven(frozen, resolution, kernel)
            state.update(_kernels_unproven=True, _kernels_proving=_wrapped(frozen, frozen.unproven))
    if frozen.layer is not None:
        state["_kernels_first"] = state["_kernels_kernel"] = _wrapped(frozen, frozen.active)
        cast(Any, frozen.cls.forward).__globals__.update(state)  # at once: other threads are in calls
        _join(frozen)


def _join(frozen: FrozenChoice) -> None:
    """Let the kernel call the next one itself where it passes calls on, if all calls of the model have the same one."""
    if frozen.next is None or frozen.active is frozen.original.forward:
        return
    before = generation()
    (part, frame), state, device = frozen.next, cast(Any, frozen.cls.forward).__globals__, frozen.device
    if device.type != "cpu" and device.index is None and hardware.accelerators != 1:
        return
    index = "" if device.type == "cpu" else f"_{device.index or 0}"
    mode = "training" if Mode.TRAINING in frozen.mode else "inference"
    following = published(part, frame, f"_{device.type}{index}_{mode}")
    if following is None or _wrapped(frozen, frozen.active) is not frozen.active:
        return
    joint = joined(frozen.active, following)
    if joint is None:
        return

    def apart(*args: Any, **kwargs: Any) -> Any:
        """Serve recorded calls by the first part, until the second one, which has a proof of its own, is proven."""
        if id(following) in part.watch.unproven:
            return frozen.active(*args, **kwargs)
        if state["_kernels_proving"] is apart:
            state["_kernels_unproven"] = False
        return joint(*args, **kwargs)

    if not state["_kernels_unproven"] and id(following) in part.watch.unproven:
        state.update(_kernels_proving=apart, _kernels_unproven=True)
    state["_kernels_kernel"] = joint
    if before != generation():  # a change of mappings meanwhile has refreshed it already, perhaps before these lines
        refresh(frozen)


def _wrapped(frozen: FrozenChoice, forward: Forward) -> Forward:
    """Let plugins put something around the choice, not in code that is compiled; leave out dtypes in quarantine."""
    if frozen.resolution is None or forward is frozen.original.forward:
        return forward
    if Mode.TORCH_COMPILE not in frozen.mode:  # a wrapper would be compiled with it, and break the graph
        forward = plugin_manager().wrap_forward(frozen.resolution, forward)
    return without_dtypes(frozen.resolution, forward)


def _refresh_all() -> None:
    for frozen in list(choices):  # a list: other threads kernelize meanwhile
        refresh(frozen)


listeners.append(_refresh_all)


def _until_proven(frozen: FrozenChoice, resolution: Resolution, kernel: Forward) -> Forward:
    """Return a forward that checks recorded calls, until the class can have the chosen forward itself."""
    layer = cast(Layer, frozen.layer)

    def decide_anew(module: nn.Module | None, values: tuple[Any, ...]) -> Forward:
        # The mapping that it came from may be gone, so that the decision of this call gives no reason.
        frozen.run.warn(
            f"Layer {layer.name!r} was kernelized with {resolution.origin}, which loses "
            "gradients that the reference has: it is in quarantine, and each call decides by itself.",
        )
        return frozen.original.forward

    return until_proven(
        layer,
        kernel,
        frozen.chosen,
        origin=resolution.origin,
        when_proven=lambda: refresh(frozen),
        decide_anew=decide_anew,
    )
