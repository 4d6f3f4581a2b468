"""The plugins that come with kernels-core: the mapping registry and the loader of Hub repositories.

They are found through entry points like anybody's, and use nothing but the public names of
`kernels_core`.
"""

from .hub.locked import LockedLayerRepository, get_locked_kernel, load_kernel
from .hub.source import LayerRepository, LocalLayerRepository
from .mapping import register_kernel_mapping, use_kernel_mapping

__all__ = [
    "LayerRepository",
    "LocalLayerRepository",
    "LockedLayerRepository",
    "get_locked_kernel",
    "load_kernel",
    "register_kernel_mapping",
    "use_kernel_mapping",
]
