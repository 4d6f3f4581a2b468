"""Dispatch on real GPUs: devices and their indices, compilation, CUDA graphs. Skipped where there is none."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels_core import (
    CUDAProperties,
    Device,
    KernelsWarning,
    Mode,
    checkpoint_scopes,
    device_capability,
    kernelize,
    receipt,
    release,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import register_kernel_mapping, use_kernel_mapping

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Plus(nn.Module):
    """A kernel whose outputs differ from those of the reference."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@use_kernel_forward_from_hub("GpuIdentity")
class Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1


def ones(device: str = "cuda") -> torch.Tensor:
    return torch.ones(8, device=device)


def served(layer: nn.Module, x: torch.Tensor) -> bool:
    return bool((layer(x) == x + 1).all())


def test_a_kernel_for_cuda_serves_cuda_only() -> None:
    """A CUDA mapping serves CUDA tensors, and neither those of the CPU nor meta tensors."""
    register_kernel_mapping({"GpuIdentity": {"cuda": Plus}})
    layer = Identity()
    assert served(layer, ones())
    assert served(layer, ones("cuda:0"))
    assert not served(layer, ones("cpu"))
    assert layer(torch.ones(2, device="meta")).device.type == "meta"


def test_capability_ranges_decide() -> None:
    """The range that holds this GPU serves; one that ends below it does not."""
    capability = device_capability(torch.device("cuda", 0))
    assert capability is not None
    fits = Device("cuda", CUDAProperties(capability, capability))
    below = Device("cuda", CUDAProperties(0, capability - 1))
    with use_kernel_mapping({"GpuIdentity": {below: Plus}}):
        assert not served(Identity(), ones())
    with use_kernel_mapping({"GpuIdentity": {fits: Plus}}):
        assert served(Identity(), ones())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_each_index_is_resolved_apart() -> None:
    """Every GPU has its own decision, and runs on its own device."""
    register_kernel_mapping({"GpuIdentity": {"cuda": Plus}})
    layer = Identity()
    for index in range(torch.cuda.device_count()):
        x = ones(f"cuda:{index}")
        assert served(layer, x) and layer(x).device == x.device
        resolution = resolve(Identity, device=f"cuda:{index}", mode=Mode.INFERENCE)
        assert resolution.request.device.index == index


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_compiles_to_one_graph(warm: bool) -> None:
    """Inductor compiles a dispatched layer whole, follows a scope, and comes back without recompiling."""
    register_kernel_mapping({"GpuIdentity": {"cuda": Plus}})
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    layer, x = Identity(), ones()
    if warm:
        layer(x)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), x + 1)
    nothing = use_kernel_mapping({}, inherit_mapping=False)
    with nothing:
        assert torch.equal(compiled(x), x)
    assert torch.equal(compiled(x), x + 1)
    with nothing:
        assert torch.equal(compiled(x), x)
    assert len(graphs) == 2


def test_cuda_graph_capture_once_warm() -> None:
    """A warm dispatched call can be captured in a CUDA graph and replayed on new data."""
    register_kernel_mapping({"GpuIdentity": {"cuda": Plus}})
    layer, x = Identity(), ones()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    x.fill_(41)
    graph.replay()
    assert torch.equal(y, torch.full_like(x, 42))


def test_activation_checkpointing_with_a_registered_mapping() -> None:
    """Forward and recomputation, which runs on autograd's own thread, are served alike."""
    register_kernel_mapping({"GpuIdentity": {"cuda": Plus}})
    x = ones().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(Identity(), x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("in_scope", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_reentrant_checkpoint_has_the_gradient_of_its_output(in_scope: bool, compiled: bool) -> None:
    """On autograd's own thread, the recomputation is served as the first pass was: by the kernel, or the reference."""

    @use_kernel_forward_from_hub("GpuTimes")
    class Times(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    def times(factor: float, **declared: bool) -> type[nn.Module]:
        forward: Any = lambda self, x: x * factor  # noqa: E731
        return type("Kernel", (nn.Module,), {"forward": forward, "can_torch_compile": True, **declared})

    layer: Any = torch.compile(Times(), backend="eager") if compiled else Times()
    traced = Mode.TORCH_COMPILE  # a source for eager calls alone would not serve compiled code
    by_mode = {m | t: times(f) for m, f in ((Mode.INFERENCE, 5), (Mode.TRAINING, 6)) for t in (m, traced)}
    for kernel, factor in (
        (times(3), 3),
        (times(4, has_backward=False), 2),
        (by_mode, 6),
    ):
        for within in (False, True):  # backward() after the scope, and in it
            mapping: Any = {"GpuTimes": {"cuda": kernel}}
            register_kernel_mapping({} if in_scope else mapping, inherit_mapping=False)
            x = ones().requires_grad_()
            with use_kernel_mapping(mapping if in_scope else {}):
                y = checkpoint(layer, x, use_reentrant=True)
                if within:
                    y.sum().backward()
            if not within:
                y.sum().backward()
            assert x.grad is not None
            assert y[0].item() == x.grad[0].item() == factor
    register_kernel_mapping({}, inherit_mapping=False)
    with use_kernel_mapping({"GpuTimes": {"cuda": times(3)}}):  # not reentrant: the scopes are given
        x = ones().requires_grad_()
        y = checkpoint(lambda x: Times()(x).sin(), x, use_reentrant=False, context_fn=checkpoint_scopes)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 3 * torch.cos(3 * ones()))


class Calls(torch.autograd.Function):
    """Calls a layer in its backward, which runs in a thread of autograd, and derives that once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, seen: list[int]) -> Any:
        ctx.layer, ctx.seen = layer, seen
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.seen.append(threading.get_ident())
        return gradient * ctx.layer(*ctx.saved_tensors), None, None


def test_backwards_in_the_threads_of_autograd_are_in_scopes() -> None:
    """A layer in a backward, a double backward or a recomputation there is in the scopes of the caller, and no other.

    Two threads in two scopes share the thread of a GPU.
    """

    @use_kernel_forward_from_hub("GpuTimes")
    class Times(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    def times(factor: float) -> Any:
        forward: Any = lambda self, x: x * factor  # noqa: E731
        return use_kernel_mapping({"GpuTimes": {"cuda": type("Kernel", (nn.Module,), {"forward": forward})}})

    layer, seen = Times(), list[int]()

    def check(factor: float) -> None:
        for _ in range(20):
            x = ones().requires_grad_()
            (first,) = torch.autograd.grad(Calls.apply(x, layer, seen).sum(), x, create_graph=True)
            assert first[0].item() == factor
            (second,) = torch.autograd.grad(Calls.apply(first, layer, seen).sum(), x)  # derives the backward, too
            assert second[0].item() == factor * factor * factor
            y: Any = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False)
            y.sum().backward()
            torch.testing.assert_close(x.grad, factor * torch.cos(factor * ones()))

    def scoped(scope: Any, factor: float, failed: list[BaseException]) -> None:
        try:
            with scope:
                check(factor)
        except BaseException as error:
            failed.append(error)

    check(2)
    with times(3):
        check(3)
        with times(4):
            check(4)
        check(3)
    check(2)
    assert threading.get_ident() not in seen
    failed: list[BaseException] = []
    threads = [threading.Thread(target=scoped, args=(times(n), n, failed)) for n in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    x = ones().requires_grad_()
    selective = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    for context_fn in (checkpoint_scopes, checkpoint_scopes(inner=selective)):
        with times(3):
            y: Any = checkpoint(lambda x: layer(x).sin().sin(), x, use_reentrant=False, context_fn=context_fn)
        with times(4):
            (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found, 3 * torch.cos(3 * ones()) * torch.cos(torch.sin(3 * ones())))


# --- Tensors that are not plain ---------------------------------------------------------------------


def test_dtensors_and_pending_collectives_with_a_triton_kernel(tmp_path: Any) -> None:
    """A `DTensor` takes the reference; a pending collective is waited for, and the kernel gets its memory."""
    pytest.importorskip("triton")
    path = Path(__file__).with_name("wrong_kernels.py")
    spec = importlib.util.spec_from_file_location("scaling_kernels", path)
    assert spec is not None and spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as collectives
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    served: list[type] = []

    @use_kernel_forward_from_hub("GpuScaled")
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, device="cuda"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.data_ptr(), "no memory"
            served.append(type(x))
            return kernels.launch(x, self.weight)  # type: ignore[no-any-return]

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, layer, x = init_device_mesh("cuda", (1,)), Scaled(), torch.randn(4, 8, device="cuda")
        expected = x * 1
        with use_kernel_mapping({"GpuScaled": {"cuda": Kernel}}), torch.no_grad():
            pending = collectives.all_gather_tensor(x, 0, mesh.get_group())
            torch.testing.assert_close(layer(pending), expected)
            assert served == [torch.Tensor]
            whole = Scaled()
            whole.weight = nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Shard(0)]))
            result = whole(distribute_tensor(x, mesh, [Shard(0)]))
            assert isinstance(result, DTensor) and served == [torch.Tensor]
            torch.testing.assert_close(result.full_tensor(), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["dispatched", "kernelized", "compiled", "kernelized and compiled"])
def test_a_call_that_is_passed_on(how: str) -> None:
    """On each GPU, the next candidate for CUDA serves it, with its gradient; an error about bfloat16 is about that."""

    class Half(nn.Module):
        dtypes = (torch.float16, torch.bfloat16)
        can_torch_compile = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
                raise RuntimeError("no kernel for 'BFloat16'")
            return x * 4

    torch._dynamo.reset()
    for index in range(torch.cuda.device_count()):
        layer: Any = nn.Sequential(Identity())
        with use_kernel_mapping({"GpuIdentity": {"cuda": [Half, Plus]}}):
            if "kernelized" in how:
                mode = Mode.TRAINING | Mode.TORCH_COMPILE if "compiled" in how else Mode.TRAINING
                layer = kernelize(layer, mode=mode, device=f"cuda:{index}")
            called = torch.compile(layer, fullgraph=True) if "compiled" in how else layer
            for dtype, number in ((torch.float16, 4), (torch.float32, 2), (torch.float16, 4)):
                x = torch.ones(8, device=f"cuda:{index}", dtype=dtype, requires_grad=True)
                y = called(x)
                y.sum().backward()
                assert y.detach().unique().tolist() == [number] and x.grad is not None
                assert x.grad.unique().tolist() == [number if dtype == torch.float16 else 1]
            if how == "dispatched":
                x = ones(f"cuda:{index}").bfloat16()
                first = pytest.warns(KernelsWarning, match="quarantine for torch.bfloat16")
                with first if index == 0 else contextlib.nullcontext():  # once for a layer and a reason
                    assert layer(x).unique().tolist() == [1]
                assert layer(x).unique().tolist() == [2] and layer(x.half()).unique().tolist() == [4]
                assert release() == 1


@pytest.mark.parametrize("tool", ["model offload", "cpu_offload"])
@pytest.mark.parametrize("first", ["kernelize", "offload"])
@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_offloaded_models_run_kernels_for_the_gpu(tool: str, first: str) -> None:
    """Weights that wait on the CPU: each call runs the kernel on the GPU, and the receipt shows so, also in between."""
    accelerate = pytest.importorskip("accelerate")

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    class Fast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.is_cuda and self.weight.is_cuda  # type: ignore[union-attr]
            return x * self.weight + 1  # type: ignore[operator,no-any-return]

    use_kernel_forward_from_hub("GpuOffloaded")(Scale)
    model: nn.Module = nn.Sequential(nn.Sequential(Scale()), Scale()).eval()
    with use_kernel_mapping({"GpuOffloaded": {"cuda": Fast}}), torch.no_grad():
        if first == "kernelize":
            kernelize(model, mode=Mode.INFERENCE, device="cuda")
        if tool == "model offload":
            model, hook = accelerate.cpu_offload_with_hook(model, execution_device=0)
        else:
            accelerate.cpu_offload(model, execution_device=0)
        if first == "offload":
            kernelize(model, mode=Mode.INFERENCE)
        for _ in range(3):
            assert torch.equal(model(torch.ones(8)).cpu(), torch.full((8,), 3.0))
            if tool == "model offload":
                hook.offload()
                assert next(model.parameters()).device.type == "cpu"
            assert [(row.device, row.is_reference) for row in receipt(model).rows] == [("cuda:0", False)] * 2


def test_the_page_of_a_receipt_names_the_gpu() -> None:
    """A receipt of a model on a GPU has its name, on its page, too."""
    found = receipt(nn.Sequential(Identity()), device=ones().device)
    assert found.about["GPU"] == torch.cuda.get_device_name() and found.about["GPU"] in found.to_html()
