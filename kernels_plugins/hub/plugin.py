"""Plugin `hub`: layers of kernels, on the Hub or on disk. A layer is `layers.<name>` of a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kernels_core import Candidate, KernelLayer, LayerRequest, LoadedLayer, ResolutionError, hookimpl

if TYPE_CHECKING:
    import typer

    from .kernel import LoadedKernel
    from .source import KernelSource, LocalLayerRepository

_kernels: dict[tuple[object, bool], LoadedKernel] = {}
"""The kernel of each source that was loaded, for the CPU and for the rest: it is asked for again for each device."""


@hookimpl(tryfirst=True)
def kernels_load_layer(request: LayerRequest, source: object) -> LoadedLayer | None:
    """Load repositories; leave all other sources to other plugins."""
    from .source import KernelSource, LocalLayerRepository

    # Whether there is code for a device is for `kernels_check_layer`, which is called for each device.
    on_cpu = request.device.type == "cpu"
    if not isinstance(source, KernelSource | LocalLayerRepository):
        return None
    from .kernel import load, load_folder
    from .request import Terms

    if isinstance(source, KernelSource):
        kernel = load(replace(source.kernel_request(), check_arch=False, on_cpu=on_cpu))
    else:
        kernel = load_folder(source.path, Terms(check_arch=False, on_cpu=on_cpu))
    loaded = _layer(kernel, source)
    _kernels[source, on_cpu] = kernel
    return loaded


@hookimpl
def kernels_check_layer(request: LayerRequest, candidate: Candidate, layer: KernelLayer) -> str | None:
    """Refuse a build that has no code for the device of the call."""
    from .source import KernelSource, LocalLayerRepository

    if not isinstance(candidate.source, KernelSource | LocalLayerRepository):
        return None
    kernel = _kernels.get((candidate.source, request.device.type == "cpu"))
    return None if kernel is None else _find_mismatch(kernel, request)


def _find_mismatch(kernel: LoadedKernel, request: LayerRequest) -> str | None:
    from .builds.archs import find_mismatch

    mismatch = find_mismatch(kernel.metadata.backend, request.device)
    if mismatch is not None:
        return f"{kernel.place}: {mismatch}"
    return next(filter(None, (_find_mismatch(dependency, request) for dependency in kernel.dependencies)), None)


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `lock`, `download`, `info`, `versions` and `variants`."""
    from . import command  # only the command line needs it

    for function in (command.lock, command.download, command.info, command.versions, command.variants):
        cli.command()(function)


def load_source(source: KernelSource) -> LoadedLayer:
    """Load a layer from a repository on the Hub.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    from .kernel import load

    return _layer(load(source.kernel_request()), source)


def load_local(source: LocalLayerRepository) -> LoadedLayer:
    """Load a layer from a folder on disk.

    Raises:
        ResolutionError: One of its kinds, naming folder, variant and what to do.
    """
    from .kernel import load_folder
    from .request import Terms

    return _layer(load_folder(source.path, Terms(check_arch=False)), source)


def _layer(kernel: LoadedKernel, source: KernelSource | LocalLayerRepository) -> LoadedLayer:
    from .builds.importing import find_function, find_layer

    try:
        if source.is_function:
            layer = find_function(kernel.module, source.layer_name)
        else:
            layer = find_layer(kernel.module, source.layer_name)
    except ResolutionError as error:
        raise type(error)(f"{kernel.place}: {error}") from error
    return LoadedLayer(layer, kernel.origin, kernel.checked)
