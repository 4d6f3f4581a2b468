"""Finds plugins through entry points, refuses bad ones by name, and calls hooks in isolation."""

from __future__ import annotations

import importlib.machinery
import os
import threading
import types
from collections.abc import Callable, Iterable
from types import NoneType
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .environment import plugin_choice, strict, words
from .errors import (
    ArgumentError,
    ConfigurationError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    require_type,
)
from .hookspecs import PROJECT
from .isolation import FAULTS, checked_hooks, isolated, raised_in
from .raised import error_text
from .resolution import Candidate, LayerRequest, Resolution
from .scopes.frame import PATIENCE
from .settings import reader
from .warning import WarnOnce, warn_once

if TYPE_CHECKING:
    import importlib_metadata

ENTRY_POINT_GROUP = "kernels_core"
OWN_DISTRIBUTION = "kernels-core"
"""Names of its plugins are taken: another distribution cannot replace them."""
_MAPPING = "mapping"
"""The plugin that asks for `kernels_mapping`."""
_CORE = "core"
"""The core's own plugin, which has no entry point."""
_POLICY = "kernels_authorize"
_REQUIRED = ("KERNELS_REQUIRE_PLUGINS", "require-plugins")
"""The variable, and the setting, with the plugins without which no kernel serves."""


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
        require_type(discover, bool, "discover")
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._originals: dict[str, object] = {}
        self._found: set[str] = set()
        """Plugins that were loaded from entry points: a scan that raises in strict mode is made again."""
        self._failed: dict[str, tuple[PluginError, bool]] = {}
        """Plugins that are installed and could not be loaded: the reason, and whether they have `kernels_authorize`."""
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
        require_type(name, (str, NoneType), "The name of a plugin")
        if isinstance(plugin, type):  # its hooks would get no `self`
            name = name or plugin.__name__
            try:
                plugin = plugin()
            except FAULTS as error:
                text = f"Plugin {name!r} is a class, and cannot be made: {error_text(error)}. Register an object of it."
                raise PluginLoadError(text, plugin=name) from error
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        if name in self._originals:
            raise PluginConflictError(
                f"A plugin named {name!r} is registered already: unregister it, or choose another name.",
                plugin=name,
            )
        hooks = checked_hooks(plugin, name)
        if not trusted:
            hooks = {hook: isolated(hook, name, plugin, function, self.report) for hook, function in hooks.items()}
        # pluggy gets the isolated hooks, and looks at no other attribute of the plugin.
        self._pluggy.register(types.SimpleNamespace(**hooks), name)
        self._originals[name] = plugin  # after pluggy, which may refuse it
        self._changed()
        return name

    def unregister(self, plugin: object = None, name: str | None = None) -> object:
        """Remove a plugin and return it.

        Args:
            plugin: The plugin as it was registered, or its name.
            name: Its name, where the plugin is not given.

        Raises:
            ArgumentError: If it is not registered.
        """
        require_type(name, (str, NoneType), "The name of a plugin")
        known = self._originals
        if name is None:
            same = (key for key, one in known.items() if one is plugin or type(one) is plugin)
            name = plugin if isinstance(plugin, str) else next(same, None)
        if name not in known:
            raise ArgumentError(f"No plugin {name or plugin!r}: there are {', '.join(self.plugins()) or 'none'}.")
        self._pluggy.unregister(name=name)
        removed = known.pop(name)
        self._changed()
        return removed

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

    def allows(self, name: str) -> bool:
        """Return whether `KERNELS_PLUGINS`, or the setting `plugins`, lets a plugin of that name be loaded."""
        allowed, blocked = plugin_choice()
        return name not in blocked and (allowed is None or name in allowed)

    def _scan(self) -> None:
        """Load the plugins of entry points that `KERNELS_PLUGINS` allows."""
        allowed, blocked = plugin_choice()
        _, chosen = words("KERNELS_PLUGINS", "plugins")
        found = self._unique(_entry_points())
        for unknown in sorted(((allowed or frozenset()) | blocked) - found.keys()):
            problem = f"{chosen} names {unknown!r}, which no installed distribution offers: there are "
            self.report(PluginLoadError(f"{problem}{', '.join(sorted(found)) or 'none'}.", plugin=unknown))
        # Our own first: a plugin that registers another one while it is imported cannot take their names.
        for name, entry_point in sorted(found.items(), key=lambda item: (not _is_ours(item[1]), item[0])):
            if not self.allows(name):
                continue
            if name not in self._originals:
                self._load(name, entry_point)
            elif name not in self._found and (name == _CORE or _is_ours(entry_point)):
                problem = f"The name {name!r} is that of a plugin of {OWN_DISTRIBUTION}: use another one for yours."
                self.report(PluginConflictError(problem, plugin=name))
        if missing := self._missing():
            self.report(missing)
        if allowed is not None and _MAPPING in found.keys() - self._originals.keys() - blocked:
            problem = (
                f"{chosen} leaves out the plugin {_MAPPING!r}, without which no mapping is used: neither "
                "those of plugin packages, nor those of register_kernel_mapping and use_kernel_mapping. Name it, "
                f"too, or write -{_MAPPING} to confirm that."
            )
            self.report(PluginLoadError(problem, plugin=_MAPPING))

    def _unique(
        self, entry_points: Iterable[importlib_metadata.EntryPoint]
    ) -> dict[str, importlib_metadata.EntryPoint]:
        """Keep one entry point per name: ours, else that of the first distribution by name; report the others."""
        by_name: dict[str, dict[str, importlib_metadata.EntryPoint]] = {}
        for entry_point in entry_points:
            offers = by_name.setdefault(entry_point.name, {})
            offers.setdefault(_distribution(entry_point), entry_point)  # a second copy on the path is shadowed
        chosen = {}
        for name, offers in by_name.items():
            used, *lost = sorted(offers, key=lambda distribution: (distribution != OWN_DISTRIBUTION, distribution))
            chosen[name] = offers[used]
            if lost:
                problem = (
                    f"Distributions {', '.join(sorted(offers))} all offer a plugin named {name!r}: that of "
                    f"{used!r} is used, and those of {', '.join(lost)} are not. Uninstall all but one."
                )
                self.report(PluginConflictError(problem, plugin=name))
        return chosen

    def _load(self, name: str, entry_point: importlib_metadata.EntryPoint) -> None:
        plugin: object = None
        try:
            plugin = entry_point.load()
            self.register(plugin, name)
            self._found.add(name)
        except FAULTS as error:
            fault = error
            if plugin is None or not isinstance(error, PluginError):  # of its import, or its constructor
                fault = PluginLoadError(
                    f"Plugin {name!r} of distribution {_distribution(entry_point)!r} cannot be imported from "
                    f"{entry_point.value!r}: {error_text(error)}. Correct or uninstall it, or block it "
                    f"with KERNELS_PLUGINS=-{name}.",
                    plugin=name,
                )
                fault.__cause__ = error  # `raise from` without raising: a fault is only reported
            assert isinstance(fault, PluginError)
            self._failed[name] = fault, hasattr(plugin, _POLICY) or _mentions_policy(entry_point.module)
            self.report(fault)

    def settings(self) -> reader.Settings:
        """Return the settings of the configuration file, checked by these plugins."""
        self._discover()
        return reader.checked(self)

    def missing(self) -> PluginLoadError | ConfigurationError | None:
        """Return why no kernel may serve: the configuration file is wrong, or a plugin is missing.

        A file that cannot be used may have a policy: so none of it applies, and the reference runs everywhere. Missing
        plugins are those that `KERNELS_REQUIRE_PLUGINS`, or the setting `require-plugins`, names, and installed ones
        with `kernels_authorize` that could not be loaded.
        """
        if reader.known.nothing and self._discovered and not self._failed and _REQUIRED[0] not in os.environ:
            return None  # as nearly always, at the price of no further call
        problems = self.settings().problems
        if not problems:
            return self._missing()
        first, more = problems[0], f" ({len(problems) - 1} more: run kernels-core config)"
        text = f"No kernel serves, for the configuration is wrong: {first}{more if len(problems) > 1 else ''}"
        if not strict():
            warn_once(text)
        return ConfigurationError(text, file=first.file, line=first.line)

    def _missing(self) -> PluginLoadError | None:
        required, chosen = words(*_REQUIRED)
        if not required and not self._failed:
            return None
        why = {name: f"it has {_POLICY}" for name, (_, is_policy) in self._failed.items() if is_policy}
        # What the user has named goes before the policy.
        why |= dict.fromkeys(required, f"{chosen} names it")
        for name in sorted(why.keys() - self._originals.keys()):
            cause, _ = self._failed.get(name, (None, False))
            more = cause or "no plugin of that name was found, or KERNELS_PLUGINS leaves it out."
            fault = PluginLoadError(
                f"Plugin {name!r} is not loaded, so no kernel serves ({why[name]}): {more}", plugin=name
            )
            fault.__cause__ = cause
            return fault
        return None

    # --- Hooks -------------------------------------------------------------------------------

    def report(self, fault: PluginError) -> None:
        """Warn of a fault of a plugin, once; in strict mode, raise it."""
        if strict():
            raise fault
        if self._warn(str(fault)):
            self.faults.append(fault)

    @property
    def hook(self) -> Any:
        """The hooks, to be called with keywords: `plugin_manager().hook.kernels_resolved(resolution=resolution)`."""
        if not self._discovered:
            self._discover()
        return self._pluggy.hook

    def vetoes(self, request: LayerRequest, candidate: Candidate) -> list[str]:
        """Return the reasons of policies to refuse a candidate."""
        missing = self.missing()
        refused: list[str] = self._pluggy.hook.kernels_authorize(request=request, candidate=candidate)
        return refused if missing is None else [str(missing)]

    def wrap_forward(self, resolution: Resolution, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Let plugins put something around the calls of a forward."""
        hook = self._pluggy.hook if self._discovered else self.hook
        for name, wrap in hook.kernels_wrap_forward(resolution=resolution):
            try:
                wrapped = wrap(forward)  # this runs code of the plugin, outside of its hook
                if not callable(wrapped):
                    problem = f"the decorator of its kernels_wrap_forward returned {wrapped!r}, not a function"
                    raise PluginError(f"Plugin {name!r}: {problem}.", plugin=name)
                forward = wrapped
            except FAULTS as error:
                self.report(raised_in("the decorator of kernels_wrap_forward", name, error))
        return forward


_manager = PluginManager()  # scans nothing yet: importing the package reads no metadata


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


def _is_ours(entry_point: importlib_metadata.EntryPoint) -> bool:
    return _distribution(entry_point) == OWN_DISTRIBUTION


def _mentions_policy(module: str) -> bool:
    """Return whether the source of a module or its packages names the hook for policies; imports nothing."""
    path: Any = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        # `importlib.util.find_spec` would import the packages around the module.
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:end]), path)
        try:
            source = spec.loader.get_source(spec.name) if spec is not None else None  # type: ignore[union-attr]
        except (AttributeError, ImportError, UnicodeError):  # a loader without source, or text that is none
            source = None
        if _POLICY in (source or ""):
            return True
        path = spec.submodule_search_locations if spec is not None else None
        if path is None:
            return False
    return False


def _distribution(entry_point: importlib_metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else "unknown"
