"""Which build variants fit a machine, the order of those that do, and the reasons of those that do not."""

from __future__ import annotations

import importlib
import itertools
import platform
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels_plugins.hub.builds.machine import Machine
from kernels_plugins.hub.builds.variants import Variant, choose_variants, parse_variant

CUDA = Machine(torch=(2, 9), backend="cuda", backend_version=(12, 8))
CPU = Machine(torch=(2, 9))
MAC = Machine((2, 9), "metal", cpu="aarch64", os="darwin", cxx11_abi=None, macos=(26, 0))
WINDOWS = replace(CUDA, os="windows", cxx11_abi=None)

KINDS = {"cpu": False, "cuda": True, "rocm": True, "xpu": True, "npu": True}
KINDS |= {"metal": False, "neuron": False, "tpu": False}

PARSED = {
    "torch29-cxx11-cu126-x86_64-linux": Variant("torch", "cuda", (2, 9), True, (12, 6), "x86_64", "linux"),
    "torch26-cxx98-cu118-x86_64-linux": Variant("torch", "cuda", (2, 6), False, (11, 8), "x86_64", "linux"),
    "torch213-cu130-aarch64-linux": Variant("torch", "cuda", (2, 13), None, (13, 0), "aarch64", "linux"),
    "torch29-cxx11-cpu-x86_64-linux": Variant("torch", "cpu", (2, 9), True, None, "x86_64", "linux"),
    "torch28-cxx11-rocm63-x86_64-linux": Variant("torch", "rocm", (2, 8), True, (6, 3), "x86_64", "linux"),
    "torch29-cxx11-xpu20252-x86_64-linux": Variant("torch", "xpu", (2, 9), True, (2025, 2), "x86_64", "linux"),
    "torch29-cxx11-cann85-aarch64-linux": Variant("torch", "npu", (2, 9), True, (8, 5), "aarch64", "linux"),
    "torch29-metal-aarch64-darwin": Variant("torch", "metal", (2, 9), None, None, "aarch64", "darwin"),
    "torch29-cu128-x86_64-windows": Variant("torch", "cuda", (2, 9), None, (12, 8), "x86_64", "windows"),
    "torch29-neuron-x86_64-linux": Variant("torch", "neuron", (2, 9), None, None, "x86_64", "linux"),
    "torch29-tpu-x86_64-linux": Variant("torch", "tpu", (2, 9), None, None, "x86_64", "linux"),
    "torch-stable-abi210-cu126-x86_64-linux": Variant(
        "torch-stable-abi", "cuda", (2, 10), None, (12, 6), "x86_64", "linux"
    ),
    "tvm-ffi01-cu128-x86_64-linux": Variant("tvm-ffi", "cuda", (0, 1), None, (12, 8), "x86_64", "linux"),
    **{f"torch-{kind}": Variant("torch", kind) for kind in (*KINDS, "universal")},
}

NOT_VARIANTS = [
    "",
    "-",
    "torch",
    "torch-",
    "docs",
    "torch-opengl",
    "torch-universal ",
    "torch-cuda\n",
    "torch2-cpu-x86_64-linux",  # no minor version
    "torch029-cpu-x86_64-linux-",
    "torch209-cpu-x86_64-linux",  # 2.09 would be a second name for 2.9
    "torch29-cu-x86_64-linux",  # CUDA needs a version
    "torch29-cpu12-x86_64-linux",  # the CPU has none
    "torch29-cu12.6-x86_64-linux",
    "torch29-npu85-x86_64-linux",  # the compiled form is spelled cann
    "torch29-cxx14-cpu-x86_64-linux",
    "torch29-cpu-x86_64",
    "torch29-cpu-x86_64-linux-gnu",
    "torch-stable-abi29-cxx11-cpu-x86_64-linux",  # the stable ABI has no C++ ABI
    "tvm-ffi01",
    "tvm-cuda",
    "jax05-cpu-x86_64-linux",
    "torch٢٩-cpu-x86_64-linux",  # digits, but not ours
    "torch29-cpu-x86_64-línux",
    "\udcff\x00🦀",
    "torch2" + "9" * 10_000 + "-cpu-x86_64-linux",  # more digits than Python converts
]

REJECTED = [
    (CUDA, "torch29-cxx11-cu130-x86_64-linux", "CUDA 13.0", "CUDA 12.8"),
    (CUDA, "torch29-cxx11-cu129-x86_64-linux", "CUDA 12.9", "CUDA 12.8"),
    (CUDA, "torch29-cxx11-cu118-x86_64-linux", "CUDA 11.8", "CUDA 12.8"),
    (CUDA, "torch29-cxx11-cpu-x86_64-linux", "the CPU backend", "CUDA 12.8"),
    (CUDA, "torch-cpu", "the CPU backend", "CUDA 12.8"),
    (CPU, "torch29-cxx11-cu126-x86_64-linux", "CUDA 12.6", "the CPU backend"),
    (CPU, "torch-cuda", "CUDA", "the CPU backend"),
    (
        replace(CUDA, backend="rocm", backend_version=(6, 4)),
        "torch29-rocm63-x86_64-linux",
        "ROCm 6.3",
        "ROCm 6.4",
    ),
    (CUDA, "torch28-cxx11-cu128-x86_64-linux", "torch 2.8", "torch 2.9"),
    (CUDA, "torch-stable-abi210-cu128-x86_64-linux", "torch 2.10 or newer", "torch 2.9"),
    (CUDA, "torch29-cxx98-cu128-x86_64-linux", "the C++98 ABI", "the C++11 ABI"),
    (WINDOWS, "torch29-cxx11-cu128-x86_64-windows", "the C++11 ABI", "no choice of C++ ABI"),
    (CUDA, "torch29-cxx11-cu128-aarch64-linux", "aarch64 linux", "x86_64 linux"),
    (CUDA, "torch29-cu128-x86_64-windows", "x86_64 windows", "x86_64 linux"),
    (CUDA, "tvm-ffi01-cu128-x86_64-linux", "tvm-ffi 0.1", "no tvm-ffi"),
    (replace(CUDA, tvm_ffi=(0, 2)), "tvm-ffi01-cu128-x86_64-linux", "tvm-ffi 0.1", "tvm-ffi 0.2"),
    (replace(MAC, macos=(15, 5)), "torch29-metal-aarch64-darwin", "macOS 26.0 or newer", "macOS 15.5"),
    (
        replace(CPU, abi3=False),
        "torch29-cpu-x86_64-linux",
        "a Python with the stable ABI",
        "a free-threaded Python without it",
    ),
    (
        CUDA,
        "torch28-cxx11-rocm63-x86_64-linux",
        "ROCm 6.3 and torch 2.8",
        "CUDA 12.8 and torch 2.9",
    ),
]

ACCEPTED = [
    (CUDA, "torch29-cxx11-cu120-x86_64-linux"),
    (CUDA, "torch29-cu128-x86_64-linux"),
    (CUDA, "torch-stable-abi26-cu126-x86_64-linux"),
    (replace(CUDA, cxx11_abi=False), "torch29-cxx98-cu128-x86_64-linux"),
    (replace(CUDA, tvm_ffi=(0, 1)), "tvm-ffi01-cu128-x86_64-linux"),
    (replace(CUDA, backend="rocm", backend_version=(7, 10)), "torch29-rocm710-x86_64-linux"),
    (replace(CUDA, backend="xpu", backend_version=(2025, 2)), "torch29-cxx11-xpu20252-x86_64-linux"),
    (replace(CUDA, backend="npu", backend_version=(8, 5)), "torch29-cxx11-cann85-x86_64-linux"),
    (replace(CUDA, backend="npu", backend_version=None), "torch-npu"),
    (replace(CPU, backend="neuron"), "torch29-neuron-x86_64-linux"),
    (replace(CPU, backend="tpu"), "torch-tpu"),
    (replace(CPU, abi3=False), "torch-cpu"),
    (CPU, "torch-universal"),
    (MAC, "torch29-metal-aarch64-darwin"),
    (replace(MAC, macos=(15, 5)), "torch-metal"),
    (WINDOWS, "torch29-cu128-x86_64-windows"),
]

# Best first, for a machine that all of them fit.
BEST_FIRST = [
    "torch-stable-abi29-cu128-x86_64-linux",
    "torch-stable-abi29-cu126-x86_64-linux",
    "torch-stable-abi28-cu128-x86_64-linux",
    "torch29-cu128-x86_64-linux",
    "torch29-cu126-x86_64-linux",
    "torch29-cxx11-cu128-x86_64-linux",
    "torch29-cxx11-cu126-x86_64-linux",
    "tvm-ffi01-cu128-x86_64-linux",
    "tvm-ffi01-cu120-x86_64-linux",
    "torch-cuda",
    "torch-universal",
]


@st.composite
def variants(draw: st.DrawFn) -> Variant:
    """Any variant that has a name."""
    kind = draw(st.sampled_from([*KINDS, "universal"]))
    if kind == "universal" or draw(st.booleans()):
        return Variant("torch", kind)
    framework = draw(st.sampled_from(["torch", "torch-stable-abi", "tvm-ffi"]))
    return Variant(
        framework,
        kind,
        draw(st.tuples(st.integers(0, 9), st.integers(0, 999))),
        draw(st.sampled_from([None, True, False])) if framework == "torch" else None,
        draw(st.tuples(st.integers(1, 99999), st.integers(0, 9))) if KINDS[kind] else None,
        draw(st.sampled_from(["x86_64", "aarch64", "riscv64"])),
        draw(st.sampled_from(["linux", "darwin", "windows"])),
    )


releases = st.tuples(st.integers(0, 3), st.integers(0, 13))
machines = st.builds(
    Machine,
    torch=releases,
    backend=st.sampled_from([*KINDS]),
    backend_version=st.none() | st.tuples(st.integers(1, 14), st.integers(0, 12)),
    cpu=st.sampled_from(["x86_64", "aarch64"]),
    os=st.sampled_from(["linux", "darwin", "windows"]),
    cxx11_abi=st.none() | st.booleans(),
    tvm_ffi=st.none() | releases,
    macos=st.none() | st.tuples(st.integers(10, 27), st.integers(0, 9)),
    abi3=st.booleans(),
)
pieces = [
    "torch",
    "29",
    "stable",
    "abi29",
    "tvm",
    "ffi01",
    "cxx11",
    "cu126",
    "cpu",
    "x86_64",
    "linux",
    "universal",
]
lookalikes = st.lists(st.sampled_from(pieces)).map("-".join)
texts = st.text() | st.text(st.characters(categories=["Cs", "Nd", "Pd"])) | lookalikes
folders = st.lists(texts | variants().map(str) | st.sampled_from([*PARSED, *BEST_FIRST]))


@pytest.mark.parametrize(("name", "variant"), PARSED.items())
def test_every_form_of_name_is_read(name: str, variant: Variant) -> None:
    """Each documented form of a folder name means the variant in the table, and is written back the same."""
    assert parse_variant(name) == variant
    assert str(variant) == name


@pytest.mark.parametrize("name", NOT_VARIANTS)
def test_other_names_are_not_variants(name: str) -> None:
    """A name that is nearly, or not at all, that of a variant is rejected with a reason, not an error."""
    assert parse_variant(name) is None
    assert choose_variants([name], CUDA).rejected == ((name, "not the name of a build variant"),)


@given(variants())
def test_a_variant_survives_its_name(variant: Variant) -> None:
    """A variant and its name say the same, so a chosen variant leads back to its folder."""
    assert parse_variant(str(variant)) == variant


@given(texts)
def test_a_name_survives_its_variant(name: str) -> None:
    """No two names mean the same variant."""
    variant = parse_variant(name)
    assert variant is None or str(variant) == name


@pytest.mark.parametrize(("machine", "name", "needs", "has"), REJECTED)
def test_a_reason_says_what_is_needed_and_what_is_there(machine: Machine, name: str, needs: str, has: str) -> None:
    """A variant that does not fit is rejected with exactly the requirement that it misses."""
    reason = f"built for {needs}, this machine has {has}"
    assert choose_variants([name], machine).rejected == ((name, reason),)


@pytest.mark.parametrize(("machine", "name"), ACCEPTED)
def test_what_fits_is_accepted(machine: Machine, name: str) -> None:
    """A variant built for this machine, or for an older one that it replaces, is accepted."""
    choice = choose_variants([name], machine)
    assert [str(variant) for variant in choice.accepted] == [name]
    assert not choice.rejected


def test_the_best_variant_leads() -> None:
    """Stable ABI, then this torch, then tvm-ffi, then not compiled, then universal; newer before older."""
    names = random.Random(0).sample(BEST_FIRST, len(BEST_FIRST))
    choice = choose_variants(names, replace(CUDA, tvm_ffi=(0, 1)))
    assert [str(variant) for variant in choice.accepted] == BEST_FIRST


def test_an_empty_repository_offers_nothing() -> None:
    """No folders give no variants and no complaints."""
    choice = choose_variants([], CPU)
    assert (choice.accepted, choice.rejected) == ((), ())


@given(folders, machines)
def test_every_name_is_accepted_or_rejected(names: list[str], machine: Machine) -> None:
    """Each name ends up accepted or rejected, never both, and a rejected one has a reason."""
    choice = choose_variants(names, machine)
    rejected = [name for name, _ in choice.rejected]
    assert sorted([*map(str, choice.accepted), *rejected]) == sorted(set(names))
    assert rejected == sorted(rejected)
    assert all(reason for _, reason in choice.rejected)


@given(st.data(), folders, machines)
def test_the_order_of_the_folders_does_not_matter(data: st.DataObject, names: list[str], machine: Machine) -> None:
    """The same folders listed in another order, or twice, give the same choice."""
    shuffled = data.draw(st.permutations(names + names[:1]))
    assert choose_variants(shuffled, machine) == choose_variants(names, machine)


@given(folders, machines)
def test_the_order_of_two_variants_is_always_the_same(names: list[str], machine: Machine) -> None:
    """Of two accepted variants the better one leads, whatever else the repository holds."""
    accepted = choose_variants(names, machine).accepted
    for better, worse in itertools.pairwise(accepted):
        assert choose_variants([str(worse), str(better)], machine).accepted == (better, worse)


def test_the_cpu_is_always_at_hand() -> None:
    """Any torch can be asked for its CPU backend, and a kernel built for this very machine then fits."""
    machine = Machine.here("cpu")
    assert (machine.backend, machine.backend_version) == ("cpu", None)
    major, minor = torch.__version__.split(".")[:2]
    name = str(Variant("torch", "cpu", (int(major), int(minor)), None, None, machine.cpu, machine.os))
    assert len(choose_variants([name, "torch-cpu", "torch-universal"], machine).accepted) >= 2


def test_a_backend_that_torch_was_not_built_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for another backend than that of torch says which one there is."""
    pretend(monkeypatch, cuda="12.8")
    with pytest.raises(ValueError, match="backend is 'xpu', and this torch has cpu and cuda"):
        Machine.here("xpu")


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Make torch look as if it were built for the given backends only."""
    for kind in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, kind, versions.get(kind), raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in versions)
    backend = "npu" if "npu" in versions else "privateuseone"
    monkeypatch.setattr("kernels_plugins.hub.builds.machine._extension_backend", lambda: backend)
    for kind, module in (("tpu", torch.backends), ("neuron", torch)):
        monkeypatch.delattr(module, kind, raising=False)
        if kind in versions:
            monkeypatch.setattr(module, kind, None, raising=False)
    imported = {
        "tvm_ffi": SimpleNamespace(__version__="0.1.16rc1"),
        "torch_npu.utils.collect_env": SimpleNamespace(get_cann_version=lambda: versions["npu"]),
    }
    monkeypatch.setattr(importlib, "import_module", imported.__getitem__)


@pytest.mark.parametrize(
    ("versions", "kind", "version"),
    [
        ({}, "cpu", None),
        ({"cuda": "12.8"}, "cuda", (12, 8)),
        ({"hip": "6.3.42131-fa1d09cbda"}, "rocm", (6, 3)),
        ({"xpu": "20250201"}, "xpu", (2025, 2)),
        ({"mps": ""}, "metal", None),
        ({"npu": "8.5.RC1"}, "npu", (8, 5)),
        ({"npu": "not known"}, "npu", None),
        ({"neuron": "", "cuda": "12.8"}, "neuron", None),
        ({"tpu": "", "neuron": ""}, "tpu", None),
    ],
)
def test_the_backend_is_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], kind: str, version: tuple[int, int] | None
) -> None:
    """The kind and the version of the backend come from the build of torch and its plugged-in backends."""
    pretend(monkeypatch, **versions)
    machine = Machine.here()
    assert (machine.backend, machine.backend_version, machine.tvm_ffi) == (kind, version, (0, 1))
    assert Machine.here(kind) == machine
    assert Machine.here("cann" if kind == "npu" else None) == machine


@pytest.mark.parametrize(
    ("system", "cpu", "mac", "expected"),
    [
        ("Linux", "x86_64", "", ("x86_64", "linux", True, None)),
        ("Darwin", "arm64", "15.5", ("aarch64", "darwin", None, (15, 5))),
        ("Darwin", "arm64", "26.1", ("aarch64", "darwin", None, (26, 1))),
        ("Darwin", "arm64", "16.0", ("aarch64", "darwin", None, (26, 0))),
        ("Darwin", "arm64", "", ("aarch64", "darwin", None, None)),
        ("Windows", "AMD64", "", ("x86_64", "windows", None, None)),
        ("Windows", "ARM64", "", ("aarch64", "windows", None, None)),
    ],
)
def test_the_platform_is_spelled_as_in_names(
    monkeypatch: pytest.MonkeyPatch, system: str, cpu: str, mac: str, expected: tuple[object, ...]
) -> None:
    """Processor and system are named as the folders name them, whatever the system calls them itself."""
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: cpu)
    monkeypatch.setattr(platform, "mac_ver", lambda: (mac, ("", "", ""), ""))
    monkeypatch.setattr(torch, "compiled_with_cxx11_abi", lambda: True)
    machine = Machine.here("cpu")
    assert (machine.cpu, machine.os, machine.cxx11_abi, machine.macos) == expected
