"""Which build variants of a Hub kernel repository fit this machine, best first.

A kernel repository holds one folder per build, and the folder's name says what the build needs:

* `torch29-cxx11-cu126-x86_64-linux`: compiled for torch 2.9, CUDA 12.6, one processor and system;
* `torch-stable-abi29-cu126-x86_64-linux`: the same for torch's stable ABI, so for torch 2.9 and newer;
* `tvm-ffi01-cu126-x86_64-linux`: the same for tvm-ffi 0.1 instead of torch;
* `torch-cuda`, `torch-universal`: nothing compiled, for one kind of backend or for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from kernels_core import set_module

from .machine import BACKENDS, Machine, Release, digits, title

_KIND_OF_TAG = {backend.tag: kind for kind, backend in BACKENDS.items()}
_UNIVERSAL = "universal"
_STABLE = "torch-stable-abi"
# What a compiled build can be made for, the preferred first.
_FRAMEWORKS = (_STABLE, "torch", "tvm-ffi")

_ABI_TAGS = {None: "", True: "-cxx11", False: "-cxx98"}
_ABI_TITLES = {None: "no choice of C++ ABI", True: "the C++11 ABI", False: "the C++98 ABI"}

# No number has a leading zero, so that two names never mean the same variant; and all are short, because
# Python refuses to read an endless one. The major version of a framework is one digit.
_COMPILED = re.compile(
    rf"(?P<framework>{'|'.join(_FRAMEWORKS)})(?P<major>[0-9])(?P<minor>0|[1-9][0-9]{{0,2}})"
    r"(?P<abi>-cxx11|-cxx98)?-(?P<tag>[a-z]+)(?P<digits>[1-9][0-9]{1,5})?-(?P<cpu>\w+)-(?P<os>\w+)",
    re.ASCII,
)

# The builds for Metal use Metal 4, which came with macOS 26. Their names do not say so.
_METAL_NEEDS_MACOS = (26, 0)


@dataclass(frozen=True)
class Variant:
    """One build variant; `str` gives the name of its folder.

    Example:
        >>> str(Variant("torch", "cuda", (2, 9), True, (12, 6), "x86_64", "linux"))
        'torch29-cxx11-cu126-x86_64-linux'
        >>> str(Variant("torch", "universal"))
        'torch-universal'
    """

    framework: str  # the framework it was compiled for: torch, torch-stable-abi or tvm-ffi; torch if not compiled
    backend: str  # the kind of backend, as in `Machine`; or universal, if not compiled
    release: Release | None = None  # the version of the framework; None if not compiled
    cxx11_abi: bool | None = None  # whether it uses the C++11 ABI; None if the name does not say
    backend_version: Release | None = None  # the version of the backend; None if the name does not say
    cpu: str = ""  # the processor; empty if not compiled
    os: str = ""  # the system; empty if not compiled

    @property
    def variant_str(self) -> str:
        """The name of the folder that holds this variant."""
        return str(self)

    def __str__(self) -> str:
        if self.release is None:
            return f"{self.framework}-{self.backend}"
        backend = BACKENDS[self.backend].tag + digits(self.backend_version)
        framework = f"{self.framework}{digits(self.release)}{_ABI_TAGS[self.cxx11_abi]}"
        return f"{framework}-{backend}-{self.cpu}-{self.os}"


@dataclass(frozen=True)
class VariantAccepted:
    """A build variant that fits this machine.

    Attributes:
        variant: The variant; `variant.variant_str` is its name.
    """

    variant: Variant


@dataclass(frozen=True)
class VariantRejected:
    """A build variant that does not fit this machine.

    Attributes:
        variant: The variant; `variant.variant_str` is its name.
        reason: What it needs, and what the machine has.
    """

    variant: Variant
    reason: str


@dataclass(frozen=True)
class VariantChoice:
    """The variants of a repository, split by whether they fit a machine."""

    accepted: tuple[Variant, ...]  # the variants that fit, best first
    rejected: tuple[tuple[str, str], ...]  # the name of each other folder and the reason, sorted by name


def parse_variant(name: str) -> Variant | None:
    """Read the name of a folder; None if it is not the name of a build variant.

    Example:
        >>> parse_variant("torch-stable-abi29-cu126-x86_64-linux").backend_version
        (12, 6)
        >>> parse_variant("docs") is None
        True
    """
    if match := _COMPILED.fullmatch(name):
        framework, major, minor, abi, tag, number, cpu, system = match.groups()
        kind = _KIND_OF_TAG.get(tag)
        if kind is None or BACKENDS[kind].versioned != bool(number) or (abi and framework != "torch"):
            return None
        # Names run major and minor together; the last digit is the minor version.
        version = (int(number[:-1]), int(number[-1])) if number else None
        cxx11_abi = abi == "-cxx11" if abi else None
        return Variant(framework, kind, (int(major), int(minor)), cxx11_abi, version, cpu, system)
    framework, _, kind = name.partition("-")
    if framework == "torch" and kind in (*BACKENDS, _UNIVERSAL):
        return Variant(framework, kind)
    return None


def choose_variants(names: Iterable[str], machine: Machine) -> VariantChoice:
    """Split the folders of a kernel repository into those that fit a machine and those that do not.

    Builds for torch's stable ABI come first (the newest ABI leading), then those for exactly this torch,
    then those for tvm-ffi, then those that are not compiled, universal last. Of two alike the one for the newer
    backend version leads.

    Example:
        >>> names = ["torch-cuda", "torch29-cxx11-cu126-x86_64-linux", "torch29-cxx11-cu130-x86_64-linux"]
        >>> choice = choose_variants(names, Machine(torch=(2, 9), backend="cuda", backend_version=(12, 8)))
        >>> [str(variant) for variant in choice.accepted]
        ['torch29-cxx11-cu126-x86_64-linux', 'torch-cuda']
        >>> choice.rejected[0][1]
        'built for CUDA 13.0, this machine has CUDA 12.8'
    """
    accepted, rejected = [], []
    for name in sorted(set(names)):  # so that a listing in another order gives the same choice
        variant = parse_variant(name)
        if variant is None:
            rejected.append((name, "not the name of a build variant"))
        elif mismatches := list(_mismatches(variant, machine)):
            needs, has = (" and ".join(side) for side in zip(*mismatches, strict=True))
            rejected.append((name, f"built for {needs}, this machine has {has}"))
        else:
            accepted.append(variant)
    return VariantChoice(tuple(sorted(accepted, key=_preference)), tuple(rejected))


def choose_for_cpu(names: Iterable[str], machine: Machine) -> VariantChoice:
    """Split the folders of a kernel repository into those for calls on the CPU of a machine and the rest.

    The backend that torch was built for does not decide then: builds for the CPU come first. A compiled build for the
    machine's accelerator may have code for the CPU, too, and comes after them; one that is not compiled has none.

    Example:
        >>> names = ["torch-cpu", "torch-cuda", "torch29-cxx11-cu128-x86_64-linux"]
        >>> choice = choose_for_cpu(names, Machine(torch=(2, 9), backend="cuda", backend_version=(12, 8)))
        >>> [str(variant) for variant in choice.accepted]
        ['torch-cpu', 'torch29-cxx11-cu128-x86_64-linux']
        >>> choice.rejected
        (('torch-cuda', 'only for CUDA, and this call is on the CPU'),)
    """
    names = list(names)
    here = choose_variants(names, machine)
    if machine.backend == "cpu":
        return here
    first = choose_variants(names, replace(machine, backend="cpu", backend_version=None)).accepted
    accepted = first + tuple(one for one in here.accepted if one.release is not None and one not in first)
    rejected = {name: reason for name, reason in here.rejected if parse_variant(name) not in accepted} | {
        str(one): f"only for {_backend_title(one)}, and this call is on the CPU"
        for one in here.accepted
        if one not in accepted
    }
    return VariantChoice(accepted, tuple(sorted(rejected.items())))


def _preference(variant: Variant) -> tuple[int, int, int, bool, int, int]:
    """The sort key of a variant that fits, the best being least."""
    if variant.release is None:
        rank = len(_FRAMEWORKS) + (variant.backend == _UNIVERSAL)
    else:
        rank = _FRAMEWORKS.index(variant.framework)
    major, minor = variant.release or (0, 0)
    backend_major, backend_minor = variant.backend_version or (0, 0)
    return rank, -major, -minor, variant.cxx11_abi is not None, -backend_major, -backend_minor


def _mismatches(variant: Variant, machine: Machine) -> Iterator[tuple[str, str]]:
    """Yield pairs of text: a need that the machine does not meet, and the property that the machine has instead."""
    if not _backend_fits(variant, machine):
        yield _backend_title(variant), _backend_title(machine)
    if variant.release is None:
        return
    if (variant.cpu, variant.os) != (machine.cpu, machine.os):  # only compiled builds have these in their names
        yield f"{variant.cpu} {variant.os}", f"{machine.cpu} {machine.os}"
    if not machine.abi3:
        yield "a Python with the stable ABI", "a free-threaded Python without it"
    if variant.framework == _STABLE:
        if machine.torch < variant.release:
            yield title("torch", variant.release) + " or newer", title("torch", machine.torch)
    else:
        have = machine.torch if variant.framework == "torch" else machine.tvm_ffi
        if have != variant.release:
            name = variant.framework
            yield title(name, variant.release), title(name if have else f"no {name}", have)
    if variant.cxx11_abi not in (None, machine.cxx11_abi):
        yield _ABI_TITLES[variant.cxx11_abi], _ABI_TITLES[machine.cxx11_abi]
    if variant.backend == machine.backend == "metal" and (machine.macos or (0, 0)) < _METAL_NEEDS_MACOS:
        yield title("macOS", _METAL_NEEDS_MACOS) + " or newer", title("macOS", machine.macos)


def _backend_fits(variant: Variant, machine: Machine) -> bool:
    if variant.backend != machine.backend:
        return variant.backend == _UNIVERSAL
    if variant.release is None:
        return True
    built, have = variant.backend_version, machine.backend_version
    if variant.backend == "cuda" and built and have:
        # CUDA promises that a build runs with every later minor version; the others promise nothing.
        return built[0] == have[0] and built[1] <= have[1]
    # As they are spelled, since the name of ROCm 7.10 reads as if it were 71.0.
    return digits(built) == digits(have)


def _backend_title(of: Variant | Machine) -> str:
    return title(BACKENDS[of.backend].title, of.backend_version)


set_module("kernels_plugins", globals())
