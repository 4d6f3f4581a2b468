"""Answers of the Hub that the processes of one cache share: one asks, the others read a note beside the pins.

A note costs no freshness: it is read only by processes that had started when its question was sent, and for
`KERNELS_SHARE_SECONDS` at most. Policies, trust by settings, and all hashes are checked in each process all the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from kernels_core import ArgumentError

from ...files import alone_with
from .board import SHARED_ERRORS
from .download import hub_address
from .metadata_cache import MetadataCache

VARIABLE = "KERNELS_SHARE_SECONDS"
_LIFE = 300.0  # in which the Hub counts requests against its limits
_SKEW = 5.0  # by which the clock of another host that writes to this cache may be ahead

_started = time.time()


def share_seconds() -> float:
    """Return for how many seconds a note serves other processes; 0 where each process asks for itself."""
    text = os.environ.get(VARIABLE, "").strip()
    try:
        seconds = float(text or _LIFE)
    except ValueError:
        seconds = -1
    if not seconds >= 0:
        raise ArgumentError(f"{VARIABLE} is {text!r}: set it to a number of seconds, or unset it.")
    return seconds


def share(
    question: str,
    cache: MetadataCache,
    send: Callable[[], Any],
    *,
    patience: float,
    is_done: Callable[[], bool] | None = None,
    lasts: Callable[[Any], object] = bool,
) -> Any:
    """Return the answer to a question, which one process of this cache asks for those that ask at the same time.

    Args:
        question: Names the question.
        cache: The metadata of the repository that it is about.
        send: Asks; returns a value of JSON.
        patience: Seconds to wait for another process that asks: one that is suspended must not suspend all others.
        is_done: Whether there is nothing to ask any more, for work whose result is no note but files.
        lasts: Whether an answer serves processes that ask later. They ask again after one that refuses a kernel, as
            after a failure: it may have been wrong, or be outdated.

    Raises:
        UnreachableError, RepositoryError: The answer, which another process may have got for this one.
    """
    if not share_seconds():
        return send()
    began = time.time()

    def known() -> dict[str, Any]:
        if is_done is not None and is_done():
            return {"answer": None}
        note = cache.note(question)
        asked, now = note.get("time"), time.time()
        if note.get("hub") != hub_address() or not isinstance(asked, float) or asked > now + _SKEW:
            return {}
        # A failure is no news for a process that asks later: it asks again.
        after = max(_started, now - share_seconds()) if "answer" in note and lasts(note["answer"]) else began
        return note if asked >= after and (is_done is None or "error" in note) else {}

    if "answer" in (note := known()):
        return note["answer"]
    with alone_with(cache.lock(question), patience):
        note = known()  # another process may have asked while this one waited
        if "answer" in note:
            return note["answer"]
        if kind := SHARED_ERRORS.get(note.get("error", "")):
            raise kind(note["message"])
        sent, hub = time.time(), hub_address()
        try:
            answer = send()
        except tuple(SHARED_ERRORS.values()) as error:
            failure = {"time": time.time(), "hub": hub, "error": type(error).__name__, "message": str(error)}
            cache.write_note(question, failure)
            raise
        if is_done is None:
            cache.write_note(question, {"time": sent, "hub": hub, "answer": answer})
        return answer
