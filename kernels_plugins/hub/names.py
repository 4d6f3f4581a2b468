"""How repositories, versions, revisions and commits are written."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

REPO_ID = r"\w[\w.-]*/\w[\w.-]*"
"""Pattern of `owner/name`. It becomes part of paths: no part of it can lead out of a folder."""

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

# What git refuses in the name of a branch or tag. Some of it would be resolved as a path on the way to the Hub.
_NO_REVISION = re.compile(r"^[/.]|/\.|\.\.|//|@\{|[/.]$|[ ~^:?*\[\\]")


def is_repo_id(value: Any) -> TypeGuard[str]:
    """Whether a value is the name of a repository, `owner/name`.

    Example:
        >>> is_repo_id("acme/silu"), is_repo_id("acme/.."), is_repo_id("silu")
        (True, False, False)
    """
    return isinstance(value, str) and re.fullmatch(REPO_ID, value) is not None


def is_version(value: Any) -> TypeGuard[int]:
    """Whether a value is the number of a kernel version: a whole number, and not a truth value.

    Example:
        >>> is_version(0), is_version(True), is_version(-1)
        (True, False, False)
    """
    return type(value) is int and value >= 0


def is_revision(value: Any) -> TypeGuard[str]:
    """Whether a value can be the name of a branch or tag, or a commit: git accepts it, and it can be printed.

    Example:
        >>> is_revision("feature/x"), is_revision("refs/pr/1"), is_revision(".."), is_revision("")
        (True, True, False, False)
    """
    return isinstance(value, str) and value.isprintable() and value != "" and not _NO_REVISION.search(value)


def is_commit(value: Any) -> TypeGuard[str]:
    """Whether a value is a commit: 40 hexadecimal digits in lower case, or 64 where git uses SHA-256.

    Example:
        >>> is_commit("c0ffee" * 6 + "c0de"), is_commit("main")
        (True, False)
    """
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None
