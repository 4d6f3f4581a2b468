"""Locked kernels: the locked commit is loaded, checked by its hashes, with all its dependencies."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_scene import REFERENCE, Publish, cached, call, kernel, new_process, served
from huggingface_hub import constants

from kernels_core import ArgumentError, ArgumentTypeError, IntegrityError, LoadError, UntrustedError
from kernels_plugins import LockedFuncRepository, LockedLayerRepository, get_locked_kernel, load_kernel
from kernels_plugins.hub.dependency import Dependency
from kernels_plugins.hub.locking.lockfile import LOCK, Lock, LockedKernel, format_hashes, read_lock, write_lock
from kernels_plugins.hub.locking.maker import make_lock
from kernels_plugins.local_hub.server import LocalHub, Repository

pytest_plugins = ["kernels_plugins.hub.testing"]

WANTED = Dependency("acme/kernels", version=1)


@pytest.fixture
def published(kernel_repository: Publish) -> Repository:
    """Version 1 of the kernel, which multiplies by three."""
    repository = kernel_repository(layers=kernel(3))
    repository.branch("v1")
    return repository


@pytest.fixture
def lockfile(tmp_path: Path, published: Repository, new_process: Callable[[], None]) -> Path:
    """The lock of that version; then a version that multiplies by five is pushed in its place."""
    path = tmp_path / LOCK
    write_lock(path, make_lock([WANTED]))
    files = dict(published.files())
    source = files["build/torch-universal/layers.py"]
    published.commit({**files, "build/torch-universal/layers.py": source.replace(b"* 3", b"* 5")})
    published.branch("v1")
    new_process()
    return path


def locked(lockfile: Path | None, **options: Any) -> LockedLayerRepository:
    """Name the layer of the locked kernel."""
    return LockedLayerRepository("acme/kernels", lockfile=lockfile, layer_name="Scale", **options)


def run(module: Any) -> float:
    """Run the layer of a kernel."""
    return float(module.layers.Scale()(torch.ones(1)).item())


# --- Loading -------------------------------------------------------------------------------------


def test_the_commit_of_the_lock_serves(lockfile: Path, published: Repository) -> None:
    """Not the newest commit of the version serves, but the one that was locked; the resolution names the checks."""
    outcome = call(locked(lockfile))
    assert (outcome.value, outcome.said) == (3.0, [])
    commit = read_lock(lockfile).kernels[0].commit
    assert commit != published.head("v1")
    assert outcome.resolution.origin == f"acme/kernels@{commit[:12]} (torch-universal)"
    assert outcome.resolution.checked["lock"] == f"commit and files are those in {lockfile}"


def test_modules_of_locked_kernels(lockfile: Path, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """get_locked_kernel downloads, with a user agent; load_kernel takes cached files, without a request."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with pytest.raises(FileNotFoundError, match="not in the cache") as caught:
        load_kernel("acme/kernels", lockfile=lockfile)
    assert isinstance(caught.value, LoadError)
    module = get_locked_kernel("acme/kernels", lockfile=lockfile, user_agent="me/1")
    assert run(module) == 3.0
    assert any("me/1" in request.headers["user-agent"] for request in local_hub.requests)
    local_hub.forget()
    assert load_kernel("acme/kernels", lockfile=str(lockfile), backend="cpu") is module
    assert local_hub.count() == 0


def test_the_lock_of_the_caller_counts(lockfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lockfile=, the lock of the project of the calling code is taken, by all three."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "locked_caller.py").write_text(
        "import kernels_plugins as k\n"
        "source = k.LockedLayerRepository('acme/kernels', layer_name='Scale')\n"
        "get = lambda: k.get_locked_kernel('acme/kernels', lockfile=None)\n"
        "load = lambda: k.load_kernel('acme/kernels', lockfile=None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import locked_caller  # type: ignore[import-not-found]

    assert locked_caller.source == locked(lockfile)
    assert run(locked_caller.get()) == run(locked_caller.load()) == served(locked_caller.source) == 3.0
    with pytest.raises(ArgumentError, match=r"No kernels.lock is found for '.*test_hub_locked'"):
        locked(None)


def test_a_lock_without_hashes(lockfile: Path) -> None:
    """A lock that `kernels` 0.17 wrote has no hashes: the commit applies; a note says that no file is checked."""
    lockfile.with_suffix(".hashes").unlink()
    outcome = call(locked(lockfile))
    assert outcome.value == 3.0
    assert outcome.resolution.checked["lock"].endswith("its files are not checked: the lock has no hashes")


def test_a_lock_of_the_older_form(lockfile: Path) -> None:
    """Locks that `kernels` before 0.17 wrote are read, and their hashes are compared."""
    lock = read_lock(lockfile)
    lockfile.with_suffix(".hashes").unlink()
    lockfile.write_text(format_hashes(lock))
    assert served(locked(lockfile)) == 3.0
    lockfile.write_text(format_hashes(lock).replace(lock.kernels[0].hashes[0][1], f"sha256-{'0' * 64}"))
    assert "is not the one that was locked" in call(locked(lockfile)).why


@pytest.mark.parametrize("problem", ["another hash", "no such variant"])
def test_another_build_than_was_locked(lockfile: Path, problem: str, local_hub: LocalHub) -> None:
    """A build that the lock does not know, or knows with other files, is refused before it is downloaded."""
    sealed = json.loads(lockfile.with_suffix(".hashes").read_text())
    (variants,) = [entry["variants"] for entry in sealed]
    if problem == "another hash":
        variants["torch-universal"]["hash"] = f"sha256-{'0' * 64}"
    else:
        variants["torch-cuda"] = variants.pop("torch-universal")
    lockfile.with_suffix(".hashes").write_text(json.dumps(sealed))
    with pytest.raises(IntegrityError, match=r"acme/kernels at v1, locked.*variant torch-universal"):
        get_locked_kernel("acme/kernels", lockfile=lockfile)
    assert local_hub.count("layers.py") == 0


def test_trust_counts_for_locked_kernels(tmp_path: Path, kernel_repository: Publish) -> None:
    """A lock says which commit, not that its code may run."""
    kernel_repository("stranger/kernels", kernel(4), trusted=False).branch("v1")
    wanted = Dependency("stranger/kernels", version=1)
    write_lock(tmp_path / LOCK, make_lock([wanted], trust=["stranger/kernels"]))
    with pytest.raises(UntrustedError, match="'stranger' is not a trusted publisher"):
        get_locked_kernel("stranger/kernels", lockfile=tmp_path / LOCK)
    allowed = get_locked_kernel("stranger/kernels", lockfile=tmp_path / LOCK, trust_remote_code=["stranger/kernels"])
    assert run(allowed) == 4.0


# --- Values --------------------------------------------------------------------------------------


def test_locked_sources_are_values(lockfile: Path, tmp_path: Path, local_hub: LocalHub) -> None:
    """Equal by their values and locks, hashable also with a list, copied and pickled, without a request."""
    local_hub.forget()
    other = tmp_path / "other" / LOCK
    other.parent.mkdir()
    write_lock(other, read_lock(lockfile))
    one, two = locked(lockfile, trust_remote_code=["a/b"]), locked(other, trust_remote_code=("a/b",))
    assert one == two and hash(one) == hash(two)
    assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == one
    assert one != locked(lockfile)
    write_lock(other, Lock((LockedKernel(WANTED, "0a" * 20),)))
    assert locked(other, trust_remote_code=["a/b"]) != one == two
    assert (
        repr(locked(lockfile))
        == str(locked(lockfile))
        == (f"LockedLayerRepository('acme/kernels', lockfile={str(lockfile)!r}, layer_name='Scale')")
    )
    assert "trust_remote_code=('a/b',)" in repr(one)
    with pytest.raises(AttributeError):
        one.layer_name = "Other"  # type: ignore[misc]
    assert local_hub.count() == 0


def test_arguments_that_make_no_locked_source(lockfile: Path, tmp_path: Path) -> None:
    """A kernel that is not locked, no lock, and wrong types are errors at once, with the next step."""
    with pytest.raises(ValueError, match=r"'acme/other' is not locked in .*kernels-core lock") as caught:
        LockedLayerRepository("acme/other", lockfile=lockfile, layer_name="Scale")
    assert isinstance(caught.value, ArgumentError)
    with pytest.raises(ArgumentError, match=r"There is no lock .*kernels-core lock"):
        locked(tmp_path / "nowhere" / LOCK)
    with pytest.raises(ArgumentTypeError, match="repo_id is a str"):
        LockedLayerRepository(7, lockfile=lockfile, layer_name="Scale")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="layer_name is a str"):
        LockedLayerRepository("acme/kernels", lockfile=lockfile, layer_name=None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="trust_remote_code is"):
        locked(lockfile, trust_remote_code="acme/kernels")


def test_a_layer_that_is_not_there(lockfile: Path) -> None:
    """The refusal names the layers of the locked commit, and the reference runs."""
    outcome = call(LockedLayerRepository("acme/kernels", lockfile=lockfile, layer_name="Missing"))
    assert outcome.value == REFERENCE and "have no 'Missing': there are Scale" in outcome.why


def test_functions_at_the_top_of_a_locked_kernel(tmp_path: Path, kernel_repository: Publish) -> None:
    """The deprecated form says so, and serves a function that is not in `layers`."""
    files = {"__init__.py": "def scale(x):\n    return x * 4\n"}
    kernel_repository(layers=files).branch("v1")
    write_lock(tmp_path / LOCK, make_lock([WANTED]))
    with pytest.warns(DeprecationWarning, match="LockedFuncRepository is deprecated"):
        source = LockedFuncRepository("acme/kernels", lockfile=tmp_path / LOCK, func_name="scale")
    assert source.func_name == "scale" and source.load()(2) == 8
    assert repr(source) == (
        f"LockedFuncRepository('acme/kernels', lockfile={str(tmp_path / LOCK)!r}, func_name='scale')"
    )


# --- Dependencies --------------------------------------------------------------------------------

DEPENDENT = """
import torch
from kernels_plugins.hub.dependency import get_kernel_dep

factor = get_kernel_dep("acme/base").layers.FACTOR

class Scale(torch.nn.Module):
    def forward(self, x):
        return x * factor
"""


@pytest.fixture
def chain(tmp_path: Path, kernel_repository: Publish, new_process: Callable[[], None]) -> Path:
    """The lock of a kernel that depends on another; then the other one is pushed anew."""
    base = kernel_repository("acme/base", "FACTOR = 7\n")
    base.branch("v1")
    needs = {"kernel-depends": [{"repo-id": "acme/base", "version": 1}]}
    kernel_repository(layers=DEPENDENT, metadata=needs).branch("v1")
    write_lock(tmp_path / LOCK, make_lock([WANTED]))
    kernel_repository("acme/base", "FACTOR = 8\n")
    base.branch("v1")
    new_process()
    return tmp_path / LOCK


def test_dependencies_come_from_the_lock(chain: Path) -> None:
    """Dependencies of a locked kernel are those that were locked, not the newest; also from the cache only."""
    assert run(get_locked_kernel("acme/kernels", lockfile=chain)) == 7.0
    assert run(load_kernel("acme/kernels", lockfile=chain)) == 7.0


def test_a_dependency_that_is_not_locked(chain: Path) -> None:
    """A lock without a kernel that another one depends on is refused, with the next step."""
    lock = read_lock(chain)
    write_lock(chain, Lock(lock.kernels[:1]))
    with pytest.raises(LoadError, match=r"depends on acme/base version 1, which is not locked in .*kernels-core lock"):
        get_locked_kernel("acme/kernels", lockfile=chain)


def test_a_changed_file_of_a_dependency(
    chain: Path, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    """Files of dependencies are compared with the lock, too, offline, and named."""
    get_locked_kernel("acme/kernels", lockfile=chain)
    commit = read_lock(chain).kernels[1].commit
    (folder,) = Path(constants.HF_HUB_CACHE).glob(f"kernels--acme--base/snapshots/{commit}/build/torch-universal")
    (folder / "layers.py").write_text("FACTOR = 6\n")
    new_process()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(IntegrityError, match=r"acme/base at v1, locked.*layers.py has other bytes"):
        get_locked_kernel("acme/kernels", lockfile=chain)


# --- Making locks --------------------------------------------------------------------------------


def test_a_redirected_kernel_is_not_locked(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """A repository that says that its kernel is elsewhere now would not stay locked: the message names the other."""
    kernel_repository("acme/new", kernel())
    status = 'kind = "redirect"\ndestination = "acme/new"\n'
    repository = kernel_repository(layers=kernel())
    repository.commit({**repository.files(), "kernel-status.toml": status})
    repository.branch("v1")
    with pytest.raises(ArgumentError, match="acme/kernels version 1 is redirected to acme/new at main"):
        make_lock([WANTED])


def test_a_renamed_repository_is_locked(tmp_path: Path, local_hub: LocalHub, published: Repository) -> None:
    """A repository that the Hub serves under another name is locked and loaded under the given name."""
    local_hub.rename("acme/kernels", "acme/renamed")
    write_lock(tmp_path / LOCK, make_lock([WANTED]))
    assert read_lock(tmp_path / LOCK).kernels[0].dependency == WANTED
    assert run(get_locked_kernel("acme/kernels", lockfile=tmp_path / LOCK)) == 3.0


def test_builds_that_nobody_can_load_are_passed_over(published: Repository) -> None:
    """A folder that is no build, and a build without metadata, depend on nothing, and are hashed all the same."""
    files = {"build/docs/metadata.json": "no JSON", "build/torch-cuda/__init__.py": ""}
    published.commit({**published.files(), **files})
    published.branch("v1")
    told: list[tuple[str, int, int]] = []
    (kernel,) = make_lock([WANTED], report=lambda wanted, done, total: told.append((str(wanted), done, total))).kernels
    assert [name for name, _ in kernel.hashes] == ["docs", "torch-cuda", "torch-universal"]
    assert told[0] == ("acme/kernels version 1", 0, 1) and told[-1] == ("acme/kernels version 1", 1, 1)
