"""Notes that processes of one cache share: which of them serve, and what happens where they cannot be kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hub_scene import Publish, call, kernel, new_process, scale
from torch import nn

from kernels_core import ArgumentError, DecisionError, Mode, kernelize, receipt, use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping
from kernels_plugins.hub.client import answers, revision
from kernels_plugins.hub.client.answers import share
from kernels_plugins.hub.client.board import FolderBoard, ask_once
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


@pytest.mark.parametrize("wrong", ["listing", "trust"])
def test_an_answer_that_refuses_is_asked_again(local_hub: LocalHub, kernel_repository: Publish, wrong: str) -> None:
    """An empty list of files, or a publisher that is not trusted yet, is asked about again in the same process."""
    kernel_repository(layers=kernel())
    if wrong == "listing":
        local_hub.fail("/tree/", body="[]", content_type="application/json", times=None)
    else:
        local_hub.organization("acme", trusted=False)
    assert call(scale()).why
    local_hub.organization("acme", trusted=True)
    local_hub.heal()
    assert not call(scale()).resolution.refusals  # registering a mapping lets all sources that failed be loaded again


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


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "neither a process group of several ranks nor KERNELS_LEADER_DIR"),
        ({"KERNELS_LEADER": "maybe"}, "KERNELS_LEADER='maybe' is neither on nor off"),
        ({"KERNELS_LEADER_DIR": "/proc/kernels"}, "ranks cannot agree there .*name a folder that all ranks may write"),
        ({"KERNELS_LEADER_DIR": "job"}, "write the whole path"),
        ({"KERNELS_LEADER_DIR": "{tmp}", "KERNELS_LEADER_TIMEOUT": "soon"}, "KERNELS_LEADER_TIMEOUT is 'soon'"),
        ({"KERNELS_LEADER_DIR": "{tmp}", "KERNELS_LEADER_TIMEOUT": "0.2", "dead": "2"}, "has not answered in 0.2 sec"),
    ],
    ids=["alone", "neither on nor off", "not writable", "relative", "timeout", "dead leader"],
)
def test_a_leader_that_is_asked_for_and_impossible(
    kernel_repository: Publish,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    new_process: Callable[[], None],
    settings: dict[str, str],
    text: str,
) -> None:
    """With `KERNELS_LEADER=1`, a rank that cannot share raises in its first call, and `kernelize` raises, too.

    Nothing is half applied: switched off, the kernel serves.
    """
    kernel_repository(layers=kernel(3))
    taken = FolderBoard.take
    if settings.get("dead"):  # ranks that have ended lead the first rounds
        monkeypatch.setattr(FolderBoard, "take", lambda self, key: not key.endswith(("-0", "-1")) and taken(self, key))
    monkeypatch.setenv("KERNELS_LEADER", "1")
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace("{tmp}", str(tmp_path / "job")))

    @use_kernel_forward_from_hub("Scale")
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model = nn.Sequential(Scale())
    with use_kernel_mapping({"Scale": {"cpu": scale()}}):
        with pytest.raises(DecisionError, match=text):
            model(torch.ones(1))
        with pytest.raises(DecisionError, match=text):
            kernelize(model, device="cpu", mode=Mode.TRAINING)
        assert type(model[0]) is Scale
        row = receipt(model, device="cpu").rows[0]
        assert row.is_reference and "KERNELS_LEADER" in row.refusals[0][1]
        monkeypatch.setenv("KERNELS_LEADER", "0")
        new_process()
        assert model(torch.ones(1)).item() == 3
