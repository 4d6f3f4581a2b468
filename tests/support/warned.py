"""Warnings within a block: each one an error, none shown, or all noted."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def never(category: type[Warning] = Warning) -> Iterator[None]:
    """Raise each warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", category)
        yield


@contextlib.contextmanager
def ignored(category: type[Warning] = Warning) -> Iterator[None]:
    """Show no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


@contextlib.contextmanager
def noted() -> Iterator[list[warnings.WarningMessage]]:
    """Yield a list of all warnings, also of those that were issued before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
