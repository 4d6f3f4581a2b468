"""Plugin `hub`: layers of kernels, on the Hub or on disk. A layer is `layers.<name>` of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kernels_core import Candidate, ConfigSection, KernelLayer, LayerRequest, LoadedLayer, hookimpl

if TYPE_CHECKING:
    import typer

    from .kernel import LoadedKernel
    from .source import KernelSource

_kernels: dict[tuple[KernelSource, bool], LoadedKernel] = {}
"""The loaded kernel of each source, for the CPU and for other devices: `kernels_check_layer` needs it per device."""


@hookimpl(tryfirst=True)
def kernels_load_layer(request: LayerRequest, source: object) -> LoadedLayer | None:
    """Load repositories; leave all other sources to other plugins, and those of subclasses with their own `load`."""
    from .source import KernelSource  # only where a layer is loaded: discovery imports this file

    if not isinstance(source, KernelSource) or type(source).load is not KernelSource.load:
        return None
    on_cpu = request.device.type == "cpu"
    # `kernels_check_layer`, which is called for each device, refuses a build without code for it.
    kernel = source.load_kernel(check_arch=False, on_cpu=on_cpu)
    loaded = source.find_layer(kernel)
    _kernels[source, on_cpu] = kernel
    return loaded


@hookimpl
def kernels_check_layer(request: LayerRequest, candidate: Candidate, layer: KernelLayer) -> str | None:
    """Refuse a build that has no code for the device of the call."""
    from .source import KernelSource

    if not isinstance(candidate.source, KernelSource):
        return None
    kernel = _kernels.get((candidate.source, request.device.type == "cpu"))
    return None if kernel is None else _find_mismatch(kernel, request)


def _find_mismatch(kernel: LoadedKernel, request: LayerRequest) -> str | None:
    from .builds.requirements import find_mismatch

    if mismatch := find_mismatch(kernel.metadata.backend, request.device):
        return f"{kernel.place}: {mismatch}"
    return next(filter(None, (_find_mismatch(dependency, request) for dependency in kernel.dependencies)), None)


def _parse_trusted(section: ConfigSection) -> dict[str, ConfigSection]:
    """Parse `trusted` of a configuration file: organisations, and repositories as `owner/name`."""
    from .names import is_repo_id

    trusted = {}
    for item in section.as_list():
        if not (is_repo_id(name := item.as_text()) or is_repo_id(f"{name}/name")):
            raise item.error(f"{name!r} is neither an organisation nor a repository: write 'owner' or 'owner/name'.")
        trusted[name] = item
    return trusted


@hookimpl
def kernels_configuration() -> Mapping[str, Callable[[ConfigSection], object]]:
    """Own `trusted`, and the settings of signatures, in the configuration file."""
    from .signatures.signer import SETTINGS

    return {"trusted": _parse_trusted, **SETTINGS}


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `lock`, `download`, `info`, `versions`, `variants`, `benchmark` and `verify-signature`, and `cache`."""
    from . import command  # only the command line needs it
    from .benchmark.command import benchmark
    from .cache.command import cache
    from .signatures.command import verify_signature

    own = (command.lock, command.download, command.info, command.versions, command.variants)
    for function in (*own, benchmark, verify_signature):
        cli.command()(function)
    cli.add_typer(cache, name="cache")
