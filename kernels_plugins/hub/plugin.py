"""Plugin `hub`: layers of kernels, on the Hub or on disk. A layer is `layers.<name>` of a kernel."""

from __future__ import annotations

from kernels_core import LayerRequest, LoadedLayer, ResolutionError, hookimpl

from .importing import find_layer
from .kernel import LoadedKernel, load, load_folder
from .source import KernelSource, LocalLayerRepository


@hookimpl(tryfirst=True)
def kernels_load_layer(request: LayerRequest, source: object) -> LoadedLayer | None:
    """Load repositories; leave everything else to others."""
    if isinstance(source, KernelSource):
        return load_source(source)
    if isinstance(source, LocalLayerRepository):
        return load_local(source)
    return None


def load_source(source: KernelSource) -> LoadedLayer:
    """Load a layer from a repository on the Hub.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    return _layer(load(source.kernel_request()), source.layer_name)


def load_local(source: LocalLayerRepository) -> LoadedLayer:
    """Load a layer from a folder on disk.

    Raises:
        ResolutionError: One of its kinds, naming folder, variant and what to do.
    """
    return _layer(load_folder(source.path), source.layer_name)


def _layer(kernel: LoadedKernel, layer_name: str) -> LoadedLayer:
    try:
        layer = find_layer(kernel.module, layer_name)
    except ResolutionError as error:
        raise type(error)(f"{kernel.place}: {error}") from error
    return LoadedLayer(layer, kernel.origin, kernel.checked or {})
