"""The form of locks: files as written, as read, and the errors for malformed ones."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_core import ArgumentError, ArgumentTypeError
from kernels_plugins.hub.builds.integrity import RemoteFile
from kernels_plugins.hub.locking.lockfile import (
    Dependency,
    Lock,
    LockedKernel,
    format_hashes,
    format_lock,
    hash_variant,
    parse_lock,
    read_lock,
    write_lock,
)
from kernels_plugins.hub.names import REPO_ID, is_revision

COMMIT, OTHER = "0a" * 20, "1b" * 20
HASH = f"sha256-{'ab' * 32}"

# --- Round trips ---------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=("Z", "C")), min_size=1)
repo_ids = st.from_regex(REPO_ID, fullmatch=True)
digits = st.integers(0, 16**40 - 1).map(lambda number: f"{number:040x}")
hashes = st.dictionaries(words, st.integers(0, 16**64 - 1).map(lambda number: f"sha256-{number:064x}"), max_size=3)
dependencies = st.one_of(
    st.builds(Dependency, repo_ids, version=st.integers(0, 2**64 - 1)),
    st.builds(Dependency, repo_ids, revision=st.text(st.characters(codec="utf-8"), min_size=1).filter(is_revision)),
)


@st.composite
def locks(draw: st.DrawFn) -> Lock:
    wanted = draw(st.lists(dependencies, unique=True, max_size=5))
    commits = {dependency.repo_id: draw(digits) for dependency in wanted}
    sealed = {repo_id: tuple(sorted(draw(hashes).items())) for repo_id in commits}
    return Lock(tuple(LockedKernel(d, commits[d.repo_id], sealed[d.repo_id]) for d in wanted))


@given(locks())
def test_what_is_written_is_read(lock: Lock) -> None:
    """Any lock comes back from its two texts as it was; from the first alone, without hashes."""
    assert parse_lock(format_lock(lock), format_hashes(lock)) == lock
    bare = Lock(tuple(replace(kernel, hashes=()) for kernel in lock.kernels))
    assert parse_lock(format_lock(lock)) == bare


@given(locks())
def test_the_older_form_is_read(lock: Lock) -> None:
    """The form of `kernels` before 0.17, which is that of our hashes, is a lock of its own."""
    older = parse_lock(format_hashes(lock))
    known = {(kernel.dependency.repo_id, kernel.commit): kernel.hashes for kernel in lock.kernels}
    assert {(k.dependency.repo_id, k.commit): k.hashes for k in older.kernels} == known
    assert all(kernel.dependency.wanted is None for kernel in older.kernels)


@given(st.text())
def test_any_text_is_read_or_refused_by_us(text: str) -> None:
    """No text makes the parser raise anything but an ArgumentError."""
    try:
        parse_lock(text)
    except ArgumentError as error:
        assert str(error).startswith("kernels.lock")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([COMMIT, HASH, "acme/a"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["dependency", "lock", "repo-id", "version", "revision", "commit", "repo_id", "sha", "variants", "hash"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@given(st.lists(json_values, max_size=2))
def test_any_json_is_read_or_refused_by_us(data: Any) -> None:
    """No JSON makes the parser raise anything but an ArgumentError, and locks that it reads can be written."""
    try:
        lock = parse_lock(json.dumps(data))
    except ArgumentError:
        return
    assert parse_lock(format_hashes(lock)).kernels is not None


# --- The form ------------------------------------------------------------------------------------


def test_the_text_is_that_of_kernels() -> None:
    """The bytes are those that `kernels` 0.17.2 writes for the same lock; it tolerates no others keys."""
    lock = Lock(
        (
            LockedKernel(Dependency("acme/silu", version=1), COMMIT, (("torch-cpu", HASH),)),
            LockedKernel(Dependency("acme/silu", revision='m"\u00e4\x01'), OTHER),
        )
    )
    assert format_lock(lock) == (
        '[\n  {\n    "dependency": {\n      "repo-id": "acme/silu",\n      "version": 1\n    },\n    "lock": {\n'
        f'      "commit": "{COMMIT}"\n    }}\n  }},\n'
        '  {\n    "dependency": {\n      "repo-id": "acme/silu",\n      "revision": "m\\"\u00e4\\u0001"\n    },\n'
        f'    "lock": {{\n      "commit": "{OTHER}"\n    }}\n  }}\n]'
    )
    assert json.loads(format_hashes(lock))[0] == {
        "repo_id": "acme/silu",
        "sha": COMMIT,
        "variants": {"torch-cpu": {"hash": HASH, "hash_type": "git_lfs_concat"}},
    }
    assert format_lock(Lock(())) == format_hashes(Lock(())) == "[]"


def test_the_hash_of_a_variant_is_that_of_kernels_before_017() -> None:
    """A value that `kernels` 0.16.2 computed: paths in order, each with its git or large-file hash."""
    large = "182a1c0c5b24b5c7864676c8b9776fad26041adf276fb3cda84b1770e6282a72"
    files = [
        RemoteFile("metadata.json", 543, "2cf02a3598bc7da3997fee9593241265a4cccc88"),
        RemoteFile("lib/z.so", 700, "e7245d53b8f5dde449f61207ef5b0254cfde96d2", sha256=large),
        RemoteFile("layers.py", 4, "bafc5d9a1a836cea09dadcec13e66fe498cd997a"),
        RemoteFile("b/x.txt", 1, "e25f1814e51579d5f55c0f1fe0135ddb28a47f4a"),
        RemoteFile("b.py", 0, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        RemoteFile("__init__.py", 21, "084c3e1d6a96eabac9160729d1a393352a0bf096"),
    ]
    assert hash_variant(files) == "sha256-941ac2a92e2bbba5922381004e340a18ec3a00d0cf6da7adbeab7c79a4113b25"


def test_what_a_project_asks_for_comes_first() -> None:
    """Of two versions of one repository, the one that was written first is the project's own."""
    own = LockedKernel(Dependency("acme/silu", version=2), COMMIT)
    foreign = LockedKernel(Dependency("acme/silu", version=1), OTHER)
    lock = parse_lock(format_lock(Lock((own, foreign))))
    assert lock.require("acme/silu") == own
    assert lock.find(foreign.dependency) == foreign
    assert lock.find(Dependency("acme/silu", version=3)) is None


def test_an_older_lock_serves_any_version() -> None:
    """The older form says no version, so an entry is found for each."""
    lock = parse_lock(json.dumps([{"repo_id": "acme/silu", "sha": COMMIT, "variants": {}}]))
    assert lock.find(Dependency("acme/silu", version=3)) == lock.require("acme/silu")
    with pytest.raises(ArgumentError, match="run `kernels-core lock"):
        format_lock(lock)


def test_a_kernel_that_is_not_locked() -> None:
    """The message names the locked kernels, the line to write, and the command to run."""
    lock = Lock((LockedKernel(Dependency("acme/silu", version=1), COMMIT),), origin="here/kernels.lock")
    with pytest.raises(ArgumentError) as caught:
        lock.require("acme/gelu")
    assert str(caught.value) == (
        "Kernel 'acme/gelu' is not locked in here/kernels.lock, which locks acme/silu version 1. Write "
        '"acme/gelu" = <version> under [tool.kernels.dependencies] in pyproject.toml, run `kernels-core lock '
        "<project>`, and install the project again."
    )


def test_locks_are_values() -> None:
    """Locks that say the same are equal and hash alike, wherever they were read."""
    one, two = (parse_lock(format_lock(Lock(())), origin=place) for place in ("here", "there"))
    assert one == two and hash(one) == hash(two) and one != "here"


# --- Malformed -----------------------------------------------------------------------------------

GOOD = {"dependency": {"repo-id": "acme/silu", "version": 1}, "lock": {"commit": COMMIT}}
OLDER = {"repo_id": "acme/silu", "sha": COMMIT, "variants": {"torch-cpu": {"hash": HASH}}}


def changed(entry: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**entry, **changes}.items() if value is not ...}


def wanting(**said: Any) -> dict[str, Any]:
    return changed(GOOD, dependency={name.replace("_", "-"): value for name, value in said.items()})


def sealed(**said: Any) -> dict[str, Any]:
    return changed(OLDER, variants={"torch-cpu": said})


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("acme/silu", "'acme/silu' is no object"),
        ({}, "no dependency"),
        (changed(GOOD, lock=...), "no lock"),
        (changed(GOOD, lock=COMMIT), "lock is '0a0a"),
        (changed(GOOD, more=1), "'more' is not known, dependency, lock are"),
        (changed(GOOD, lock={}), "commit: None is not a commit"),
        (changed(GOOD, lock={"commit": "main"}), "'main' is not a commit of 40 or 64 hexadecimal digits"),
        (changed(GOOD, lock={"commit": COMMIT, "hash": HASH}), "lock: 'hash' is not known"),
        (wanting(version=1), "dependency: its repo-id is None, not 'owner/name'"),
        (wanting(repo_id="silu", version=1), "dependency: its repo-id is 'silu', not 'owner/name'"),
        (wanting(repo_id="../../silu", version=1), "dependency: its repo-id is '../../silu', not"),
        (wanting(repo_id="acme/silu"), "dependency: it has neither version nor revision"),
        (wanting(repo_id="acme/silu", version=1, revision="main"), "dependency: it has both version and revision"),
        (wanting(repo_id="acme/silu", version="1"), "version is '1', not a whole number"),
        (wanting(repo_id="acme/silu", version=True), "version is True, not a whole number"),
        (wanting(repo_id="acme/silu", version=-1), "version is -1, not a whole number"),
        (wanting(repo_id="acme/silu", revision=""), "dependency: its revision is '', not a branch"),
        (wanting(repo_id="acme/silu", revision=".."), "its revision is '..', not a branch, tag or commit"),
        (wanting(repo_id="acme/silu", revision="\ud800"), "its revision is '\\ud800', not a branch"),
        (wanting(repo_id="acme/silu", version=1, extra=1), "dependency: 'extra' is not known"),
        (changed(OLDER, sha="main"), "sha: 'main' is not a commit"),
        (changed(OLDER, variants=...), "variants is None, not an object"),
        (changed(OLDER, variants=...) | {"files": []}, "neither library reads any more"),
        (changed(OLDER, more=1), "'more' is not known"),
        (sealed(), "{} is not hash and hash_type"),
        (sealed(hash="abc"), "hash is 'abc', not sha256- and 64 hexadecimal digits"),
        (sealed(hash=1), "hash is 1"),
        (sealed(hash=HASH, hash_type="recursive_file_hash"), "hash_type is 'recursive_file_hash'"),
    ],
)
def test_a_malformed_entry_is_told_with_its_place(entry: Any, problem: str) -> None:
    """The message names the entry, the value and its fault, and ends in the next step."""
    with pytest.raises(ArgumentError) as caught:
        parse_lock(json.dumps([{**GOOD, "dependency": {"repo-id": "acme/other", "version": 1}}, entry]))
    message = str(caught.value)
    assert message.startswith("kernels.lock, entry 2: ") and problem in message
    assert message.endswith("Restore the file, or write it anew with `kernels-core lock <project>`.")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is no JSON"),
        ("[", "it is no JSON"),
        ("{}", "it holds dict, not a list"),
        ("[" * 100_000, "it is no JSON"),
        ('[{"lock": 1, "lock": 2}]', "a key is repeated among lock, lock"),
        (json.dumps([GOOD, GOOD]), "entry 2: acme/silu version 1 is locked twice"),
        (json.dumps([OLDER, OLDER]), "entry 2: acme/silu is locked twice"),
    ],
)
def test_a_malformed_file_is_told(text: str, problem: str) -> None:
    """JSON that is no list of entries, or has one entry twice, is refused with the next step."""
    with pytest.raises(ArgumentError, match="kernels-core lock") as caught:
        parse_lock(text)
    assert problem in str(caught.value)


def test_a_commit_is_written_in_small_letters() -> None:
    """A commit in capitals is the same commit; one of SHA-256 is one, too; so says `kernels`."""
    for commit in (COMMIT, "2c" * 32):
        entry = {**GOOD, "lock": {"commit": commit.upper()}}
        assert parse_lock("\ufeff" + json.dumps([entry])).kernels[0].commit == commit


# --- Files ---------------------------------------------------------------------------------------

LOCK = Lock((LockedKernel(Dependency("acme/silu", version=1), COMMIT, (("torch-cpu", HASH),)),))


def test_two_files_are_written_and_read(tmp_path: Path) -> None:
    """The hashes lie beside the lock; nothing else is left in the folder."""
    path = tmp_path / "kernels.lock"
    write_lock(path, Lock(()))
    write_lock(path, LOCK)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kernels.hashes", "kernels.lock"]
    assert read_lock(path) == read_lock(str(path)) == LOCK
    (tmp_path / "kernels.hashes").unlink()
    assert read_lock(path).kernels[0].hashes == ()


def test_hashes_of_another_lock_are_refused(tmp_path: Path) -> None:
    """A lock that was written anew without its hashes does not silently lose the check."""
    write_lock(tmp_path / "kernels.lock", LOCK)
    (tmp_path / "kernels.lock").write_text(format_lock(Lock((replace(LOCK.kernels[0], commit=OTHER),))))
    with pytest.raises(ArgumentError, match="is of another lock: it has no acme/silu at 1b1b1b1b1b1b") as caught:
        read_lock(tmp_path / "kernels.lock")
    assert "kernels-core lock" in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk fails while a lock is written, the lock that was there is whole, and no rest is left."""
    path = tmp_path / "kernels.lock"
    write_lock(path, LOCK)
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArgumentError, match="No space left"):
        write_lock(path, Lock(()))
    assert read_lock(path) == LOCK
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kernels.hashes", "kernels.lock"]


def test_a_link_to_a_lock_stays_one(tmp_path: Path) -> None:
    """Where the lock is a symbolic link, the file that it leads to is written."""
    (tmp_path / "real.lock").touch()
    (tmp_path / "kernels.lock").symlink_to(tmp_path / "real.lock")
    write_lock(tmp_path / "kernels.lock", LOCK)
    assert (tmp_path / "kernels.lock").is_symlink() and read_lock(tmp_path / "kernels.lock") == LOCK


def test_paths_that_hold_no_lock(tmp_path: Path) -> None:
    """A missing file, a folder, a file that is no text, a value that is no path: each error has the next step."""
    with pytest.raises(ArgumentError, match=r"There is no lock .*run `kernels-core lock"):
        read_lock(tmp_path / "kernels.lock")
    with pytest.raises(ArgumentError, match="a folder: name the file in it"):
        read_lock(tmp_path)
    (tmp_path / "kernels.lock").write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError, match=r"Cannot read .*kernels-core lock"):
        read_lock(tmp_path / "kernels.lock")
    with pytest.raises(ArgumentTypeError, match="not 7"):
        read_lock(7)  # type: ignore[arg-type]
