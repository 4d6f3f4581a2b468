"""Kernels by name: functions, kernels that depend on kernels, redirects, overrides, versions, the user agent."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import urllib.request
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from hub_scene import REFERENCE, Publish, cached, call, kernel, new_process, scale, served
from huggingface_hub import constants
from patience import PATIENCE
from warned import never, noted

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    IntegrityError,
    KernelsWarning,
    LoadError,
    UntrustedError,
    use_kernel_forward_from_hub,
)
from kernels_plugins import (
    FuncRepository,
    LayerRepository,
    LoadedKernel,
    LocalFuncRepository,
    LocalLayerRepository,
    RepoInfo,
    VariantAccepted,
    VariantRejected,
    get_kernel,
    get_kernel_dep,
    get_kernel_variants,
    get_loaded_kernels,
    get_local_kernel,
    has_kernel,
    install_kernel,
    use_kernel_func_from_hub,
    use_kernel_mapping,
)
from kernels_plugins.hub import fetching
from kernels_plugins.hub.builds.machine import Machine
from kernels_plugins.hub.client import board, overrides
from kernels_plugins.hub.client.overrides import parse_overrides
from kernels_plugins.hub.client.redirect import parse_status
from kernels_plugins.hub.locking.lockfile import Dependency, Lock, LockedKernel
from kernels_plugins.hub.request import KernelRequest
from kernels_plugins.local_hub.server import LocalHub, Repository, Request
from kernels_plugins.locks import KeyedLocks

pytest_plugins = ["kernels_plugins.hub.testing"]

OTHER = "torch29-cxx11-cu126-riscv64-linux"
"""A build for no machine that runs these tests."""


def factor(module: Any) -> float:
    """Run the layer of a kernel."""
    return float(module.layers.Scale()(torch.ones(1)).item())


def on_disk(repository: Repository, folder: Path) -> Path:
    """Write the files of a repository to disk."""
    for path, data in repository.files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log messages of the loader, and clear them."""
    said = [record.getMessage() for record in caplog.records if record.name == "kernels_plugins.hub"]
    caplog.clear()
    return said


# --- The functions -------------------------------------------------------------------------------


def test_get_kernel(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """A kernel is loaded by version, branch and commit as one module, listed with its origin."""
    repository = kernel_repository(layers=kernel(3))
    commit = repository.branch("v1")
    modules = {get_kernel("acme/kernels", **pin) for pin in ({"version": 1}, {"revision": "v1"}, {"revision": commit})}
    (module,) = modules
    assert factor(module) == 3
    (loaded,) = get_loaded_kernels()
    assert isinstance(loaded, LoadedKernel) and loaded.module is module
    assert loaded.repo_info == RepoInfo("acme/kernels", commit) and loaded.metadata.name == "kernels"
    assert loaded.checked["trust"] == "acme was a trusted publisher when it was downloaded"
    get_loaded_kernels().clear()
    assert len(get_loaded_kernels()) == 1


def test_get_local_kernel(local_hub: LocalHub, kernel_repository: Publish, tmp_path: Path) -> None:
    """A folder is a kernel without the Hub; a damaged one is refused."""
    folder = on_disk(kernel_repository(layers=kernel(4)), tmp_path / "kernel")
    local_hub.forget()
    assert factor(get_local_kernel(folder)) == factor(get_local_kernel(str(folder / "build"), backend="cpu")) == 4
    assert [loaded.repo_info for loaded in get_loaded_kernels()] == [None] and local_hub.requests == []
    (folder / "build/torch-universal/layers.py").write_text(kernel(666))
    with pytest.raises(IntegrityError, match=r"layers\.py has other bytes"):
        get_local_kernel(folder)
    with pytest.raises(LoadError, match="no such folder") as caught:
        get_local_kernel(tmp_path / "nowhere")
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("function", [get_kernel, has_kernel, install_kernel, get_kernel_variants])
def test_arguments(local_hub: LocalHub, function: Callable[..., Any]) -> None:
    """Each function refuses senseless arguments before any request, and says what to write."""
    for pins in ({}, {"version": 1, "revision": "main"}):
        with pytest.raises(ArgumentError, match="exactly one of revision"):
            function("acme/kernels", **pins)
    with pytest.raises(ArgumentError, match="write 'owner/name'"):
        function("kernels", version=1)
    with pytest.raises(ArgumentError, match=r"backend is 'tpu', and this torch has cpu"):
        function("acme/kernels", version=1, backend="tpu")
    assert local_hub.requests == []


def test_user_agent_arguments() -> None:
    """Text that cannot stand in a header, and a list that is none, are refused by the call that gets them."""
    with pytest.raises(ArgumentTypeError, match="user_agent is a text or a mapping"):
        get_kernel("acme/kernels", version=1, user_agent=7)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="printable ASCII"):
        get_kernel("acme/kernels", version=1, user_agent="a\nb: c")
    with pytest.raises(ArgumentTypeError, match="trust_remote_code"):
        get_local_kernel("nowhere", trust_remote_code="acme/kernels")
    with pytest.raises(ArgumentError, match="backend is 'xpu'"):
        get_local_kernel("nowhere", backend="xpu")


def test_has_kernel(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """There is a kernel if a build fits; not without one, nor without `build`. Nothing but metadata is downloaded."""
    kernel_repository("acme/one", kernel()).branch("v1")
    kernel_repository("acme/two", kernel(), variant=OTHER).branch("v1")
    local_hub.add("acme/none", {"README.md": "to be built"}).branch("v1")
    assert [has_kernel(f"acme/{name}", version=1) for name in ("one", "two", "none")] == [True, False, False]
    assert {r.path.rpartition("/")[2] for r in local_hub.requests if "/resolve/" in r.path} == {"metadata.json"}
    assert get_loaded_kernels() == []


def test_has_kernel_does_not_know(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None]
) -> None:
    """No such version, no trust and no network are errors, each of its own kind; the network is named as such."""
    kernel_repository(layers=kernel()).branch("v1")
    kernel_repository("eve/kernels", kernel(), trusted=False).branch("v1")
    with pytest.raises(LoadError, match="versions that exist are 1") as caught:
        has_kernel("acme/kernels", version=2)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UntrustedError, match="not a trusted publisher") as distrust:
        has_kernel("eve/kernels", version=1)
    assert isinstance(distrust.value, ValueError)
    assert has_kernel("eve/kernels", version=1, trust_remote_code=["eve/kernels"])
    new_process()
    local_hub.stop()
    with pytest.raises(LoadError, match="cannot be reached") as unreachable:
        has_kernel("acme/kernels", version=1)
    assert isinstance(unreachable.value, ConnectionError) and "trusted publisher" not in str(unreachable.value)


def test_has_kernel_for_this_device(monkeypatch: pytest.MonkeyPatch, kernel_repository: Publish) -> None:
    """A build without code for the current device counts as none, unless that is not checked; loading says why."""
    backend = {"type": "cuda", "archs": ["9.0a"]}
    kernel_repository(layers=kernel(), metadata={"backend": backend}).branch("v1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert not has_kernel("acme/kernels", version=1) and has_kernel("acme/kernels", version=1, check_arch=False)
    with pytest.raises(LoadError, match=r"torch-universal: it has code for 9.0a, and cuda:0 has capability 8.0") as why:
        get_kernel("acme/kernels", version=1)
    assert isinstance(why.value, RuntimeError)
    assert factor(get_kernel("acme/kernels", version=1, check_arch=False)) == 3


def test_layer_for_each_device(monkeypatch: pytest.MonkeyPatch, kernel_repository: Publish) -> None:
    """A layer is refused on a GPU that its build has no code for, and serves on the other one: it is loaded once."""
    from kernels_core import Mode, resolve

    kernel_repository(layers=kernel(), metadata={"backend": {"type": "cuda", "archs": ["9.0"]}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    both = [(8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: both[getattr(gpu, "index", gpu)])
    monkeypatch.setattr(torch.version, "cuda", "12.6")

    @use_kernel_forward_from_hub("for each device")
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with use_kernel_mapping({"for each device": {"cuda": scale()}}):
        old, new = (resolve(Layer, device=f"cuda:{index}", mode=Mode.INFERENCE) for index in (0, 1))
    assert "cuda:0 has capability 8.0" in old.refusals[0].reason and old.is_reference
    assert new.refusals == () and not new.is_reference


def test_install_kernel(local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None]) -> None:
    """A build is downloaded and checked, not run; then it is found there without a request."""
    repository = kernel_repository(layers="raise SystemExit('imported')")
    repository.branch("v1")
    path = install_kernel("acme/kernels", version=1)
    assert path == cached(repository) and (path / "layers.py").is_file()
    local_hub.forget()
    new_process()
    assert install_kernel("acme/kernels", version=1, local_files_only=True) == path and local_hub.requests == []
    with pytest.raises(LoadError, match=r"not in the cache, and local_files_only=True") as caught:
        install_kernel("acme/kernels", version=2, local_files_only=True)
    assert isinstance(caught.value, FileNotFoundError) and local_hub.requests == []


def test_get_kernel_variants(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Builds are listed, the best first, the others with a reason; whoever published it, and nothing is downloaded."""
    repository = kernel_repository("eve/kernels", kernel(), trusted=False)
    files = dict(repository.files())
    fitting = f"torch-{Machine.here().backend}"
    for name in (fitting, "torch-tpu", OTHER, "docs"):
        files |= {path.replace("torch-universal", name): data for path, data in repository.files().items()}
    repository.commit(files)
    found = get_kernel_variants("eve/kernels", revision="main")
    assert [decision.variant.variant_str for decision in found] == [fitting, "torch-universal", "torch-tpu", OTHER]
    assert [type(decision) for decision in found] == [VariantAccepted] * 2 + [VariantRejected] * 2
    assert isinstance(found[2], VariantRejected) and found[2].reason.startswith("built for TPU")
    assert local_hub.count("/resolve/") == 0


def test_threads_load_one_kernel(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Eight threads that ask for a kernel at the same time download it once, and get the same module."""
    kernel_repository(layers=kernel()).branch("v1")
    with ThreadPoolExecutor(8) as pool:
        modules = set(pool.map(lambda _: get_kernel("acme/kernels", version=1), range(8)))
    assert len(modules) == 1 and local_hub.count("GET /kernels/acme/kernels/resolve") == 3


def test_older_names(kernel_repository: Publish, tmp_path: Path) -> None:
    """Functions at the top of a kernel serve through the older names, each of which says that it is deprecated."""
    files = {"__init__.py": "def scale(x):\n    return x * 3\n"}
    repository = kernel_repository(layers=files)
    folder = on_disk(repository, tmp_path / "kernel")
    with pytest.warns(DeprecationWarning, match="LayerRepository"):
        sources = [FuncRepository("acme/kernels", func_name="scale", revision="main")]
        same = FuncRepository("acme/kernels", func_name="scale", revision="main")
    with pytest.warns(DeprecationWarning, match="LocalLayerRepository"):
        local = LocalFuncRepository(folder, func_name="scale")
    with pytest.warns(DeprecationWarning, match="use_kernel_forward_from_hub"):
        double = use_kernel_func_from_hub("an older name")(lambda x: x * 2)
    assert (same, hash(same)) == (sources[0], hash(sources[0])) and "scale" in repr(local) and "scale" in repr(same)
    for source in (*sources, local):
        with use_kernel_mapping({"an older name": {"cpu": source}}):
            assert double(torch.ones(1)).item() == 3
    with pytest.warns(DeprecationWarning), pytest.raises(LoadError, match="no function 'abacus': there are scale"):
        FuncRepository("acme/kernels", func_name="abacus", revision="main").load()


def test_dirty_build(kernel_repository: Publish) -> None:
    """A build from sources that were not committed serves, and that is warned of once."""
    git = {"commit": "a" * 40, "dirty": True}
    kernel_repository(
        layers=kernel(), metadata={"provenance": {"kernel-builder": {"version": "1", **git}, "kernel": git}}
    ).branch("v1")
    with noted() as caught:
        for _ in range(2):
            get_kernel("acme/kernels", version=1)
    (said,) = [str(warning.message) for warning in caught if warning.category is KernelsWarning]
    assert "the kernel and the builder" in said and "acme/kernels@" in said


# --- Kernels that depend on kernels --------------------------------------------------------------


def depends(**versions: int) -> dict[str, object]:
    """Describe the dependencies of a kernel, all of acme."""
    return {"kernel-depends": [{"repo-id": f"acme/{name}", "version": number} for name, number in versions.items()]}


def needing(*names: str, line: str = "from kernels_plugins import get_kernel_dep") -> dict[str, str]:
    """Write a kernel whose factor is the product of those that it depends on."""
    product = " * ".join(f"get_kernel_dep('acme/{name}').FACTOR" for name in names)
    return {"__init__.py": f"{line}\n\nFACTOR = {product}\n"}


def publish(make: Publish, name: str, files: dict[str, str] | int, version: int = 1, **options: Any) -> Repository:
    """Publish a version of a kernel, with a factor or that of its dependency."""
    files = {"__init__.py": f"FACTOR = {files}\n"} if isinstance(files, int) else files
    repository = make(f"acme/{name}", files, **options)
    repository.branch(f"v{version}")
    return repository


@pytest.mark.parametrize("line", ["from kernels_plugins", "from kernels", "from kernels.deps"])
def test_dependencies(kernel_repository: Publish, line: str) -> None:
    """Dependencies of a kernel, and theirs, are loaded first and given to it, as published kernels ask for them."""
    publish(kernel_repository, "base", 3)
    publish(kernel_repository, "other", 5)
    line = f"{line} import get_kernel_dep"
    publish(kernel_repository, "middle", needing("base", line=line), metadata=depends(base=1))
    top = needing("middle", "other", line=line)
    publish(kernel_repository, "top", top, metadata=depends(middle=1, other=1))
    before = sys.modules.get("kernels")
    assert get_kernel("acme/top", version=1).FACTOR == 15
    assert sys.modules.get("kernels") is before
    names = [loaded.metadata.name for loaded in get_loaded_kernels()]
    assert names == ["base", "middle", "other", "top"]
    top_kernel = get_loaded_kernels()[-1]
    assert [kernel.metadata.name for kernel in top_kernel.dependencies] == ["middle", "other"]
    assert has_kernel("acme/top", version=1) and install_kernel("acme/top", version=1).is_dir()


def test_dependencies_of_layers(
    kernel_repository: Publish, new_process: Callable[[], None], local_hub: LocalHub
) -> None:
    """A layer of a kernel that depends on another serves; warm, both cost a request each, and a commit none."""
    publish(kernel_repository, "base", 3)
    source = "import torch\nfrom kernels_plugins import get_kernel_dep\nbase = get_kernel_dep('acme/base')\n"
    files = {"layers.py": source + kernel(1).partition("\n")[2].replace("* 1", "* base.FACTOR")}
    commit = kernel_repository(layers=files, metadata=depends(base=1)).head()
    assert served(scale()) == 3
    local_hub.forget()
    new_process()
    assert served(scale(revision=commit)) == 3
    assert [r.path for r in local_hub.requests] == ["/api/kernels/acme/base/refs"]


def test_two_versions_of_a_dependency(kernel_repository: Publish) -> None:
    """Two kernels depend on two versions of one, and one content on two: all live side by side."""
    publish(kernel_repository, "base", 3, version=1)
    publish(kernel_repository, "base", 5, version=2)
    publish(kernel_repository, "one", needing("base"), metadata=depends(base=1))
    publish(kernel_repository, "two", needing("base"), metadata=depends(base=2))
    assert [get_kernel(f"acme/{name}", version=1).FACTOR for name in ("one", "two", "one")] == [3, 5, 3]
    assert len({id(loaded.module) for loaded in get_loaded_kernels()}) == 4


def test_same_content_other_dependency(
    kernel_repository: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose dependency is another one now is another module, though its own files are the same."""
    base = publish(kernel_repository, "base", 3)
    publish(kernel_repository, "top", needing("base"), metadata=depends(base=1))
    first = get_kernel("acme/top", version=1)
    monkeypatch.setenv("LOCAL_KERNELS", f"acme/base={on_disk(base, tmp_path / 'base')}")
    assert get_kernel("acme/top", version=1) is first  # the same bytes are the same module, wherever they lie
    publish(kernel_repository, "base", 7)
    monkeypatch.setenv("LOCAL_KERNELS", f"acme/base={on_disk(base, tmp_path / 'new')}")
    second = get_kernel("acme/top", version=1)
    assert (first.FACTOR, second.FACTOR) == (3, 7)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circle(kernel_repository: Publish, length: int) -> None:
    """Kernels that depend on each other are refused, and the circle is named; whether there is a build is answered."""
    for number in range(length):
        publish(kernel_repository, f"k{number}", 1, metadata=depends(**{f"k{(number + 1) % length}": 1}))
    with pytest.raises(LoadError) as caught:
        get_kernel("acme/k0", version=1)
    circle = " -> ".join(f"acme/k{number % length} at v1" for number in range(length + 1))
    assert f"depend on each other in a circle: {circle}" in str(caught.value) and isinstance(caught.value, ValueError)
    assert has_kernel("acme/k0", version=1)


def test_dependencies_are_checked(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """A dependency needs trust of its own, and bytes as promised; nothing is imported before all are there."""
    kernel_repository("eve/base", {"__init__.py": ""}, trusted=False).branch("v1")
    needs = {"kernel-depends": [{"repo-id": "eve/base", "version": 1}]}
    publish(kernel_repository, "top", {"__init__.py": "raise SystemExit"}, metadata=needs)
    with pytest.raises(UntrustedError, match=r"acme/top at v1 .*: eve/base at v1: 'eve' is not a trusted publisher"):
        get_kernel("acme/top", version=1)
    assert local_hub.count("eve/base/resolve") == 0
    with pytest.raises(LoadError, match="SystemExit"):
        get_kernel("acme/top", version=1, trust_remote_code=["eve/base"])
    files = dict(kernel_repository("acme/spoiled", {"__init__.py": ""}).files())
    local_hub.repository("acme/spoiled").commit({**files, "build/torch-universal/more.py": b""})  # type: ignore[union-attr]
    local_hub.repository("acme/spoiled").branch("v1")  # type: ignore[union-attr]
    publish(kernel_repository, "upper", {"__init__.py": "raise SystemExit"}, metadata=depends(spoiled=1))
    with pytest.raises(IntegrityError, match=r"acme/upper at v1 .*acme/spoiled at v1 .*more.py is not in the digest"):
        get_kernel("acme/upper", version=1)


def test_dependency_without_a_build(kernel_repository: Publish) -> None:
    """Where a dependency has no build for this machine, there is no kernel."""
    publish(kernel_repository, "base", 3, variant=OTHER)
    publish(kernel_repository, "top", needing("base"), metadata=depends(base=1))
    assert not has_kernel("acme/top", version=1)
    with pytest.raises(LoadError, match="acme/base at v1: no build variant fits"):
        get_kernel("acme/top", version=1)


def test_get_kernel_dep_elsewhere(kernel_repository: Publish) -> None:
    """Outside of an import, in a function that runs later, and for undeclared dependencies, the error says so."""
    with pytest.raises(LoadError, match="where no kernel is being imported") as caught:
        get_kernel_dep("acme/base")
    assert isinstance(caught.value, RuntimeError)
    publish(kernel_repository, "base", 3)
    publish(kernel_repository, "bad", needing("other"), metadata=depends(base=1))
    with pytest.raises(LoadError, match=r"declares no such dependency.*are: acme/base"):
        get_kernel("acme/bad", version=1)
    late = "from kernels import get_kernel_dep\n\n\ndef late():\n    return get_kernel_dep('acme/base')\n"
    publish(kernel_repository, "late", {"__init__.py": late}, metadata=depends(base=1))
    module = get_kernel("acme/late", version=1)
    # Of the library `kernels`, which says so itself, where it is installed; else there is none.
    with pytest.raises((LoadError, ImportError) if find_spec("kernels") is None else RuntimeError):
        module.late()


def test_local_kernel_with_dependencies(local_hub: LocalHub, kernel_repository: Publish, tmp_path: Path) -> None:
    """Dependencies of a kernel on disk come from the Hub, under the terms of the caller."""
    kernel_repository("eve/base", {"__init__.py": "FACTOR = 3\n"}, trusted=False).branch("v1")
    needs = {"kernel-depends": [{"repo-id": "eve/base", "version": 1}]}
    source = {"__init__.py": "from kernels import get_kernel_dep\n\nFACTOR = get_kernel_dep('eve/base').FACTOR\n"}
    folder = on_disk(publish(kernel_repository, "top", source, metadata=needs), tmp_path / "top")
    with pytest.raises(UntrustedError, match="eve/base"):
        get_local_kernel(folder)
    module = get_local_kernel(folder, trust_remote_code=["eve/base"], user_agent="caller/7")
    assert module.FACTOR == 3
    assert "LocalLayerRepository" in repr(LocalLayerRepository(folder, layer_name="x"))


def test_locked_dependencies(kernel_repository: Publish) -> None:
    """With a lock, dependencies are the commits that it says; one that it does not have is an error."""
    from kernels_plugins.hub.kernel import load
    from kernels_plugins.hub.request import locked_request

    base = publish(kernel_repository, "base", 3)
    old = base.head()
    top = publish(kernel_repository, "top", needing("base"), metadata=depends(base=1))
    publish(kernel_repository, "base", 5)
    locked = LockedKernel(Dependency("acme/top", version=1), top.head())
    lock = Lock((locked, LockedKernel(Dependency("acme/base", version=1), old)))
    assert load(locked_request(lock, "acme/top")).module.FACTOR == 3
    with pytest.raises(
        LoadError, match=r"acme/top at v1, locked .* depends on acme/base version 1, which is not locked"
    ):
        load(locked_request(Lock((locked,)), "acme/top"))


# --- Redirects -----------------------------------------------------------------------------------


def redirect(repository: Repository, destination: str, revision: str | None = None, branch: str = "v1") -> str:
    """Say in a repository where its kernel is now; return the commit."""
    text = f'kind = "redirect"\ndestination = "{destination}"\n' + (f'revision = "{revision}"\n' if revision else "")
    commit = repository.commit({**repository.files(), "kernel-status.toml": text})
    repository.branch(branch)
    return commit


@pytest.mark.parametrize("revision", [None, "v1"])
def test_redirect(
    local_hub: LocalHub,
    kernel_repository: Publish,
    new_process: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
    revision: str | None,
) -> None:
    """A redirect is followed, with one warning, and shown; warm, it costs its two revisions, and a commit nothing."""
    new = kernel_repository("acme/new", kernel(5))
    new.branch("v1")
    commit = redirect(kernel_repository("acme/old", kernel(3)), "acme/new", revision)
    outcome = call(scale("acme/old", version=1))
    wanted = f"acme/new at {revision or 'main'}"
    assert outcome.value == 5 and outcome.said == [] and outcome.resolution.checked["redirect"] == wanted
    assert outcome.resolution.origin.startswith(f"acme/new@{new.head()[:12]}")
    assert logged(caplog) == [f"acme/old at v1 is redirected to {wanted}: name that instead."]
    assert local_hub.count("acme/old/resolve") == 2  # the file that says so
    for pin, paths in (
        ({"version": 1}, ["old/refs", f"new/revision/{revision or 'main'}"]),
        ({"revision": commit}, []),
    ):
        factor(get_kernel("acme/old", **pin))
        new_process()
        local_hub.forget()
        assert factor(get_kernel("acme/old", **pin)) == 5
        assert [r.path for r in local_hub.requests] == [f"/api/kernels/acme/{path}" for path in paths]


def test_redirect_offline(
    local_hub: LocalHub,
    kernel_repository: Publish,
    new_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that was loaded through a redirect loads again without the Hub, and with HF_HUB_OFFLINE."""
    kernel_repository("acme/new", kernel(5))
    redirect(kernel_repository("acme/old", kernel(3)), "acme/new")
    assert factor(get_kernel("acme/old", version=1)) == 5
    new_process()
    local_hub.fail("acme/new", status=503, times=None)
    assert factor(get_kernel("acme/old", version=1)) == 5
    new_process()
    local_hub.stop()
    assert factor(get_kernel("acme/old", version=1)) == 5
    new_process()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert factor(get_kernel("acme/old", version=1)) == 5


def test_redirect_and_trust(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Trust is decided on where a redirect leads: not trusted there is refused, not trusted here does not matter."""
    kernel_repository("eve/new", kernel(5), trusted=False)
    redirect(kernel_repository("acme/old", kernel(3)), "eve/new")
    with pytest.raises(UntrustedError, match=r"'eve' is not a trusted publisher .*'acme/old' was moved to 'eve/new'"):
        get_kernel("acme/old", version=1, trust_remote_code=["acme/old"])
    assert local_hub.count("eve/new/resolve") == 0
    assert factor(get_kernel("acme/old", version=1, trust_remote_code=["eve/new"])) == 5
    kernel_repository("acme/good", kernel(7))
    redirect(kernel_repository("bob/old", kernel(3), trusted=False), "acme/good")
    assert factor(get_kernel("bob/old", version=1)) == 7


def test_redirects_in_a_row(kernel_repository: Publish) -> None:
    """Redirects are followed some times; a circle and an endless row are refused, and named."""
    kernel_repository("acme/k9", kernel(9)).branch("v1")
    for number in range(8, 0, -1):
        redirect(kernel_repository(f"acme/k{number}", kernel(number)), f"acme/k{number + 1}", "v1")
    assert factor(get_kernel("acme/k4", version=1)) == 9
    with pytest.raises(LoadError, match="redirected too far: acme/k1 at v1 -> acme/k2 at v1"):
        get_kernel("acme/k1", version=1)
    redirect(kernel_repository("acme/a", kernel()), "acme/b", "v1")
    redirect(kernel_repository("acme/b", kernel()), "acme/a", "v1")
    with pytest.raises(LoadError, match="in a circle: acme/a at v1 -> acme/b at v1 -> acme/a at v1"):
        get_kernel("acme/a", version=1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("kind =", "it is no TOML"),
        (b"\xff", "it is no TOML"),
        ("", "it has no kind"),
        ('kind = "gone"', "its kind is 'gone', and 'redirect' is known"),
        ('kind = "redirect"', "its destination is None"),
        ('kind = "redirect"\ndestination = "../up"', "its destination is '../up'"),
        ('kind = "redirect"\ndestination = "a/b"\nrevision = 3', "its revision is 3"),
        ('kind = "redirect"\ndestination = "a/b"\nrevision = ".."', "its revision is '..'"),
        ('kind = "redirect"\ndestination = "a/b/c"', "its destination is 'a/b/c'"),
        ('kind = "redirect"\ndestination = "a/b"\nrevision = ""', "its revision is ''"),
    ],
)
def test_malformed_status(kernel_repository: Publish, text: str | bytes, what: str) -> None:
    """A status file that cannot be followed refuses the kernel, with the fault of the file."""
    repository = kernel_repository(layers=kernel())
    repository.commit({**repository.files(), "kernel-status.toml": text})
    outcome = call(scale())
    assert outcome.value == REFERENCE and "kernel-status.toml cannot be followed: " + what in outcome.why
    with pytest.raises(LoadError, match=r"kernel-status\.toml"):
        parse_status(text if isinstance(text, bytes) else text.encode())


def test_large_status(kernel_repository: Publish) -> None:
    """A status file that is too large to be one is not downloaded."""
    repository = kernel_repository(layers=kernel())
    repository.commit({**repository.files(), "kernel-status.toml": "#" * 70_000})
    assert "kernel-status.toml has 70000 bytes" in call(scale()).why


# --- Folders instead of repositories -------------------------------------------------------------


def test_overrides(
    local_hub: LocalHub, kernel_repository: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LOCAL_KERNELS serves functions, layers and dependencies, without a request, and is shown."""
    folder = on_disk(kernel_repository("acme/made", kernel(7)), tmp_path / "one")
    base = on_disk(publish(kernel_repository, "base", 3), tmp_path / "two")
    top = on_disk(publish(kernel_repository, "top", needing("base"), metadata=depends(base=1)), tmp_path / "three")
    value = f"acme/kernels={folder}:acme/base={base}:acme/top={top}"
    monkeypatch.setenv("LOCAL_KERNELS", value)
    local_hub.forget()
    assert factor(get_kernel("acme/kernels", version=1)) == 7 and get_kernel("acme/top", version=4).FACTOR == 3
    outcome = call(scale())
    assert outcome.value == 7 and outcome.resolution.checked["trust"] == "local files: LOCAL_KERNELS"
    assert outcome.resolution.origin == str(folder / "build" / "torch-universal")
    assert has_kernel("acme/top", revision="main")
    assert install_kernel("acme/kernels", version=1) == folder / "build" / "torch-universal"
    (only,) = get_kernel_variants("acme/kernels", version=1)
    assert only.variant.variant_str == "torch-universal" and local_hub.requests == []
    for nowhere in str(tmp_path / "nowhere"), "~nobody-of-that-name/nowhere":
        monkeypatch.setenv("LOCAL_KERNELS", f"acme/kernels={nowhere}")
        assert not has_kernel("acme/kernels", version=1)
        with pytest.raises(LoadError, match=r"acme/kernels \(LOCAL_KERNELS\): .*nowhere: there is no such folder"):
            get_kernel("acme/kernels", version=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a/b=/x", {"a/b": "/x"}),
        ("a/b=/x:c/d=y/z", {"a/b": "/x", "c/d": "y/z"}),
        (r"a/b=C:\x\y:c/d=D:/z", {"a/b": r"C:\x\y", "c/d": "D:/z"}),
        (r"a/b=\\server\share:c/d=.", {"a/b": r"\\server\share", "c/d": "."}),
        ("a/b=/x=y", {"a/b": "/x=y"}),
        ("a.b-c/d_e=/x", {"a.b-c/d_e": "/x"}),
    ],
)
def test_forms_of_overrides(text: str, expected: dict[str, str]) -> None:
    """Entries are parted at colons, those of drives excepted."""
    assert {name: str(path) for name, path in parse_overrides(text).items()} == expected


@pytest.mark.parametrize(
    "text", ["a", "a/b", "a/b=", "a/b=/x:c", "a/b=/x:", ":a/b=/x", "a=/x", "a/b/c=/x", "a/b=/x:a/b=/y"]
)
def test_malformed_overrides(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """An entry that is none is refused with the form that it should have."""
    monkeypatch.setenv("LOCAL_KERNELS", text)
    with pytest.raises(ArgumentError, match=r"Write LOCAL_KERNELS=owner/name=path:owner2/name2=path2"):
        get_kernel("acme/kernels", version=1)
    overrides.parse_overrides.cache_clear()


# --- Versions ------------------------------------------------------------------------------------


def test_newer_version(
    local_hub: LocalHub,
    kernel_repository: Publish,
    new_process: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """That there is a newer version is asked when one is loaded first, and logged once in each process."""
    repository = kernel_repository(layers=kernel())
    for name in ("v1", "v2", "v12", "v9x", "vintage", "v007"):
        repository.branch(name)
    said = "Version 2 of acme/kernels is used, and there is version 12."
    with never():
        for _ in range(2):
            get_kernel("acme/kernels", version=2)
    assert logged(caplog) == [said] and local_hub.count("/refs") == 1
    new_process()
    local_hub.forget()
    get_kernel("acme/kernels", version=2)
    assert logged(caplog) == [said] and local_hub.count() == 1
    get_kernel("acme/kernels", version=12)
    get_kernel("acme/kernels", revision="v1")
    assert logged(caplog) == []


def test_versions_cannot_be_asked(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None]
) -> None:
    """A Hub that does not list its branches serves no version, but one from the cache; the next attempt asks again."""
    kernel_repository(layers=kernel()).branch("v1")
    local_hub.fail("/refs", status=500, times=None)
    with pytest.raises(ConnectionError, match="acme/kernels at v1: the Hub is in trouble"):
        get_kernel("acme/kernels", version=1)
    local_hub.heal()
    assert factor(get_kernel("acme/kernels", version=1)) == 3
    new_process()
    local_hub.fail("/refs", status=500, times=None)
    assert factor(get_kernel("acme/kernels", version=1)) == 3


def test_a_version_is_a_branch(
    local_hub: LocalHub, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    """A tag of that name is no version: not alone, not beside the branch, and not offline; a revision may be one."""
    repository = kernel_repository(layers=kernel(3))
    tagged = repository.tag("v7")
    repository.branch("v1")
    with pytest.raises(LoadError, match="acme/kernels at v7: it has no version 7: versions that exist are 1") as caught:
        get_kernel("acme/kernels", version=7)
    assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
    assert factor(get_kernel("acme/kernels", revision="v7")) == 3
    kernel_repository(layers=kernel(5))
    repository.branch("v8")
    repository.tag("v8", tagged)
    assert factor(get_kernel("acme/kernels", version=8)) == 5
    new_process()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        get_kernel("acme/kernels", version=7)
    assert factor(get_kernel("acme/kernels", version=8)) == 5


@pytest.mark.parametrize("revision", ["..", "../main", "a/../b", "/main", ".hidden", "a b", "a\0b", "main.", "a:b", ""])
def test_revisions_that_are_paths(revision: str) -> None:
    """Names that git refuses are refused before any request, and so become no part of a path."""
    with pytest.raises(ArgumentError, match="name a branch, tag or commit"):
        get_kernel("acme/kernels", revision=revision)
    with pytest.raises(ArgumentError, match="name a branch, tag or commit"):
        LayerRepository("acme/kernels", layer_name="Silu", revision=revision)


def test_kinds_of_errors(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """A missing or gated repository is an OSError; the error of a kernel's own code is the cause of ours."""
    with pytest.raises(OSError, match="no such repository"):
        get_kernel("acme/nowhere", revision="main")
    with pytest.raises(OSError, match="it has no revision 'other': branches and tags are main"):
        kernel_repository("acme/there", kernel())
        get_kernel("acme/there", revision="other")
    tree = kernel_repository("acme/open", kernel()).files()
    local_hub.add("acme/closed", tree, gated=True)
    with pytest.raises(OSError, match="access to it is gated"):
        get_kernel("acme/closed", revision="main")
    kernel_repository("acme/wrong", {"__init__.py": "def f(:\n"})
    with pytest.raises(LoadError, match="its import fails: SyntaxError") as caught:
        get_kernel("acme/wrong", revision="main")
    assert isinstance(caught.value.__cause__, SyntaxError)


# --- A Hub that stalls, or lists something wrong -------------------------------------------------


def test_a_silent_hub_is_not_waited_for(
    local_hub: LocalHub, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    """A Hub that never answers is given up, and the cache serves; without it, the error is a ConnectionError."""
    kernel_repository(layers=kernel()).branch("v1")
    assert factor(get_kernel("acme/kernels", version=1)) == 3
    new_process()
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    local_hub.fail("/api/", delay=600, times=None)
    assert factor(get_kernel("acme/kernels", version=1)) == 3
    with pytest.raises(ConnectionError, match=r"did not answer in 0\.3 seconds.*HF_HUB_ETAG_TIMEOUT"):
        get_kernel("acme/kernels", version=2)


def test_a_cache_that_serves_is_no_answer_of_the_hub(
    local_hub: LocalHub,
    kernel_repository: Publish,
    monkeypatch: pytest.MonkeyPatch,
    new_process: Callable[[], None],
    tmp_path: Path,
) -> None:
    """A rank whose cache serves while the Hub is silent waits less for the next kernels, until the Hub has answered."""
    kernel_repository(layers=kernel()).branch("v1")
    assert factor(get_kernel("acme/kernels", version=1)) == 3
    new_process()
    monkeypatch.setattr(board, "_silent", False)
    monkeypatch.setenv(board.FOLDER, str(tmp_path / "board"))
    timeout, patience = constants.HF_HUB_ETAG_TIMEOUT, 6.0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", patience / 6)
    local_hub.fail("/api/", status=503, times=None)
    assert factor(get_kernel("acme/kernels", version=1)) == 3
    client = fetching._client(KernelRequest("acme/other", version=1))
    assert not client.persistent and client.patience == patience / 6
    local_hub.heal()
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", timeout)
    new_process()
    monkeypatch.setenv(board.FOLDER, str(tmp_path / "next board"))
    assert factor(get_kernel("acme/kernels", version=1)) == 3
    assert not board.hub_is_silent()


@pytest.mark.parametrize("question", ["/refs", "/revision/", "/tree/", "/organizations/", "GET /kernels/acme"])
@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 408}, {"status": 429, "headers": {"Retry-After": "0"}}, {"drop": True}],
    ids=["503", "408", "429", "drop"],
)
def test_a_fault_that_passes(
    local_hub: LocalHub, kernel_repository: Publish, question: str, fault: dict[str, Any]
) -> None:
    """A request that fails once is sent again, and the kernel is loaded at once."""
    kernel_repository(layers=kernel()).branch("v1")
    local_hub.fail(question, **fault)
    assert factor(get_kernel("acme/kernels", version=1)) == 3


def test_a_hub_that_asks_to_wait_too_long(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Where the Hub names a time beyond the bound, the request is not repeated, and the error names the answer."""
    kernel_repository(layers=kernel()).branch("v1")
    local_hub.fail("/refs", status=429, headers={"Retry-After": "86400"})
    with pytest.raises(ConnectionError, match=r"too many requests \(429\)"):
        get_kernel("acme/kernels", version=1)
    assert local_hub.count("/refs") == 1
    assert factor(get_kernel("acme/kernels", version=1)) == 3


def test_a_stalled_repository_blocks_no_other(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """While the answer about one repository is awaited, another one loads."""
    kernel_repository("acme/slow", kernel(3))
    kernel_repository("acme/fast", kernel(4))
    asked = threading.Event()

    def concerns_slow(request: Request) -> bool:
        if concerned := "acme/slow/revision" in request.path:
            asked.set()
        return concerned

    local_hub.fail(concerns_slow, delay=600, drop=True, times=None)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(get_kernel, "acme/slow", revision="main")
        assert asked.wait(PATIENCE)
        assert factor(get_kernel("acme/fast", revision="main")) == 4 and not slow.done()
        local_hub.stop()
        with pytest.raises(ConnectionError):
            slow.result(PATIENCE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    """A lock that a thread of the parent holds is free in the child."""
    locks, held, done = KeyedLocks(), threading.Event(), threading.Event()

    def hold() -> None:
        with locks.hold("acme/kernels"):
            held.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        with locks.hold("acme/kernels"):
            os._exit(7)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7


@pytest.mark.parametrize("wrong", ["missing", "oid", "size"])
def test_a_wrong_listing_is_not_kept(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None], wrong: str
) -> None:
    """A listing that the files contradict refuses the kernel once; the next attempt lists again, in any process."""
    repository = kernel_repository(layers=kernel())
    tree = f"{local_hub.url}/api/kernels/acme/kernels/tree/{repository.head()}?recursive=true"
    entries = json.loads(urllib.request.urlopen(tree).read())
    (layers,) = (entry for entry in entries if entry["path"].endswith("layers.py"))
    if wrong == "missing":
        entries.remove(layers)
    elif wrong == "oid":
        layers["oid"] = "0" * 40
    else:
        layers["size"] += 1
    local_hub.fail("/tree/", body=json.dumps(entries), content_type="application/json")
    with pytest.raises(IntegrityError, match=r"layers\.py"):
        get_kernel("acme/kernels", revision="main")
    assert factor(get_kernel("acme/kernels", revision="main")) == 3
    new_process()
    assert factor(get_kernel("acme/kernels", revision="main")) == 3


def test_a_listing_that_is_wrong_for_another_build_is_not_kept(
    local_hub: LocalHub, kernel_repository: Publish, new_process: Callable[[], None]
) -> None:
    """A listing is kept with the first build whose files pass; a build that contradicts it later ends that."""
    repository = kernel_repository(layers=kernel())
    files = dict(repository.files())
    repository.commit({**files, **{path.replace("-universal", "-cpu"): content for path, content in files.items()}})
    tree = f"{local_hub.url}/api/kernels/acme/kernels/tree/{repository.head()}?recursive=true"
    entries = json.loads(urllib.request.urlopen(tree).read())
    (layers,) = (entry for entry in entries if entry["path"] == "build/torch-cpu/layers.py")
    layers["oid"] = "0" * 40
    local_hub.fail("/tree/", body=json.dumps(entries), content_type="application/json")

    def fetch(name: str) -> None:
        resolved = fetching.resolve_kernel(KernelRequest("acme/kernels", revision="main"))
        fetching.fetch_build(resolved.build(name))

    fetch("torch-universal")
    new_process()
    with pytest.raises(IntegrityError, match=r"layers\.py has other bytes"):
        fetch("torch-cpu")
    new_process()
    fetch("torch-cpu")


def test_version_that_fits(local_hub: LocalHub, kernel_repository: Publish) -> None:
    """Where no build fits, the newest version with one that does is named; asking for that may fail."""
    repository = kernel_repository(layers=kernel(), variant=OTHER)
    repository.branch("v1")
    repository.branch("v3")
    kernel_repository(layers=kernel())
    repository.branch("v2")
    assert "Version 2 has one that fits: version=2" in call(scale(version=1)).why
    assert "Version 2 has one that fits" in call(scale(version=3)).why
    repository.branch("v2", "v1")
    assert "has one that fits" not in call(scale(version=1, trust_remote_code=True)).why
    local_hub.fail("/refs", status=500, times=None)
    with pytest.raises(LoadError, match="could not be asked: the Hub is in trouble"):
        get_kernel("acme/kernels", version=1)


# --- What the Hub is told ------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["caller/7", {"caller": 7}])
def test_user_agent(
    local_hub: LocalHub, kernel_repository: Publish, monkeypatch: pytest.MonkeyPatch, agent: Any
) -> None:
    """Each request tells library, Python, backend, platform, PyTorch and the caller; none of it without telemetry."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    kernel_repository(layers=kernel())
    target = kernel_repository("acme/new", kernel())
    target.branch("v2")
    redirect(kernel_repository("acme/old", kernel()), "acme/new", "v2")
    served(scale(user_agent=agent))
    get_kernel("acme/old", version=1, user_agent=agent)
    has_kernel("acme/new", revision="main")
    told = [r.headers["user-agent"] for r in local_hub.requests if "agent-harnesses" not in r.path]
    parts = (
        "kernels-core/",
        "python/3",
        f"backend/{Machine.here().backend_tag}",
        "platform/",
        f"torch/{torch.__version__}",
        "file_type/kernel",
    )
    assert len(told) > 12 and all(part in header for part in parts for header in told)
    assert all("caller/7" in header for header in told[:-3]) and "caller/7" not in told[-1]
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    local_hub.forget()
    kernel_repository("acme/more", kernel())
    served(scale("acme/more", user_agent=agent))
    headers = {r.headers["user-agent"] for r in local_hub.requests}
    assert headers and not any(p in header for p in ("caller", "torch/", "backend/", "file_type") for header in headers)


@pytest.mark.parametrize("variable", ["HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", ""])
def test_opting_out(local_hub: LocalHub, kernel_repository: Publish, tmp_path: Path, variable: str) -> None:
    """The variables that switch telemetry off do so in a real process; without them, the user agent has details."""
    kernel_repository(layers=kernel()).branch("v1")
    environment = {**os.environ, **local_hub.environment(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "0"}
    environment |= {variable: "1"} if variable else {}
    code = "from kernels_plugins import get_kernel; get_kernel('acme/kernels', version=1, user_agent='caller/7')"
    run_python("-c", code, environment=environment, folder=tmp_path).check_returncode()
    told = {"caller/7" in r.headers["user-agent"] for r in local_hub.requests if "harnesses" not in r.path}
    assert told == {not variable}


# --- Starts --------------------------------------------------------------------------------------

START = """
import json, sys
import kernels_plugins
assert "huggingface_hub" not in sys.modules
print(json.dumps(kernels_plugins.get_kernel("acme/kernels", **json.loads(sys.argv[1])).layers.Scale()(3)))
"""


@pytest.mark.parametrize("kind", ["commit", "version", "branch", "tag"])
def test_requests_of_a_start(local_hub: LocalHub, kernel_repository: Publish, tmp_path: Path, kind: str) -> None:
    """A warm start in a process of its own asks nothing for a commit, and once for all else; none with the Hub gone."""
    repository = kernel_repository(layers=kernel())
    commit = repository.branch("v1")
    repository.tag("1.0")
    pin = {"commit": {"revision": commit}, "version": {"version": 1}, "branch": {"revision": "main"}}
    wanted = json.dumps({**pin, "tag": {"revision": "1.0"}}[kind])

    def start(**variables: str) -> int:
        local_hub.forget()
        environment = {**os.environ, **local_hub.environment(tmp_path / "home"), **variables}
        done = run_python("-c", START, wanted, environment=environment, folder=tmp_path)
        assert (done.returncode, done.stdout.strip()) == (0, "9"), done.stderr
        return local_hub.count()

    cold, warm, offline = start(), start(), start(HF_HUB_OFFLINE="1")
    assert (cold <= 12, warm, offline) == (True, 0 if kind == "commit" else 1, 0)
    local_hub.stop()
    assert start() == offline
