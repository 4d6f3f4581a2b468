"""Fixtures for the authors of kernel plugins: the import path that documentation gives to them.

The fixtures themselves live in `kernels_plugins.local_hub.testing`, which pytest loads as a plugin of its own, once.
"""

from typing import Any

from ..local_hub import testing as _testing
from ..local_hub.testing import KernelRepository, file_digests, kernel_metadata, point_client_at, publish_kernels

__all__ = ["KernelRepository", "file_digests", "kernel_metadata", "point_client_at", "publish_kernels"]

pytest_plugins = ["kernels_plugins.local_hub.testing"]


def __getattr__(name: str) -> Any:
    """Return a fixture: a name of this module would register it a second time."""
    return getattr(_testing, name)
