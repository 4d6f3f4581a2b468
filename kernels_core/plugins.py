"""Finds plugins through entry points, refuses bad ones by name, and calls hooks in isolation."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .environment import plugin_choice, strict
from .errors import ArgumentError, PluginConflictError, PluginError, PluginLoadError
from .hookspecs import PROJECT
from .isolation import FAULTS, checked_hooks, isolated, raised_in
from .resolution import Resolution
from .scope import PATIENCE
from .warning import WarnOnce

if TYPE_CHECKING:
    import importlib_metadata

ENTRY_POINT_GROUP = "kernels_core"
_MAPPING = "mapping"
"""The plugin that asks for `kernels_mapping`."""


class PluginManager:
    """The plugins of this process, with one typed method per hook.

    Entry points of the group `kernels_core` are scanned once, when a hook is first needed.

    Attributes:
        faults: The faults of plugins so far, each once.
        generation: Counts registrations, for plugins that remember the offers of others.
        on_change: Called after a plugin was registered or unregistered.
    """

    def __init__(self, *, discover: bool = True) -> None:
        """Start without plugins; `discover=False` never looks at entry points."""
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._originals: dict[str, object] = {}
        self._discovered = not discover
        self._scanning: int | None = None
        """The thread that scans entry points now."""
        self._discovering = threading.Lock()
        self._warn = WarnOnce()
        self.on_change: list[Callable[[], None]] = []
        self.faults: list[PluginError] = []
        self.generation = 0

    # --- Registration ------------------------------------------------------------------------

    def register(self, plugin: object, name: str | None = None, *, trusted: bool = False) -> str:
        """Add a plugin: a module, an object, or a class that takes no arguments.

        Args:
            plugin: Has functions marked with `hookimpl`.
            name: Defaults to the name of the module, class or object.
            trusted: Whether exceptions and wrong answers of its hooks are not caught: for the core itself.

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
        hooks = checked_hooks(plugin, name)
        if not trusted:
            hooks = {hook: isolated(hook, name, plugin, function, self.report) for hook, function in hooks.items()}
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
        here = threading.get_ident()
        if self._discovered or self._scanning == here:  # scanning: a plugin dispatches while it is imported
            return
        if not self._discovering.acquire(timeout=PATIENCE):
            return  # the thread that scans may wait for an import that this one is in: use the plugins found so far
        try:
            if not self._discovered:
                self._scanning = here
                self._scan()
                self._discovered = True  # other threads wait until now
        finally:
            self._scanning = None
            self._discovering.release()

    def _scan(self) -> None:
        """Load the plugins of entry points that `KERNELS_PLUGINS` allows."""
        allowed, blocked = plugin_choice()
        found = self._unique(_entry_points())
        for unknown in sorted(((allowed or frozenset()) | blocked) - found.keys()):
            problem = f"KERNELS_PLUGINS names {unknown!r}, which no installed distribution offers: there are "
            self.report(PluginLoadError(f"{problem}{', '.join(sorted(found)) or 'none'}.", plugin=unknown))
        for name, entry_point in sorted(found.items()):
            if name not in self._originals and name not in blocked and (allowed is None or name in allowed):
                self._load(name, entry_point)
        if allowed is not None and _MAPPING in found.keys() - self._originals.keys() - blocked:
            problem = (
                f"KERNELS_PLUGINS leaves out the plugin {_MAPPING!r}, without which no mapping is used: neither "
                "those of plugin packages, nor those of register_kernel_mapping and use_kernel_mapping. Name it, "
                f"too, or write -{_MAPPING} to confirm that."
            )
            self.report(PluginLoadError(problem, plugin=_MAPPING))

    def _unique(
        self, entry_points: Iterable[importlib_metadata.EntryPoint]
    ) -> dict[str, importlib_metadata.EntryPoint]:
        """Keep one entry point per name: of two distributions, the first by name, and report the others."""
        by_name: dict[str, dict[str, importlib_metadata.EntryPoint]] = {}
        for entry_point in entry_points:
            offers = by_name.setdefault(entry_point.name, {})
            offers.setdefault(_distribution(entry_point), entry_point)  # a second copy on the path is shadowed
        for name, offers in by_name.items():
            if len(offers) > 1:
                used, *lost = sorted(offers)
                problem = (
                    f"Distributions {', '.join(sorted(offers))} all offer a plugin named {name!r}: that of "
                    f"{used!r} is used, and those of {', '.join(lost)} are not. Uninstall all but one."
                )
                self.report(PluginConflictError(problem, plugin=name))
        return {name: offers[min(offers)] for name, offers in by_name.items()}

    def _load(self, name: str, entry_point: importlib_metadata.EntryPoint) -> None:
        try:
            self.register(entry_point.load(), name)
        except PluginError as error:
            self.report(error)
        except FAULTS as error:
            fault = PluginLoadError(
                f"Plugin {name!r} of distribution {_distribution(entry_point)!r} cannot be imported from "
                f"{entry_point.value!r}: {type(error).__name__}: {error}. Correct or uninstall it, or block it "
                f"with KERNELS_PLUGINS=-{name}.",
                plugin=name,
            )
            fault.__cause__ = error
            self.report(fault)

    # --- Hooks -------------------------------------------------------------------------------

    def report(self, fault: PluginError) -> None:
        """Warn of a fault of a plugin, once; in strict mode, raise it."""
        if strict():
            raise fault
        if self._warn(str(fault), stacklevel=2):
            self.faults.append(fault)

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
                if not callable(wrapped):
                    problem = f"the decorator of its kernels_wrap_forward returned {wrapped!r}, not a function"
                    raise PluginError(f"Plugin {name!r}: {problem}.", plugin=name)
                forward = wrapped
            except FAULTS as error:
                self.report(raised_in("the decorator of kernels_wrap_forward", name, error))
        return forward


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
