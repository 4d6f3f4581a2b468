"""Plugin `mapping`: which source serves a layer name, on which device, in which mode.

A mapping is `{layer name: {device: source | [sources in order] | {Mode: source}}}`. The tables of the
library transformers are mappings, too: a source may be `"owner/name:Layer"` or `("owner/name:Layer",
{"version": 2})`, and may stand without a dictionary of devices, for all of them. There are four places
for a mapping: an open `use_kernel_mapping` scope, `register_kernel_mapping`, the configuration file, and the
hook `kernels_mapping` of a plugin package; they are asked in that order.
"""

from __future__ import annotations

import functools
import os
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import torch

from kernels_core import (
    STAND_INS,
    ArgumentError,
    ArgumentTypeError,
    Candidate,
    Cause,
    ConfigSection,
    Device,
    Exclusive,
    KernelLayer,
    KernelsError,
    LayerRequest,
    LoadedLayer,
    Mode,
    PluginError,
    PluginManager,
    PluginMapping,
    Refusal,
    Scope,
    check_registered_mode,
    configured,
    forget,
    hookimpl,
    plugin_manager,
    require_type,
    set_module,
    source_label,
)


class _Loads(Protocol):
    """A source that loads itself."""

    def load(self) -> Any: ...


class _Dataclass(Protocol):
    """A source of a plugin with `kernels_load_layer`: a value."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


_Text = str | tuple[str, Mapping[str, Any]]
_Source = type[torch.nn.Module] | Callable[..., Any] | _Loads | _Dataclass | os.PathLike[str] | _Text
_Sources = _Source | Sequence[_Source]
_DeviceName = Literal["cpu", "cuda", "metal", "mps", "neuron", "npu", "rocm", "tpu", "xpu"]
KernelMapping = Mapping[str, Mapping[_DeviceName | Device, _Sources | Mapping[Mode, _Sources]] | _Text]
"""`{layer name: {device: source | [sources in order] | {Mode: source}}}`: annotate a variable that holds a mapping."""


@dataclass(frozen=True, eq=False)
class Level:
    """A parsed mapping: sources in order, per layer name, device and mode; those further out apply if it inherits."""

    sources: Mapping[str, Mapping[tuple[Device, Mode], tuple[object, ...]]]
    inherit: bool = True
    same: frozenset[str] = frozenset()
    """The layers that have one kernel for all modes."""

    def offers(self, request: LayerRequest, like: Candidate) -> list[Candidate | Refusal]:
        """Return candidates like `like`, those for the narrowest device first, then by mode; after them, refusals."""
        if request.layer_name not in self.sources:
            if not self.sources:
                return []
            from .layer_names import misspelt_for  # only where a mapping does not name the layer

            return misspelt_for(request, like, self.sources)
        like = replace(like, same_for_all_modes=request.layer_name in self.same)
        fitting: list[tuple[float, int, tuple[object, ...]]] = []
        unfit: list[tuple[tuple[object, ...], Cause, str]] = []
        for (device, mode), sources in self.sources[request.layer_name].items():
            if not device.matches(request.device, capability=request.capability):
                unfit.append((sources, *_why_not(device, request)))  # as refusals: a user asks why it does not serve
                continue
            serving = [mode in STAND_INS[served] for served in request.modes]
            if any(serving) != all(serving):  # reading `mode` tells the core that the answer depends on it
                serving = [mode in STAND_INS[request.mode]]
            if all(serving):
                width = float("inf") if device.properties is None else device.properties.width
                fitting.append((width, STAND_INS[request.modes[0]].index(mode), sources))
            else:
                asked = " or ".join(map(str, request.modes))
                unfit.append((sources, Cause.MODE, f"it is mapped for {mode}, and this call is {asked}"))
        fitting.sort(key=lambda entry: entry[:2])  # stable: of equal ones, the first in the mapping goes first
        offered = [source for _, _, sources in fitting for source in sources]
        refused = [
            Refusal(reason, replace(like, source=source), like.plugin, cause=cause)
            for sources, cause, reason in unfit
            for source in sources
            if source not in offered  # one that is mapped for several devices
        ]
        return [*(replace(like, source=source) for source in offered), *refused]

    def updated(self, other: Level) -> Level:
        """Return this level with the entries of `other` added; those for an equal layer and device are replaced."""
        merged = dict(self.sources)
        for name, entries in other.sources.items():
            replaced = {device for device, _ in entries}
            kept = {key: sources for key, sources in merged.get(name, {}).items() if key[0] not in replaced}
            merged[name] = {**kept, **entries}
        return Level(merged, other.inherit, self.same.difference(other.sources) | other.same)


def _why_not(device: Device, request: LayerRequest) -> tuple[Cause, str]:
    """Return why a source that is mapped for a device does not serve a call on another."""
    if not Device(device.type).matches(request.device):
        return Cause.DEVICE, f"it is mapped for {device.type}, and this call is on {request.device}"
    capability = "one that is not known here" if request.capability is None else request.capability
    where = f"the capability of {request.device} is {capability}"
    return Cause.PROPERTIES, f"it is mapped for {device.properties}, and {where}"


_registering = threading.Lock()
_registered = Level({})


def register_kernel_mapping(
    mapping: KernelMapping, inherit_mapping: bool = True, *, same_for_all_modes: bool = False
) -> None:
    """Register which kernels serve which layers, for the whole process, from the next call on.

    Args:
        mapping: `{layer name: {device: source | [sources in order] | {Mode: source}}}`. A device is
            a name such as `"cuda"` or a `Device`; a source is a repository, an object with
            `load()`, an `nn.Module` class, a function, `Reference` or `"reference"`, or `"pack:NAME"`.
        inherit_mapping: Whether to add to the mappings registered before (an equal layer and device is
            replaced, with all its modes) and to those of plugin packages, or to replace them.
        same_for_all_modes: Whether the kernel that serves training serves inference, too, for the layers of this
            mapping: for models whose numbers in inference are compared with those in training, such as the
            log-probabilities of a policy. A kernel that cannot train then serves neither.

    Raises:
        ArgumentError: For an unknown device or an impossible mode (a `ValueError`).
        ArgumentTypeError: For anything of the wrong type. Nothing is registered then.

    Example:
        >>> class FastIdentity(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> register_kernel_mapping({"Identity": {"cpu": FastIdentity}})
    """
    global _registered
    level = parse_mapping(mapping, inherit=inherit_mapping, same=same_for_all_modes)
    with _registering:
        _registered = _registered.updated(level) if inherit_mapping else level  # a new value, so readers need no lock
    forget()


class use_kernel_mapping(Scope):  # noqa: N801 - a context manager that reads like a statement
    """Choose which kernels serve which layers inside a `with` block.

    Applies to the thread or asyncio task that enters it. The object can be entered again and again,
    and keeps the decisions made inside. Arguments and errors are those of `register_kernel_mapping`.

    Args:
        inherit_mapping: Whether mappings from outside of the block apply, too, after this one.

    Example:
        >>> class FastIdentity(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> with use_kernel_mapping({"Identity": {"cpu": FastIdentity}}):
        ...     resolve("Identity", device="cpu", mode=Mode.INFERENCE).is_reference
        False
    """

    def __init__(
        self, mapping: KernelMapping, *, inherit_mapping: bool = True, same_for_all_modes: bool = False
    ) -> None:
        """Check the mapping; nothing changes before the block is entered."""
        super().__init__(parse_mapping(mapping, inherit=inherit_mapping, same=same_for_all_modes))


# --- Parsing -------------------------------------------------------------------------------------


def parse_mapping(
    mapping: Mapping[str, Any], *, inherit: bool = True, same: bool = False, folder: Path = Path()
) -> Level:
    """Check a mapping and bring it into one form; paths in texts are relative to `folder`."""
    _expect_mapping(mapping, "A kernel mapping", "{layer name: {device: source}}")
    require_type(inherit, bool, "inherit_mapping")
    require_type(same, bool, "same_for_all_modes")
    sources: dict[str, dict[tuple[Device, Mode], tuple[object, ...]]] = {}
    for name, devices in mapping.items():
        if not isinstance(name, str):
            raise ArgumentTypeError(f"A layer name in a mapping is a string, not {name!r}.")
        if "*" in name or "?" in name:
            from .layer_names import check_layer_name  # only for a name that is wrong

            check_layer_name(name)
        if _as_text(devices):
            devices = dict.fromkeys(_EVERYWHERE, devices)
        _expect_mapping(devices, f"The mapping of layer {name!r}", "{device: source}")
        sources[name] = {
            (device, mode): chosen
            for key, value in devices.items()
            for device in [key if isinstance(key, Device) else _device(key, name)]
            for mode, chosen in _modes(value, f"layer {name!r}, device {device.type!r}", name, folder)
        }
    return Level(sources, inherit, frozenset(sources) if same else frozenset())


def _device(name: object, layer_name: str) -> Device:
    where = f"In the mapping of layer {layer_name!r}"
    if isinstance(name, Mode):
        raise ArgumentTypeError(f"{where}: {name} stands where a device should: write {{device: {{mode: source}}}}.")
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{where}: a device is a name such as 'cuda', or a Device, not {name!r}.")
    try:
        return Device.parse(name)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from None  # it says all that the first one said


def _modes(value: object, where: str, layer_name: str, folder: Path) -> Iterator[tuple[Mode, tuple[object, ...]]]:
    if not isinstance(value, Mapping):
        yield Mode.FALLBACK, _sources(value, where, layer_name, folder)
        return
    for mode, chosen in value.items():
        if not isinstance(mode, Mode):
            raise ArgumentTypeError(f"In the mapping of {where}: {mode!r} is not a Mode such as Mode.TRAINING.")
        yield check_registered_mode(mode), _sources(chosen, where, layer_name, folder)


def _sources(value: object, where: str, layer_name: str, folder: Path) -> tuple[object, ...]:
    several = isinstance(value, list | tuple) and not _as_text(value)
    sources = cast("Sequence[object]", value) if several else (value,)
    return tuple(as_source(source, where, layer_name, folder) for source in sources)


_EVERYWHERE = ("cpu", "cuda", "mps", "neuron", "npu", "rocm", "tpu", "xpu")
"""The devices that a layer's only repository is for."""


def _as_text(value: object) -> tuple[str, Mapping[str, Any]] | None:
    """Return text and options of a source written as text, `"owner/name:Layer"`; None for any other."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], Mapping):
        return value[0], value[1]
    return (value, {}) if isinstance(value, str) else None


def as_source(source: object, where: str, layer_name: str = "", folder: Path = Path()) -> object:
    """Check one source of a layer, and turn one that is written as text into the object that it names."""
    if text := _as_text(source):
        from .sources import parse_text  # only for mappings with texts

        return parse_text(*text, where, layer_name, folder)
    problem = ""
    if isinstance(source, type):
        problem = "" if issubclass(source, torch.nn.Module) else "is a class, but not of nn.Module"
    elif isinstance(source, torch.nn.Module):
        problem = "is a module, where its class is wanted"
    elif not callable(source) and type(source).__module__ == "builtins":  # None, a number, bytes, a set
        problem = "cannot serve a layer"
    if problem:
        raise ArgumentTypeError(
            f"In the mapping of {where}: {source!r} {problem}. A source is a repository such as "
            "LayerRepository('owner/name', layer_name='Name', version=1), an object with load() or one that a plugin "
            "loads, an nn.Module class, a function, Reference, or a text such as 'pack:torch'."
        )
    return source


def parse_settings(section: ConfigSection) -> Level:
    """Parse the mapping in a configuration file: each source by itself, so that an error has its line."""
    from .layer_names import check_layer_name
    from .sources import read_entries

    sources: dict[str, dict[tuple[Device, Mode], tuple[object, ...]]] = {}
    for name, layer in section.as_table().items():
        with layer.blamed():
            check_layer_name(name)
        sources[name] = {}
    for name, leaf, forms in read_entries(section):
        found: dict[tuple[Device, Mode], tuple[object, ...]] = {}
        for item, form in forms:
            with item.blamed():
                level = parse_mapping({name: form}, folder=section.path.parent)
            for key, source in level.sources[name].items():
                found[key] = found.get(key, ()) + source
        if not found:
            raise leaf.error('it names no source: write at least one, such as "reference".')
        if found.keys() & sources[name].keys():
            raise leaf.error("an entry above is for the same device and mode: keep one.")
        sources[name].update(found)
    return Level(sources)


def _expect_mapping(value: object, subject: str, form: str) -> None:
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(f"{subject} has the form {form}, not {value!r}.")


# --- Hooks ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _packaged(manager: PluginManager, generation: int) -> list[tuple[str, int, Level]]:
    """Return the parsed mappings of plugin packages, best first; `generation` makes it anew for other plugins."""
    levels = []
    offers: list[PluginMapping] = manager.hook.kernels_mapping()
    for offer in sorted(offers, key=lambda offer: (-offer.priority, offer.plugin)):
        try:
            levels.append((offer.plugin, offer.priority, parse_mapping(offer.mapping)))
        except KernelsError as error:
            fault = PluginError(f"Plugin {offer.plugin!r} offers a bad mapping: {error}", plugin=offer.plugin)
            fault.__cause__ = error  # not raised here: outside of strict mode, a report is a warning
            manager.report(fault)
    return levels


@hookimpl(tryfirst=True)  # of one tier, sources of mappings go before the offers of other plugins
def kernels_find_candidates(request: LayerRequest) -> list[Candidate | Refusal | Exclusive]:
    """Offer the sources of open scopes, innermost first, then the registered ones, then those of plugin packages.

    Those of the configuration file come after those that were registered.

    A mapping that does not inherit leaves out those after it, and by an `Exclusive` also what other plugins offer.
    """
    offers: list[Candidate | Refusal | Exclusive] = []
    for level in request.scopes:
        if isinstance(level, Level):
            offers += level.offers(request, Candidate(None, "mapping", "scope"))
            if not level.inherit:
                return [*offers, Exclusive("scope")]
    offers += _registered.offers(request, Candidate(None, "mapping", "user"))
    if not _registered.inherit:
        return [*offers, Exclusive("user")]
    for key in ("mapping", "packs"):  # of the configuration file: code goes before it, and packages after it
        if (level := configured(key)) is not None:
            offers += level.offers(request, Candidate(None, "mapping", "user"))
    manager = plugin_manager()
    for plugin, priority, level in _packaged(manager, manager.generation):
        offers += level.offers(request, Candidate(None, plugin, "plugin", priority))
    return offers


@hookimpl
def kernels_configuration() -> Mapping[str, Callable[[ConfigSection], object]]:
    """Own `mapping` in the configuration file."""
    return {"mapping": parse_settings}


@hookimpl
def kernels_settings_in_code() -> Mapping[str, str]:
    """Show the layers of `register_kernel_mapping`."""
    return {"mapping": ", ".join(sorted(_registered.sources))} if _registered.sources else {}


@hookimpl
def kernels_load_layer(request: LayerRequest, source: object) -> KernelLayer | LoadedLayer | None:
    """Take classes and functions as they are, and ask packs and any other object to load themselves."""
    if isinstance(source, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return source
    load_on = getattr(source, "load_on", None)  # of a pack, whose kernels differ by device
    if callable(load_on):
        return cast("KernelLayer | LoadedLayer", load_on(request.device))
    load = getattr(source, "load", None)
    if callable(load):
        loaded = load()
        return loaded if isinstance(loaded, LoadedLayer) else LoadedLayer(loaded, source_label(source))
    return source if callable(source) else None


set_module("kernels_plugins", globals())
