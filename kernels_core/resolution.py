"""The values that travel between dispatcher and plugins: request, candidate, refusal, resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal, cast

import torch

from .layer import Layer, source_label
from .mode import Mode

Tier = Literal["scope", "user", "plugin"]
TIERS: tuple[Tier, ...] = ("scope", "user", "plugin")
"""Who offers a candidate, first to be asked first: an open scope, the user, a plugin package."""

KernelLayer = type[torch.nn.Module] | Callable[..., Any]
"""What a source is turned into: an `nn.Module` class whose `forward` serves, or a function."""


@dataclass(frozen=True)
class LayerRequest:
    """The question: which implementation serves this layer, on this device, called like this?

    Attributes:
        layer_name: The name that the layer was decorated with.
        device: Device of the call, with its index.
        mode: One of the four modes that a call can have.
        layer: The decorated class or function; None if only a name is asked about.
        capability: Compute capability of the device, 90 for 9.0; None where there is none.
        scopes: What the open scopes carry, innermost first (see `Scope`).
    """

    layer_name: str
    device: torch.device
    mode: Mode
    layer: Layer | None = None
    capability: int | None = None
    scopes: tuple[object, ...] = ()

    def __str__(self) -> str:
        """Name layer, device and mode."""
        return f"{self.place} for {self.mode_text}"

    @property
    def mode_text(self) -> str:
        """The mode in words: `"training + compile"`."""
        return " + ".join(str(flag.name).lower() for flag in Mode if flag in self.mode).replace("torch_", "")

    @property
    def place(self) -> str:
        """Layer and device."""
        return f"layer {self.layer_name!r} on {self.device}"


@dataclass(frozen=True)
class Candidate:
    """An offer: this source might serve.

    Attributes:
        source: Whatever a `kernels_load_layer` hook can turn into a layer.
        plugin: Who offers it; filled in with the plugin's name where left empty.
        tier: `"plugin"` for plugin packages; `"scope"` and `"user"` go before, for what was said
            in an open scope or registered by the user.
        priority: Among plugins, the larger goes first; then the plugin's name decides.
    """

    source: object
    plugin: str = ""
    tier: Tier = "plugin"
    priority: int = 0

    @property
    def label(self) -> str:
        """One line that names the source."""
        return source_label(self.source)


class Cause(Enum):
    """What kind of reason keeps a kernel from serving, in the order in which it is looked at.

    Attributes:
        DEVICE: It is for another type of device.
        PROPERTIES: It is for devices of this type with other properties.
        MODE: It is for calls of another mode, or cannot do what this mode needs.
        LOAD: It cannot be used: not allowed, not there, broken, or made for another signature.
    """

    DEVICE = auto()
    PROPERTIES = auto()
    MODE = auto()
    LOAD = auto()


@dataclass(frozen=True)
class Refusal:
    """Why one candidate, or everything a plugin had to offer, does not serve.

    Attributes:
        reason: A sentence that ends in what to do, where something can be done.
        candidate: The candidate; None if the plugin failed before it offered one.
        plugin: Who offered it.
        error: The exception behind it, if any.
        cause: What kind of reason it is.
    """

    reason: str
    candidate: Candidate | None = None
    plugin: str = ""
    error: BaseException | None = field(default=None, compare=False, repr=False)
    cause: Cause = Cause.LOAD

    def __str__(self) -> str:
        """Name the candidate and the reason."""
        if self.candidate is None and self.reason.startswith("Plugin "):  # as our own errors do
            return self.reason
        return f"{self.candidate.label if self.candidate else f'plugin {self.plugin!r}'}: {self.reason}"


@dataclass(frozen=True)
class LoadedLayer:
    """A kernel layer with its provenance, for loaders that know it.

    Attributes:
        layer: The `nn.Module` class or function.
        origin: Where it came from: repository, commit and build variant.
        checked: What was verified on the way, and what was not: `{"digest": "12 files", ...}`.
        adapt: Makes what serves one decorated layer, for kernels that must know it; called once for each.
            Where only a name is asked about, `layer` stands for all of them.
    """

    layer: KernelLayer
    origin: str
    checked: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[Layer], KernelLayer] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Resolution:
    """The answer: what serves, where it came from, and why everything before it does not.

    Attributes:
        request: The question.
        implementation: What is called in place of the forward; None stands for the reference.
        candidate: The offer that was taken; None for the reference.
        origin: Where the implementation came from; `"reference"` for the reference.
        refusals: Candidates that were refused, in the order in which they were tried.
        checked: What was verified about the kernel, and what was not.
        note: Why no candidate was even asked for, where that is so.
        every_mode: Whether the decision is the same for training and inference.
        misfits: What is offered for this layer, but not for such a device or mode, so that it was never tried.
    """

    request: LayerRequest
    implementation: Callable[..., Any] | None = None
    candidate: Candidate | None = None
    origin: str = "reference"
    refusals: tuple[Refusal, ...] = ()
    checked: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    every_mode: bool = False
    misfits: tuple[Refusal, ...] = ()

    @property
    def subject(self) -> str:
        """What was decided about: layer, device, and the mode where that makes a difference."""
        return self.request.place if self.every_mode else str(self.request)

    @property
    def is_reference(self) -> bool:
        """Whether the layer's own forward runs."""
        return self.implementation is None

    @property
    def plugin(self) -> str:
        """Name of the plugin that offered what serves; empty for the reference."""
        return self.candidate.plugin if self.candidate else ""

    def explain(self) -> str:
        """Tell the whole decision, a line for each candidate."""
        lines = [f"{self.subject}: {self.origin}" + (f" ({self.note})" if self.note else "")]
        lines += [f"  refused {refusal}" for refusal in self.refusals]
        lines += [f"  not for this call: {misfit}" for misfit in self.misfits if self.is_reference]
        lines += [f"  {what}: {result}" for what, result in self.checked.items()]
        return "\n".join(lines)

    __str__ = explain


def attribute(layer: KernelLayer, name: str, default: bool) -> bool:
    """Read a declaration such as `has_backward` off a kernel layer."""
    return bool(getattr(cast(Any, layer), name, default))
