"""A program of a user, checked by `mypy --strict` against the installed packages; it never runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_type

import torch
import typer
from torch import Tensor, nn

import kernels_core
import kernels_plugins
from kernels_core import (
    Candidate,
    CUDAProperties,
    Device,
    KernelLayer,
    KernelsError,
    Layer,
    LayerRequest,
    LoadedLayer,
    Mode,
    NoKernelError,
    Refusal,
    Resolution,
    Scope,
    decorated_layer,
    hookimpl,
    plugin_manager,
    replace_kernel_forward_from_hub,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import (
    BisectResult,
    LayerRepository,
    LocalLayerRepository,
    bisect,
    canary,
    register_kernel_mapping,
    use_kernel_mapping,
)
from kernels_plugins.mapping import KernelMapping

# --- Decorated things keep their types ---------------------------------------------------------------


@use_kernel_forward_from_hub("RMSNorm")
class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@use_kernel_forward_from_hub("scale", lambda x, factor: x.is_cuda, use_fallback=False)
def scale(x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor


class Theirs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


replace_kernel_forward_from_hub(Theirs, "RMSNorm")

norm = RMSNorm(8)
assert_type(norm, RMSNorm)
assert_type(norm.forward(torch.ones(8)), Tensor)
assert_type(scale(torch.ones(8), factor=3.0), Tensor)
RMSNorm("wide")  # type: ignore[arg-type]
scale(torch.ones(8), factor="much")  # type: ignore[arg-type]
use_kernel_forward_from_hub(RMSNorm)  # type: ignore[arg-type]
assert_type(decorated_layer(RMSNorm), Layer)

# --- Mappings ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shelf:
    """A source that a plugin loads."""

    place: str


class Registry:
    """A source that loads itself."""

    def load(self) -> type[nn.Module]:
        return Theirs


repository = LayerRepository("acme/kernels", layer_name="RMSNorm", version=1, trust_remote_code=("acme/kernels",))
local = LocalLayerRepository("kernels", layer_name="RMSNorm")
hopper = Device("cuda", CUDAProperties(min_capability=90, max_capability=90))
register_kernel_mapping({"RMSNorm": {"cuda": [Theirs, "pack:liger", kernels_plugins.Reference, "reference"]}})
register_kernel_mapping({"RMSNorm": {"cuda": repository, hopper: {Mode.TRAINING: [repository, local]}}})
register_kernel_mapping({"RMSNorm": Theirs})  # type: ignore[dict-item]
register_kernel_mapping({"RMSNorm": "acme/kernels:RMSNorm", "Gate": ("acme/kernels:Gate", {"version": 2})})
register_kernel_mapping({"RMSNorm": {"cuda": "acme/kernels:RMSNorm", "rocm": ["/kernels:Gate", Theirs, scale]}})
register_kernel_mapping({"RMSNorm": {"cpu": Path("k.py"), "xpu": Shelf("a"), "mps": {Mode.INFERENCE: Registry()}}})
register_kernel_mapping({"RMSNorm": {"gpu": Theirs}})  # type: ignore[dict-item]
register_kernel_mapping({"RMSNorm": {"cuda": 3}})  # type: ignore[dict-item]
register_kernel_mapping({"RMSNorm": {"cuda": [Theirs, None]}})  # type: ignore[list-item]
register_kernel_mapping({"RMSNorm": {"cuda": {"training": Theirs}}})  # type: ignore[dict-item]
mapping: KernelMapping = {"RMSNorm": {"cuda": repository}}
register_kernel_mapping(mapping)
with use_kernel_mapping({"RMSNorm": {"cpu": Theirs}}, inherit_mapping=False) as scope:
    assert_type(scope, Scope)
LayerRepository("acme/kernels", layer_name="RMSNorm", revision=1)  # type: ignore[arg-type]

# --- Questions and answers -----------------------------------------------------------------------------

resolution = resolve(RMSNorm, device="cuda:1", mode=Mode.TRAINING | Mode.TORCH_COMPILE)
assert_type(resolution, Resolution)
assert_type(resolution.refusals, tuple[Refusal, ...])
assert_type(resolution.is_reference, bool)
try:
    norm(torch.ones(8))
except NoKernelError as error:
    assert_type(error.refusals, tuple[Refusal, ...])
    caught: KernelsError = error

# --- Names that are imported on first use --------------------------------------------------------------

assert_type(bisect(norm, lambda model: 0.0, tolerance=0.1), BisectResult)
with canary(first=1) as watching:
    assert_type(watching, canary)
with kernels_plugins.numerics("batch_invariant") as required:
    assert_type(required, Scope)
kernels_plugins.register_numerics("exact")  # type: ignore[arg-type]
kernels_core.receipt(norm).require("*", deterministic=True)
print(kernels_plugins.get_kernal)  # type: ignore[attr-defined]
assert_type(kernels_plugins.LayerRepository("acme/kernels", layer_name="RMSNorm", version=1), LayerRepository)

# --- A plugin --------------------------------------------------------------------------------------------


class Plugin:
    kernels_priority = 5

    @hookimpl
    def kernels_find_candidates(self, request: LayerRequest) -> Sequence[Candidate] | None:
        return [Candidate(Theirs)] if request.device.type == "cpu" else None

    @hookimpl(tryfirst=True)
    def kernels_load_layer(self, request: LayerRequest, source: object) -> KernelLayer | LoadedLayer | None:
        return LoadedLayer(Theirs, "acme", {"digest": "none"}) if source is Theirs else None

    @hookimpl
    def kernels_register_commands(self, cli: typer.Typer) -> None:
        cli.command()(main)


def main() -> None:
    print(kernels_core.__version__, kernels_plugins.__all__)


assert_type(plugin_manager().register(Plugin(), "acme"), str)
