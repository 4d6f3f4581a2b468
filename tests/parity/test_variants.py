"""Build variants: the same names are taken and refused on the same machines, in the same order."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import variants as their_variants
from kernels.backends import CANN, CPU, CUDA, TPU, XPU, Metal, Neuron, ROCm
from packaging.version import Version
from parity_scene import Both, Side, write_kernel

from kernels_plugins.hub.builds.machine import Machine
from kernels_plugins.hub.builds.variants import VariantChoice, choose_variants, parse_variant

BACKENDS: dict[str, Any] = {
    "cpu": CPU,
    "cuda": CUDA,
    "rocm": ROCm,
    "xpu": XPU,
    "npu": CANN,
    "metal": Metal,
    "neuron": Neuron,
    "tpu": TPU,
}


def theirs(names: Iterable[str], machine: Machine) -> list[str]:
    """Return the names that `kernels` takes on a machine, best first; equal ones in the order given."""
    variants = []
    for name in names:
        try:
            variants.append(their_variants.parse_variant(name))
        except ValueError:
            continue
    make = BACKENDS[machine.backend]
    free_threaded = not machine.abi3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(their_variants, "_is_unsupported_free_threaded_build", lambda: free_threaded)
        accepted, _ = their_variants._resolve_variant_for_system(
            variants=variants,
            selected_backend=make(version=_version(machine.backend_version)) if machine.backend_version else make(),
            cpu=machine.cpu,
            os=machine.os,
            torch_version=_version(machine.torch),
            torch_cxx11_abi=machine.cxx11_abi,
            tvm_ffi_version=_version(machine.tvm_ffi),
            macos_version=_version(machine.macos),
        )
    return [variant.variant_str for variant in accepted]


def _version(release: tuple[int, int] | None) -> Version | None:
    return None if release is None else Version(f"{release[0]}.{release[1]}")


def agree(names: Sequence[str], machine: Machine) -> VariantChoice:
    """Insist on the same answer, however the names are ordered when asked."""
    choice = choose_variants(names, machine)
    ours = [str(variant) for variant in choice.accepted]
    # Their sort is stable: given our order, they change nothing if and only if it is one of theirs.
    assert theirs([*ours, *(name for name, _ in choice.rejected)], machine) == ours
    assert {name for name, _ in choice.rejected} == set(names) - set(ours)
    return choice


LINUX = Machine(torch=(2, 9), backend="cuda", backend_version=(12, 8))
MACHINES = {
    "cuda 12.8": LINUX,
    "cuda 12.8, tvm-ffi": replace(LINUX, tvm_ffi=(0, 1)),
    "cuda 13.0 on arm": replace(LINUX, backend_version=(13, 0), cpu="aarch64"),
    "cuda, the old ABI": replace(LINUX, cxx11_abi=False),
    "cuda, free-threaded": replace(LINUX, abi3=False),
    "cuda, newer torch": replace(LINUX, torch=(2, 13)),
    "cuda, torch 3": replace(LINUX, torch=(3, 0)),
    "cuda on Windows": replace(LINUX, os="windows", cxx11_abi=None),
    "cpu": Machine(torch=(2, 9)),
    "cpu on Windows": Machine(torch=(2, 9), os="windows", cxx11_abi=None),
    "cpu on a Mac": Machine(torch=(2, 9), os="darwin", cpu="aarch64", cxx11_abi=None, macos=(26, 0)),
    "metal": Machine(torch=(2, 9), backend="metal", os="darwin", cpu="aarch64", cxx11_abi=None, macos=(26, 1)),
    "metal, old macOS": Machine(
        torch=(2, 9), backend="metal", os="darwin", cpu="aarch64", cxx11_abi=None, macos=(15, 6)
    ),
    "rocm 6.4": Machine(torch=(2, 9), backend="rocm", backend_version=(6, 4)),
    "rocm 7.1": Machine(torch=(2, 9), backend="rocm", backend_version=(7, 1)),
    "xpu": Machine(torch=(2, 9), backend="xpu", backend_version=(2025, 2)),
    "npu": Machine(torch=(2, 9), backend="npu", backend_version=(8, 2), cpu="aarch64"),
    "neuron": Machine(torch=(2, 9), backend="neuron"),
    "tpu": Machine(torch=(2, 9), backend="tpu"),
}

_FRAMEWORKS = (
    *(f"torch{version}{abi}" for version in ("28", "29", "210", "213", "30") for abi in ("", "-cxx11", "-cxx98")),
    *(f"torch-stable-abi{version}" for version in ("28", "29", "210", "30")),
    *(f"tvm-ffi{version}" for version in ("01", "02", "10")),
)
_TAGS = (
    "cpu",
    *("cu126", "cu128", "cu129", "cu130"),
    *("rocm63", "rocm64", "rocm71", "xpu20251", "xpu20252", "cann82", "cann83"),
    *("metal", "neuron", "tpu"),
)
_PLATFORMS = ("x86_64-linux", "aarch64-linux", "aarch64-darwin", "x86_64-windows", "x86_64-darwin")
COMPILED = [f"{framework}-{tag}-{place}" for framework in _FRAMEWORKS for tag in _TAGS for place in _PLATFORMS]
PLAIN = [f"torch-{kind}" for kind in (*BACKENDS, "universal")]
NO_VARIANTS = (
    "",
    "docs",
    "torch",
    "torch29",
    "torch29-cu128",
    "torch29-cu128-x86_64",
    "torch29-cu-x86_64-linux",
    "torch29-cuda-x86_64-linux",
    "torch29-cxx14-cu128-x86_64-linux",
    "torch29-cu128-x86_64-linux-extra",
    "torch-stable-abi-cu128-x86_64-linux",
    "torch-stable-abi29-cxx11-cu128-x86_64-linux",
    "tvm-ffi01-cxx11-cu128-x86_64-linux",
    "tvm-cu128-x86_64-linux",
    "torch-abacus",
    "jax05-cu128-x86_64-linux",
    "torch29-cpu1-x86_64-linux",
    "torch29-rocm-x86_64-linux",
    "TORCH29-cu128-x86_64-linux",
    "__pycache__",
)


@pytest.mark.parametrize("machine", list(MACHINES))
def test_table(machine: str) -> None:
    """Of all names in the table, both take the same ones, in the same order; not none, and not all."""
    names = [*COMPILED, *PLAIN, *NO_VARIANTS]
    choice = agree(names, MACHINES[machine])
    assert 2 <= len(choice.accepted) < len(names)


def test_table_tells_machines_apart() -> None:
    """The machines of the table are no two alike: each takes a set of names of its own."""
    taken = [frozenset(map(str, choose_variants([*COMPILED, *PLAIN], here).accepted)) for here in MACHINES.values()]
    alike = {"cuda, free-threaded"}  # what is not compiled is all that is left
    assert len(set(taken)) >= len(MACHINES) - len(alike)


@pytest.mark.parametrize("name", [*COMPILED[::7], *PLAIN, *NO_VARIANTS])
def test_names(name: str) -> None:
    """Both read the same names and write them back as they were; both refuse the others."""
    try:
        read: str | None = their_variants.parse_variant(name).variant_str
    except ValueError:
        read = None
    ours = parse_variant(name)
    if ours is None:
        # Theirs reads `torch-<anything>`, to refuse it on every machine.
        assert read is None or all(theirs([name], machine) == [] for machine in MACHINES.values())
    else:
        assert str(ours) == read == name


def test_plain_names_of_backends() -> None:
    """Builds without compiled code go by the name of the backend on both; for CANN, that is `npu`."""
    for kind in BACKENDS:
        machine = next(here for here in MACHINES.values() if here.backend == kind)
        assert theirs(PLAIN, machine) == [f"torch-{kind}", "torch-universal"]
        agree(PLAIN, machine)


_RELEASES = st.tuples(st.integers(0, 9), st.integers(0, 15))
_BACKEND_RELEASES = st.tuples(st.integers(1, 30), st.integers(0, 9))
_VERSIONED = {"cuda": "cu", "rocm": "rocm", "xpu": "xpu", "npu": "cann"}


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Draw any machine."""
    kind = draw(st.sampled_from(list(BACKENDS)))
    system = draw(st.sampled_from(["linux", "darwin", "windows"]))
    return Machine(
        torch=draw(_RELEASES),
        backend=kind,
        backend_version=draw(_BACKEND_RELEASES) if kind in _VERSIONED else None,
        cpu=draw(st.sampled_from(["x86_64", "aarch64"])),
        os=system,
        cxx11_abi=draw(st.booleans()) if system == "linux" else None,
        tvm_ffi=draw(st.none() | _RELEASES),
        macos=draw(st.sampled_from([(15, 0), (26, 0), (27, 1)])) if system == "darwin" else None,
        abi3=draw(st.booleans()),
    )


@st.composite
def names_near(draw: st.DrawFn, machine: Machine) -> list[str]:
    """Draw names, each of which has a chance to fit."""

    def near(value: int) -> int:
        return max(draw(st.sampled_from([value, value, value, value - 1, value + 1])), 0)

    found = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from([machine.backend, machine.backend, *BACKENDS]))
        if draw(st.integers(0, 5)) == 0:
            found.append(f"torch-{draw(st.sampled_from([kind, 'universal']))}")
            continue
        version = ""
        if kind in _VERSIONED:
            major, minor = machine.backend_version or draw(_BACKEND_RELEASES)
            version = f"{max(near(major), 1)}{min(near(minor), 9)}"
        major, minor = machine.torch
        framework = draw(st.sampled_from(["torch", "torch-cxx11", "torch-cxx98", "torch-stable-abi", "tvm-ffi"]))
        if framework == "tvm-ffi":
            major, minor = machine.tvm_ffi or (0, 1)
        stem, cxx, abi = framework.partition("-cxx")
        tag = _VERSIONED.get(kind, kind) + version
        cpu = draw(st.sampled_from([machine.cpu, machine.cpu, "riscv64"]))
        system = draw(st.sampled_from([machine.os, machine.os, "linux"]))
        found.append(f"{stem}{min(near(major), 9)}{near(minor)}{cxx}{abi}-{tag}-{cpu}-{system}")
    return found


@settings(max_examples=400, deadline=None)
@given(data=st.data(), machine=machines())
def test_any_names_on_any_machine(data: st.DataObject, machine: Machine) -> None:
    """On any machine, both take the same of any names that nearly fit it, in the same order."""
    agree(data.draw(names_near(machine)), machine)


# --- This machine, and others by their names ------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "system", "mac", "expected"),
    [
        ("x86_64", "Linux", "", "torch-stable-abi29-cpu-x86_64-linux"),
        ("aarch64", "Linux", "", "torch-stable-abi29-cpu-aarch64-linux"),
        ("AMD64", "Windows", "", "torch-stable-abi29-cpu-x86_64-windows"),
        ("arm64", "Darwin", "26.1", "torch-stable-abi29-cpu-aarch64-darwin"),
        ("x86_64", "Darwin", "15.1", "torch-stable-abi29-cpu-x86_64-darwin"),
    ],
)
@pytest.mark.parametrize("free_threaded", [False, True])
def test_this_machine(
    monkeypatch: pytest.MonkeyPatch, processor: str, system: str, mac: str, expected: str, free_threaded: bool
) -> None:
    """Both describe a machine alike from Python's answers: processor, system, and free-threaded builds."""
    flag = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda n: free_threaded if n == "Py_GIL_DISABLED" else flag(n))
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "mac_ver", lambda: (mac, ("", "", ""), processor))
    names = [*COMPILED, *PLAIN]
    ours = list(map(str, choose_variants(names, Machine.here("cpu")).accepted))
    parsed = [their_variants.parse_variant(name) for name in ours]
    rest = [their_variants.parse_variant(name) for name in names if name not in ours]
    accepted, _ = their_variants.resolve_variants([*parsed, *rest], "cpu")
    assert [variant.variant_str for variant in accepted] == ours
    assert (expected in ours) is not free_threaded


@pytest.mark.parametrize(("of", "version", "name"), [("cuda", "12.8", "cu126"), ("hip", "6.4.43482", "rocm64")])
def test_backend_of_this_torch(monkeypatch: pytest.MonkeyPatch, of: str, version: str, name: str) -> None:
    """Both take the backend that PyTorch was built for, whether or not there is such a device."""
    monkeypatch.setattr(torch.version, of, version)
    wanted = f"torch-stable-abi29-{name}-x86_64-linux"
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    found, _ = their_variants.resolve_variants([their_variants.parse_variant(wanted)], None)
    assert [variant.variant_str for variant in found] == [wanted]
    assert list(map(str, choose_variants([wanted], Machine.here()).accepted)) == [wanted]


def test_backend_by_name(both: Both) -> None:
    """Both take `cpu` on every machine, and refuse a backend that this PyTorch was not built for."""
    assert Machine.here("cpu").backend == "cpu"
    assert their_variants.resolve_variants([], "cpu") == ([], [])

    def scenario(side: Side) -> object:
        return Machine.here("tpu") if side.is_ours else their_variants.resolve_variants([], "tpu")

    both.run(scenario).refuse(ValueError)


# --- Architectures -------------------------------------------------------------------------------

ARCHS = {
    "none said": (None, {75: True, 90: True}),
    "nothing listed": ([], {75: True, 90: True}),
    "one": (["9.0"], {89: False, 90: True, 100: False}),
    "newer minor versions": (["8.0"], {75: False, 80: True, 86: True, 89: True, 90: False}),
    "several": (["7.5", "8.9"], {75: True, 80: False, 89: True, 90: False}),
    "for one capability": (["9.0a"], {90: True, 100: False}),
    "for one capability, of another": (["12.0a"], {120: True, 121: False}),
    "for a family": (["10.0f"], {100: True, 103: True, 120: False, 90: False}),
    "with PTX": (["8.0+PTX"], {75: False, 80: True, 90: True, 120: True}),
    "with PTX, for one capability": (["9.0a+PTX"], {90: True, 100: False}),
    "with PTX, for a family": (["10.0f+PTX"], {100: True, 103: True, 120: False}),
    "unknown": (["sm_90"], {75: True, 90: True}),
    "unknown and known": (["sm_90", "8.0"], {80: True, 90: False}),
}


@pytest.mark.parametrize("what", list(ARCHS))
def test_cuda_archs(both: Both, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Both refuse a CUDA build without code for this GPU, and take the rest; `check_arch=False` takes all."""
    archs, expected = ARCHS[what]
    backend = {"type": "cuda"} if archs is None else {"type": "cuda", "archs": archs}
    folder = write_kernel(both.home / "kernel", "", changes={"backend": backend})
    monkeypatch.setenv("LOCAL_KERNELS", f"acme/kernels={folder}")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for here, fits in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, here=here: divmod(here, 10))
        _forget_capabilities()

        def has(side: Side, **options: Any) -> bool:
            return bool(side.lib.has_kernel("acme/kernels", version=1, **options))

        both.run(has).agree(fits)
        both.run(lambda side: has(side, check_arch=False)).agree(True)
    _forget_capabilities()


@pytest.mark.parametrize(
    ("archs", "here", "fits"),
    [
        (["gfx942"], "gfx942", True),
        (["gfx942"], "gfx90a:sramecc+:xnack-", False),
        (["gfx90a", "gfx942"], "gfx90a:sramecc+:xnack-", True),
        ([], "gfx90a", True),
    ],
)
def test_rocm_archs(both: Both, monkeypatch: pytest.MonkeyPatch, archs: list[str], here: str, fits: bool) -> None:
    """Both refuse a ROCm build that does not list this GPU, whatever features the name of the GPU tells."""
    backend = {"type": "rocm", "archs": archs}
    folder = write_kernel(both.home / "kernel", "", changes={"backend": backend})
    monkeypatch.setenv("LOCAL_KERNELS", f"acme/kernels={folder}")
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"gcnArchName": here}))
    both.run(lambda side: side.lib.has_kernel("acme/kernels", version=1)).agree(fits)


def _forget_capabilities() -> None:
    from kernels_core.device import _capability

    _capability.cache_clear()


def test_kernels_without_a_gpu(both: Both) -> None:
    """Where there is no GPU to compare with, both take a build that lists architectures."""
    changes = {"backend": {"type": "cuda", "archs": ["9.0"]}}
    folder = write_kernel(both.home / "kernel", "", changes=changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_KERNELS", f"acme/kernels={folder}")
        both.run(lambda side: side.lib.has_kernel("acme/kernels", version=1)).agree(True)
