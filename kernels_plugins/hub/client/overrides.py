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
        if match is None or _has_loose_end(match["path"]):
            raise _malformed(entry, "is no owner/name=path")
        if match["repo_id"] in found:
            raise _malformed(entry, f"names {match['repo_id']} again")
        found[match["repo_id"]] = Path(match["path"]).expanduser()
    return found


def _has_loose_end(path: str) -> bool:
    """Whether a path contains a colon, and so probably a malformed entry."""
    return ":" in _DRIVE.sub("", path, count=1) and not Path(path).expanduser().exists()


def _malformed(entry: str, problem: str) -> ArgumentError:
    return ArgumentError(f"{VARIABLE}: {entry!r} {problem}. Write {VARIABLE}=owner/name=path:owner2/name2=path2")
