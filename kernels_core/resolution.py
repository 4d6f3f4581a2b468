"""The values that core and plugins exchange: request, candidate, refusal, loaded layer, resolution."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal, cast

import torch

from .decisions.content import content_of
from .errors import is_transient
from .layer import Layer, source_label
from .mode import EAGER_MODES, TRACED_MODES, Mode
from .text import cleaned

Tier = Literal["scope", "user", "plugin"]
TIERS: tuple[Tier, ...] = ("scope", "user", "plugin")
"""Where a candidate was specified, first to be tried first: in an open scope, by the user, by a plugin package."""

KernelLayer = type[torch.nn.Module] | Callable[..., Any]
"""A loaded kernel: an `nn.Module` class whose `forward` serves, or a function."""


@dataclass(frozen=True)
class LayerRequest:
    """The question: which implementation serves this layer, on this device, in this mode?

    A request may be about the two modes of one call, with and without gradients (`modes`): then one answer serves
    both, unless a plugin reads `mode`, which tells the core that the answer depends on it. Such a plugin is asked
    again, for each mode.

    Attributes:
        layer_name: The name that the layer was decorated with.
        device: Device of the call, with its index.
        mode: The mode of the call, one of four.
        layer: The decorated class or function; None if the request is about a layer name only.
        capability: Compute capability of the device, 90 for 9.0; None where there is none.
        scopes: The payloads of the open scopes, innermost first (see `Scope`).
        subclasses: The classes of the tensors of the call that are not plain, such as `DTensor`.
        passed_on: The kernels that have passed a call on: they returned `NotImplemented`, and the answer is for such
            calls.
    """

    layer_name: str
    device: torch.device
    mode: Mode
    layer: Layer | None = None
    capability: int | None = None
    scopes: tuple[object, ...] = ()
    subclasses: frozenset[type[torch.Tensor]] = frozenset()
    passed_on: tuple[Callable[..., Any], ...] = ()

    depends_on_mode = False  # not a field: only a request about several modes finds out

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that the answer is to serve: one, or the two of a call."""
        return (self.mode,)

    def in_mode(self, mode: Mode) -> LayerRequest:
        """Return the same request about one mode."""
        return LayerRequest(
            self.layer_name,
            self.device,
            mode,
            self.layer,
            self.capability,
            self.scopes,
            self.subclasses,
            self.passed_on,
        )

    @property
    def is_traced(self) -> bool:
        """Whether the call is being traced."""
        return Mode.TORCH_COMPILE in self.modes[0]

    def __str__(self) -> str:
        """Name layer, device and mode."""
        return f"{self.place} for {self.mode_text}"

    @property
    def mode_text(self) -> str:
        """The mode in words: `"training + compile"`."""
        words = (" + ".join(str(flag.name).lower() for flag in Mode if flag in mode) for mode in self.modes)
        return " or ".join(words).replace("torch_", "")

    @property
    def place(self) -> str:
        """Layer and device."""
        return f"layer {self.layer_name!r} on {self.device}"


class JointRequest(LayerRequest):
    """A request about both modes of a call, which notices whether the answer may depend on the mode."""

    @property
    def mode(self) -> Mode:
        """The mode of the call; reading it is noticed."""
        vars(self)["depends_on_mode"] = True
        return cast(Mode, vars(self)["mode"])

    @mode.setter
    def mode(self, mode: Mode) -> None:
        vars(self)["mode"] = mode

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Both modes of the call."""
        return TRACED_MODES if Mode.TORCH_COMPILE in vars(self)["mode"] else EAGER_MODES


@dataclass(frozen=True)
class Candidate:
    """An offer: this source might serve.

    Attributes:
        source: Anything that a `kernels_load_layer` hook can turn into a layer.
        plugin: The plugin that offers it; filled in by the core where left empty.
        tier: `"plugin"` for plugin packages; `"scope"` and `"user"` are tried before, for sources that were
            specified in an open scope or registered by the user.
        priority: Among plugins, the larger is tried first; then the plugin's name decides.
        same_for_all_modes: Whether the kernel that serves training is to serve the layer's inference, too. One such
            candidate decides that for all, even if it is offered in a refusal.
        limit: Puts a function around the kernel that passes on the calls for which it is not offered: it returns
            `NotImplemented`. Called once the kernel is loaded, with the `LoadedLayer` and the function that serves
            calls; an exception refuses the candidate. Equal limits are called once. It may have a method `join` of
            that function and another one, which serves the calls that are passed on: it returns a function for all
            eager calls, which saves their second dispatch, or None.
        note: Why it is offered, or for which calls: a part of receipts.
        record: The same for a decision file, as JSON; the plugin that replays the file makes the limit of it.
    """

    source: object
    plugin: str = ""
    tier: Tier = "plugin"
    priority: int = 0
    same_for_all_modes: bool = False
    limit: Callable[[LoadedLayer, Callable[..., Any]], Callable[..., Any]] | None = None
    note: str = field(default="", compare=False)
    record: Any = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """One line that names the source."""
        return source_label(self.source)


@dataclass(frozen=True)
class _Reference:
    """The type of `Reference`: a value, so that copies and pickles of a mapping still name the reference."""

    def __repr__(self) -> str:
        return "Reference"


Reference = _Reference()
"""A source that names the layer's own forward: it serves from its place on, and no candidate after it is tried."""


@dataclass(frozen=True)
class Exclusive:
    """Offered besides candidates: offers of the tiers after this one are left out.

    Attributes:
        tier: The last tier that applies: `"scope"` leaves out `"user"` and `"plugin"`.
        plugin: The plugin that offers it; filled in by the core where left empty.
    """

    tier: Tier
    plugin: str = ""


class Cause(Enum):
    """The kind of reason that keeps a kernel from serving, in the order in which it is looked at.

    Attributes:
        DEVICE: It is for another type of device.
        PROPERTIES: It is for devices of this type with other properties.
        MODE: It is for calls of another mode, cannot do what this mode needs, or has passed the call on.
        POLICY: It must not be used here: a plugin does not authorize it, or it is in quarantine.
        LOAD: It cannot be used: not trusted, not there, broken, or made for another signature.
    """

    DEVICE = auto()
    PROPERTIES = auto()
    MODE = auto()
    POLICY = auto()
    LOAD = auto()


_LONGEST = 4_000
"""Characters of a reason that are kept."""


@dataclass(frozen=True)
class Refusal:
    """The reason why one candidate, or all that a plugin may have to offer, does not serve.

    Attributes:
        reason: A sentence that ends in what to do, where something can be done.
        candidate: The candidate; None if the plugin failed before it offered one.
        plugin: The plugin that offered it.
        error: The exception behind it, if any.
        cause: The kind of reason.
    """

    reason: str
    candidate: Candidate | None = None
    plugin: str = ""
    error: BaseException | None = field(default=None, compare=False, repr=False)
    cause: Cause = Cause.LOAD

    def __post_init__(self) -> None:
        """Make a reason visible that has text of others in it."""
        object.__setattr__(self, "reason", cleaned(self.reason, _LONGEST))

    def __str__(self) -> str:
        """Name the candidate and the reason."""
        if self.candidate is None and (not self.plugin or self.reason.startswith("Plugin ")):  # as our own errors do
            return self.reason
        return f"{self.candidate.label if self.candidate else f'plugin {self.plugin!r}'}: {self.reason}"


@dataclass(frozen=True)
class LoadedLayer:
    """A kernel layer with its provenance, for loaders that know it.

    Attributes:
        layer: The `nn.Module` class or function.
        origin: Where it came from: repository, commit and build variant.
        checked: The checks that were made on the way, or were left out: `{"digest": "12 files", ...}`.
        adapt: Makes the kernel for one decorated layer, where a kernel must know the layer; called once for each.
            For a request about a layer name only, `layer` is used for all of them.
        provenance: Who published it, under which license, with which digests: texts by name, or mappings and
            sequences of these. Receipts and bills of materials list it.
        content: A hash of the files of its build; empty for kernels that are known by their code.
        pin: What a decision file keeps, as JSON, of a source with a method `pinned`: called with it, that returns a
            source of the very same kernel, however its branches move.
    """

    layer: KernelLayer
    origin: str
    checked: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[Layer], KernelLayer] | None = field(default=None, compare=False, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    pin: Any = field(default=None, compare=False, repr=False)
    content: str = ""


@dataclass(frozen=True)
class Resolution:
    """The answer: the implementation, its origin, and the refusals of all candidates before it.

    Attributes:
        request: The question.
        implementation: The function that is called in place of the forward; None for the reference.
        candidate: The offer that was taken; None for the reference.
        origin: Where the implementation came from; `"reference"` for the reference.
        refusals: Candidates that were refused, in the order in which they were tried.
        checked: The checks that were made on the kernel, or were left out.
        note: Why the reference is the right answer, where it was chosen: the candidates were not asked, or it was one.
        every_mode: Whether the decision is the same for training and inference.
        misfits: Inapplicable candidates: offered for this layer, but for other devices or modes, so never tried.
        inference_only: Whether the kernel declares that it has no backward.
        kernel_layer: The kernel as it was loaded, with its declarations; None for the reference, or if not known.
        provenance: Who published it, and so on, as its loader knows it.
        pin: What a decision file keeps of its source, as in `LoadedLayer.pin`.
        loaded_content: The hash of its files, as in `LoadedLayer.content`.
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
    inference_only: bool = False
    kernel_layer: KernelLayer | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    pin: Any = field(default=None, compare=False, repr=False)
    loaded_content: str = field(default="", repr=False)

    @property
    def subject(self) -> str:
        """Layer and device, and the mode where the decision depends on it."""
        return self.request.place if self.every_mode else str(self.request)

    @property
    def is_reference(self) -> bool:
        """Whether the layer's own forward runs."""
        return self.implementation is None

    @property
    def content(self) -> str:
        """A hash of the kernel: of the files of its build, else of its code; empty for the reference.

        It is the same in all processes of one program.
        """
        if self.is_reference:
            return ""
        return self.loaded_content or content_of(self.kernel_layer or self.implementation)

    @property
    def can_be_traced(self) -> bool:
        """Whether the kernel declares `can_torch_compile`; always so for the reference."""
        return self.is_reference or bool(getattr(self.kernel_layer, "can_torch_compile", False))

    def declares(self, name: str) -> bool:
        """Return whether the kernel declares something to be so, such as `batch_invariant`."""
        return getattr(self.kernel_layer, name, None) is True

    @property
    def is_provisional(self) -> bool:
        """Whether the reference runs only until a kernel can be reached, which is tried in the background."""
        return self.is_reference and any(is_transient(refusal.error) for refusal in self.refusals)

    @property
    def plugin(self) -> str:
        """Name of the plugin that offered the kernel; empty for the reference."""
        return self.candidate.plugin if self.candidate else ""

    @property
    def reasons(self) -> list[str]:
        """A line for each candidate that does not serve."""
        misfits = self.misfits if self.is_reference else ()
        return [f"  refused {refusal}" for refusal in self.refusals] + [f"  not for this call: {m}" for m in misfits]

    def explain(self) -> str:
        """Return the whole decision as text, a line for each candidate."""
        first = f"{self.subject}: {self.origin}" + (f" ({self.note})" if self.note else "")
        return "\n".join([first, *self.reasons, *(f"  {check}: {result}" for check, result in self.checked.items())])

    __str__ = explain


def tiers_of(offers: Iterable[Candidate | Refusal | Exclusive]) -> tuple[Tier, ...]:
    """Return the tiers whose candidates may serve: an `Exclusive` leaves out those after its own."""
    last = len(TIERS)
    for offer in offers:
        if isinstance(offer, Exclusive):
            last = min(last, TIERS.index(offer.tier))
    return TIERS[: last + 1]


def rank_offers(
    answers: Iterable[Iterable[Candidate | Refusal | Exclusive]],
) -> tuple[list[Candidate], tuple[Refusal, ...], list[Refusal]]:
    """Sort the answers of all plugins to one request, without the offers that an `Exclusive` leaves out.

    Returns:
        Candidates, first to be tried first; inapplicable candidates; and plugins that failed to offer any.

    Example:
        >>> answers = [Candidate("theirs")], [Candidate("mine", tier="user"), Exclusive("user")]
        >>> [candidate.source for candidate in rank_offers(answers)[0]]
        ['mine']
    """
    offers = list(itertools.chain.from_iterable(answers))
    tiers = tiers_of(offers)
    candidates: list[Candidate] = []
    misfits: list[Refusal] = []
    failures: list[Refusal] = []
    for offer in offers:  # once, without generators: this is a part of the price of a first call
        if isinstance(offer, Candidate):
            if offer.tier in tiers:
                candidates.append(offer)
        elif isinstance(offer, Refusal):
            if offer.candidate is None:
                failures.append(offer)
            elif offer.candidate.tier in tiers:
                misfits.append(offer)
    # Stable: among the candidates of scopes, and of the user, the order is that in which they were written.
    candidates.sort(key=lambda c: (TIERS.index(c.tier), -c.priority, c.plugin if c.tier == "plugin" else ""))
    return candidates, tuple(misfits), failures
