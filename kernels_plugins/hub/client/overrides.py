"""Folders instead of repositories: `LOCAL_KERNELS=owner/name=path:owner2/name2=path2`."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from kernels_core import ArgumentError

from ..names import REPO_ID

VARIABLE = "LOCAL_KERNELS"
_NEXT = re.compile(rf":(?={REPO_ID}=)")  # the colon of a drive is followed by no name
_ENTRY = re.compile(rf"(?P<repo_id>{REPO_ID})=(?P<path>.+)")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def find_override(repo_id: str) -> Path | None:
    """Return the folder that replaces a repository; None if there is none."""
    return parse_overrides(os.environ.get(VARIABLE, "")).get(repo_id)


@lru_cache(maxsize=8)
def parse_overrides(text: str) -> dict[str, Path]:
    r"""Read the variable.

    Example:
        >>> sorted(parse_overrides(r"a/one=C:\kernels\one:a/two=/kernels/two"))
        ['a/one', 'a/two']
    """
    found: dict[str, Path] = {}
    for entry in _NEXT.split(text) if text else ():
        match = _ENTRY.fullmatch(entry)
        repo_id, path = match.groups() if match else ("", "")
        folder = Path(os.path.expanduser(path))  # as it is where there is no such user
        # A colon in a path that does not exist is probably the end of an entry, before a malformed one.
        if match is None or (":" in _DRIVE.sub("", path, count=1) and not folder.exists()):
            problem = "is no owner/name=path"
        elif repo_id in found:
            problem = f"names {repo_id} again"
        else:
            found[repo_id] = folder
            continue
        raise ArgumentError(f"{VARIABLE}: {entry!r} {problem}. Write {VARIABLE}=owner/name=path:owner2/name2=path2")
    return found
