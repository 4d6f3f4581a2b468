"""`kernels-core cache`: lists, measures, shrinks and verifies the cache, filled from a Hub over real sockets."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command_line import Run, run_here
from hub_scene import Publish, cached, kernel, new_process
from packaging.version import Version

from kernels_plugins import get_kernel, has_kernel
from kernels_plugins.hub.locking.lockfile import Dependency, Lock, LockedKernel, write_lock
from kernels_plugins.local_hub.server import LocalHub, Repository

pytest_plugins = ["kernels_plugins.hub.testing"]

IS_OLD = Version(huggingface_hub.__version__) < Version("1.32")
lists = pytest.mark.skipif(IS_OLD, reason="this huggingface_hub does not list kernels")


@pytest.fixture
def cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, new_process: object
) -> Run:
    """Run a command of `kernels-core cache`."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(run_here, capsys, "cache")


@pytest.fixture
def two(kernel_repository: Publish, new_process: Callable[[], None]) -> tuple[Repository, str, str]:
    """Two commits of one kernel in the cache, of which version 1 was first the one and is now the other."""
    repository = kernel_repository(layers=kernel(3))
    repository.branch("v1")
    old = repository.head()
    get_kernel("acme/kernels", version=1)
    new_process()
    kernel_repository(layers=kernel(5))
    repository.branch("v1")
    get_kernel("acme/kernels", version=1)
    return repository, old, repository.head()


def test_an_empty_cache_is_an_answer(cache: Run, local_hub: LocalHub) -> None:
    """Without a cache, each command says where it looked, and none fails."""
    for command in ("list", "size", "prune", "verify"):
        ran = cache(command)
        assert (ran.code, ran.err) == (0, "") and ("There are no kernels in" in ran.out or "nothing to" in ran.out)
    assert cache("list", "--json").json == []
    assert cache("size", "--json").json["size"] == 0
    assert cache("prune", "--json", "--yes").json["commits"] == cache("verify", "--json").json["builds"] == []


@lists
def test_commits_are_listed_with_their_names(cache: Run, two: tuple[Repository, str, str]) -> None:
    """Each commit has a row, newest use first, with the version that points to it; files that both have count once."""
    _, old, new = two
    rows = {row["commit"]: row for row in cache("list", "--json").json}
    assert (rows[old]["refs"], rows[new]["refs"]) == ([], ["v1"])
    assert rows[new]["builds"] == ["torch-universal"] and rows[new]["verified"] is True
    table = cache("list").out.splitlines()
    assert table[0].split() == ["repository", "commit", "refs", "builds", "size", "used"]
    assert max(map(len, table)) <= 80 and "not verified" not in cache("list").out
    assert [line.split()[1] for line in table[1:]] == [new[:12], old[:12]]
    total = cache("size", "--json").json
    assert total["size"] < sum(row["size"] for row in rows.values()) and total["repositories"][0]["commits"] == 2
    assert cache("size").out.splitlines()[1].split()[:3] == ["acme/kernels", "2", "2"]


@lists
def test_globs_choose_and_a_name_that_is_not_there_is_an_error(cache: Run, two: object) -> None:
    """A repository that is not in the cache is an error that lists those that are."""
    assert len(cache("list", "acme/*", "--json").json) == 2
    wrong = cache("list", "acme/nothing")
    assert wrong.code == 2 and "has no kernel acme/nothing: it has acme/kernels" in wrong.err


@lists
def test_prune_shows_first_and_removes_only_with_yes(cache: Run, two: tuple[Repository, str, str]) -> None:
    """The commit that no version points to any more is removed by the client; the other one still loads offline."""
    repository, old, new = two
    shown = cache("prune")
    assert shown.code == 0 and old[:12] in shown.out and new[:12] not in shown.out and "add --yes" in shown.out
    assert cached(repository, commit=old).is_dir()
    done = cache("prune", "--yes", "--json").json
    assert done["removed"] is True and [row["commit"] for row in done["commits"]] == [old] and done["freed"] > 0
    assert not cached(repository, commit=old).exists() and cached(repository, commit=new).is_dir()
    assert cache("prune", "--yes").out == "There is nothing to remove.\n"
    assert cache("verify").code == 0


@lists
def test_prune_all_but_locked_and_old(cache: Run, two: tuple[Repository, str, str], tmp_path: Path) -> None:
    """`--all` takes referenced commits too, `--older-than` only unused ones, and a lock keeps its commit."""
    repository, old, new = two
    assert cache("prune", "--all", "--older-than", "2", "--json").json["commits"] == []
    for file in cached(repository, commit=new).iterdir():
        os.utime(file, (1e9, 1e9))
    assert [row["commit"] for row in cache("prune", "--all", "--older-than", "2", "--json").json["commits"]] == [new]
    write_lock(tmp_path / "kernels.lock", Lock((LockedKernel(Dependency("acme/kernels", version=1), old),)))
    found = cache("prune", "--all", "--json").json
    assert [row["commit"] for row in found["commits"]] == [new] and [row["commit"] for row in found["locked"]] == [old]
    assert "1 more stay, for they are locked in kernels.lock" in cache("prune", "--all").out
    (tmp_path / "kernels.lock").rename(tmp_path / "away.lock")
    assert cache("prune", "--all", "--project", str(tmp_path)).code == 2
    assert cache("prune", "--all", "--yes").code == 0 and cache("list", "--json").json == []


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda build: (build / "layers.py").write_text("x = 1\n"), "layers.py has"),
    "missing": (lambda build: (build / "__init__.py").unlink(), "__init__.py is missing"),
    "added": (lambda build: (build / "more\x1b[2J.py").touch(), "is not on the Hub"),
}


@lists
@pytest.mark.parametrize("spoil", SPOILS)
def test_verify_names_each_file_that_differs(cache: Run, two: tuple[Repository, str, str], spoil: str) -> None:
    """A file that was changed, removed or added is named, without its control characters, and the exit code is 1."""
    repository, _, new = two
    assert cache("verify").code == 0
    change, text = SPOILS[spoil]
    change(cached(repository, commit=new))
    ran = cache("verify")
    assert ran.code == 1 and text in ran.out and "\x1b" not in ran.out and "1 with differences" in ran.out
    row = next(row for row in cache("verify", "--json").json["builds"] if row["commit"] == new)
    assert not row["ok"] and text in row["differences"][0]


@lists
def test_a_kernel_of_another_program_is_not_called_verified(cache: Run, two: tuple[Repository, str, str]) -> None:
    """Without our notes there is no list to compare with: the digests of the publisher are compared all the same."""
    repository, _, new = two
    notes = cached(repository).parents[3] / "kernels-core" / "commits" / f"{new}.json"
    notes.unlink()
    row = next(row for row in cache("list", "--json").json if row["commit"] == new)
    assert row["verified"] is False and cache("list").out.count("not verified") == 1
    row = next(row for row in cache("verify", "--json").json["builds"] if row["commit"] == new)
    assert row["ok"] and row["listed"] == "no list is kept" and "sha256" in row["digest"]


@lists
def test_metadata_without_the_rest_is_no_damage(cache: Run, kernel_repository: Publish) -> None:
    """`has_kernel` downloads only the metadata of a build: that is listed, and nothing is missing."""
    kernel_repository(layers=kernel(3)).branch("v1")
    assert has_kernel("acme/kernels", version=1)
    (row,) = cache("verify", "--json").json["builds"]
    assert row["ok"] and row["digest"] == "only metadata is here"


@pytest.mark.skipif(not IS_OLD, reason="this huggingface_hub lists kernels")
def test_an_older_client_is_an_error(cache: Run, two: object) -> None:
    """A client that does not list kernels is named, with the release that does."""
    ran = cache("list")
    assert ran.code == 2 and "upgrade it to 1.32 or newer" in ran.err


@lists
def test_a_damaged_cache_is_reported(cache: Run, two: tuple[Repository, str, str]) -> None:
    """A repository that the client cannot read is named with its remedy, and `verify` exits with 1."""
    repository, _, new = two
    (cached(repository, commit=new) / "layers.py").resolve().unlink()
    ran = cache("verify")
    assert ran.code == 1 and "error: " in ran.err and "Remove the folder, and load the kernel again" in ran.err
