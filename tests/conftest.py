"""Every test starts with nothing registered, no scope open, and no setting of this machine."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest

from kernels_core import PluginManager, scope
from kernels_plugins import mapping

pytest_plugins = ["kernels_core.testing"]


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unset the settings that the core obeys; undo registrations and scopes that a test leaves behind."""
    for name in (
        "KERNELS_STRICT",
        "KERNELS_PLUGINS",
        "KERNELS_REQUIRE_PLUGINS",
        "KERNELS_OBSERVE",
        "KERNELS_CANARY",
        "DISABLE_KERNEL_MAPPING",
    ):
        monkeypatch.delenv(name, raising=False)
    registered, mapping._registered = mapping._registered, mapping.Level({})
    yield
    mapping._registered = registered
    if scope.root.active is not scope.root:
        scope._current.set(scope.root)


@pytest.fixture
def mapping_plugin(isolated_plugins: PluginManager) -> types.ModuleType:
    """Add the plugin `mapping` to an isolated plugin manager, so that registering mappings has an effect."""
    isolated_plugins.register(mapping, "mapping")
    return mapping
