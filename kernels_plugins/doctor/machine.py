"""The machine: Python, PyTorch, the GPU and its driver, compilers, and packages that work together or do not."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import importlib_metadata
import torch

from kernels_core import __version__, setting

from .finding import NOTE, PROBLEM, Finding

_PATIENCE = 10.0
"""Seconds until a program that lists the GPUs is given up."""

_INSTALL = "Install a build of PyTorch for it: https://pytorch.org/get-started/locally/"


def check_machine() -> Iterator[Finding]:
    """Yield the findings about this machine and its packages; sends nothing over the network."""
    yield Finding("machine", "python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("machine", "system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("machine", "kernels-core", __version__)
    built = next((f"for {kind} {v}" for kind in ("cuda", "hip", "xpu") if (v := _built(kind))), "for CPUs")
    yield Finding("machine", "torch", f"{torch.__version__}, {built}")
    yield from _compilers()
    yield from _gpus()
    yield from _packages()


def _built(kind: str) -> str | None:
    return getattr(torch.version, kind, None)


def _gpus() -> Iterator[Finding]:
    """Yield the GPUs that PyTorch uses, or the reason why it uses none."""
    cards = _cards()
    for card in cards:
        yield Finding("gpu", "driver", card)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available():
        try:
            known = torch.cuda.get_arch_list()
            for index in range(torch.cuda.device_count()):
                yield _gpu(index, known)
        except RuntimeError as error:  # such as a GPU in a process of its own, or with an error that lasts
            yield Finding("gpu", "torch", f"the GPU cannot be used: {error}", PROBLEM, "Restart the machine's driver.")
    elif cards and hidden is not None and not hidden.strip("-1, "):
        remedy = "Unset CUDA_VISIBLE_DEVICES if that is not intended."
        yield Finding("gpu", "torch", f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU", NOTE, remedy)
    elif cards and _built("cuda") is None and _built("hip") is None:
        yield Finding("gpu", "torch", "this PyTorch is compiled without CUDA, and there is a GPU", PROBLEM, _INSTALL)
    elif cards:
        found = f"PyTorch, built for CUDA {_built('cuda')}, cannot use the GPU: its driver may be too old"
        yield Finding("gpu", "torch", found, PROBLEM, f"Update the driver. {_INSTALL}")
    elif torch.accelerator.is_available():
        yield Finding("gpu", "torch", f"uses {torch.accelerator.current_accelerator()}")
    else:
        yield Finding("gpu", "torch", "no GPU: kernels for CPUs serve")


def _gpu(index: int, known: list[str]) -> Finding:
    about = torch.cuda.get_device_properties(index)
    capability = f"{about.major}.{about.minor}"
    found = f"{about.name}, capability {capability}, {about.total_memory / 2**30:.0f} GiB"
    # Code for an older capability of the same major version runs, and so does PTX of any older one.
    majors = {int(name.partition("_")[2].rstrip("af")[:-1]) for name in known if name.startswith("sm_")}
    if _built("cuda") and majors and about.major not in majors and not any("compute" in name for name in known):
        return Finding(
            "gpu", f"cuda:{index}", f"{found}: PyTorch has no code for it ({' '.join(known)})", PROBLEM, _INSTALL
        )
    return Finding("gpu", f"cuda:{index}", found)


def _cards() -> list[str]:
    """Return name, driver and capability of each NVIDIA GPU, whether or not PyTorch finds it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _compilers() -> Iterator[Finding]:
    """Yield whether `torch.compile` has the compiler that it needs, and whether it is switched off."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if setting(name) is not False:
            found = f"{name} is set: torch.compile compiles nothing"
            yield Finding("machine", "torch.compile", found, NOTE, f"Unset {name} if that is not intended.")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl"))), None)
    if compiler is None:
        found = "no C++ compiler: torch.compile cannot compile for the CPU, and Triton cannot start"
        remedy = "Install g++ or clang++, or set CXX, if models are compiled."
        yield Finding("machine", "compiler", found, NOTE, remedy)
    else:
        yield Finding("machine", "compiler", compiler)


def _packages() -> Iterator[Finding]:
    """Yield the versions of packages that kernels and models come from."""
    for name in ("huggingface_hub", "transformers", "liger-kernel", "triton", "kernels"):
        version = _version(name)
        if name == "kernels" and version is not None:
            found = f"{version}, the library of Hugging Face, is installed beside kernels-core"
            remedy = (
                "Both work side by side: layers that it decorates are served by it, and `adopt` makes models of "
                "transformers dispatch here. Programs change over with `import kernels_plugins as kernels`."
            )
            yield Finding("packages", name, found, NOTE, remedy)
        elif version is not None:
            yield Finding("packages", name, version)
        elif name == "triton" and torch.cuda.is_available():
            remedy = "pip install triton, the version that your PyTorch asks for."
            yield Finding("packages", name, "not installed: kernels in Triton do not serve", NOTE, remedy)
        elif name != "kernels":
            yield Finding("packages", name, "not installed")


def _version(name: str) -> str | None:
    try:
        return str(importlib_metadata.version(name))
    except importlib_metadata.PackageNotFoundError:
        return None
