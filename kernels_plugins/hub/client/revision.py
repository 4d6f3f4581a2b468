"""The commit of a revision, and the repository that serves it: requested once, cached, redirects followed."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from kernels_core import LoadError, warn_once

from ...locks import KeyedLocks
from ..errors import RevisionError, UnknownError, UnreachableError
from ..names import is_commit
from ..request import KernelRequest
from .answers import share
from .board import ask_once, heard
from .download import REPO_TYPES, Client, cache_folder, metadata_cache, not_cached
from .metadata_cache import Pin, Record
from .redirect import parse_status

T = TypeVar("T")

logger = logging.getLogger("kernels_plugins.hub")
"""For notes that are no faults: these are no warnings, which may be errors."""

_MOST_REDIRECTS = 5
_HUB = "from the Hub"
BRANCH = "refs/heads/"
_VERSION = f"{BRANCH}v"
SERVED = "served/"
"""Before a commit: its pin before redirects. Under the commit itself is that after redirects."""

_asking = KeyedLocks()
"""One thread at a time asks for a repository."""

_pins: dict[tuple[str, str], Pin] = {}
"""Answers of the Hub in this process: the layers of one model come from one commit, also after a push."""

_listed: dict[Pin, Record] = {}
"""The commits whose files were listed in this process, and not verified yet."""

_forgotten: Counter[Pin] = Counter()
"""How many listings of a commit were wrong: the next one is another question, to which there is no answer yet."""


@dataclass(frozen=True)
class Pinned:
    """A revision that was resolved."""

    first: Pin  # the commit of the revision in the repository that was requested
    pin: Pin  # the commit that serves it, after redirects
    how: str  # how that is known, in words
    redirect: str = ""  # where it was redirected to, in words; empty if it was not


def find_revision(request: KernelRequest, client: Client) -> Pinned:
    """Return the commit of a request; asks the Hub at most once in a process."""
    first, how = _pin(client, request.repo_id, request.ref)
    pin, passed = first, [f"{request.repo_id} at {request.wanted}"]
    try:
        # A locked commit is that very commit, wherever its kernel is now.
        while request.commit is None and (target := find_record(pin, client).redirect):
            place = " at ".join(target)
            passed.append(place)
            if place in passed[:-1] or len(passed) > _MOST_REDIRECTS + 1:
                why = "in a circle" if place in passed[:-1] else "too far"
                raise UnknownError(
                    f"it is redirected {why}: {' -> '.join(passed)}. Tell its publisher, or name another revision"
                )
            pin, how = _pin(client, *target)
    except UnreachableError as error:
        known = metadata_cache(request.repo_id).pin(request.ref)
        if known is None:
            raise
        pin, how = known, f"from the cache: {error}"
    if len(passed) == 1 and pin.repo_id == request.repo_id:
        return Pinned(first, pin, how)
    where = " -> ".join(passed[1:]) or pin.repo_id
    warn_once(f"{request.repo_id} at {request.wanted} is redirected to {where}: name that instead.", logger=logger)
    return Pinned(first, pin, how, where)


def report_newer(request: KernelRequest) -> None:
    """Log once that there was a newer version, when the Hub was last asked for the versions."""
    if request.version is None or request.commit is not None:
        return
    newest = metadata_cache(request.repo_id).newest()
    if newest is not None and newest > request.version:
        message = f"Version {request.version} of {request.repo_id} is used, and there is version {newest}."
        warn_once(message, logger=logger)


def _pin(client: Client, repo_id: str, ref: str) -> tuple[Pin, str]:
    folder = str(cache_folder(repo_id, REPO_TYPES[0]))
    with _asking.hold(folder):
        if (folder, ref) not in _pins:
            known = metadata_cache(repo_id).pin(ref)
            if known is not None and is_commit(ref):
                return known, "a commit that is in the cache"
            # All ranks of a job get one commit: also those that are offline, or whose cache has another one.
            answer = ask_once(f"the commit of {repo_id} at {ref}", lambda: _find_pin(client, repo_id, ref))
            # As another rank has it, whose version of this library may be another one.
            found = answer if isinstance(answer, dict) else {}
            pin, how = _parsed(Pin.parse(found.get("pin"))), str(found.get("how"))
            heard(how == _HUB)
            if how != _HUB:  # served for now: the next request asks again
                return pin, how
            _pins[folder, ref] = pin
        return _pins[folder, ref], _HUB


def _find_pin(client: Client, repo_id: str, ref: str) -> dict[str, Any]:
    cache = metadata_cache(repo_id)
    known, version = cache.pin(ref), ref.removeprefix(_VERSION)

    def send() -> dict[str, Any]:
        pin = client.find_pin(repo_id, ref) if version == ref else _find_version(client, repo_id, int(version))
        return asdict(pin)

    if client.silence:
        if known is None:
            raise not_cached(client.silence)
        return {"pin": asdict(known), "how": f"from the cache: {client.silence} is set"}
    if known is not None:
        client = replace(client, patience=client.patience / 6)  # there is something to serve meanwhile
    try:
        return {"pin": share(f"the commit of {ref}", cache, send, patience=2 * client.patience), "how": _HUB}
    except UnreachableError as error:
        if known is None:
            raise
        return {"pin": asdict(known), "how": f"from the cache: {error}"}


def _find_version(client: Client, repo_id: str, version: int) -> Pin:
    """Return the pin of a version: the commit of that branch, which the name alone could mistake for a tag's."""
    versions = client.list_versions(repo_id)
    if version not in versions:
        existing = ", ".join(map(str, sorted(versions))) or "none"
        raise RevisionError(f"it has no version {version}: versions that exist are {existing}")
    cache = metadata_cache(repo_id)
    cache.write_newest(max(versions))  # for `report_newer`, which sends no request
    commit = versions[version]
    return cache.pin(SERVED + commit) or client.find_pin(repo_id, commit)


def find_record(pin: Pin, client: Client) -> Record:
    """Return the metadata of a commit; asks the Hub if they are not in the cache."""
    cache = metadata_cache(pin.repo_id)
    record = cache.record(pin.commit) or Record()
    if record.redirect is not None or record.variants:
        return record
    listed = _listed.get(pin)  # one look: another thread may keep or forget it
    if listed is None:
        question = _listing(pin)

        def send() -> dict[str, Any]:
            variants, status = client.list_files(pin)
            redirect = () if status is None else parse_status(client.read_status(pin, status))
            return asdict(Record(variants=variants, redirect=redirect))

        patience = 2 * client.patience
        answer = ask_once(question, lambda: share(question, cache, send, patience=patience, lasts=_has_builds))
        # As JSON, also where this process asked: so the others read it.
        found = _parsed(Record.parse(json.loads(json.dumps(answer))))
        heard(True)
        listed = replace(record, variants=found.variants, redirect=found.redirect)
        if listed.redirect:  # the file that says so was compared with the listing
            cache.update_record(pin.commit, variants=listed.variants, redirect=listed.redirect)
        if listed.variants or listed.redirect:  # an answer without either may be no answer of the Hub
            _listed[pin] = listed  # not kept on disk before the files passed
    return listed


def keep_record(pin: Pin) -> None:
    """Keep the listing of a commit, whose files passed the checks, in the cache."""
    if (listed := _listed.get(pin)) is not None:
        metadata_cache(pin.repo_id).update_record(pin.commit, variants=listed.variants, redirect=listed.redirect)
        _listed.pop(pin, None)  # after the file has it: threads that look meanwhile need not list again


def forget_record(pin: Pin) -> None:
    """Forget the listing of a commit, in the cache, too: files do not pass the checks, and it may be the fault."""
    _listed.pop(pin, None)
    cache = metadata_cache(pin.repo_id)
    cache.write_note(_listing(pin), {})
    _forgotten[pin] += 1
    record = cache.record(pin.commit)
    if record is not None and record.variants:  # kept with another build, whose files passed
        cache.update_record(pin.commit, variants={}, redirect=None)


def _listing(pin: Pin) -> str:
    again = f", asked again ({_forgotten[pin]})" if pin in _forgotten else ""
    return f"the files of {pin.repo_type} {pin.repo_id} at {pin.commit}{again}"


def _has_builds(answer: Any) -> bool:
    """Whether a listing, as JSON, has a build or leads to another repository."""
    return isinstance(answer, dict) and any(map(answer.get, ("variants", "redirect")))


def _parsed(answer: T | None) -> T:
    if answer is None:
        raise LoadError(
            "another process has shared an answer of the Hub that cannot be read: upgrade it, or remove the folder "
            "`kernels-core` of the repository from the cache; if KERNELS_LEADER_DIR is set, name another one"
        )
    return answer
