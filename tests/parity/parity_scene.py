"""Two sides and one scenario: the outcomes in `kernels` and in ours, to be compared.

A scenario is a function of a `Side`. `Both.run` plays it on each side, with a cache of its own, and gives a
`Pair` of outcomes: the value or the error, what was said meanwhile, and what the Hub was asked.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import kernels
import pytest
import torch
from kernels.hf_hub import _get_hf_api  # noqa: F401  (fails here, not in a test, if this is not the version meant)
from torch import nn

import kernels_plugins
from kernels_core import KernelsWarning
from kernels_plugins.local_hub.server import LocalHub, Request
from kernels_plugins.local_hub.testing import kernel_metadata, point_client_at, publish_kernels

REFERENCE = 2.0
"""What a decorated layer multiplies by; no kernel does."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Side:
    """One of the two libraries."""

    name: str
    lib: ModuleType

    @property
    def is_ours(self) -> bool:
        return self.lib is kernels_plugins

    def mode(self, text: str) -> Any:
        """Return the mode that is written as `INFERENCE|TORCH_COMPILE`."""
        first, *rest = (self.lib.Mode[name.strip()] for name in text.split("|"))
        for flag in rest:
            first = first | flag
        return first

    def fallback(self, *names: str) -> Any:
        """Return the sum of flags of `KernelizeFallback`."""
        flags = self.lib.KernelizeFallback.NONE
        for name in names:
            flags |= self.lib.KernelizeFallback[name]
        return flags

    def layer(self, name: str | None = None, **options: Any) -> type[nn.Module]:
        """Make a decorated class; its name is the layer name."""
        name = name or f"Scale{next(_numbers)}"

        @self.lib.use_kernel_forward_from_hub(name, **options)
        class Layer(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * REFERENCE

        return Layer

    def function(self, decorator: str = "use_kernel_forward_from_hub") -> tuple[str, Callable[..., Any], Any]:
        """Make a decorated function, and a class that declares to call it; its layer name comes first."""
        name = f"scale{next(_numbers)}"

        @getattr(self.lib, decorator)(name)
        def scale(x: torch.Tensor) -> torch.Tensor:
            return x * REFERENCE

        @self.lib.use_kernelized_func(scale)
        class Calls(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return scale(x)

        return name, scale, Calls

    def freeze(self, model: nn.Module, mapping: Mapping[str, Any], mode: str = "INFERENCE", **options: Any) -> float:
        """Kernelize a model inside of a scope, and call it outside."""
        options.setdefault("device", "cpu")
        with self.lib.use_kernel_mapping(mapping):
            model = self.lib.kernelize(model, mode=self.mode(mode), **options)
        return call(model)

    def served(self, source: object, mode: str = "INFERENCE", **options: Any) -> float:
        """Kernelize one layer with one source, and call it."""
        layer = self.layer()
        return self.freeze(layer(), {layer.kernel_layer_name: {"cpu": source}}, mode, **options)


THEIRS = Side("theirs", kernels)
OURS = Side("ours", kernels_plugins)
SIDES = (THEIRS, OURS)


@dataclass
class Outcome:
    """The outcome of a scenario on one side."""

    value: Any = None
    error: BaseException | None = None
    said: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def get(self) -> Any:
        """Return the value, or raise the error of the scenario."""
        if self.error is not None:
            raise self.error
        return self.value

    @property
    def why(self) -> str:
        """The error, with the chain of its causes."""
        told, error = [], self.error
        while error is not None:
            told.append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or error.__context__
        return "\n".join(told)

    def asked(self, text: str) -> int:
        """Count the requests that have a text in their line."""
        return sum(request.matches(text) for request in self.requests)


@dataclass
class Pair:
    """The outcomes of both sides."""

    theirs: Outcome
    ours: Outcome

    def agree(self, expected: Any) -> None:
        """Insist that both gave this value."""
        assert (self.theirs.get(), self.ours.get()) == (expected, expected)

    def refuse(self, kind: type[BaseException]) -> None:
        """Insist that both raised this kind of error."""
        assert isinstance(self.theirs.error, kind), f"theirs: {self.theirs}"
        assert isinstance(self.ours.error, kind), f"ours: {self.ours.why or self.ours}"


def play(side: Side, scenario: Callable[[Side], Any], hub: LocalHub | None = None) -> Outcome:
    """Run a scenario on one side, and note all that can be noticed."""
    outcome, records = Outcome(), logging.Handler()
    records.emit = lambda record: outcome.said.append(record.getMessage())  # type: ignore[method-assign]
    if hub is not None:
        hub.forget()
    root = logging.getLogger()
    level, root_handlers = root.level, root.handlers
    root.setLevel(logging.INFO)
    root.addHandler(records)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome.value = scenario(side)
    except Exception as error:
        outcome.error = error
    finally:
        root.removeHandler(records)
        root.setLevel(level)
        assert root.handlers == root_handlers
    outcome.said = [text for text in outcome.said if "HTTP Request" not in text]
    outcome.said += [str(warning.message) for warning in caught if issubclass(warning.category, KernelsWarning)]
    if hub is not None:
        outcome.requests = hub.requests
    return outcome


@dataclass
class Both:
    """Plays scenarios on both sides."""

    home: Path
    hub: LocalHub | None = None

    def run(self, scenario: Callable[[Side], Any]) -> Pair:
        """Play on theirs, then on ours; each has its own cache of the Hub."""
        return Pair(*(self.alone(side, scenario) for side in SIDES))

    def alone(self, side: Side, scenario: Callable[[Side], Any]) -> Outcome:
        """Play on one side, with that side's cache."""
        if self.hub is None:
            return play(side, scenario)
        with pytest.MonkeyPatch.context() as patch:
            point_client_at(self.hub, self.home / side.name, patch)
            telemetry(patch)
            return play(side, scenario, self.hub)

    def process(self, side: Side, code: str, *, check: bool = True, **environment: str) -> Any:
        """Run code in a new process of one side, where `lib` is the library; return its last line, read as JSON."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KERNELS_", "HF_"))}
        if self.hub is not None:
            inherited |= {**self.hub.environment(self.home / side.name), "HF_HUB_DISABLE_TELEMETRY": "0"}
        program = PREAMBLE.format(lib=side.lib.__name__) + textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**inherited, **environment},
            capture_output=True,
            text=True,
        )
        if not check:
            return done
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


PREAMBLE = """
import json, os, sys, warnings
import torch
import {lib} as lib

def layer(name="Scale", **options):
    @lib.use_kernel_forward_from_hub(name, **options)
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x * 2.0
    return Layer

def served(source, **options):
    with lib.use_kernel_mapping({{"Scale": {{"cpu": source}}}}):
        model = lib.kernelize(layer()(), mode=lib.Mode.INFERENCE, device="cpu", **options)
    return model(torch.ones(1)).item()

def tell(value):
    print(json.dumps(value))
"""


# --- Fixtures ------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path: Path) -> Both:
    """Both sides, without a Hub."""
    return Both(tmp_path)


@pytest.fixture
def kernels_hub(local_hub: LocalHub, tmp_path: Path) -> Both:
    """Both sides, with a Hub on this machine and a cache for each."""
    homes = tmp_path / "homes"
    homes.mkdir()
    return Both(homes, local_hub)


@pytest.fixture(autouse=True)
def fresh_theirs() -> Iterator[Callable[[], None]]:
    """Clear all that `kernels` keeps between calls, as in a new process."""
    from kernels import importer, load
    from kernels.layer import globals as shared
    from kernels.layer import layer, repos

    def forget() -> None:
        layer._CACHED_LAYER.clear()
        layer.LayerRepository._resolve_revision.cache_clear()
        repos._find_capability.cache_clear()
        load._parse_local_kernel_overrides.cache_clear()
        for loaded in importer._loaded_kernels.values():
            for name in [name for name in sys.modules if name.partition(".")[0] == loaded.metadata.id]:
                del sys.modules[name]
        importer._loaded_kernels.clear()
        shared._KERNEL_MAPPING.get().clear()

    token = shared._KERNEL_MAPPING.set({})
    forget()
    yield forget
    forget()
    shared._KERNEL_MAPPING.reset(token)


# --- Kernels -------------------------------------------------------------------------------------


def kernel_class(factor: float, **declarations: bool) -> type[nn.Module]:
    """Make a kernel that multiplies; its declarations are members."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x * factor

    return type(f"Times{factor:g}", (nn.Module,), {"forward": forward, **declarations})


class Source:
    """A source that both sides take: an object that loads."""

    def __init__(self, loaded: object) -> None:
        self.loaded = loaded
        self.loads = 0

    def load(self) -> Any:
        self.loads += 1
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def able(factor: float) -> Source:
    """Make a source of a kernel that can do everything."""
    return Source(kernel_class(factor, has_backward=True, can_torch_compile=True))


def kernel_source(factor: float, *, extra: str = "", name: str = "Scale") -> str:
    """Write the `layers.py` of a kernel whose layer multiplies."""
    return (
        f"import torch\n\n\nclass {name}(torch.nn.Module):\n    can_torch_compile = True\n\n"
        f"    def forward(self, x):\n        return x * {factor}\n{extra}"
    )


def write_kernel(
    folder: Path,
    files: Mapping[str, str] | str,
    *,
    name: str = "my-kernel",
    variant: str = "torch-universal",
    digest: bool = True,
    changes: Mapping[str, object] | None = None,
) -> Path:
    """Write a kernel repository with one variant to disk; return the repository."""
    files = {"layers.py": files} if isinstance(files, str) else dict(files)
    files.setdefault("__init__.py", "from . import layers\n" if "layers.py" in files else "")
    place = folder / "build" / variant
    place.mkdir(parents=True)
    for path, text in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    described = kernel_metadata(name, files, digest=digest, changes=changes)
    (place / "metadata.json").write_text(json.dumps(described))
    return folder


def lock(both: Both, commit: str) -> Path:
    """Write a lock file for version 1 of acme/kernels, as `kernels lock` does."""
    path = both.home / "kernels.lock"
    path.write_text(json.dumps([{"dependency": {"repo-id": "acme/kernels", "version": 1}, "lock": {"commit": commit}}]))
    return path


def call(model: nn.Module, x: torch.Tensor | None = None) -> float:
    """Call with ones."""
    return float(model(torch.ones(1) if x is None else x).sum())


def telemetry(patch: pytest.MonkeyPatch, *, on: bool = True) -> None:
    """Allow the client to tell who asks; without that, no request of theirs gets through."""
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", not on)
    patch.setenv("HF_HUB_DISABLE_TELEMETRY", "0" if on else "1")


def offline(patch: pytest.MonkeyPatch) -> None:
    """Say `HF_HUB_OFFLINE` to a client that is imported already."""
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    patch.setenv("HF_HUB_OFFLINE", "1")


@contextlib.contextmanager
def capability(patch: pytest.MonkeyPatch, *capabilities: int, hip: bool = False) -> Iterator[None]:
    """Have GPUs of these capabilities, as far as PyTorch tells."""

    def of(device: Any = None) -> tuple[int, int]:
        index = torch.device(device).index if device is not None and not isinstance(device, int) else device
        return divmod(capabilities[index or 0], 10)

    from kernels.layer.repos import _find_capability

    from kernels_core.device import _capability

    with patch.context() as context:
        context.setattr(torch.cuda, "is_available", lambda: True)
        context.setattr(torch.cuda, "current_device", lambda: 0)
        context.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        context.setattr(torch.cuda, "get_device_capability", of)
        context.setattr(torch.version, "hip" if hip else "cuda", "6.4" if hip else "12.8")
        for cached in (_find_capability, _capability):
            cached.cache_clear()
        try:
            yield
        finally:
            for cached in (_find_capability, _capability):
                cached.cache_clear()


__all__ = [name for name in globals() if not name.startswith("__")] + ["publish_kernels"]
