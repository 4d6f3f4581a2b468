"""The Hub, its cache on this machine, and the locks of the project: can kernels be downloaded, kept and trusted?"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from kernels_core import ArgumentError, KernelsError, LoadError, plugin_manager

from ..hub.cache.command import format_size
from ..hub.errors import UnsuitableError
from ..hub.locking.lockfile import LOCK, read_lock
from ..hub.locking.project import PYPROJECT, read_dependencies
from .finding import NOTE, OK, PROBLEM, Finding

_PATIENCE = 5.0
"""Seconds to wait for the Hub."""
_KNOWN = "kernels-community"
"""An organisation that the Hub is asked about: the same question decides whether a publisher is trusted."""
_LITTLE = 2**30
"""Bytes that a large kernel needs with its downloads."""


def check_hub(offline: bool) -> Iterator[Finding]:
    """Yield the findings about the Hub: where it is, whether it answers, and whether a token is sent."""
    from ..hub.client.download import Client, has_token, hub_address  # where it cannot be, that is a finding

    yield Finding("hub", "address", hub_address())
    yield Finding(
        "hub", "token", "is there, and is not shown" if has_token() else "none: only public kernels are found"
    )
    client = Client(patience=_PATIENCE)
    if offline:
        yield Finding("hub", "connection", "not tried: --offline")
    elif client.silence:
        remedy = "Unset it to load kernels that are not in the cache."
        yield Finding("hub", "connection", f"not tried: {client.silence} is set", NOTE, remedy)
    else:
        start = time.perf_counter()
        try:
            client.is_trusted_publisher(_KNOWN)
            yield Finding("hub", "connection", f"answers in {time.perf_counter() - start:.1f} s")
        except (LoadError, OSError) as error:
            yield Finding("hub", "connection", str(error), PROBLEM)


def check_cache() -> Iterator[Finding]:
    """Yield the findings about the cache: its place, its size, and whether there is room for more."""
    from ..hub.client.cached import find_cached, size_of
    from ..hub.client.download import Client, cache_root

    try:
        root = cache_root()
    except LoadError as error:
        yield Finding("cache", "folder", str(error), PROBLEM)
        return
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    missing = "" if there == root else ", which will be made"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        found = f"{root} cannot be written" if there.is_dir() else f"{there} is a file"
        state = NOTE if Client().silence and root.is_dir() else PROBLEM  # without downloads, reading is enough
        yield Finding(
            "cache", "folder", found, state, "Correct its permissions, or set KERNELS_CACHE to another folder."
        )
    else:
        yield Finding("cache", "folder", f"{root}{missing}")
    free = shutil.disk_usage(there).free
    remedy = "Free some: `kernels-core cache prune` shows kernels that are not used." if free < _LITTLE else ""
    yield Finding("cache", "free space", format_size(free), PROBLEM if free < _LITTLE else OK, remedy)
    try:
        kernels = find_cached()
    except LoadError as error:  # an older client loads kernels all the same
        yield Finding("cache", "kernels", str(error), NOTE if isinstance(error, UnsuitableError) else PROBLEM)
        return
    repositories = {commit.repo_id for commit in kernels.commits}
    yield Finding("cache", "kernels", f"{len(repositories)} repositories, {format_size(size_of(kernels.commits))}")
    for problem in kernels.problems:
        yield Finding("cache", "kernels", problem, PROBLEM, "Remove the folder, and load the kernel again.")


def check_trust() -> Iterator[Finding]:
    """Yield who decides which code may run."""
    policies = [name for name, plugin in plugin_manager().plugins().items() if hasattr(plugin, "kernels_authorize")]
    found = "trusted publishers of the Hub, and those that a mapping allows with trust_remote_code"
    yield Finding("trust", "publishers", found)
    yield Finding("trust", "policies", f"plugins {', '.join(policies)}" if policies else "no plugin has one")
    if missing := plugin_manager().missing():
        yield Finding("trust", "policies", str(missing), PROBLEM)


def check_locks(folder: Path) -> Iterator[Finding]:
    """Yield the lock of the project that a folder belongs to."""
    project = next((place for place in (folder, *folder.parents) if (place / LOCK).is_file()), None)
    if project is None:
        yield Finding("locks", LOCK, f"none in {folder} or above")
        return
    try:
        lock = read_lock(project / LOCK)
    except KernelsError as error:
        yield Finding("locks", LOCK, str(error), PROBLEM)
        return
    try:
        missing = [str(wanted) for wanted in read_dependencies(project) if lock.find(wanted) is None]
    except ArgumentError as error:
        missing = []
        if (project / PYPROJECT).is_file():
            yield Finding("locks", PYPROJECT, str(error), NOTE)
    if missing:
        found, remedy = f"{project / LOCK} does not have {', '.join(missing)}", f"Run `kernels-core lock {project}`."
        yield Finding("locks", LOCK, found, PROBLEM, remedy)
    else:
        yield Finding("locks", LOCK, f"{project / LOCK}: {len(lock.kernels)} kernels")
