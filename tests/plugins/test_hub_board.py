"""The board of a job: one rank asks, all have its answer; leaders that fail, die or are slow; boards that fail."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from kernels_core import ArgumentError, DecisionError, IntegrityError, LoadError
from kernels_plugins.hub import fetching
from kernels_plugins.hub.client import board, revision
from kernels_plugins.hub.client.board import Board, FolderBoard, GroupBoard, ask_once, find_board
from kernels_plugins.hub.errors import RevisionError, UnreachableError
from kernels_plugins.hub.request import KernelRequest

RANKS = 8


@pytest.fixture(params=["HashStore", "TCPStore", "folder"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """Give all threads of a test one board: each thread is a rank."""
    monkeypatch.setenv("KERNELS_LEADER_TIMEOUT", "60")
    monkeypatch.setattr(board, "_silent", False)
    one: Board
    if request.param == "folder":
        one = FolderBoard(tmp_path / "board")
    else:
        one = GroupBoard(dist.HashStore() if request.param == "HashStore" else dist.TCPStore("127.0.0.1", 0, 1, True))
    monkeypatch.setattr(board, "find_board", lambda: one)
    yield one


def ranks(ask: Callable[[int], object]) -> list[object]:
    """Let all ranks ask at once; return their answers, or errors."""

    def tried(rank: int) -> object:
        try:
            return ask(rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(tried, range(RANKS)))


def test_one_rank_asks_and_all_have_its_answer(shared: Board) -> None:
    """Of ranks that ask one question at once, one sends it; each rank has the answer; late ones need not wait."""
    sent: list[int] = []

    def ask(rank: int) -> object:
        return ask_once("which commit", lambda: (sent.append(rank), time.sleep(0.05), {"by": rank})[-1])

    answers = ranks(ask)
    assert answers == [{"by": sent[0]}] * RANKS and len(sent) == 1
    assert ask(99) == {"by": sent[0]}
    assert ask_once("another question", lambda: None) is None


def test_a_failure_is_that_of_all_and_the_next_attempt_is_a_new_round(shared: Board) -> None:
    """Where the Hub does not answer, every rank that waits has that error; the next attempt sends one request again."""
    numbers = itertools.count()

    def send() -> int:
        time.sleep(0.3)  # so that all ranks wait
        if (number := next(numbers)) == 0:
            raise UnreachableError("the Hub is in trouble (503)")
        return number

    first = ranks(lambda rank: ask_once("which commit", send))
    assert {type(one) for one in first} == {UnreachableError} and {str(one) for one in first} == {
        "the Hub is in trouble (503)"
    }
    assert ranks(lambda rank: ask_once("which commit", send)) == [1] * RANKS


def test_a_hub_that_is_silent_is_told_and_not_asked_for_as_long_again(
    shared: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that waits long logs the question; once one was given up, the client repeats others less."""
    monkeypatch.setattr(board, "_QUIET", 0.01)
    told = threading.Event()
    monkeypatch.setattr(board.logger, "warning", lambda *text: told.set() if "which commit" in text[1] else None)

    def repeats() -> bool:
        return bool(fetching._client(KernelRequest("acme/norm", version=1)).persistent)

    def never() -> None:
        assert told.wait()
        raise UnreachableError("the Hub cannot be reached")

    assert repeats()
    with pytest.raises(UnreachableError):
        ask_once("which commit", never)
    assert not repeats()
    assert ask_once("a question that a rank answers itself", lambda: 1) == 1
    assert not repeats()


def test_errors_of_the_rank_itself_are_its_own(shared: Board) -> None:
    """A rank with a fault of its own raises that, and the next one leads; an answer of the Hub is every rank's."""

    def send(rank: int) -> int:
        time.sleep(0.05)
        if len(faulty) < 2:
            faulty.append(rank)
            raise IntegrityError("its disk")
        return rank

    faulty: list[int] = []
    answers = ranks(lambda rank: ask_once("which files", lambda: send(rank)))
    assert all(isinstance(answers[rank], IntegrityError) for rank in faulty)
    others = [answers[rank] for rank in range(RANKS) if rank not in faulty]
    assert len(others) == RANKS - 2 and len(set(map(str, others))) == 1 and isinstance(others[0], int)

    def refuse() -> None:
        time.sleep(0.3)
        raise RevisionError("it has no version 7")

    assert {type(one) for one in ranks(lambda rank: ask_once("version 7", refuse))} == {RevisionError}


def test_a_leader_that_dies_is_replaced(shared: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait for a leader that has died as long as is set; then another one leads, and all have its answer."""
    monkeypatch.setenv("KERNELS_LEADER_TIMEOUT", "0.4")
    began, dead = threading.Event(), threading.Event()

    def slow() -> str:
        began.set()
        dead.wait()
        return "late"

    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(ask_once, "which commit", slow)
        began.wait()
        try:
            assert ranks(lambda rank: ask_once("which commit", lambda: "next")) == ["next"] * RANKS
        finally:
            dead.set()
        assert leader.result() == "next"  # it was only slow: it takes what the others have


def test_dead_leaders_are_waited_for_once(shared: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that asks after two leaders have died, as after a restart with the same folder, gets the answer."""
    monkeypatch.setenv("KERNELS_LEADER_TIMEOUT", "0.05")
    real = shared.take
    monkeypatch.setattr(shared, "take", lambda key: real(key) and False)
    with pytest.raises(UnreachableError, match="and neither has the next one"):
        ask_once("which commit", lambda: "none")
    monkeypatch.setattr(shared, "take", real)
    monkeypatch.setenv("KERNELS_LEADER_TIMEOUT", "5")
    assert ask_once("which commit", lambda: "the newest") == "the newest"


def test_two_leaders_that_die_are_an_error_within_a_bound(shared: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks whose leader and the next one have died end with an error that names the question and the remedy."""
    monkeypatch.setenv("KERNELS_LEADER_TIMEOUT", "0.2")
    taken = shared.take
    monkeypatch.setattr(shared, "take", lambda key: taken(key) and False)  # whoever leads ends at once
    for error in ranks(lambda rank: ask_once("which commit", lambda: None)):
        assert isinstance(error, UnreachableError) and "'which commit' has not answered in 0.2 seconds" in str(error)
        assert "KERNELS_LEADER_TIMEOUT" in str(error)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder, a file in its place, and a full disk are errors that name the folder, before a request."""
    (tmp_path / "file").write_text("")
    sent: list[int] = []
    for place in (tmp_path / "file", Path("/proc/kernels")):
        monkeypatch.setenv("KERNELS_LEADER_DIR", str(place))
        with pytest.raises(UnreachableError, match=f"KERNELS_LEADER_DIR is {place}, and ranks cannot agree there"):
            ask_once("which commit", lambda: sent.append(1))
    assert not sent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the files of a child")
def test_a_full_disk_leaves_no_half_of_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that cannot write raises before it asks; nothing half-written is left, and the next rank leads at once."""
    import resource

    monkeypatch.setenv("KERNELS_LEADER_DIR", str(tmp_path))
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # each write fails, as on a full disk
        try:
            ask_once("which commit", lambda: os._exit(3))
        except UnreachableError as error:
            os._exit(7 if "ranks cannot agree there (OSError" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not list(tmp_path.iterdir())
    assert ask_once("which commit", lambda: "whole") == "whole"


def test_a_store_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose server has ended is an error that names it, and is tried again later: `ConnectionError`."""

    class Broken(dist.Store):
        pass

    monkeypatch.setattr(board, "find_board", lambda: GroupBoard(Broken()))
    with pytest.raises(ConnectionError, match=r"the store of the process group fails .*KERNELS_LEADER=0"):
        ask_once("which commit", lambda: None)


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a group, there is no board; asked for one, the error says what to name. Others' folders are refused."""
    assert find_board() is None
    monkeypatch.setenv("KERNELS_LEADER", "1")
    with pytest.raises(DecisionError, match="neither a process group of several ranks nor KERNELS_LEADER_DIR"):
        find_board()
    monkeypatch.delenv("KERNELS_LEADER")
    for folder in ("new", "~nobody-of-this-name/new"):
        monkeypatch.setenv("KERNELS_LEADER_DIR", folder)
        with pytest.raises(LoadError, match="write the whole path"):
            find_board()
    monkeypatch.setenv("KERNELS_LEADER_DIR", str(tmp_path / "new"))
    assert isinstance(find_board(), FolderBoard)
    monkeypatch.setenv("KERNELS_LEADER", "0")
    assert find_board() is None
    monkeypatch.delenv("KERNELS_LEADER")
    (tmp_path / "new").chmod(0o777)
    with pytest.raises(LoadError, match="which other users may write"):
        find_board()
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("KERNELS_LEADER_TIMEOUT", text)
        with pytest.raises(ArgumentError, match="KERNELS_LEADER_TIMEOUT is"):
            board.leader_patience()


@pytest.mark.parametrize("text", ["nonsense", "{}", "[1]"])
def test_a_board_with_other_content(shared: Board, text: str) -> None:
    """Text on the board that is no answer is an error, not a kernel."""
    import hashlib

    from kernels_plugins.hub.client.download import hub_address

    key = hashlib.sha256(f"{hub_address()} which commit".encode()).hexdigest()[:32]
    shared.post(key, text)
    with pytest.raises(LoadError, match=f"{re.escape(repr(text))} where an answer belongs"):
        ask_once("which commit", lambda: None)


@pytest.mark.parametrize("answer", [3, None, [1], {}, {"pin": 3}, {"pin": {"commit": 3}, "how": "x"}])
def test_answers_of_another_version(answer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An answer with another content, as of another version of this library, is an error that names the remedy."""
    monkeypatch.setattr(revision, "ask_once", lambda question, send: answer)
    monkeypatch.setattr(revision, "cache_folder", lambda *which: tmp_path)
    with pytest.raises(LoadError, match="cannot be read: upgrade it"):
        revision._pin(cast(Any, None), "acme/none", "main")
