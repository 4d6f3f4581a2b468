"""Fixtures for the authors of plugins: an isolated plugin manager, and a record of every hook call.

Name this module in the `conftest.py` at the root of your tests:

    pytest_plugins = ["kernels_core.testing"]

A test then sees the plugins that it registers, and no others:

    def test_our_kernel_is_offered(isolated_plugins, hook_recorder):
        isolated_plugins.register(our_plugin, "ours")
        resolution = resolve("RMSNorm", device="cpu", mode=Mode.INFERENCE)
        assert resolution.plugin == "ours"
        assert hook_recorder.names()[-1] == "kernels_check_layer"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from . import loading, plugins, resolver
from .answer import CorePlugin
from .plugins import PluginManager
from .scopes.frame import forget
from .settings.reader import forget_settings
from .warning import warn_once


@dataclass
class HookCall:
    """One call of one hook, with the answers of all plugins.

    Attributes:
        hook: Name of the hook.
        arguments: Its arguments, by name.
        answer: The result of the call: one answer for hooks of the kind *first result*, else a list.
        error: The exception that it raised instead, if any.
        done: Whether the call is over; the calls that it made in turn come after it in the record.
    """

    hook: str
    arguments: Mapping[str, Any]
    answer: Any = None
    error: BaseException | None = None
    done: bool = False


@dataclass
class HookRecorder:
    """The hook calls of a plugin manager, in the order in which they began.

    Attributes:
        calls: The record so far.

    Example:
        >>> from kernels_core import Mode, plugin_manager, resolve
        >>> recorder = HookRecorder()
        >>> stop = recorder.watch(plugin_manager())
        >>> resolution = resolve("no such layer", device="cpu", mode=Mode.INFERENCE)
        >>> recorder.names()[:2]
        ['kernels_resolve_forward', 'kernels_find_candidates']
        >>> recorder.of("kernels_resolve_forward")[0].answer is resolution
        True
        >>> stop()
    """

    calls: list[HookCall] = field(default_factory=list)

    def names(self) -> list[str]:
        """Return the names of the hooks, a name for each call."""
        return [call.hook for call in self.calls]

    def of(self, hook: str) -> list[HookCall]:
        """Return the calls of one hook."""
        return [call for call in self.calls if call.hook == hook]

    def clear(self) -> None:
        """Start the record anew."""
        self.calls.clear()

    def watch(self, manager: PluginManager) -> Any:
        """Record the calls of `manager` from now on.

        Args:
            manager: The plugin manager that calls the hooks.

        Returns:
            A function without arguments that ends it.
        """
        # By the identity of the arguments, which pluggy passes to both: calls nest, and threads call side by side.
        under_way: dict[int, HookCall] = {}

        def before(hook_name: str, hook_impls: object, kwargs: Mapping[str, Any]) -> None:
            under_way[id(kwargs)] = call = HookCall(hook_name, dict(kwargs))
            self.calls.append(call)

        def after(outcome: Any, hook_name: str, hook_impls: object, kwargs: Mapping[str, Any]) -> None:
            call = under_way.pop(id(kwargs))  # pluggy calls this also where a hook has raised
            call.error = outcome.exception
            call.answer = None if call.error else outcome.get_result()
            call.done = True

        return manager._pluggy.add_hookcall_monitoring(before, after)


@pytest.fixture
def isolated_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginManager]:
    """Put a plugin manager without discovery in place of that of the process, for one test.

    It knows the core's own plugin and no other: not those that are installed, and not `mapping`
    either (`isolated_plugins.register(kernels_plugins.mapping, "mapping")` adds that one). Before and
    after the test, decisions, loaded kernels and issued warnings are forgotten.

    Example:
        >>> def test_plugin(isolated_plugins):
        ...     isolated_plugins.register(our_plugin)
        ...     assert list(isolated_plugins.plugins()) == ["core", "our_plugin"]
    """
    _start_anew()
    manager = PluginManager(discover=False)
    manager.on_change.append(resolver.forget)
    manager.register(CorePlugin(), "core", trusted=True)
    monkeypatch.setattr(plugins, "_manager", manager)
    yield manager
    monkeypatch.undo()  # first, so that nothing is decided anew by plugins of the test
    _start_anew()


@pytest.fixture
def hook_recorder(isolated_plugins: PluginManager) -> Iterator[HookRecorder]:
    """Record the hook calls of `isolated_plugins` during one test.

    Example:
        >>> def test_policy_is_asked_first(isolated_plugins, hook_recorder):
        ...     resolve("RMSNorm", device="cpu", mode=Mode.INFERENCE)
        ...     names = hook_recorder.names()
        ...     assert names.index("kernels_authorize") < names.index("kernels_load_layer")
    """
    recorder = HookRecorder()
    stop = recorder.watch(isolated_plugins)
    yield recorder
    stop()


def _start_anew() -> None:
    """Forget decisions, loaded kernels and issued warnings, without resolving anything again."""
    forget_settings()
    forget()
    warn_once.forget()
    loading.forget_loads()
