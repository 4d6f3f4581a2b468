"""A board on which the ranks of a job read the answers that one of them got, so that all of them have the same.

The board is the store of the default process group, or the folder `KERNELS_LEADER_DIR` where a launcher makes no group.
For each question, the rank that asks it first leads: it asks the Hub, and posts the answer; the others wait for that.
Rank 0 would be a poor leader for all questions: under pipeline parallelism it may never have the layer that rank 3 has.

Why a store and no collective: a layer is resolved in its first forward, which each rank reaches at another moment, and
some ranks never. A broadcast would wait for all of them, and would match up with a collective of the model. A rank that
leads waits for the Hub only, never for another rank, and within one question asks no other, so no circle can close.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.utils.data import get_worker_info

from kernels_core import ArgumentError, DecisionError, KernelsError, LoadError, switch
from kernels_core.torch_internals import default_store

from ..errors import RepositoryError, RevisionError, UnreachableError
from .download import hub_address

SWITCH, FOLDER, TIMEOUT = "KERNELS_LEADER", "KERNELS_LEADER_DIR", "KERNELS_LEADER_TIMEOUT"
_PATIENCE = 180.0
"""Seconds that a rank waits for the one that leads, unless `KERNELS_LEADER_TIMEOUT` names another number."""

_QUIET = 10.0
"""Seconds after which a rank logs the question that it waits for."""

logger = logging.getLogger("kernels_plugins.hub")

_silent = False

SHARED_ERRORS = {kind.__name__: kind for kind in (RepositoryError, RevisionError, UnreachableError)}
"""Answers of the Hub that are no: others need not ask. All other errors are the asker's own, such as a full disk."""

_DEAD = json.dumps({"dead": True})

_inherited: Any = None
"""The store of a parent process. Its connection is the parent's: bytes of two processes would mix on it."""


class Board(Protocol):
    """Texts by key, that all ranks of a job read. Where it fails, each method raises as `ask_once`."""

    def take(self, key: str) -> bool:
        """Return whether this is the first call with this key, of all ranks."""

    def post(self, key: str, text: str) -> str:
        """Write a text, unless there is one; return the one that is there."""

    def read(self, key: str) -> str | None:
        """Return a text, None where there is none yet; never waits for one."""


class GroupBoard:
    """The store of the default process group."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def take(self, key: str) -> bool:
        """Count up: the store does that for one rank after the other."""
        with self._naming():
            return bool(self._store.add(key, 1) == 1)

    def post(self, key: str, text: str) -> str:
        """Compare with nothing and set, as one step of the store."""
        with self._naming():
            return str(self._store.compare_set(key, "", text).decode())

    def read(self, key: str) -> str | None:
        """Look first: `get` would wait, and meanwhile hold the connection that other threads need, as NCCL's do."""
        with self._naming():
            return self._store.get(key).decode() if self._store.check([key]) else None

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise _failure(
                UnreachableError,
                f"the store of the process group fails ({error}), so ranks cannot agree on a commit: see whether the "
                f"process that holds it has ended, as rank 0, or set {SWITCH}=0 on all ranks",
            ) from error


class FolderBoard:
    """A folder that all ranks see. New files and links are made by one rank only, also on NFS, without any locks."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_absolute():  # ranks may work in different folders, and would share nothing without a word
            text = f"{FOLDER} is {str(folder)!r}: write the whole path, which is the same for all ranks"
            raise _failure(LoadError, text)
        self._folder = folder
        with self._naming():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        # What is posted decides which code runs.
        if hasattr(os, "geteuid") and (found.st_uid not in (0, os.geteuid()) or found.st_mode & stat.S_IWOTH):
            text = f"{FOLDER} is {folder}, which other users may write: name a folder that only you may write"
            raise _failure(LoadError, text)

    def take(self, key: str) -> bool:
        """Make a file that must not exist, with some text: a full disk shows here, and not after the Hub was asked."""
        place = self._folder / key
        with self._naming():
            try:
                with place.open("x") as file:
                    file.write(f"process {os.getpid()}")
            except FileExistsError:
                return False
            except OSError:
                place.unlink(missing_ok=True)
                raise
            return True

    def post(self, key: str, text: str) -> str:
        """Write a file whole, then give it its name, unless that is taken."""
        place = self._folder / f"{key}.json"
        new = self._folder / f"{key}.{secrets.token_hex(8)}.new"
        with self._naming():
            try:
                with new.open("x", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())  # a full disk may show here only
                with suppress(FileExistsError):
                    os.link(new, place)
            finally:
                new.unlink(missing_ok=True)
            return place.read_text(encoding="utf-8")

    def read(self, key: str) -> str | None:
        """Read a file, where there is one."""
        with self._naming():
            try:
                return (self._folder / f"{key}.json").read_text(encoding="utf-8")
            except FileNotFoundError:
                return None

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _failure(
                UnreachableError,
                f"{FOLDER} is {self._folder}, and ranks cannot agree there ({type(error).__name__}: {error}): name a "
                "folder that all ranks may write, with free space",
            ) from error


def _failure(kind: type[KernelsError], text: str) -> KernelsError:
    """Return the error of a rank that cannot share: one that no reference answers, where `KERNELS_LEADER` is on."""
    return (
        DecisionError(f"{SWITCH} is on, and {text}", found=text) if os.environ.get(SWITCH, "").strip() else kind(text)
    )


def find_board() -> Board | None:
    """Return the board of this job; None where this process is no rank of one, or `KERNELS_LEADER` is off."""
    asked = bool(os.environ.get(SWITCH, "").strip())
    try:
        if asked and not switch(SWITCH):
            return None
    except ArgumentError as error:
        raise DecisionError(str(error)) from None
    if folder := os.environ.get(FOLDER):
        return FolderBoard(Path(os.path.expanduser(folder)))
    store = _group_store()
    if store is None and asked:
        raise _failure(
            LoadError,
            f"there is neither a process group of several ranks nor {FOLDER}: name a folder that all ranks see, "
            f"initialise torch.distributed first, or unset {SWITCH}",
        )
    return None if store is None else GroupBoard(store)


def leader_patience() -> float:
    """Return how many seconds a rank waits for the one that leads."""
    text = os.environ.get(TIMEOUT, "").strip()
    try:
        seconds = float(text or _PATIENCE)
    except ValueError:
        seconds = -1
    if not 0 < seconds < float("inf"):
        raise _failure(ArgumentError, f"{TIMEOUT} is {text!r}: set it to a number of seconds, or unset it.")
    return seconds


def hub_is_silent() -> bool:
    """Whether this job last gave a question up: others are not repeated for as long, until the Hub has answered one.

    Ten kernels would take ten times the patience of one otherwise, on a cluster that cannot reach the Hub.
    """
    return _silent


def heard(from_hub: bool) -> None:
    """Note whether an answer to `ask_once` is one of the Hub: the cache, or a rank itself, answers others."""
    global _silent
    _silent = not from_hub


def ask_once(question: str, send: Callable[[], Any]) -> Any:
    """Return the answer to a question, which one rank of the job asks for all; without a board, ask.

    Every rank gets the same answer. A failure is every rank's, too, and the next attempt is a new round: so none of
    them is left behind on its reference because it alone had no luck. A rank that leads and dies is waited for, twice.

    Args:
        question: Names the question; equal on all ranks.
        send: Asks; returns a value of JSON.

    Raises:
        UnreachableError: The Hub did not answer, or the board fails, or the rank that leads does not answer in time.
        DecisionError: The same of board and ranks, where `KERNELS_LEADER` is on: no reference serves then.
    """
    global _silent
    board = find_board()
    if board is None:
        return send()
    text = "There is no answer yet to: %s. One rank asks the Hub, again and again, and the others wait."
    telling = threading.Timer(_QUIET, logger.warning, [text, question])
    telling.daemon = True
    telling.start()
    try:
        return _answer(board, question, send)
    except UnreachableError:
        _silent = True
        raise
    finally:
        telling.cancel()


def _answer(board: Board, question: str, send: Callable[[], Any]) -> Any:
    key, late = hashlib.sha256(f"{hub_address()} {question}".encode()).hexdigest()[:32], 0
    for turn in count():
        if (text := board.read(key)) is not None:
            return _parse(text, "answer")["answer"]
        failed = f"{key}-{turn}-failed"
        if board.read(failed) is not None:  # before we asked: this rank takes part in the next round
            continue
        if board.take(f"{key}-{turn}"):
            return _lead(board, key, failed, send)
        text = _wait(board, key, failed)
        # A round whose leader is dead is over for good: ranks that ask later, as after a restart, need not wait again.
        told = _parse(board.post(failed, _DEAD) if text is None else text)
        if told.get("dead"):
            late += 1
            if late == 2:
                raise _failure(
                    UnreachableError,
                    f"the rank that asks the Hub for {question!r} has not answered in {leader_patience():g} seconds, "
                    f"and neither has the next one: see which rank has ended or hangs, or set {TIMEOUT} higher",
                )
        if "answer" in told:
            return told["answer"]
        if kind := SHARED_ERRORS.get(told.get("error", "")):
            raise kind(told["message"])
    raise AssertionError("unreachable")  # pragma: no cover - rounds do not end


def _lead(board: Board, key: str, failed: str, send: Callable[[], Any]) -> Any:
    try:
        answer = send()
    except BaseException as error:
        told = {"error": type(error).__name__, "message": str(error)} if type(error).__name__ in SHARED_ERRORS else {}
        with suppress(UnreachableError, DecisionError):  # the others wait no longer than they would for one that died
            board.post(failed, json.dumps(told))
        raise
    # Another rank has posted one, if it took this one for dead: that one holds for all.
    return _parse(board.post(key, json.dumps({"answer": answer})), "answer")["answer"]


def _wait(board: Board, key: str, failed: str) -> str | None:
    """Wait for an answer, or for a failure of this round; return None where there is neither in time."""
    end, pause = time.monotonic() + leader_patience(), 0.01
    while time.monotonic() < end:
        for place in (key, failed):
            if (text := board.read(place)) is not None:
                return text
        time.sleep(pause)
        pause = min(1.5 * pause, 0.25)  # a thousand ranks look at one store
    return None


def _parse(text: str, *needed: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), dict) and found.keys() >= {*needed}:
            return found
    raise _failure(LoadError, f"the ranks' board has {text[:80]!r} where an answer belongs: name another {FOLDER}")


def _group_store() -> Any:
    """Return the store of the default process group, where this process is one of several ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    if get_worker_info() is not None or dist.get_backend() == "fake":  # a child that loads data; a group of one process
        return None
    store = default_store()
    return None if store is _inherited else store


def _in_child() -> None:
    global _inherited
    _inherited = default_store() if dist.is_available() and dist.is_initialized() else None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_child)
