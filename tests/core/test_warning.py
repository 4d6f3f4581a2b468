"""Warnings that are issued once: by key, by memory, from many threads, and where warnings are errors."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any

import pytest

from kernels_core import KernelsWarning, WarnOnce, warn_once
from kernels_core.testing import _start_anew


def test_each_key_once() -> None:
    """A key is warned of once; without one, the text is the key, whatever addresses are in it."""
    warn = WarnOnce()
    with pytest.warns(KernelsWarning) as caught:
        assert warn("slow", "a") and warn("slow", "b") and warn("slow")
        assert not warn("slower", "a") and not warn("slow")
        assert warn(f"{object.__new__(Slow)!r} is slow") and not warn(f"{object.__new__(Slow)!r} is slow")
        assert warn(f"{object()!r} is slow")
    assert [str(warning.message)[:4] for warning in caught] == ["slow", "slow", "slow", "<tes", "<obj"]


class Slow:
    """Has an address in its repr."""


def test_memories_are_apart() -> None:
    """What one object warned of, another and the process warn of, too."""
    with pytest.warns(KernelsWarning) as caught:
        for warn in (WarnOnce(), WarnOnce(), warn_once):
            warn("slow"), warn("slow")
    assert len(caught) == 3


def test_errors_are_raised_each_time() -> None:
    """Where warnings are errors, each attempt raises and is not remembered; nor is one whose display fails."""
    warn = WarnOnce()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(KernelsWarning, match="slow"):
                warn("slow")

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = broken
        with pytest.raises(KeyboardInterrupt):
            warn("slow")
    with pytest.warns(KernelsWarning, match="slow"):
        assert warn("slow")


def test_what_shows_a_warning_may_warn() -> None:
    """The code of a user that shows warnings may warn itself, also in another thread: no lock is held meanwhile."""
    warn = WarnOnce()
    shown: list[str] = []

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        shown.append(str(message))
        other = threading.Thread(target=warn, args=("inner",))
        other.start()
        other.join(60)
        assert not other.is_alive()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        warn("outer")
    assert shown == ["outer", "inner"]


def test_many_threads_warn_once() -> None:
    """Of threads that warn at the same time, one does."""
    warn = WarnOnce()
    start = threading.Barrier(8)
    answers: list[bool] = []

    def run() -> None:
        start.wait()
        answers.extend(warn("slow", number, logger=logging.getLogger("quiet")) for number in range(200))

    logging.getLogger("quiet").disabled = True
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.count(True) == 200


def test_a_log_instead(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    """A logger gets the message in place of the module `warnings`, once as well; % in it means nothing."""
    warn = WarnOnce()
    for _ in range(2):
        warn("100 % slow", logger=logging.getLogger("kernels_core"))
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("kernels_core", "WARNING", "100 % slow")
    ]
    assert not recwarn.list


def test_the_level_is_that_of_the_module_warnings() -> None:
    """With stacklevel 1 a warning is where `warn_once` is called, with 2 where its caller is."""

    def inner(level: int) -> int:
        with pytest.warns(KernelsWarning) as caught:
            WarnOnce()("slow", stacklevel=level)
        assert caught[0].filename == __file__
        return caught[0].lineno

    first = inner.__code__.co_firstlineno
    assert inner(1) == first + 2
    assert inner(2) == first + 8


def test_forgetting() -> None:
    """What is forgotten is issued again; the kit for plugins forgets all that the process has issued."""
    warn = WarnOnce()
    with pytest.warns(KernelsWarning):
        warn("slow", "a"), warn("slow", "b"), warn_once("slow")
        warn.forget("a")
        assert warn("slow", "a") and not warn("slow", "b")
        warn.forget()
        assert warn("slow", "b") and not warn_once("slow")
        _start_anew()
        assert warn_once("slow")
