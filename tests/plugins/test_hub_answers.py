"""Notes that processes of one cache share: which of them serve, and what happens where they cannot be kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hub_scene import Publish, call, kernel, new_process, scale

from kernels_core import ArgumentError
from kernels_plugins.hub.client import answers, revision
from kernels_plugins.hub.client.answers import share
from kernels_plugins.hub.client.board import ask_once
from kernels_plugins.hub.client.download import hub_address, metadata_cache
from kernels_plugins.hub.client.metadata_cache import MetadataCache, Pin
from kernels_plugins.hub.errors import UnreachableError
from kernels_plugins.local_hub.server import LocalHub

pytest_plugins = ["kernels_plugins.hub.testing"]
QUESTION = "which commit"


def asked(cache: MetadataCache, answer: object = "new", patience: float = 60.0) -> Any:
    """Ask; the answer is that of a note, or the given one."""
    return share(QUESTION, cache, lambda: answer, patience=patience)


def test_notes_that_serve_and_those_that_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note serves if it was asked of this Hub since this program started, and not long ago; a failure does not."""
    cache, now = MetadataCache(tmp_path), time.time()
    monkeypatch.setattr(answers, "_started", now - 1000)

    def noted(**changes: Any) -> object:
        note = {"time": now - 100, "hub": hub_address(), "answer": "old"}
        cache.write_note(QUESTION, {**note, **changes})
        return asked(cache)

    assert noted() == "old"
    assert asked(cache) == "old"
    assert noted(hub="https://another.hub") == "new"
    assert noted(time=now - 2000) == noted(time=now - 400) == noted(time=now + 3600) == noted(time="soon") == "new"
    failure = {"time": now - 0.1, "hub": hub_address(), "error": "UnreachableError", "message": "down"}
    cache.write_note(QUESTION, failure)
    assert asked(cache) == "new"
    monkeypatch.setenv("KERNELS_SHARE_SECONDS", "50")
    assert noted() == "new"
    monkeypatch.setenv("KERNELS_SHARE_SECONDS", "0")
    assert noted(time=time.time()) == "new"
    for text in ("soon", "-1", "nan"):
        monkeypatch.setenv("KERNELS_SHARE_SECONDS", text)
        with pytest.raises(ArgumentError, match="KERNELS_SHARE_SECONDS is"):
            noted()


def test_a_failure_serves_those_that_wait_for_it(tmp_path: Path) -> None:
    """A process that waits while another one asks has its failure, and sends nothing."""
    cache, sending, sent = MetadataCache(tmp_path), threading.Event(), []

    def fail() -> None:
        sent.append(1)
        sending.set()
        time.sleep(0.3)
        raise UnreachableError("the Hub is in trouble (503)")

    errors: list[Exception] = []

    def ask() -> None:
        try:
            share(QUESTION, cache, fail, patience=60.0)
        except UnreachableError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    threads[0].start()
    sending.wait()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(error) for error in errors] == ["the Hub is in trouble (503)"] * 4 and sent == [1]


def test_what_cannot_be_kept_or_locked_holds_up_nothing(tmp_path: Path) -> None:
    """In a cache that cannot be written, and while another process hangs with the lock, a process asks for itself."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc/kernels")):
        assert asked(MetadataCache(folder)) == "new"
    cache = MetadataCache(tmp_path)
    place = cache.lock(QUESTION)
    place.parent.mkdir(parents=True)
    with FileLock(place):
        assert asked(cache, patience=0.1) == "new"


def test_a_wrong_list_of_files_is_forgotten(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Files that do not pass their checks take the note of their list with them: another process asks anew."""
    repository = kernel_repository(layers=kernel())
    local_hub.fail("/resolve/", flip=0, times=2)
    assert "removed from the cache" in call(scale(), times=1).why
    pin = Pin(repository.id, "kernel", repository.head())
    revision._forgotten.clear()
    assert metadata_cache(repository.id).note(revision._listing(pin)) == {}


@pytest.mark.parametrize("shared", ["torch-universal", "torch-cuda"])
def test_ranks_with_equal_devices_have_one_build(
    kernel_repository: Publish,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    new_process: Callable[[], None],
    shared: str,
) -> None:
    """A rank takes the build of the others, also where another one fits better; one that does not fit is refused."""
    first = kernel_repository(layers=kernel(5), variant="torch-cpu").files()
    repository = kernel_repository(layers=kernel(3), variant="torch-universal")
    repository.commit({**first, **repository.files()})
    monkeypatch.setenv("KERNELS_LEADER_DIR", str(tmp_path / "job"))
    assert ask_once(f"the build of {repository.head()} for cpu", lambda: shared) == shared
    outcome = call(scale())
    if shared == "torch-universal":
        assert outcome.value == 3
    else:
        assert outcome.value == 2 and "other ranks have its build torch-cuda, and that does not fit" in outcome.why
    monkeypatch.setenv("KERNELS_LEADER", "0")
    new_process()
    assert call(scale()).value == 5
