"""Every test starts with nothing registered or in quarantine, no scope open, and no setting of this machine."""

from __future__ import annotations

import gc
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kernels_core import PluginManager, forget, release
from kernels_core.models.choice import choices
from kernels_core.scopes import frame as frames
from kernels_core.settings.reader import forget_settings
from kernels_plugins import mapping, register_numerics
from kernels_plugins.numerics import plugin as numerics_hooks
from kernels_plugins.numerics import store

pytest_plugins = ["kernels_core.testing"]

os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start: with small tensors, several only wait
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> None:
    """Leave the million objects of PyTorch and of earlier modules out of each collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unset the settings that the core obeys; undo registrations, scopes and quarantines of a test."""
    for name in (
        "KERNELS_CONFIG",
        "KERNELS_DENY",
        "KERNELS_STRICT",
        "KERNELS_PLUGINS",
        "KERNELS_REQUIRE_PLUGINS",
        "KERNELS_OBSERVE",
        "KERNELS_CANARY",
        "KERNELS_DECISIONS",
        "KERNELS_SIGNATURES",
        "DISABLE_KERNEL_MAPPING",
    ):
        monkeypatch.delenv(name, raising=False)
    registered, mapping._registered = mapping._registered, mapping.Level({})
    forget_settings()
    yield
    forget_settings()
    release()
    mapping._registered = registered
    if frames.here() is not frames.root:
        frames.set_frame(frames.root)


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a configuration file into the folder of the test, which becomes the working directory; return its path."""
    monkeypatch.chdir(tmp_path)
    # Kernelized models that other tests have left, in caches of compiled code, would read the file at once on `forget`.
    choices.clear()

    def write(text: str, name: str = "kernels.toml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        forget()
        return tmp_path / name

    return write


@pytest.fixture
def same_numbers() -> None:
    """Compute with the same random numbers in each run."""
    torch.manual_seed(0)


@pytest.fixture
def mapping_plugin(isolated_plugins: PluginManager) -> types.ModuleType:
    """Add the plugin `mapping` to an isolated plugin manager, so that registering mappings has an effect."""
    isolated_plugins.register(mapping, "mapping")
    return mapping


@pytest.fixture
def numerics_plugin(
    mapping_plugin: object,
    isolated_plugins: PluginManager,
    same_numbers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """Add the plugin `numerics`, with nothing known or required, and a cache of its own."""
    isolated_plugins.register(numerics_hooks, "numerics")
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))
    store._found.clear()
    yield
    register_numerics()
    store._found.clear()
