"""What can go wrong with a kernel, by the kind of exception that Python has for it.

All are kinds of `LoadError` or `UntrustedError`: catch those. The second base is for code that asks for a
kernel as it would open a file or import a module.
"""

from __future__ import annotations

from kernels_core import LoadError, UntrustedError


class UnreachableError(LoadError, ConnectionError):
    """The Hub could not be asked, or had no time to answer: what is in the cache may serve."""


class AbsentError(LoadError, FileNotFoundError):
    """There is no kernel for this machine, or none in the cache where nothing else may be asked."""


class UnknownError(LoadError, ValueError):
    """What was asked for does not exist, or what describes it makes no sense."""


class PackageError(LoadError, ImportError):
    """A kernel cannot be imported: mostly, a Python package is missing."""


class UnsuitableError(LoadError, RuntimeError):
    """A kernel asks for more than this process has: a newer library, another device."""


class DependencyError(LoadError, RuntimeError):
    """A kernel that another one depends on is not to be had here."""


class PublisherError(UntrustedError, ValueError):
    """The publisher of a kernel is not trusted."""
