"""Which commit is a revision, and of which repository: asked once, remembered, redirects followed."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace

from kernels_core import LoadError

from ..errors import UnknownError, UnreachableError
from ..request import KernelRequest
from .cache import COMMIT, Pin, Record
from .download import REPO_TYPES, Client, cache_folder, not_cached, notes
from .redirect import Redirect, parse_status

logger = logging.getLogger("kernels_plugins.hub")
"""Tells what is worth knowing and no fault: these are no warnings, which may be errors."""

_MOST_REDIRECTS = 5
_HUB = "from the Hub"

_asking = threading.Lock()
_pins: dict[tuple[str, str], Pin] = {}
"""What the Hub said in this process: the layers of one model come from one commit, whatever is pushed meanwhile."""

_said: set[str] = set()
_cold: set[Pin] = set()
"""What was listed in this process."""


@dataclass(frozen=True)
class Pinned:
    """What a revision is.

    Attributes:
        first: The commit of the revision in the repository that was asked for.
        pin: The commit that serves it, after redirects.
        how: How that is known, in words.
        redirect: Where it was redirected to, in words; empty if it was not.
    """

    first: Pin
    pin: Pin
    how: str
    redirect: str = ""


def find_revision(request: KernelRequest, client: Client) -> Pinned:
    """Return the commit of what is asked for; asks the Hub at most once in a process.

    Raises:
        LoadError: If there is none, or a redirect leads nowhere.
        UnreachableError: If the Hub does not answer, and it is not in the cache.
    """
    first, how = _pin(client, request.repo_id, request.wanted)
    pin, passed = first, [f"{request.repo_id} at {request.wanted}"]
    try:
        # What is locked is that very commit, wherever its kernel is now.
        while request.commit is None and (redirect := _redirect(pin, client)) is not None:
            if str(redirect) in passed or len(passed) > _MOST_REDIRECTS:
                why = "in a circle" if str(redirect) in passed else "too far"
                raise UnknownError(
                    f"it is redirected {why}: {' -> '.join([*passed, str(redirect)])}. Tell its publisher, or name "
                    "another revision"
                )
            passed.append(str(redirect))
            pin, how = _pin(client, redirect.repo_id, redirect.revision)
    except UnreachableError as error:
        known = notes(request.repo_id).pin(request.wanted)
        if known is None:
            raise
        pin, how = known, f"from the cache: {error}"
    if len(passed) == 1 and pin.repo_id == request.repo_id:
        return Pinned(first, pin, how)
    where = " -> ".join(passed[1:]) or pin.repo_id
    say_once(f"{request.repo_id} at {request.wanted} is redirected to {where}: name that instead.")
    return Pinned(first, pin, how, where)


def look_for_newer(request: KernelRequest, pin: Pin, client: Client) -> None:
    """Ask which versions there are, when a version is loaded for the first time, and remember the newest."""
    if request.version is None or request.commit is not None or client.silence or pin not in _cold:
        return
    _cold.discard(pin)
    try:
        versions = client.list_versions(pin.repo_id, pin.repo_type)
    except LoadError as error:  # it was not asked for: what was is served all the same
        logger.debug("which versions of %s there are could not be asked: %s", request.repo_id, error)
        return
    notes(request.repo_id).write_newest(max(versions, default=request.version))


def tell_newer(request: KernelRequest) -> None:
    """Say once that there is a newer version, if that is known."""
    if request.version is None or request.commit is not None:
        return
    newest = notes(request.repo_id).newest()
    if newest is not None and newest > request.version:
        say_once(f"Version {request.version} of {request.repo_id} is used, and there is version {newest}.")


def say_once(message: str) -> None:
    """Log a warning, unless that was done."""
    with _asking:
        if message in _said:
            return
        _said.add(message)
    logger.warning(message)


def _pin(client: Client, repo_id: str, wanted: str) -> tuple[Pin, str]:
    key = (str(cache_folder(repo_id, REPO_TYPES[0])), wanted)
    with _asking:
        if key not in _pins:
            pin, how = _find_pin(client, repo_id, wanted)
            if how != _HUB:
                return pin, how
            _pins[key] = pin
        return _pins[key], _HUB


def _find_pin(client: Client, repo_id: str, wanted: str) -> tuple[Pin, str]:
    known = notes(repo_id).pin(wanted)
    if known is not None and COMMIT.fullmatch(wanted):
        return known, "a commit that is in the cache"
    if client.silence:
        if known is None:
            raise not_cached(client.silence)
        return known, f"from the cache: {client.silence} is set"
    try:
        return client.find_pin(repo_id, wanted), _HUB
    except UnreachableError as error:
        if known is None:
            raise
        return known, f"from the cache: {error}"


def _redirect(pin: Pin, client: Client) -> Redirect | None:
    """Return where a commit is redirected to; asks the Hub if it was not asked before."""
    record = find_record(pin, client)
    return Redirect(*record.redirect) if record.redirect else None


def find_record(pin: Pin, client: Client) -> Record:
    """Return what a commit holds; asks the Hub if it was not asked before.

    Raises:
        LoadError: If it cannot be listed, or says something malformed about where its kernel is.
        UnreachableError: If the Hub does not answer.
    """
    record = notes(pin.repo_id).record(pin.commit) or Record()
    if record.redirect is None and not record.variants:
        variants, status = client.list_files(pin)
        found = None if status is None else parse_status(client.read_status(pin, status))
        record = replace(record, variants=variants, redirect=(found.repo_id, found.revision) if found else ())
        if variants or found:  # an answer without either may be no answer of the Hub
            notes(pin.repo_id).write_record(pin.commit, record)
        _cold.add(pin)
    return record
