"""Redirects of repositories: `kernel-status.toml` at the root of a revision."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import UnknownError
from ..names import is_repo_id, is_revision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


STATUS = "kernel-status.toml"
LARGEST = 65536
"""Bytes that such a file may have."""


def parse_status(content: bytes) -> tuple[str, str]:
    r"""Read a status file; return the repository that serves the kernel now, and the revision there.

    Example:
        >>> parse_status(b'kind = "redirect"\ndestination = "acme/silu"')
        ('acme/silu', 'main')
    """
    try:
        data: Any = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # nested thousands deep
        raise _malformed(f"it is no TOML ({error})") from error
    kind = data.get("kind")
    if kind != "redirect":
        raise _malformed(f"its kind is {kind!r}, and 'redirect' is known" if "kind" in data else "it has no kind")
    destination, revision = data.get("destination"), data.get("revision", "main")
    if not is_repo_id(destination):
        raise _malformed(f"its destination is {destination!r}, not owner/name")
    if not is_revision(revision):
        raise _malformed(f"its revision is {revision!r}, not a branch, tag or commit")
    return destination, revision


def _malformed(problem: str) -> UnknownError:
    return UnknownError(f"its {STATUS} cannot be followed: {problem}. Tell its publisher, or name another revision")
