"""Plugin `mapping`: which source serves a layer name, on which device, in which mode.

A mapping is `{layer name: {device: source | [sources in order] | {Mode: source}}}`. The tables of the
library transformers are mappings, too: a source may be `"owner/name:Layer"` or `("owner/name:Layer",
{"version": 2})`, and may stand without a dictionary of devices, for all of them. There are three places
to say a mapping: an open `use_kernel_mapping` scope, `register_kernel_mapping`, and the hook
`kernels_mapping` of a plugin package; they are asked in that order.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from kernels_core import (
    STAND_INS,
    ArgumentError,
    ArgumentTypeError,
    Candidate,
    Cause,
    Device,
    KernelLayer,
    KernelsError,
    LayerRequest,
    LoadedLayer,
    Mode,
    PluginError,
    Refusal,
    Scope,
    check_registered_mode,
    forget,
    hookimpl,
    plugin_manager,
    source_label,
)

KernelMapping = Mapping[str, Mapping[Any, Any]]
"""`{layer name: {device: source | [sources in order] | {Mode: source}}}`."""


@dataclass(frozen=True, eq=False)
class Level:
    """A parsed mapping: sources in order, per layer name, device and mode.

    Attributes:
        sources: What serves.
        inherit: Whether mappings said further out count, too.
    """

    sources: Mapping[str, Mapping[tuple[Device, Mode], tuple[object, ...]]]
    inherit: bool = True

    def find(self, request: LayerRequest) -> Iterator[object]:
        """Yield the sources that fit a request: narrowest device first, then the best mode."""
        stand_ins = STAND_INS[request.mode]
        fitting = [
            (_width(device), stand_ins.index(mode), sources)
            for (device, mode), sources in self.sources.get(request.layer_name, {}).items()
            if mode in stand_ins and device.matches(request.device, capability=request.capability)
        ]
        for _, _, sources in sorted(fitting, key=lambda entry: entry[:2]):
            yield from sources

    def misfits(self, request: LayerRequest) -> Iterator[tuple[object, Cause, str]]:
        """Yield the sources of this layer that do not fit a request, with the reason."""
        for (device, mode), sources in self.sources.get(request.layer_name, {}).items():
            if not Device(device.type).matches(request.device):
                cause, reason = Cause.DEVICE, f"it is mapped for {device.type}, and this call is on {request.device}"
            elif not device.matches(request.device, capability=request.capability):
                capability = "one that is not known here" if request.capability is None else request.capability
                reason = f"it is mapped for {device.properties}, and the capability of {request.device} is {capability}"
                cause = Cause.PROPERTIES
            elif mode not in STAND_INS[request.mode]:
                cause, reason = Cause.MODE, f"it is mapped for {mode}, and this call is {request.mode}"
            else:
                continue
            yield from ((source, cause, reason) for source in sources)

    def updated(self, other: Level) -> Level:
        """Return this level with the entries of `other` added; those for an equal layer and device are replaced."""
        merged = dict(self.sources)
        for name, entries in other.sources.items():
            said = {device for device, _ in entries}
            kept = {key: sources for key, sources in merged.get(name, {}).items() if key[0] not in said}
            merged[name] = {**kept, **entries}
        return Level(merged, other.inherit)


def _width(device: Device) -> float:
    return float("inf") if device.properties is None else device.properties.width


_registering = threading.Lock()
_registered = Level({})


def register_kernel_mapping(mapping: KernelMapping, inherit_mapping: bool = True) -> None:
    """Say which kernels serve which layers, for the whole process, from the next call on.

    Args:
        mapping: `{layer name: {device: source | [sources in order] | {Mode: source}}}`. A device is
            a name such as `"cuda"` or a `Device`; a source is a repository, an object with
            `load()`, an `nn.Module` class, or a function.
        inherit_mapping: Whether to add to what was registered before (an equal layer and device is
            replaced, with all its modes) and to the mappings of plugin packages, or to stand instead of them.

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
    level = parse_mapping(mapping, inherit=bool(inherit_mapping))
    with _registering:
        _registered = _registered.updated(level) if inherit_mapping else level
    forget()


class use_kernel_mapping(Scope):  # noqa: N801 - a context manager that reads like a statement
    """Say which kernels serve which layers inside a `with` block.

    Counts for the thread or asyncio task that enters it. The object can be entered again and again,
    and remembers what was resolved inside.

    Args:
        mapping: As for `register_kernel_mapping`.
        inherit_mapping: Whether mappings said outside of the block count, too, after this one.

    Raises:
        ArgumentError: As `register_kernel_mapping`, as does `ArgumentTypeError`.

    Example:
        >>> class FastIdentity(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> with use_kernel_mapping({"Identity": {"cpu": FastIdentity}}):
        ...     resolve("Identity", device="cpu", mode=Mode.INFERENCE).is_reference
        False
    """

    def __init__(self, mapping: KernelMapping, *, inherit_mapping: bool = True) -> None:
        """Check the mapping; nothing changes before the block is entered."""
        super().__init__(parse_mapping(mapping, inherit=bool(inherit_mapping)))


# --- Parsing -------------------------------------------------------------------------------------


def parse_mapping(mapping: KernelMapping, *, inherit: bool = True) -> Level:
    """Check a mapping and bring it into one form.

    Raises:
        ArgumentError: For an unknown device or an impossible mode.
        ArgumentTypeError: For anything of the wrong type.
    """
    _expect_mapping(mapping, "A kernel mapping", "{layer name: {device: source}}")
    sources: dict[str, dict[tuple[Device, Mode], tuple[object, ...]]] = {}
    for name, devices in mapping.items():
        if not isinstance(name, str):
            raise ArgumentTypeError(f"A layer name in a mapping is a string, not {name!r}.")
        if _is_named(devices):
            devices = dict.fromkeys(_EVERYWHERE, devices)
        _expect_mapping(devices, f"The mapping of layer {name!r}", "{device: source}")
        sources[name] = {
            (device, mode): chosen
            for key, value in devices.items()
            for device in [key if isinstance(key, Device) else _device(key, name)]
            for mode, chosen in _modes(value, f"layer {name!r}, device {device.type!r}")
        }
    return Level(sources, inherit)


@functools.cache
def _known_device(name: str) -> Device:
    return Device(name)


def _device(name: object, layer_name: str) -> Device:
    where = f"In the mapping of layer {layer_name!r}"
    if isinstance(name, Mode):
        raise ArgumentTypeError(f"{where}: {name} stands where a device should: write {{device: {{mode: source}}}}.")
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{where}: a device is a name such as 'cuda', or a Device, not {name!r}.")
    try:
        return _known_device(name)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from None


def _modes(value: object, where: str) -> Iterator[tuple[Mode, tuple[object, ...]]]:
    if not isinstance(value, Mapping):
        yield Mode.FALLBACK, _sources(value, where)
        return
    for mode, chosen in value.items():
        if not isinstance(mode, Mode):
            raise ArgumentTypeError(f"In the mapping of {where}: {mode!r} is not a Mode such as Mode.TRAINING.")
        yield check_registered_mode(mode), _sources(chosen, where)


def _sources(value: object, where: str) -> tuple[object, ...]:
    several = isinstance(value, list | tuple) and not _is_named(value)
    sources = tuple(_unnamed(source, where) for source in (cast("Sequence[object]", value) if several else (value,)))
    for source in sources:
        problem = _source_problem(source)
        if problem:
            raise ArgumentTypeError(
                f"In the mapping of {where}: {source!r} {problem}. A source is a repository such as "
                "LayerRepository('owner/name', layer_name='Name', version=1), an object with load(), "
                "an nn.Module class, or a function."
            )
    return sources


_EVERYWHERE = ("cpu", "cuda", "mps", "neuron", "npu", "rocm", "tpu", "xpu")
"""The devices that a layer's only repository is for."""

_OPTIONS = {"version", "revision", "trust_remote_code"}
_DEFAULT_VERSION = 1
"""The version of a repository that is named without one, as transformers has it."""


def _is_named(value: object) -> bool:
    """Whether a source is written as in the tables of transformers: `"owner/name:Layer"`, or that and options."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        return isinstance(value[0], str)
    return isinstance(value, str)


def _unnamed(source: object, where: str) -> object:
    """Turn `"owner/name:Layer"` or `"/path/to/kernel:Layer"` into a repository; leave everything else."""
    if not _is_named(source):
        return source
    text, options = cast("tuple[str, Mapping[str, Any]]", source if isinstance(source, tuple) else (source, {}))
    place, colon, layer_name = text.rpartition(":")
    if not (colon and layer_name and "/" in place.replace("\\", "/")):
        raise ArgumentError(
            f"In the mapping of {where}: {text!r} names no layer of a repository: write 'owner/name:Layer', or "
            "'/path/to/kernel:Layer' for a folder."
        )
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise ArgumentError(
            f"In the mapping of {where}: {text!r} has unknown options {', '.join(map(repr, unknown))}: there are "
            f"{', '.join(sorted(_OPTIONS))}."
        )
    from .hub.source import LayerRepository, LocalLayerRepository

    if place.startswith(("/", ".", "~")) or place.count("/") != 1 or "\\" in place:
        return LocalLayerRepository(Path(place).expanduser(), layer_name=layer_name)
    chosen = {name: value for name, value in options.items() if value is not None}
    if not chosen.keys() & {"version", "revision"}:
        chosen["version"] = _DEFAULT_VERSION
    return LayerRepository(place, layer_name=layer_name, **chosen)


def as_source(source: object, where: str) -> object:
    """Check one source, and turn one that is written as text into a repository.

    Raises:
        ArgumentError: If a text names no layer of a repository.
        ArgumentTypeError: If no kernel can come from it.
    """
    found = _sources([source], where)
    return found[0]


def _source_problem(source: object) -> str | None:
    if isinstance(source, type):
        return None if issubclass(source, torch.nn.Module) else "is a class, but not of nn.Module"
    if isinstance(source, torch.nn.Module):
        return "is a module, where its class is wanted"
    if isinstance(source, bytes):
        return "is bytes"
    loads = callable(getattr(source, "load", None))
    return None if loads or callable(source) else "cannot serve a layer"


def _expect_mapping(value: object, what: str, form: str) -> None:
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(f"{what} has the form {form}, not {value!r}.")


# --- Hooks ---------------------------------------------------------------------------------------


_offered: tuple[object, list[tuple[str, int, Level]]] = (None, [])


def _offered_levels() -> list[tuple[str, int, Level]]:
    """Return the parsed mappings of plugin packages, best first; parsed once per set of plugins."""
    global _offered
    manager = plugin_manager()
    manager.plugins()  # discovery may still change the generation
    key = (manager, manager.generation)
    if _offered[0] != key:
        levels = []
        for offer in manager.mappings():
            try:
                levels.append((offer.plugin, offer.priority, parse_mapping(offer.mapping)))
            except KernelsError as error:
                fault = PluginError(f"Plugin {offer.plugin!r} offers a bad mapping: {error}", plugin=offer.plugin)
                fault.__cause__ = error
                manager.report(fault)
        _offered = (key, levels)
    return _offered[1]


@hookimpl(wrapper=True, trylast=True)  # other wrappers see what is offered here, too
def kernels_find_candidates(request: LayerRequest) -> Generator[None, Any, Any]:
    """Offer what open scopes say, then what the user registered, then what plugin packages bring.

    Around the offers of all other plugins: where a mapping does not inherit, those said further out do not count.
    """
    answers: list[Sequence[Candidate | Refusal]] = yield
    further_out = _further_out(request)
    kept = [[offer for offer in answer if _tier(offer) not in further_out] for answer in answers]
    found: list[Candidate | Refusal] = []
    for level, like in _levels(request):
        like = replace(like, plugin=like.plugin or "mapping")
        offered = list(level.find(request))
        found += [replace(like, source=source) for source in offered]
        found += [
            Refusal(reason, replace(like, source=source), like.plugin, cause=cause)
            for source, cause, reason in level.misfits(request)
            if source not in offered  # one that is mapped for several devices
        ]
    return [found, *kept]


def _further_out(request: LayerRequest) -> tuple[str, ...]:
    """Return the tiers that do not count because a mapping further in does not inherit."""
    if any(isinstance(level, Level) and not level.inherit for level in request.scopes):
        return ("user", "plugin")
    return () if _registered.inherit else ("plugin",)


def _tier(offer: Candidate | Refusal) -> str:
    """Return the tier of an offer; a plugin that failed to make one has none."""
    candidate = offer.candidate if isinstance(offer, Refusal) else offer
    return candidate.tier if candidate is not None else ""


def _levels(request: LayerRequest) -> Iterator[tuple[Level, Candidate]]:
    """Yield the mappings that count, innermost first, each with what its candidates look like."""
    for level in request.scopes:
        if isinstance(level, Level):
            yield level, Candidate(None, tier="scope")
            if not level.inherit:
                return
    yield _registered, Candidate(None, tier="user")
    if _registered.inherit:
        for plugin, priority, level in _offered_levels():
            yield level, Candidate(None, plugin, "plugin", priority)


@hookimpl
def kernels_load_layer(request: LayerRequest, source: object) -> KernelLayer | LoadedLayer | None:
    """Take classes and functions as they are, and ask any other object to load itself."""
    if isinstance(source, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return source
    load = getattr(source, "load", None)
    if callable(load):
        loaded = load()
        return loaded if isinstance(loaded, LoadedLayer) else LoadedLayer(loaded, source_label(source))
    return source if callable(source) else None
