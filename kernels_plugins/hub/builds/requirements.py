"""Requirements of a build: a level of the kernel interface, Python packages, the right device."""

from __future__ import annotations

from collections.abc import Iterable

from packaging.version import Version

from kernels_core import warn_once

from ..errors import UnsuitableError
from .archs import find_mismatch
from .metadata import Metadata
from .packages import check_packages

INTERFACE_LEVEL = Version("0.17")
"""Level of the kernel interface that this package implements; `kernels-minver` is compared with it."""


def check_requirements(metadata: Metadata, backends: Iterable[str] = ()) -> None:
    """Refuse a build that this process cannot import."""
    minver = metadata.kernels_minver
    if minver is not None and minver.release[:2] > INTERFACE_LEVEL.release[:2]:
        raise UnsuitableError(
            f"it asks for level {minver} of the kernel interface (kernels-minver), and kernels-core "
            f"implements {INTERFACE_LEVEL}. Upgrade with: pip install --upgrade kernels-core"
        )
    check_packages(metadata.python_depends, (metadata.backend.backend_type, *backends))


def check_device(metadata: Metadata) -> None:
    """Refuse a build that has no code for the current device."""
    mismatch = find_mismatch(metadata.backend)
    if mismatch is not None:
        raise UnsuitableError(mismatch)


def warn_dirty(metadata: Metadata, place: str) -> None:
    """Warn once about a build from sources with changes that were not committed."""
    if metadata.provenance is not None and metadata.provenance.dirty:
        warn_once(
            f"{place}: {metadata.name} was built while sources of {' and '.join(metadata.provenance.dirty_sources)} "
            "had changes that were not committed (dirty): its commit does not identify them. Ask the publisher for a "
            "build from committed sources.",
            stacklevel=2,
        )
