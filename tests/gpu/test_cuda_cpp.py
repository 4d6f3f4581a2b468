"""A kernel in CUDA C++, compiled here, served by a local Hub and loaded as any other. Needs a GPU and nvcc."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

from kernels_core import IntegrityError, Mode, Resolution, resolve, use_kernel_forward_from_hub
from kernels_plugins import LayerRepository, use_kernel_mapping
from kernels_plugins.hub.builds.machine import Machine
from kernels_plugins.hub.builds.variants import Variant, choose_variants
from kernels_plugins.local_hub.server import LocalHub, Repository
from kernels_plugins.local_hub.testing import kernel_metadata, point_client_at, publish_kernels

if not torch.cuda.is_available() or torch.version.cuda is None:
    pytest.skip("no CUDA device is visible, so a kernel in CUDA C++ cannot run", allow_module_level=True)

SOURCES = Path(__file__).with_name("cuda_cpp")
REPOSITORY = "acme/silu-and-mul"
STABLE_ABI = (2, 10)
"""The oldest torch whose stable ABI has all that the sources use."""


@use_kernel_forward_from_hub("CudaSiluAndMul")
class SiluAndMul(nn.Module):
    """The reference."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return nn.functional.silu(a) * b


# The build


@dataclass(frozen=True)
class Build:
    """The output of the compiler: the files of one build variant, and the name of its library and operators."""

    name: str
    variant: str
    files: dict[str, bytes]

    @property
    def library(self) -> str:
        return f"{self.name}.abi3.so"

    @property
    def metadata(self) -> dict[str, object]:
        major, minor = torch.cuda.get_device_capability()
        return {"id": self.name, "backend": {"type": "cuda", "archs": [f"{major}.{minor}"]}}


def find_compiler() -> tuple[Path, tuple[int, int]]:
    """Return nvcc and its version, or skip where there is none."""
    places = (shutil.which("nvcc"), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc")
    found = [Path(place) for place in places if place and Path(place).is_file()]
    if not found:
        pytest.skip("nvcc is not installed, so CUDA C++ cannot be compiled")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        pytest.skip("the headers of this Python are not installed, so no extension can be compiled")
    said = subprocess.run([found[0], "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    assert release is not None, said
    return found[0], (int(release[1]), int(release[2]))


def compile_kernel(revision: int, folder: Path) -> Build:
    """Compile the sources for this GPU into the files of a folder under `build/`."""
    nvcc, cuda = find_compiler()
    machine = Machine.here("cuda")
    variant = str(Variant("torch-stable-abi", "cuda", STABLE_ABI, None, cuda, machine.cpu, machine.os))
    for _, reason in choose_variants([variant], machine).rejected:
        pytest.skip(f"what nvcc makes here does not fit this machine: {reason}")

    arch = "{}{}".format(*torch.cuda.get_device_capability())
    sources = [SOURCES / "kernel.cu", SOURCES / "torch_binding.cpp"]
    hashed = b"".join(path.read_bytes() for path in (*sources, SOURCES / "kernel.h"))
    unique = hashlib.sha256(hashed + f"{variant} {arch} {revision}".encode()).hexdigest()[:8]
    name = f"_silu_and_mul_cuda_{unique}"
    library, torch_home = folder / f"{name}.abi3.so", Path(torch.__file__).parent
    major, minor = STABLE_ABI
    command = [nvcc, "-shared", "-O3", "-std=c++17", "-Xcompiler=-fPIC", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += [f"-DKERNEL_NAME={name}", f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
    command += ["-DUSE_CUDA", "-DPy_LIMITED_API=0x030a0000"]
    command += [f"-I{torch_home / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    command += [*sources, f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    files = {path.name: path.read_bytes() for path in (SOURCES / "python").glob("*.py")}
    files[library.name] = library.read_bytes()
    files["_ops.py"] = (
        f"import torch\n\nfrom . import {name}\n\nops = torch.ops.{name}\n\n\n"
        f'def add_op_namespace_prefix(name: str) -> str:\n    return f"{name}::{{name}}"\n'
    ).encode()
    return Build(name, variant, files)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[Build]:
    """Two builds of the same sources, as two revisions of a kernel."""
    folder = tmp_path_factory.mktemp("compiled")
    find_compiler()  # skips here, not in a thread
    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_kernel, (1, 2), (folder, folder)))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A Hub that keeps large files apart, with an empty cache for its client."""
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.lfs_threshold = 100_000
        point_client_at(hub, tmp_path_factory.mktemp("home"), patch)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def repository(hub: LocalHub, builds: list[Build]) -> Repository:
    """The builds on the Hub, as the branches v1 and v2."""
    for version, build in enumerate(builds, 1):
        metadata = {**build.metadata, "version": version}
        repository = publish_kernels(hub, REPOSITORY, build.files, variant=build.variant, metadata=metadata)
        repository.branch(f"v{version}")
    return repository


# What is compared


def kernels(version: int = 1, repo_id: str = REPOSITORY) -> Any:
    source = LayerRepository(repo_id, layer_name="SiluAndMul", version=version)
    return use_kernel_mapping({"CudaSiluAndMul": {"cuda": source}})


def reference() -> Any:
    return use_kernel_mapping({}, inherit_mapping=False)


def gradients(call: Any, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the gradient of the input."""
    x = x.detach().requires_grad_()
    y = call(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def decision(mode: Mode = Mode.TRAINING) -> Resolution:
    return resolve(SiluAndMul, device="cuda", mode=mode)


def assert_served_right(x: torch.Tensor, call: Any = None) -> None:
    """Compare output and gradient with those of the reference; `call` is the layer, or the layer compiled."""
    layer = SiluAndMul()
    dy = torch.randn(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
    with reference():
        expected = gradients(layer, x, dy)
    with kernels():
        assert not decision().is_reference, decision()
        actual = gradients(layer if call is None else call, x, dy)
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.device) == (e.dtype, e.device)
        torch.testing.assert_close(a, e)


@pytest.fixture(autouse=True)
def seed(repository: Repository) -> None:
    torch.manual_seed(0)


# Tests


def test_origin_names_repository_commit_and_variant(repository: Repository, builds: list[Build]) -> None:
    """The decision says which commit serves, that it is the compiled build for the stable ABI, and its checks."""
    with kernels():
        resolution = decision()
    assert builds[0].variant.startswith("torch-stable-abi210-cu")
    assert resolution.origin == f"{REPOSITORY}@{repository.head('v1')[:12]} ({builds[0].variant})"
    assert resolution.refusals == ()
    assert resolution.checked["digest"] == f"{len(builds[0].files)} files, sha256"
    assert resolution.checked["transfer"] == f"{len(builds[0].files) + 1} files as listed by the Hub"
    assert resolution.checked["trust"] == "acme is a trusted publisher"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(33, 640), (2, 3, 2 * 14336), (5,), (3, 10), (0, 64), (4, 0)], ids=str)
def test_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Outputs and gradients are the reference's, for widths that fill whole accesses of 16 bytes and others."""
    assert_served_right(torch.randn(*shape[:-1], shape[-1] // 2 * 2, dtype=dtype, device="cuda"))


def test_the_operator_runs_eagerly(builds: list[Build]) -> None:
    """The operator that autograd recorded is that of this very build."""
    with kernels():
        y = SiluAndMul()(torch.randn(4, 64, device="cuda", requires_grad=True))
    assert builds[0].name in y.grad_fn.name()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_full_graph(dtype: torch.dtype, dynamic: bool, builds: list[Build]) -> None:
    """One graph holds the operator, forward and backward, and is right; with dynamic shapes for other sizes, too."""
    from torch._inductor.compile_fx import compile_fx

    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(str(module.graph))
        return compile_fx(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(SiluAndMul(), backend=backend, fullgraph=True, dynamic=dynamic)
    for rows in (33, 100, 257) if dynamic else (33,):
        assert_served_right(torch.randn(rows, 640, dtype=dtype, device="cuda"), compiled)
    assert len(graphs) == 1 and builds[0].name in graphs[0]


def test_strided_and_unaligned_inputs() -> None:
    """Transposed, sliced and unaligned inputs, and an expanded gradient, are read with their own strides."""
    flat = torch.randn(1 + 64 * 320, device="cuda")
    for x in (
        flat[1:].view(64, 320),
        flat[1:].view(320, 64).t(),
        torch.randn(64, 640, device="cuda")[:, ::2],
    ):
        assert_served_right(x)
    layer, dy = SiluAndMul(), torch.randn(64, 1, device="cuda").expand(64, 160)
    with reference():
        expected = gradients(layer, flat[1:].view(64, 320), dy)
    with kernels():
        torch.testing.assert_close(gradients(layer, flat[1:].view(64, 320), dy), expected)


def test_operators_pass_the_checks_of_torch(builds: list[Build]) -> None:
    """Schema, fake tensors, autograd and compilation with dynamic shapes hold, by torch's own account."""
    with kernels():
        decision()
    operators = getattr(torch.ops, builds[0].name)
    x, dy = torch.randn(6, 64, device="cuda", requires_grad=True), torch.randn(6, 32, device="cuda")
    torch.library.opcheck(operators.silu_and_mul.default, (x,))
    torch.library.opcheck(operators.silu_and_mul_backward.default, (dy, x.detach()))


def test_second_derivative_is_refused() -> None:
    """A double backward raises rather than treating the first gradient as a constant."""
    x = torch.randn(4, 64, device="cuda", requires_grad=True)
    with kernels():
        (dx,) = torch.autograd.grad(SiluAndMul()(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


def test_cuda_graph_on_the_current_stream() -> None:
    """A warm call is recorded on the stream that is current, and its replay follows new inputs."""
    layer, x = SiluAndMul(), torch.randn(64, 320, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with kernels(), torch.no_grad():
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    with reference():
        torch.testing.assert_close(y, layer(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_runs_on_the_device_of_its_input() -> None:
    """An input on another GPU than the current one is computed there."""
    with torch.cuda.device(0):
        assert_served_right(torch.randn(33, 640, device="cuda:1"))


def test_two_revisions_side_by_side(builds: list[Build]) -> None:
    """Two builds of one kernel serve in one process, each with operators of its own."""
    x = torch.randn(4, 64, device="cuda", requires_grad=True)
    names = []
    for version, build in enumerate(builds, 1):
        with kernels(version):
            y = SiluAndMul()(x)
        assert build.name in y.grad_fn.name()
        names.append(y.grad_fn.name())
    assert names[0] != names[1]


def test_a_changed_library_is_not_loaded(hub: LocalHub, builds: list[Build]) -> None:
    """One byte of the shared object that its digest does not promise: it is refused, and the reference serves."""
    build = builds[0]
    honest = kernel_metadata("tampered", build.files, changes=build.metadata)
    changed = bytearray(build.files[build.library])
    changed[len(changed) // 2] ^= 1
    files = {**build.files, build.library: bytes(changed)}
    promised = {"digest": honest["digest"], **build.metadata}
    publish_kernels(hub, "acme/tampered", files, variant=build.variant, metadata=promised).branch("v1")
    x = torch.randn(4, 64, device="cuda")
    with kernels(repo_id="acme/tampered"), pytest.warns(match="other bytes"):
        y = SiluAndMul()(x)
        resolution = decision()
    assert resolution.is_reference
    (refusal,) = resolution.refusals
    assert isinstance(refusal.error, IntegrityError) and build.library in refusal.reason
    with reference():
        assert torch.equal(y, SiluAndMul()(x))
