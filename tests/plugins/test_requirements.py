"""Requirements of a build: level of the interface, Python packages, a device that it has code for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from warned import never

import kernels_core
from kernels_core import KernelsWarning, LoadError, warn_once
from kernels_plugins.hub.builds import requirements
from kernels_plugins.hub.builds.metadata import BackendInfo, BuilderInfo, GitStatus, KernelName, Metadata, Provenance
from kernels_plugins.hub.builds.requirements import (
    INTERFACE_LEVEL,
    check_packages,
    check_requirements,
    find_mismatch,
    runs_on_cuda,
    runs_on_rocm,
    warn_dirty,
)


def build(**changes: Any) -> Metadata:
    """Describe a build."""
    return Metadata(
        **{"id": "_x", "name": KernelName("kernels"), "version": 1, "backend": BackendInfo("cpu"), **changes}
    )


# --- Level ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minver", "fits"), [("0.17", True), ("0.17.9", True), ("0.9", True), ("0.18", False), ("1.0", False)]
)
def test_minver(minver: str, fits: bool) -> None:
    """The level asked for is compared with that of the interface, which is 0.17, in its first two numbers."""
    assert Version("0.17") == INTERFACE_LEVEL
    metadata = build(kernels_minver=Version(minver))
    if fits:
        check_requirements(metadata)
        return
    with pytest.raises(LoadError, match=rf"level {minver} .*implements 0.17.*pip install --upgrade") as caught:
        check_requirements(metadata)
    assert isinstance(caught.value, RuntimeError)


def test_minver_is_not_our_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The level is one constant, and our own version has no part in it."""
    assert Version(kernels_core.__version__) != INTERFACE_LEVEL
    monkeypatch.setattr(kernels_core, "__version__", "99.0")
    metadata = build(kernels_minver=Version("0.18"))
    with pytest.raises(LoadError):
        check_requirements(metadata)
    monkeypatch.setattr(requirements, "INTERFACE_LEVEL", Version("0.18"))
    check_requirements(metadata)


# --- Python packages -----------------------------------------------------------------------------

PACKAGES = [
    ("einops", "cpu", "einops"),
    ("helion", "metal", "helion"),
    ("tvm-ffi", "cpu", "apache-tvm-ffi"),
    ("nvidia-cutlass-dsl", "cuda", "nvidia-cutlass-dsl"),
    ("nki", "neuron", "nki"),
]


@pytest.mark.parametrize(("name", "backend", "package"), PACKAGES)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, name: str, backend: str, package: str) -> None:
    """A missing package ends in the command that installs it, and is an ImportError; one that is there is enough."""
    monkeypatch.setattr(requirements, "_is_installed", lambda module: False)
    with pytest.raises(LoadError, match=rf"pip install {package}$") as caught:
        check_packages([name], [backend])
    assert isinstance(caught.value, ImportError)
    monkeypatch.setattr(requirements, "_is_installed", lambda module: True)
    check_packages([name], [backend])


def test_packages_of_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of one backend is not known to another; backends of build and machine both count."""
    monkeypatch.setattr(requirements, "_is_installed", lambda module: True)
    with pytest.raises(LoadError, match=r"'nki', which kernels for cuda may not: .*einops, helion, nvidia-cutlass-dsl"):
        check_packages(["nki"], ["cuda"])
    check_packages(["nki", "nvidia-cutlass-dsl"], ["cuda", "neuron"])
    check_requirements(build(python_depends=("nki",)), ["neuron"])


def test_all_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All missing packages are named at once; a library without a module is not looked for."""
    monkeypatch.setattr(requirements, "_is_installed", lambda module: module == "einops")
    with pytest.raises(LoadError, match=r"pip install apache-tvm-ffi helion$"):
        check_packages(["tvm-ffi", "einops", "onednn", "helion", "helion"], ["xpu"])
    check_packages(["onednn"], ["xpu"])


@pytest.mark.parametrize("name", ["", ".", "..", "torch", "\0", "\ud800", "x" * 300, "/etc/passwd", "-r x"])
def test_unknown_package(name: str) -> None:
    """An unknown package is refused as one, for it could not be installed; the error is a ValueError, too."""
    with pytest.raises(LoadError, match="may not: those that may be needed are") as caught:
        check_packages([name], ["cpu"])
    assert isinstance(caught.value, ValueError)


def test_packages_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To see that a package is there, it is not run."""
    (tmp_path / "helion.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_packages(["helion"], ["cpu"])


# --- Devices -------------------------------------------------------------------------------------

RUNS = [
    (["9.0"], (9, 0), True),
    (["9.0"], (8, 9), False),
    (["8.0"], (8, 9), True),
    (["8.6"], (8, 0), False),
    (["9.0"], (10, 0), False),
    (["9.0+PTX"], (10, 0), True),
    (["9.0+PTX"], (8, 9), False),
    (["9.0a"], (9, 0), True),
    (["9.0a"], (9, 1), False),
    (["9.0a+PTX"], (10, 0), False),
    (["10.0f"], (10, 3), True),
    (["10.3f"], (10, 0), False),
    (["10.0f"], (12, 0), False),
    (["10.0f+PTX"], (12, 0), False),
    (["7.5", "9.0a"], (9, 0), True),
    (["7.5", "9.0a"], (8, 0), False),
    (["sm_90"], (1, 0), True),
    (["later", "9.0"], (8, 0), False),
    (["9"], (1, 0), True),
    (["9.0x"], (1, 0), True),
    (["9.0+ptx"], (1, 0), True),
    (["9.0.1"], (1, 0), True),
]


@pytest.mark.parametrize(("archs", "capability", "runs"), RUNS)
def test_cuda(archs: list[str], capability: tuple[int, int], runs: bool) -> None:
    """Code for an architecture runs on it, and on others as its suffix says; unreadable names refuse nothing."""
    assert runs_on_cuda(archs, capability) is runs


CAPABILITY = st.tuples(st.integers(1, 15), st.integers(0, 9))
ARCH = st.builds(
    "{0[0]}.{0[1]}{1}{2}".format, CAPABILITY, st.sampled_from(["", "a", "f"]), st.sampled_from(["", "+PTX"])
)


@given(CAPABILITY, st.sampled_from(["", "a", "f", "+PTX"]))
def test_own_device(capability: tuple[int, int], suffix: str) -> None:
    """Code for exactly a device runs on it, whatever the suffix."""
    assert runs_on_cuda([f"{capability[0]}.{capability[1]}{suffix}"], capability)


@given(st.lists(ARCH, min_size=1), CAPABILITY, ARCH)
def test_more_archs_run_on_more(archs: list[str], capability: tuple[int, int], more: str) -> None:
    """Each architecture is looked at for itself, and one more never takes a device away."""
    assert runs_on_cuda(archs, capability) == any(runs_on_cuda([arch], capability) for arch in archs)
    assert runs_on_cuda([*archs, more], capability) >= runs_on_cuda(archs, capability)


@given(st.lists(st.text(max_size=6), max_size=3), st.lists(ARCH, min_size=1, max_size=3), CAPABILITY)
def test_unknown_forms(noise: list[str], archs: list[str], capability: tuple[int, int]) -> None:
    """Unknown forms neither refuse nor allow beside those that are known."""
    noise = [text for text in noise if not text[:1].isdigit()]
    assert runs_on_cuda(noise, capability)
    assert runs_on_cuda([*noise, *archs], capability) == runs_on_cuda(archs, capability)


def test_rocm() -> None:
    """An AMD device is one of the architectures, whatever its features are."""
    assert runs_on_rocm(["gfx942", "gfx90a"], "gfx90a:sramecc+:xnack-")
    assert not runs_on_rocm(["gfx942"], "gfx90a") and not runs_on_rocm(["gfx90a:xnack-"], "gfx90a")


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], hip: str | None = None) -> None:
    """Have GPUs of these capabilities, as far as PyTorch tells; the second is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    properties = type("Properties", (), {"gcnArchName": "gfx90a:sramecc+"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.6")
    monkeypatch.setattr(torch.version, "hip", hip)


def test_each_device_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that is asked about counts, or the current one; not the first."""
    gpus(monkeypatch, (8, 0), (9, 0))
    backend = BackendInfo("cuda", ("9.0a",))
    reason = find_mismatch(backend, torch.device("cuda", 0))
    assert reason is not None and "code for 9.0a, and cuda:0 has capability 8.0" in reason and "check_arch" in reason
    assert find_mismatch(backend, torch.device("cuda", 1)) is find_mismatch(backend) is None
    assert find_mismatch(BackendInfo("cuda", ("8.0",))) is not None


def test_nothing_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds without architectures, for other backends, on other devices, and machines without a GPU are let be."""
    cuda = torch.device("cuda", 0)
    assert find_mismatch(BackendInfo("cuda", ("9.0a",)), cuda) is None  # PyTorch has no GPU here
    gpus(monkeypatch, (8, 0), (8, 0))
    for backend in (BackendInfo("cuda"), BackendInfo("cuda", ()), BackendInfo("rocm", ("gfx90a",)), BackendInfo("cpu")):
        assert find_mismatch(backend, cuda) is None
    assert find_mismatch(BackendInfo("cuda", ("9.0a",)), torch.device("cpu")) is None


def test_amd_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch for ROCm, builds for ROCm are compared, and builds for CUDA are not."""
    gpus(monkeypatch, (9, 0), (9, 0), hip="6.3")
    assert find_mismatch(BackendInfo("rocm", ("gfx90a",))) is None
    assert "is gfx90a" in str(find_mismatch(BackendInfo("rocm", ("gfx942",))))
    assert find_mismatch(BackendInfo("cuda", ("1.0a",))) is None


# --- Dirty builds --------------------------------------------------------------------------------


def test_dirty_is_said_once() -> None:
    """A dirty build causes one warning for each place, with the dirty part; where warnings are errors, each time."""
    dirty = build(provenance=Provenance(BuilderInfo("1"), GitStatus("a" * 40, True)))
    with never():
        for _ in range(2):
            with pytest.raises(KernelsWarning, match="here: kernels was built while sources of the kernel had changes"):
                warn_dirty(dirty, "here")
    with pytest.warns(KernelsWarning) as caught:
        for _ in range(2):
            warn_dirty(dirty, "here")
        warn_dirty(dirty, "there")
    assert len(caught) == 2
    with never():
        warn_dirty(build(), "elsewhere")
        warn_dirty(build(provenance=Provenance(BuilderInfo("1"), GitStatus("a" * 40, False))), "elsewhere")
    warn_once.forget()
