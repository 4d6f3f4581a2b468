"""Warnings that are issued once: by key, by memory, from many threads, and where warnings are errors."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import nn
from warned import never

from kernels_core import KernelsWarning, LayerRequest, Mode, PluginManager, WarnOnce, hookimpl, kernelize, warn_once
from kernels_core.testing import _start_anew
from kernels_plugins import use_kernel_mapping

Make = Callable[..., Any]
ERRORS = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()


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
    """A warning of one object is issued by another and by the process, too."""
    with pytest.warns(KernelsWarning) as caught:
        for warn in (WarnOnce(), WarnOnce(), warn_once):
            warn("slow"), warn("slow")
    assert len(caught) == 3


def test_errors_are_raised_each_time() -> None:
    """Where warnings are errors, each attempt raises and is not remembered; nor is one whose display fails."""
    warn = WarnOnce()
    with never():
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
        other.join(PATIENCE)
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


def test_a_warning_points_to_the_line_of_the_user(make_layer: Make, isolated_plugins: PluginManager) -> None:
    """Warnings of calls, also in models, of plugins at fault and of `kernelize` have the user's file and line."""
    unfit = type("Unfit", (nn.Module,), {"forward": lambda self, x, y: x})

    class Offers:
        @hookimpl
        def kernels_find_candidates(self, request: LayerRequest) -> Any:
            if request.layer_name == "Faulty":
                raise ValueError("at fault")

    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += 1  # so that the call cannot be made anew
            raise ValueError("at fault")

    isolated_plugins.register(Offers())
    x = torch.ones(2)
    ways: list[Callable[[], object]] = [
        lambda: make_layer("One")()(x),
        lambda: nn.Sequential(nn.Sequential(make_layer("Two")()))(x),
        lambda: make_layer("Faulty")()(x),
        lambda: kernelize(make_layer("Three")(), mode=Mode.INFERENCE, device="cpu"),
    ]
    with use_kernel_mapping({"One": {"cpu": unfit}, "Two": {"cpu": unfit}, "Three": {"cuda": unfit}}):
        for number, way in enumerate(ways):
            with pytest.warns(KernelsWarning) as caught:
                way()
            assert [warning.filename for warning in caught] == [__file__], number
            assert caught[0].lineno == way.__code__.co_firstlineno
    with use_kernel_mapping({"Four": {"cpu": Raises}}), pytest.warns(KernelsWarning) as caught:
        with contextlib.suppress(ValueError):
            make_layer("Four")()(x)
    assert {warning.filename for warning in caught} == {__file__}


def test_a_warning_points_beyond_the_modules_of_python() -> None:
    """Where a context manager of ours warns, the line is not one of `contextlib`."""
    scene: dict[str, Any] = {"__name__": "kernels_core.scene", "warn": WarnOnce()}
    text = "import contextlib\n@contextlib.contextmanager\ndef left():\n    yield\n    warn('slow')\n"
    exec(f"{text}def act():\n    with left(): pass", scene)
    with pytest.warns(KernelsWarning) as caught:
        scene["act"]()
    assert caught[0].filename == __file__


def test_the_level_counts_lines_of_others() -> None:
    """With stacklevel 1 a warning is where a plugin calls `warn_once`, with 2 where its caller is; never beyond."""

    def inner(level: int) -> int:
        with pytest.warns(KernelsWarning) as caught:
            WarnOnce()("slow", stacklevel=level)
        return caught[0].lineno if level < 9999 else len(caught)

    first = inner.__code__.co_firstlineno
    assert inner(1) == first + 2
    assert inner(2) == first + 7
    assert inner(9999) == 1


@pytest.mark.filterwarnings(re.findall(r"pytest -W (\S+)", ERRORS)[0])
def test_the_filter_of_the_docs_makes_errors(python: Make, make_layer: Make) -> None:
    """The options that docs/errors.md names make a refusal in a call an error: that for pytest, and that for Python."""
    unfit = type("Unfit", (nn.Module,), {"forward": lambda self, x, y: x})
    with use_kernel_mapping({"Add": {"cpu": unfit}}), pytest.raises(KernelsWarning, match="is not used"):
        make_layer()()(torch.ones(2))
    (option,) = re.findall(r"python -W (\S+)", ERRORS)
    code = f"import warnings; warnings._setoption({option!r}); import kernels_core; kernels_core.warn_once('slow')"
    done = python(code, check=False)
    assert done.returncode == 1 and "KernelsWarning: slow" in done.stderr and "Invalid" not in done.stderr


def test_forgetting() -> None:
    """A warning that is forgotten is issued again; the kit for plugins forgets all that the process has issued."""
    warn = WarnOnce()
    with pytest.warns(KernelsWarning):
        warn("slow", "a"), warn("slow", "b"), warn_once("slow")
        warn.forget("a")
        assert warn("slow", "a") and not warn("slow", "b")
        warn.forget()
        assert warn("slow", "b") and not warn_once("slow")
        _start_anew()
        assert warn_once("slow")
