"""Errors of loading a kernel, by the kind of exception that Python has for them.

All are kinds of `LoadError` or `UntrustedError`: catch those. The second base is for code that requests a
kernel as it would open a file or import a module.
"""

from __future__ import annotations

from kernels_core import IntegrityError, LoadError, UntrustedError


class UnreachableError(LoadError, ConnectionError):
    """The Hub did not answer, or not in time: the cache is used where it has the kernel."""


class AbsentError(LoadError, FileNotFoundError):
    """There is no kernel for this machine, or it is not in the cache and no request may be sent."""


class RepositoryError(LoadError, OSError):
    """The Hub has no such repository, or forbids access to it."""


class UnknownError(LoadError, ValueError):
    """The requested version or layer does not exist, or a file that describes the kernel is malformed."""


class RevisionError(RepositoryError, UnknownError):
    """A repository has no such version, branch, tag or commit."""


class PackageError(LoadError, ImportError):
    """A kernel cannot be imported: mostly, a Python package is missing."""


class UnsuitableError(LoadError, RuntimeError):
    """A kernel needs a newer library or another device."""


class DependencyError(LoadError, RuntimeError):
    """A kernel that another one depends on is not available."""


class PublisherError(UntrustedError, ValueError):
    """The publisher of a kernel is not trusted."""


class SignatureError(UntrustedError, ValueError):
    """The signature of a kernel is malformed, or covers none of its files; the kinds below have other reasons."""


class UnsignedError(SignatureError):
    """A kernel has no signature, and one is required."""


class SignerError(SignatureError):
    """A kernel is signed, but not by a signer of its publisher."""


class ExpiredError(SignatureError):
    """The certificate of a signature was not valid when it was logged."""


class AuthorityError(SignatureError):
    """The certificate of a signature is not one of a trusted authority, or no authority can be read."""


class TamperedError(SignatureError, IntegrityError):
    """A signature is not one of the bytes beside it."""
