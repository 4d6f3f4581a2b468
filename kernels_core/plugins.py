"""Finds plugins through entry points, refuses bad ones by name, and calls hooks in isolation."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .environment import plugin_choice, strict
from .errors import ArgumentError, KernelsWarning, LoadError, PluginConflictError, PluginError, PluginLoadError
from .hookspecs import PROJECT
from .resolution import TIERS, Candidate, Exclusive, Refusal, Resolution

if TYPE_CHECKING:
    import importlib_metadata

ENTRY_POINT_GROUP = "kernels_core"
PATIENCE = 60.0
"""Seconds to wait for another thread that looks for plugins."""

FAULTS = (Exception, SystemExit)
"""What a plugin may raise without harm to others; an interrupt goes on."""

_VETO = ("kernels_authorize", "kernels_check_layer")
_MAPPING = "mapping"
"""The plugin that asks for `kernels_mapping`."""

_HOOKS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(spec).parameters)
    for name, spec in vars(hookspecs).items()
    if name.startswith("kernels_")
}


@dataclass(frozen=True)
class PluginMapping:
    """A mapping that a plugin package offers, with its rank."""

    plugin: str
    priority: int
    mapping: Mapping[str, Mapping[Any, Any]]


class PluginManager:
    """The plugins of this process, with one typed method per hook.

    Entry points of the group `kernels_core` are scanned once, when a hook is first needed.

    Attributes:
        faults: What plugins did wrong so far, each told once.
        generation: Counts registrations, for plugins that remember what others offer.
        on_change: Called after a plugin was registered or unregistered.
    """

    def __init__(self, *, discover: bool = True) -> None:
        """Start without plugins; `discover=False` never looks at entry points."""
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._originals: dict[str, object] = {}
        self._discovered = not discover
        self._scanning = False
        self._discovering = threading.RLock()
        self._reported: set[str] = set()
        self.on_change: list[Callable[[], None]] = []
        self.faults: list[PluginError] = []
        self.generation = 0

    # --- Registration ------------------------------------------------------------------------

    def register(self, plugin: object, name: str | None = None, *, isolated: bool = True) -> str:
        """Add a plugin: a module, an object, or a class that takes no arguments.

        Args:
            plugin: Has functions marked with `hookimpl`.
            name: Defaults to the name of the module, class or object.
            isolated: Whether the core reports exceptions of its hooks, and wrong answers, and goes on.

        Returns:
            The name.

        Raises:
            PluginLoadError: If it has no hooks, or one with a wrong name or wrong arguments.
            PluginConflictError: If a plugin of that name is registered.
        """
        if isinstance(plugin, type):
            plugin = plugin()
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        if name in self._originals:
            raise PluginConflictError(
                f"A plugin named {name!r} is registered already: unregister it, or choose another name.",
                plugin=name,
            )
        hooks = _checked_hooks(plugin, name)
        if isolated:
            hooks = {hook: self._guard(hook, name, plugin, function) for hook, function in hooks.items()}
        self._pluggy.register(types.SimpleNamespace(**hooks), name)
        self._originals[name] = plugin
        self._changed()
        return name

    def unregister(self, name: str) -> object:
        """Remove the plugin of that name and return it.

        Raises:
            ArgumentError: If there is none.
        """
        if name not in self._originals:
            raise ArgumentError(f"No plugin {name!r}: there are {', '.join(self.plugins()) or 'none'}.")
        self._pluggy.unregister(name=name)
        plugin = self._originals.pop(name)
        self._changed()
        return plugin

    def plugins(self) -> dict[str, object]:
        """Return the plugins by name, in the order of their names."""
        self._discover()
        return dict(sorted(self._originals.items()))

    def _changed(self) -> None:
        self.generation += 1
        for listener in self.on_change:
            listener()

    # --- Discovery ---------------------------------------------------------------------------

    def _discover(self) -> None:
        if self._discovered:
            return
        if not self._discovering.acquire(timeout=PATIENCE):
            return  # the thread that scans may wait for an import that this one is in: go on with what is there
        try:
            if self._discovered or self._scanning:  # scanning: a plugin dispatches while it is imported
                return
            self._scanning = True
            try:
                self._scan()
                self._discovered = True  # other threads wait until now
            finally:
                self._scanning = False
        finally:
            self._discovering.release()

    def _scan(self) -> None:
        """Load what entry points offer and `KERNELS_PLUGINS` allows."""
        allowed, blocked = plugin_choice()
        found = self._unique(_entry_points())
        for unknown in sorted(((allowed or frozenset()) | blocked) - found.keys()):
            self.report(
                PluginLoadError(
                    f"KERNELS_PLUGINS names {unknown!r}, which no installed distribution offers: "
                    f"there are {', '.join(sorted(found)) or 'none'}.",
                    plugin=unknown,
                )
            )
        for name, entry_point in sorted(found.items()):
            if name not in self._originals and name not in blocked and (allowed is None or name in allowed):
                self._load(name, entry_point)
        if allowed is not None and _MAPPING in found.keys() - self._originals.keys() - blocked:
            self.report(
                PluginLoadError(
                    f"KERNELS_PLUGINS leaves out the plugin {_MAPPING!r}, without which no mapping counts: neither "
                    "those of plugin packages, nor those of register_kernel_mapping and use_kernel_mapping. Name it, "
                    f"too, or say -{_MAPPING} if that is what you want.",
                    plugin=_MAPPING,
                )
            )

    def _unique(
        self, entry_points: Iterable[importlib_metadata.EntryPoint]
    ) -> dict[str, importlib_metadata.EntryPoint]:
        """Keep one entry point per name: of two distributions, the first by name, and say so."""
        by_name: dict[str, dict[str, importlib_metadata.EntryPoint]] = {}
        for entry_point in entry_points:
            offers = by_name.setdefault(entry_point.name, {})
            offers.setdefault(_distribution(entry_point), entry_point)  # a second copy on the path is shadowed
        for name, offers in by_name.items():
            if len(offers) > 1:
                used, *lost = sorted(offers)
                self.report(
                    PluginConflictError(
                        f"Distributions {', '.join(sorted(offers))} all offer a plugin named {name!r}: that of "
                        f"{used!r} is used, and those of {', '.join(lost)} are not. Uninstall all but one.",
                        plugin=name,
                    )
                )
        return {name: offers[min(offers)] for name, offers in by_name.items()}

    def _load(self, name: str, entry_point: importlib_metadata.EntryPoint) -> None:
        try:
            self.register(entry_point.load(), name)
        except PluginError as error:
            self.report(error)
        except FAULTS as error:
            fault = PluginLoadError(
                f"Plugin {name!r} of distribution {_distribution(entry_point)!r} cannot be imported from "
                f"{entry_point.value!r}: {type(error).__name__}: {error}. Mend or uninstall it, or block it "
                f"with KERNELS_PLUGINS=-{name}.",
                plugin=name,
            )
            fault.__cause__ = error
            self.report(fault)

    # --- Isolation ---------------------------------------------------------------------------

    def report(self, fault: PluginError) -> None:
        """Say once what a plugin did wrong; in strict mode, raise it."""
        if strict():
            raise fault
        told = re.sub(r" at 0x[0-9a-fA-F]+", "", str(fault))  # an address would make each time a new story
        if told not in self._reported:
            warnings.warn(str(fault), KernelsWarning, stacklevel=2)
            self._reported.add(told)
            self.faults.append(fault)

    def report_raised(self, hook: str, name: str, error: BaseException) -> None:
        """Report that a hook of a plugin raised."""
        self.report(self._raised(hook, name, error))

    def _raised(self, hook: str, name: str, error: BaseException) -> PluginError:
        told = f"{type(error).__name__}: {error}".rstrip(".: ")
        fault = PluginError(f"Plugin {name!r} raised in {hook}: {told}.", plugin=name)
        fault.__cause__ = error
        return fault

    def _guard(self, hook: str, name: str, plugin: object, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap one hook implementation so that its exceptions are reported in its name."""
        if getattr(function, f"{PROJECT}_impl").get("wrapper"):
            return self._guard_wrapper(hook, name, function)
        priority = getattr(plugin, "kernels_priority", 0)

        @wraps(function)
        def guarded(*args: Any) -> Any:
            try:
                return _attributed(hook, name, priority, function(*args))
            except PluginError as fault:
                error, reason = fault, str(fault)
            except FAULTS as raised:
                if hook == "kernels_load_layer":  # a loader says why it cannot load by raising
                    _blame(raised, name)
                    if isinstance(raised, SystemExit):
                        raise LoadError(f"it would end the process: SystemExit: {raised}") from raised
                    raise
                error = self._raised(hook, name, raised)
                reason = str(error)
            if hook in _VETO:
                return reason
            self.report(error)
            return [Refusal(reason, plugin=name, error=error)] if hook == "kernels_find_candidates" else None

        return guarded

    def _guard_wrapper(self, hook: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a wrapper: where it raises by itself, the wrapped answer stands."""

        def failed(raised: BaseException, answer: Any) -> Any:
            fault = raised if isinstance(raised, PluginError) else self._raised(hook, name, raised)
            if hook in _VETO:  # a policy that fails stops
                return [*answer, str(fault)]
            self.report(fault)
            return answer

        @wraps(function)
        def guarded(*args: Any) -> Any:
            generator = function(*args)
            try:
                next(generator)
            except FAULTS as raised:
                return failed(raised, (yield))
            inner: BaseException | None = None
            answer: Any = None
            try:
                answer = yield
            except BaseException as raised:
                inner = raised
            try:
                if inner is None:
                    generator.send(answer)
                    raise RuntimeError("a wrapper yields once, this one did twice")
                else:
                    generator.throw(inner)
            except StopIteration as stop:
                fault = _wrapped_fault(hook, name, stop.value)
                return stop.value if fault is None else failed(fault, answer)
            except BaseException as raised:
                if raised is inner or not isinstance(raised, FAULTS):
                    raise
                if inner is None:
                    return failed(raised, answer)
                self.report(self._raised(hook, name, raised))
            if inner is not None:
                raise inner
            return answer

        return guarded

    # --- One method per hook -----------------------------------------------------------------

    @property
    def hook(self) -> Any:
        """The hooks, to be called with keywords: `plugin_manager().hook.kernels_resolved(resolution=resolution)`."""
        if not self._discovered:
            self._discover()
        return self._pluggy.hook

    def wrap_forward(self, resolution: Resolution, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Let plugins put something around the calls of a forward."""
        for name, wrap in self.hook.kernels_wrap_forward(resolution=resolution):
            try:
                wrapped = wrap(forward)
            except FAULTS as error:
                self.report(self._raised("what kernels_wrap_forward returned", name, error))
                continue
            if callable(wrapped):
                forward = wrapped
            else:
                told = f"Plugin {name!r}: what its kernels_wrap_forward returned made {wrapped!r}, not a function."
                self.report(PluginError(told, plugin=name))
        return forward

    def mappings(self) -> list[PluginMapping]:
        """Collect the mappings of plugin packages, best first."""
        answers: list[PluginMapping] = self.hook.kernels_mapping()
        return sorted(answers, key=lambda offer: (-offer.priority, offer.plugin))


_manager = PluginManager()


def plugin_manager() -> PluginManager:
    """Return the plugin manager of this process.

    Example:
        >>> "mapping" in plugin_manager().plugins()
        True
    """
    return _manager


def _entry_points() -> Iterable[importlib_metadata.EntryPoint]:
    import importlib_metadata  # reads the environment: only when plugins are first needed

    return importlib_metadata.entry_points(group=ENTRY_POINT_GROUP)


def _distribution(entry_point: importlib_metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else "unknown"


def _checked_hooks(plugin: object, name: str) -> dict[str, Callable[..., Any]]:
    """Return the hook implementations of a plugin; raise where one would silently never be called."""
    hooks: dict[str, Callable[..., Any]] = {}
    for attribute in dir(plugin):
        function = getattr(plugin, attribute, None)
        marked = isinstance(getattr(function, f"{PROJECT}_impl", None), dict)
        if marked and attribute not in _HOOKS:
            close = difflib.get_close_matches(attribute, _HOOKS, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_HOOKS)}."
            raise PluginLoadError(f"Plugin {name!r} implements an unknown hook {attribute}: {hint}", plugin=name)
        if attribute in _HOOKS and not marked:
            raise PluginLoadError(
                f"Plugin {name!r} has a function {attribute} that is not marked: put @hookimpl on it.",
                plugin=name,
            )
        if marked and callable(function):
            options = getattr(function, f"{PROJECT}_impl")
            if options.get("hookwrapper"):
                raise PluginLoadError(
                    f"Plugin {name!r}: {attribute} is an old hookwrapper: use wrapper=True.", plugin=name
                )
            if options.get("wrapper") and not inspect.isgeneratorfunction(function):
                raise PluginLoadError(f"Plugin {name!r}: {attribute} is a wrapper without a yield.", plugin=name)
            _check_arguments(attribute, function, name)
            hooks[attribute] = function
    if not hooks:
        raise PluginLoadError(
            f"Plugin {name!r} ({plugin!r}) implements no hook: mark at least one function with @hookimpl.",
            plugin=name,
        )
    priority = getattr(plugin, "kernels_priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise PluginLoadError(f"Plugin {name!r}: kernels_priority is {priority!r}, not an integer.", plugin=name)
    return hooks


def _check_arguments(hook: str, function: Callable[..., Any], name: str) -> None:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in _HOOKS[hook]:
            problem = "which the hook does not have"
        elif parameter.default is not parameter.empty:
            problem = "with a default, which pluggy would never fill"
        else:
            continue
        raise PluginLoadError(
            f"Plugin {name!r}: {hook}{inspect.signature(function)} takes {parameter.name!r}, {problem}. "
            f"It may take any of ({', '.join(_HOOKS[hook])}).",
            plugin=name,
        )


def _attributed(hook: str, name: str, priority: int, answer: Any) -> Any:
    """Check the type of an answer and put the plugin's name on it."""
    if answer is None:
        return None
    if hook == "kernels_mapping":
        return PluginMapping(name, priority, _checked_answer(hook, name, answer))
    if hook == "kernels_wrap_forward":
        return name, _checked_answer(hook, name, answer)
    if hook == "kernels_find_candidates":
        return [_signed(offer, name) for offer in _checked_answer(hook, name, answer)]
    return _checked_answer(hook, name, answer)


def _signed(offer: Candidate | Refusal | Exclusive, name: str) -> Candidate | Refusal | Exclusive:
    """Put the name of a plugin on what it offers."""
    if isinstance(offer, Refusal) and offer.candidate is not None:
        candidate = replace(offer.candidate, plugin=offer.candidate.plugin or name)
        return replace(offer, candidate=candidate, plugin=offer.plugin or candidate.plugin)
    return offer if offer.plugin else replace(offer, plugin=name)


def _blame(error: BaseException, name: str) -> None:
    """Note on an exception of a loader which plugin raised it."""
    with contextlib.suppress(AttributeError, TypeError):  # one that takes no attributes
        error.kernels_plugin = name  # type: ignore[attr-defined]


def _rankable(item: object) -> bool:
    """Whether an offer is a candidate that has a place among the others, or tells why one does not fit."""
    if isinstance(item, Refusal):
        return item.candidate is not None
    if isinstance(item, Exclusive):
        return item.tier in TIERS
    return isinstance(item, Candidate) and item.tier in TIERS and type(item.priority) is int


def _wrapped_fault(hook: str, name: str, answer: Any) -> PluginError | None:
    """What is wrong with the answer of a wrapper, which is that of the whole call."""
    expected = {"kernels_resolve_forward": Resolution}.get(hook, list)
    if hook == "kernels_load_layer" or isinstance(answer, expected):
        return None
    return PluginError(
        f"Plugin {name!r}: its wrapper of {hook} returned {answer!r}, not a {expected.__name__}: "
        "return what yield gave, or another of its kind.",
        plugin=name,
    )


_ANSWERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kernels_resolve_forward": ("a Resolution or None", lambda a: isinstance(a, Resolution)),
    "kernels_find_candidates": (
        "a sequence of Candidate (and of Refusal, for what does not fit) or None",
        lambda a: isinstance(a, Sequence) and all(map(_rankable, a)),
    ),
    "kernels_authorize": ("None or a reason (a string)", lambda a: isinstance(a, str) and bool(a.strip())),
    "kernels_check_layer": ("None or a reason (a string)", lambda a: isinstance(a, str) and bool(a.strip())),
    "kernels_wrap_forward": ("a decorator or None", callable),
    "kernels_mapping": ("a mapping or None", lambda a: isinstance(a, Mapping)),
}


def _checked_answer(hook: str, name: str, answer: Any) -> Any:
    expected, fits = _ANSWERS.get(hook, ("", lambda _: True))
    if answer is not None and not fits(answer):
        raise PluginError(f"Plugin {name!r}: {hook} returned {answer!r}, not {expected}.", plugin=name)
    return answer
