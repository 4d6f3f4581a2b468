"""Repositories and the `get_kernel` family: the same kernels from the same folders and the same Hub."""

from __future__ import annotations

import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity_scene import (
    SIDES,
    Both,
    Side,
    call,
    kernel_source,
    lock,
    offline,
    publish_kernels,
    write_kernel,
)


def times(kernel: ModuleType) -> float:
    """Run the layer of a kernel module."""
    return call(kernel.layers.Scale())


# --- On disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "build", "build/torch-universal"])
def test_local_kernel(both: Both, where: str) -> None:
    """Both take a repository, the folder with its builds, and a build."""
    folder = write_kernel(both.home / "kernel", kernel_source(3)) / where
    both.run(lambda side: times(side.lib.get_local_kernel(folder))).agree(3.0)
    both.run(lambda side: times(side.lib.get_local_kernel(repo_path=folder, backend="cpu"))).agree(3.0)


@pytest.mark.parametrize("where", ["", "build", "build/torch-universal"])
def test_local_layer(both: Both, where: str) -> None:
    """Both take a layer from each of these."""
    folder = write_kernel(both.home / "kernel", kernel_source(3)) / where

    def scenario(side: Side) -> list[object]:
        repository = side.lib.LocalLayerRepository(repo_path=folder, layer_name="Scale")
        same = side.lib.LocalLayerRepository(folder, layer_name="Scale")
        return [side.served(repository), repository == same, hash(repository) == hash(same), repository.layer_name]

    both.run(scenario).agree([3.0, True, True, "Scale"])


def test_package_of_its_name(both: Both) -> None:
    """Both import a build whose code is in a package of the kernel's name."""
    source = kernel_source(3)
    files = {"my_kernel/__init__.py": "from . import layers\n", "my_kernel/layers.py": source, "__init__.py": ""}
    folder = write_kernel(both.home / "kernel", files, digest=False)
    (folder / "build/torch-universal/__init__.py").unlink()
    both.run(lambda side: times(side.lib.get_local_kernel(folder))).agree(3.0)


def test_nothing_there(both: Both) -> None:
    """Both raise where there is no build for this machine, and name those that there are."""
    folder = write_kernel(both.home / "kernel", "", variant="torch29-cu126-riscv64-linux")
    pair = both.run(lambda side: side.lib.get_local_kernel(folder))
    pair.refuse(FileNotFoundError)
    for outcome in (pair.theirs, pair.ours):
        assert "torch29-cu126-riscv64-linux" in str(outcome.error) and "riscv64" in str(outcome.error)


def test_no_such_layer(both: Both) -> None:
    """Both raise for a layer that a kernel does not have, and for a kernel without layers."""
    folder = write_kernel(both.home / "one", kernel_source(3))
    bare = write_kernel(both.home / "two", {"__init__.py": ""}, name="other-kernel")
    for place, name in ((folder, "Abacus"), (bare, "Scale")):
        both.run(lambda side, p=place, n=name: side.lib.LocalLayerRepository(p, layer_name=n).load()).refuse(ValueError)


def test_missing_dependency(both: Both) -> None:
    """Both raise an ImportError that names the pip command where a kernel needs a package that is not here."""
    folder = write_kernel(both.home / "kernel", "", changes={"python-depends": ["helion"]})
    pair = both.run(lambda side: side.lib.get_local_kernel(folder))
    pair.refuse(ImportError)
    for outcome in (pair.theirs, pair.ours):
        assert "pip install helion" in str(outcome.error)


def test_unknown_dependency(both: Both) -> None:
    """Both refuse a kernel that needs a package which no kernel may need."""
    folder = write_kernel(both.home / "kernel", "", changes={"python-depends": ["abacus"]})
    pair = both.run(lambda side: side.lib.get_local_kernel(folder))
    assert isinstance(pair.theirs.error, ValueError)
    assert pair.ours.error is not None and "abacus" in str(pair.ours.error)


@pytest.mark.parametrize(("level", "taken"), [("0.10.0", True), ("0.17.2", True), ("99.0.0", False)])
def test_minimum_version(both: Both, level: str, taken: bool) -> None:
    """Both take kernels for this version of `kernels` and older ones, and refuse those for newer ones."""
    folder = write_kernel(both.home / "kernel", kernel_source(3), changes={"kernels-minver": level})
    pair = both.run(lambda side: times(side.lib.get_local_kernel(folder)))
    if taken:
        pair.agree(3.0)
    else:
        pair.refuse(RuntimeError)
        assert "99" in str(pair.theirs.error) and "99" in str(pair.ours.error)


@pytest.mark.parametrize("dirty", [True, False])
def test_dirty_build(both: Both, dirty: bool) -> None:
    """Both say so where a kernel was built from sources that were not committed, and use it."""
    git = {"commit": "a" * 40, "dirty": dirty}
    provenance = {"kernel-builder": {"version": "0.17.2", "git": {**git, "dirty": False}}, "kernel": git}
    folder = write_kernel(both.home / "kernel", kernel_source(3), changes={"provenance": provenance})
    pair = both.run(lambda side: times(side.lib.get_local_kernel(folder)))
    pair.agree(3.0)
    for outcome in (pair.theirs, pair.ours):
        assert any("dirty" in said or "uncommitted" in said for said in outcome.said) is dirty


@pytest.mark.parametrize("lacks", ["id", "name", "version", "python-depends", "backend"])
def test_incomplete_metadata(both: Both, lacks: str) -> None:
    """Both refuse a build that does not describe itself, and name the missing file."""
    folder = write_kernel(both.home / "kernel", kernel_source(3), changes={lacks: None})
    pair = both.run(lambda side: times(side.lib.get_local_kernel(folder)))
    pair.refuse(ValueError)
    assert f"`{lacks}`" in str(pair.theirs.error) and lacks in str(pair.ours.error)


def test_loaded_kernels(both: Both) -> None:
    """Both list the loaded kernels: metadata, module, and origin; once for each build."""
    folder = write_kernel(both.home / "kernel", kernel_source(3))

    def scenario(side: Side) -> list[object]:
        kernel = side.lib.get_local_kernel(folder)
        again = side.lib.get_local_kernel(folder)
        (loaded,) = [one for one in side.lib.get_loaded_kernels() if one.module is kernel]
        metadata = loaded.metadata
        listed = side.lib.get_loaded_kernels()
        listed.clear()
        return [
            again is kernel,
            isinstance(loaded, side.lib.LoadedKernel),
            isinstance(metadata, side.lib.Metadata),
            loaded.repo_info,
            str(metadata.name),
            metadata.version,
            metadata.id,
            metadata.license,
            metadata.upstream,
            metadata.source,
            metadata.python_depends,
            metadata.kernel_depends,
            metadata.kernels_minver,
            metadata.provenance,
            sorted(metadata.digest.files),
            metadata.backend.archs,
            len(side.lib.get_loaded_kernels()) > 0,
        ]

    pair = both.run(scenario)
    assert [list(x) if isinstance(x, tuple) else x for x in pair.ours.get()] == pair.theirs.get()
    assert pair.theirs.get()[4:8] == ["my-kernel", 1, "_my_kernel_local", "Apache-2.0"]


# --- On the Hub ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["layer", "get_kernel"])
@pytest.mark.parametrize("pinned", ["version", "branch", "tag", "commit", "main"])
def test_revisions(kernels_hub: Both, pinned: str, how: str) -> None:
    """Both load versions, branches, tags and commits, as a layer or as a module."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    first = published.head()
    published.branch("v1")
    published.branch("feature/x")
    published.tag("release")
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(5))
    published.branch("v2")
    pins: dict[str, dict[str, Any]] = {
        "version": {"version": 1},
        "branch": {"revision": "feature/x"},
        "tag": {"revision": "release"},
        "commit": {"revision": first},
        "main": {"revision": "main"},
    }

    def scenario(side: Side) -> float:
        if how == "layer":
            return side.served(side.lib.LayerRepository("acme/kernels", layer_name="Scale", **pins[pinned]))
        return times(side.lib.get_kernel("acme/kernels", **pins[pinned]))

    kernels_hub.run(scenario).agree(5.0 if pinned == "main" else 3.0)


def test_one_module(kernels_hub: Both) -> None:
    """Both give the same module to all who ask for the same build, and leave its state alone."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    published.branch("v1")

    def scenario(side: Side) -> list[object]:
        first = side.lib.get_kernel("acme/kernels", version=1)
        first.layers.counter = 7
        second = side.lib.get_kernel("acme/kernels", revision=published.head())
        layer = side.lib.LayerRepository("acme/kernels", layer_name="Scale", revision="main").load()
        return [first is second, second.layers.counter, layer is first.layers.Scale]

    kernels_hub.run(scenario).agree([True, 7, True])


def test_newer_version(kernels_hub: Both) -> None:
    """Both say that there is a newer version, and use the one that was asked for."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    published.branch("v1")
    published.branch("v12")

    def scenario(side: Side) -> float:
        return times(side.lib.get_kernel("acme/kernels", version=1))

    pair = kernels_hub.run(scenario)
    pair.agree(3.0)
    for outcome in (pair.theirs, pair.ours):
        assert any("12" in said and "acme/kernels" in said for said in outcome.said), outcome.said


@pytest.mark.parametrize("function", ["get_kernel", "has_kernel", "install_kernel", "get_kernel_variants"])
@pytest.mark.parametrize("pins", [{}, {"version": 1, "revision": "main"}], ids=["neither", "both"])
def test_one_pin(kernels_hub: Both, function: str, pins: dict[str, Any]) -> None:
    """Both want exactly one of version and revision, everywhere, and ask nothing before."""
    pair = kernels_hub.run(lambda side: getattr(side.lib, function)("acme/kernels", **pins))
    pair.refuse(ValueError)
    assert pair.theirs.requests == pair.ours.requests == []


@pytest.mark.parametrize("pins", [{}, {"version": 1, "revision": "main"}], ids=["neither", "both"])
def test_one_pin_of_a_layer(both: Both, pins: dict[str, Any]) -> None:
    """Both want exactly one of them for a layer."""
    both.run(lambda side: side.lib.LayerRepository("acme/kernels", layer_name="Scale", **pins)).refuse(ValueError)


def test_version_that_is_not_there(kernels_hub: Both) -> None:
    """Both list the versions that there are."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v3")
    pair = kernels_hub.run(lambda side: side.lib.get_kernel("acme/kernels", version=7))
    pair.refuse(ValueError)
    assert "3" in str(pair.theirs.error) and "3" in str(pair.ours.error)


@pytest.mark.parametrize("how", ["layer", "get_kernel", "has_kernel", "install_kernel"])
@pytest.mark.parametrize(
    ("trust", "taken"), [(False, False), (True, True), (["stranger/kernels"], True), (["acme/kernels"], False)]
)
def test_trust(kernels_hub: Both, trust: bool | list[str], taken: bool, how: str) -> None:
    """Both refuse untrusted publishers with a ValueError, unless the caller trusts all or this one."""
    publish_kernels(kernels_hub.hub, "stranger/kernels", kernel_source(3), trusted=False).branch("v1")

    def scenario(side: Side) -> object:
        options: dict[str, Any] = {"version": 1, "trust_remote_code": trust}
        if how == "layer":
            return side.lib.LayerRepository("stranger/kernels", layer_name="Scale", **options).load() is not None
        found = getattr(side.lib, how)("stranger/kernels", **options)
        return found if how == "has_kernel" else found is not None

    pair = kernels_hub.run(scenario)
    if taken:
        pair.agree(True)
    else:
        pair.refuse(ValueError)
        for outcome in (pair.theirs, pair.ours):
            assert "stranger" in str(outcome.error) and "trust" in str(outcome.error)
            assert outcome.asked("/resolve/") == 0


def test_trusted_publisher(kernels_hub: Both) -> None:
    """Both ask the Hub whether it trusts the publisher, and take its kernels without a word."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")
    pair = kernels_hub.run(lambda side: times(side.lib.get_kernel("acme/kernels", version=1)))
    pair.agree(3.0)
    for outcome in (pair.theirs, pair.ours):
        assert outcome.asked("/api/organizations/acme/overview") == 1


def test_the_list_of_the_caller_is_copied(both: Both) -> None:
    """To both, changing the list afterwards changes nothing; equal lists make equal repositories."""

    def scenario(side: Side) -> list[bool]:
        trust = ["acme/kernels"]
        first, second = (
            side.lib.LayerRepository("acme/kernels", layer_name="Scale", version=1, trust_remote_code=trust)
            for _ in range(2)
        )
        trust.append("stranger/kernels")
        third = side.lib.LayerRepository("acme/kernels", layer_name="Scale", version=1, trust_remote_code=trust)
        return [first == second, hash(first) == hash(second), first == third]

    both.run(scenario).agree([True, True, False])


def test_backend(kernels_hub: Both) -> None:
    """Both load for the given backend, and refuse one that this PyTorch was not built for."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")
    kernels_hub.run(lambda side: times(side.lib.get_kernel("acme/kernels", version=1, backend="cpu"))).agree(3.0)
    kernels_hub.run(lambda side: side.lib.get_kernel("acme/kernels", version=1, backend="tpu")).refuse(ValueError)


def test_local_kernels_variable(kernels_hub: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both take kernels from the folders in LOCAL_KERNELS instead of the Hub, for all ways to load."""
    folder = write_kernel(kernels_hub.home / "one", kernel_source(3))
    other = write_kernel(kernels_hub.home / "two", kernel_source(5), name="other-kernel")
    monkeypatch.setenv("LOCAL_KERNELS", f"acme/kernels={folder}:acme/others={other}")

    def scenario(side: Side) -> list[object]:
        return [
            times(side.lib.get_kernel("acme/kernels", version=1)),
            times(side.lib.get_kernel("acme/others", revision="main")),
            side.lib.has_kernel("acme/kernels", version=1),
            side.served(side.lib.LayerRepository("acme/kernels", layer_name="Scale", revision="main")),
        ]

    pair = kernels_hub.run(scenario)
    pair.agree([3.0, 5.0, True, 3.0])
    assert pair.theirs.requests == pair.ours.requests == []


def test_local_kernels_malformed(kernels_hub: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both refuse a LOCAL_KERNELS that they cannot read."""
    monkeypatch.setenv("LOCAL_KERNELS", "acme/kernels")
    pair = kernels_hub.run(lambda side: side.lib.get_kernel("acme/kernels", version=1))
    pair.refuse(ValueError)
    assert "LOCAL_KERNELS" in str(pair.theirs.error) and "LOCAL_KERNELS" in str(pair.ours.error)


def test_has_kernel(kernels_hub: Both) -> None:
    """Both say whether there is a build for this machine, and load nothing."""
    hub = kernels_hub.hub
    publish_kernels(hub, "acme/kernels", "raise SystemExit('imported')").branch("v1")
    publish_kernels(hub, "acme/others", "", variant="torch29-cu126-riscv64-linux").branch("v1")

    def scenario(side: Side) -> list[object]:
        return [side.lib.has_kernel(repo_id, version=1) for repo_id in ("acme/kernels", "acme/others")]

    kernels_hub.run(scenario).agree([True, False])


def test_install_kernel(kernels_hub: Both) -> None:
    """Both download a build without importing it, and tell where it is; both find it there offline by its commit."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    commit = published.head()

    def scenario(side: Side) -> list[object]:
        before = {id(loaded.module) for loaded in side.lib.get_loaded_kernels()}
        path = side.lib.install_kernel("acme/kernels", revision=commit)
        again = side.lib.install_kernel("acme/kernels", revision=commit, local_files_only=True)
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        new = {id(loaded.module) for loaded in side.lib.get_loaded_kernels()} - before
        return [isinstance(path, Path), path.name, files, again == path, new]

    kernels_hub.run(scenario).agree(
        [True, "torch-universal", ["__init__.py", "layers.py", "metadata.json"], True, set()]
    )


def test_install_kernel_offline_without_it(kernels_hub: Both) -> None:
    """Both raise where a kernel is to be found on disk and is not."""
    pair = kernels_hub.run(
        lambda side: side.lib.install_kernel("acme/kernels", revision="a" * 40, local_files_only=True)
    )
    pair.refuse(FileNotFoundError)


def test_kernel_variants(kernels_hub: Both) -> None:
    """Both list the builds of a repository, those that fit first, with a reason for each that does not."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    names = ["torch-cpu", "torch-cuda", "torch29-cxx11-cu126-riscv64-linux"]
    files = dict(published.files())
    for name in names:
        files |= {p.replace("torch-universal", name): d for p, d in files.items() if "torch-universal" in p}
    published.commit(files)
    published.branch("v1")

    def scenario(side: Side) -> list[tuple[str, bool, bool]]:
        decisions = side.lib.get_kernel_variants("acme/kernels", version=1)
        kinds = side.lib.VariantAccepted, side.lib.VariantRejected
        assert all(isinstance(decision, kinds) for decision in decisions)
        return [
            (
                decision.variant.variant_str,
                isinstance(decision, side.lib.VariantAccepted),
                bool(getattr(decision, "reason", "")),
            )
            for decision in decisions
        ]

    pair = kernels_hub.run(scenario)
    expected = [("torch-cpu", True, False), ("torch-universal", True, False)]
    rejected = [("torch-cuda", False, True), ("torch29-cxx11-cu126-riscv64-linux", False, True)]
    for outcome in (pair.theirs, pair.ours):
        assert outcome.get()[:2] == expected and sorted(outcome.get()[2:]) == rejected


def test_loaded_from_the_hub(kernels_hub: Both) -> None:
    """Both give the repository and the revision of a kernel loaded with `get_kernel`."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    commit = published.head()

    def scenario(side: Side) -> list[object]:
        kernel = side.lib.get_kernel("acme/kernels", revision=commit)
        (loaded,) = [one for one in side.lib.get_loaded_kernels() if one.module is kernel]
        info = loaded.repo_info
        return [isinstance(info, side.lib.RepoInfo), info.repo_id, info.revision]

    kernels_hub.run(scenario).agree([True, "acme/kernels", commit])


def test_cache_variable(kernels_hub: Both) -> None:
    """Both keep kernels under KERNELS_CACHE where that is set."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")
    code = 'lib.get_kernel("acme/kernels", version=1)\ntell(str(lib.install_kernel("acme/kernels", version=1)))'
    for side in SIDES:
        cache = kernels_hub.home / f"cache of {side.name}"
        path = kernels_hub.process(side, code, KERNELS_CACHE=str(cache))
        assert Path(path).is_relative_to(cache) and (Path(path) / "layers.py").is_file()


# --- Kernels that need kernels -------------------------------------------------------------------


def depends(*repo_ids: str) -> dict[str, object]:
    """Describe the dependencies of a kernel."""
    return {"kernel-depends": [{"repo-id": repo_id, "version": 1} for repo_id in repo_ids]}


def needing(side: Side, *repo_ids: str) -> str:
    """Write a kernel whose factor is the product of those of the kernels that it needs."""
    wanted = " * ".join(f"{side.lib.__name__}.get_kernel_dep({repo_id!r}).FACTOR" for repo_id in repo_ids)
    return f"import {side.lib.__name__}\n\nFACTOR = {wanted}\n"


def test_dependencies(kernels_hub: Both) -> None:
    """Both load the kernels that a kernel needs first, also those that these need, and hand them to it."""
    hub = kernels_hub.hub

    def scenario(side: Side) -> int:
        own = side.name
        publish_kernels(hub, f"acme/{own}-base", {"__init__.py": "FACTOR = 3\n"}).branch("v1")
        publish_kernels(hub, f"acme/{own}-other", {"__init__.py": "FACTOR = 5\n"}).branch("v1")
        for name, needs in ((f"{own}-middle", [f"acme/{own}-base"]), (f"{own}-top", ["middle", "other"])):
            needs = [need if "/" in need else f"acme/{own}-{need}" for need in needs]
            files = {"__init__.py": needing(side, *needs)}
            publish_kernels(hub, f"acme/{name}", files, metadata=depends(*needs)).branch("v1")
        return int(side.lib.get_kernel(f"acme/{own}-top", version=1).FACTOR)

    kernels_hub.run(scenario).agree(15)


@pytest.mark.parametrize("line", ["from kernels import get_kernel_dep", "from kernels.deps import get_kernel_dep"])
def test_dependencies_of_published_kernels(kernels_hub: Both, line: str) -> None:
    """Both load kernels as they are published, which ask `kernels` for the kernels that they need."""
    publish_kernels(kernels_hub.hub, "acme/base", {"__init__.py": "FACTOR = 3\n"}).branch("v1")
    source = f"{line}\n\nFACTOR = get_kernel_dep('acme/base').FACTOR\n"
    publish_kernels(kernels_hub.hub, "acme/top", {"__init__.py": source}, metadata=depends("acme/base")).branch("v1")
    kernels_hub.run(lambda side: side.lib.get_kernel("acme/top", version=1).FACTOR).agree(3)


def test_dependency_that_is_not_declared(kernels_hub: Both) -> None:
    """Both raise where a kernel asks for one that it does not declare."""
    hub = kernels_hub.hub

    def scenario(side: Side) -> object:
        publish_kernels(hub, f"acme/{side.name}", {"__init__.py": needing(side, "acme/base")}).branch("v1")
        return side.lib.get_kernel(f"acme/{side.name}", version=1)

    pair = kernels_hub.run(scenario)
    assert isinstance(pair.theirs.error, RuntimeError)
    assert pair.ours.error is not None
    for outcome in (pair.theirs, pair.ours):
        assert "acme/base" in outcome.why


def test_dependency_outside_of_a_load(both: Both) -> None:
    """Both give kernels that a kernel needs to no other importer."""
    both.run(lambda side: side.lib.get_kernel_dep("acme/base")).refuse(RuntimeError)


def test_cyclic_dependencies(kernels_hub: Both) -> None:
    """Both refuse kernels that need each other."""
    for name, other in (("one", "two"), ("two", "one")):
        publish_kernels(kernels_hub.hub, f"acme/{name}", {"__init__.py": ""}, metadata=depends(f"acme/{other}")).branch(
            "v1"
        )
    kernels_hub.run(lambda side: side.lib.get_kernel("acme/one", version=1)).refuse(ValueError)


# --- Locked --------------------------------------------------------------------------------------


def test_locked(kernels_hub: Both) -> None:
    """Both load the commit in a lock file, whatever the branch is now: as a layer, and as a module."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    lockfile = lock(kernels_hub, published.branch("v1"))
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(5))
    published.branch("v1")

    def scenario(side: Side) -> list[float]:
        repository = side.lib.LockedLayerRepository("acme/kernels", lockfile=lockfile, layer_name="Scale")
        kernel = side.lib.get_locked_kernel("acme/kernels", lockfile=lockfile)
        return [side.served(repository), times(kernel), times(side.lib.load_kernel("acme/kernels", lockfile=lockfile))]

    kernels_hub.run(scenario).agree([3.0, 3.0, 3.0])


def test_load_kernel_downloads_nothing(kernels_hub: Both) -> None:
    """Both raise in `load_kernel` where the kernel is not on disk, and ask the Hub nothing."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    lockfile = lock(kernels_hub, published.branch("v1"))
    pair = kernels_hub.run(lambda side: side.lib.load_kernel("acme/kernels", lockfile=lockfile))
    pair.refuse(FileNotFoundError)
    assert pair.theirs.requests == pair.ours.requests == []


@pytest.mark.parametrize("how", ["LockedLayerRepository", "get_locked_kernel", "load_kernel"])
def test_not_locked(kernels_hub: Both, how: str) -> None:
    """Both refuse a repository that is not in the lock file, at once."""
    lockfile = lock(kernels_hub, "a" * 40)
    options = {"layer_name": "Scale"} if how == "LockedLayerRepository" else {}
    pair = kernels_hub.run(lambda side: getattr(side.lib, how)("acme/others", lockfile=lockfile, **options))
    pair.refuse(ValueError)
    assert "acme/others" in str(pair.theirs.error) and "acme/others" in str(pair.ours.error)


def test_no_lock_of_the_calling_package(kernels_hub: Both) -> None:
    """Both say that the calling package has no lock file."""
    pair = kernels_hub.run(lambda side: side.lib.get_locked_kernel("acme/kernels", lockfile=None))
    pair.refuse(ValueError)
    assert "kernels.lock" in str(pair.theirs.error) and "kernels.lock" in str(pair.ours.error)


def test_locked_and_offline(kernels_hub: Both, new_process: Any, fresh_theirs: Any) -> None:
    """Both load a locked kernel offline that was loaded online, where the repository has no other build."""
    published = publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3))
    lockfile = lock(kernels_hub, published.branch("v1"))

    def load(side: Side) -> float:
        return times(side.lib.get_locked_kernel("acme/kernels", lockfile=lockfile))

    kernels_hub.run(load).agree(3.0)
    new_process()
    fresh_theirs()

    def again(side: Side) -> float:
        with pytest.MonkeyPatch.context() as patch:
            offline(patch)
            return load(side)

    kernels_hub.run(again).agree(3.0)


# --- Layers for functions -------------------------------------------------------------------


def test_class_serves_a_function(both: Both) -> None:
    """Both let a layer class of a kernel serve a decorated function."""
    folder = write_kernel(both.home / "kernel", kernel_source(3))

    def scenario(side: Side) -> float:
        name, _, calls = side.function()
        return side.freeze(calls(), {name: {"cpu": side.lib.LocalLayerRepository(folder, layer_name="Scale")}})

    both.run(scenario).agree(3.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["FuncRepository", "LocalFuncRepository", "LockedFuncRepository"])
def test_older_names(kernels_hub: Both, how: str) -> None:
    """Both let a function at the top of a kernel serve a decorated function, by the older names."""
    files = {"__init__.py": "def scale(x):\n    return x * 7\n"}
    commit = publish_kernels(kernels_hub.hub, "acme/kernels", files).branch("v1")
    folder = write_kernel(kernels_hub.home / "kernel", files)
    lockfile = lock(kernels_hub, commit)

    def scenario(side: Side) -> float:
        name, _, calls = side.function("use_kernel_func_from_hub")
        named: dict[str, tuple[object, dict[str, Any]]] = {
            "FuncRepository": ("acme/kernels", {"version": 1}),
            "LocalFuncRepository": (folder, {}),
            "LockedFuncRepository": ("acme/kernels", {"lockfile": lockfile}),
        }
        place, options = named[how]
        source = getattr(side.lib, how)(place, func_name="scale", **options)
        return side.freeze(calls(), {name: {"cpu": source}})

    kernels_hub.run(scenario).agree(7.0)


# --- What is told to the Hub ---------------------------------------------------------------------


@pytest.mark.parametrize("agent", [None, "caller/7", {"caller": "7"}])
@pytest.mark.parametrize("how", ["get_kernel", "install_kernel"])
def test_user_agent(kernels_hub: Both, agent: Any, how: str) -> None:
    """Both have a user agent with library, backend, platform, PyTorch, and the additions of the caller."""
    publish_kernels(kernels_hub.hub, "acme/kernels", kernel_source(3)).branch("v1")
    pair = kernels_hub.run(lambda side: getattr(side.lib, how)("acme/kernels", version=1, user_agent=agent) and True)
    pair.agree(True)
    wanted = [f"torch/{torch.__version__}", "backend/cpu", f"platform/{_platform()}", "file_type/kernel", "python/"]
    for outcome in (pair.theirs, pair.ours):
        told = [r.headers.get("user-agent", "") for r in outcome.requests if "/resolve/" in r.path]
        assert told
        for header in told:
            missing = [part for part in wanted if part not in header]
            assert not missing, (missing, header)
            assert ("caller/7" in header) is (agent is not None)


def _platform() -> str:
    return f"{platform.machine()}-{platform.system().lower()}"
