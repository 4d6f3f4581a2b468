"""The Triton kernels of the bundled repository, against the demo's eager layers. Needs an NVIDIA GPU and Triton."""

from __future__ import annotations

import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
from demo_layers import load, load_reference

from kernels_plugins.demo.bundle import write_bundle

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible, so the Triton kernels cannot run", allow_module_level=True)

FOLDER = tempfile.TemporaryDirectory(prefix="demo-kernels-")
VARIANT = write_bundle(Path(FOLDER.name, "hub")) / "kernels-demo" / "llama-layers" / "build" / "torch-cuda"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Bounds on the relative error (of norms) against float64: a few roundings to the dtype.
ERROR = {F32: 2e-6, BF16: 6e-3, F16: 1e-3}
SHAPES = [
    (3, 5),
    (2, 3, 100),
    (1000, 128),
    (7,),
    (17, 2880),
    (9, 4097),
    (2, 2, 16384),
    (3, 40000),
    (5, 65536),
]


reference = load_reference("demo_reference_layers_gpu")
kernels = load("demo_kernels_cuda_under_test", VARIANT).layers


def kernelized(layer: Any, source: Any = kernels) -> Any:
    """Runs `layer` with the kernel of its own class name, as a kernel loader would."""
    layer.forward = types.MethodType(getattr(source, type(layer).__name__).forward, layer)
    return layer


def rms_norm(columns: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Any:
    """A reference layer with random weights."""
    layer = reference.RMSNorm(columns)
    torch.nn.init.normal_(layer.weight)
    return layer.to("cuda", weight_dtype or dtype)


def make(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """A reference layer and an input for an output of `shape`."""
    if name == "RMSNorm":
        return rms_norm(shape[-1], dtype), torch.randn(shape, dtype=dtype, device="cuda")
    shape = (*shape[:-1], shape[-1] * 2)
    return getattr(reference, name)().cuda(), torch.randn(shape, dtype=dtype, device="cuda")


def make_rotary(dtype: torch.dtype, batch: int, heads: tuple[int, int], seq: int, dim: int) -> list[torch.Tensor]:
    """Query, key, cosines and sines, whose two halves differ so that mixing them up shows."""
    q = torch.randn(batch, seq, heads[0], dim, dtype=dtype, device="cuda").transpose(1, 2)
    k = torch.randn(batch, heads[1], seq, dim, dtype=dtype, device="cuda")
    return [q, k, *(torch.randn(batch, seq, dim, dtype=dtype, device="cuda") for _ in range(2))]


def run(layer: Any, inputs: list[torch.Tensor], grads: list[torch.Tensor], differentiable: int = 1) -> list[Any]:
    """Outputs, then the gradients of the first `differentiable` inputs and of the parameters."""
    inputs = [x.detach().requires_grad_(i < differentiable) for i, x in enumerate(inputs)]
    outputs = layer(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = inputs[:differentiable] + list(layer.parameters())
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, wanted, grads[: len(outputs)]))


def exact(layer: Any, inputs: list[torch.Tensor], grads: list[torch.Tensor], differentiable: int = 1) -> list[Any]:
    """The output of `run` for the eager layer on the same values in float64."""
    forward, layer.forward = layer.forward, types.MethodType(type(layer).forward, layer)
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    try:
        return run(layer.double(), [x.double() for x in inputs], [g.double() for g in grads], differentiable)
    finally:
        for name, parameter in layer.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        layer.forward = forward


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Every tensor is within its dtype's bound of the expected one, by norm; NaN never is."""
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        error = ((a.double() - e.double()).norm() / e.double().norm()).item()
        assert error < ERROR[dtype], f"tensor {index}: relative error {error:.2e} of {tuple(a.shape)} in {dtype}"


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many representable 16-bit floats lie between `a` and `b`, elementwise."""

    def order(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    return (order(a) - order(b)).abs()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Fixes the random inputs."""
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "GeluAndMul"])
def test_matches_float64(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Outputs and all gradients agree with float64 for every width, power of two or not, in every dtype."""
    layer, x = make(name, shape, dtype)
    dy = torch.randn(shape, dtype=dtype, device="cuda")
    assert_close(run(kernelized(layer), [x], [dy]), exact(layer, [x], [dy]), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("batch", "heads", "seq", "dim"),
    [(2, (8, 2), 100, 128), (1, (3, 3), 1, 80), (3, (5, 1), 7, 6), (2, (4, 4), 16, 64)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_rotary_matches_float64(
    dtype: torch.dtype, batch: int, heads: tuple[int, int], seq: int, dim: int, shared: bool
) -> None:
    """Rotated queries and keys and their gradients agree with float64, for angles per batch and for shared ones."""
    inputs = make_rotary(dtype, batch, heads, seq, dim)
    if shared:
        inputs[2:] = [angle[:1] for angle in inputs[2:]]
    layer = kernelized(reference.RotaryEmbedding())
    grads = [torch.randn_like(inputs[0]), torch.randn_like(inputs[1])]
    assert_close(run(layer, inputs, grads, 2), exact(layer, inputs, grads, 2), dtype)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "GeluAndMul", "RotaryEmbedding"])
def test_rounds_like_the_reference(name: str, dtype: torch.dtype) -> None:
    """Outputs equal the eager layer's bit for bit, but for a few that are a unit or two in the last place away."""
    if name == "RotaryEmbedding":
        layer, inputs = reference.RotaryEmbedding(), make_rotary(dtype, 2, (8, 2), 100, 128)
    else:
        layer, x = make(name, (256, 1000), dtype)
        inputs = [x]
    expected = layer(*inputs)
    actual = kernelized(layer)(*inputs)
    for a, e in zip(*(y if isinstance(y, tuple) else (y,) for y in (actual, expected)), strict=True):
        distance = ulps(a, e)
        # A one-unit step of the normalised value or the activation moves its product by up to two.
        assert distance.max() <= (2 if name != "RotaryEmbedding" else 1)
        assert (distance == 0).float().mean() > 0.995


def test_float32_weight_with_bfloat16_input() -> None:
    """A layer kept in float32 promotes its output as torch does, and its gradients keep their own dtypes."""
    layer = rms_norm(512, BF16, F32)
    x, dy = torch.randn(64, 512, dtype=BF16, device="cuda"), torch.randn(64, 512, device="cuda")
    y, dx, dweight = run(kernelized(layer), [x], [dy])
    assert (y.dtype, dx.dtype, dweight.dtype) == (F32, BF16, F32)
    assert_close([y, dx, dweight], exact(layer, [x], [dy]), BF16)


def test_float32_angles_with_bfloat16_heads() -> None:
    """Float32 angles promote the rotated heads as torch does, and the gradients come back in the heads' dtype."""
    inputs = make_rotary(BF16, 2, (4, 2), 33, 64)
    inputs[2:] = [angle.float() for angle in inputs[2:]]
    grads = [torch.randn_like(inputs[0], dtype=F32), torch.randn_like(inputs[1], dtype=F32)]
    layer = kernelized(reference.RotaryEmbedding())
    results = run(layer, inputs, grads, 2)
    assert [result.dtype for result in results] == [F32, F32, BF16, BF16]
    assert_close(results, exact(layer, inputs, grads, 2), BF16)


def test_learned_angles_get_gradients() -> None:
    """Cosines and sines that require gradients receive them instead of silently missing them."""
    inputs = make_rotary(F32, 2, (4, 2), 9, 16)
    layer = kernelized(reference.RotaryEmbedding())
    grads = [torch.randn_like(inputs[0]), torch.randn_like(inputs[1])]
    assert_close(run(layer, inputs, grads, 4), exact(layer, inputs, grads, 4), F32)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0, 64), (3, 0)], ids=str)
@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "GeluAndMul"])
def test_empty(name: str, shape: tuple[int, ...]) -> None:
    """Empty inputs give empty outputs, and a zero gradient for the weight."""
    layer, x = make(name, shape, BF16)
    y, dx, *rest = run(kernelized(layer), [x], [torch.empty(shape, dtype=BF16, device="cuda")])
    assert y.shape == shape
    assert dx.shape == x.shape
    assert all(not dweight.any() for dweight in rest)


def test_empty_rotary() -> None:
    """No positions to rotate is no error."""
    inputs = make_rotary(F32, 2, (4, 2), 0, 64)
    q, k, dq, dk = run(kernelized(reference.RotaryEmbedding()), inputs, [inputs[0], inputs[1]], 2)
    assert (q.shape, k.shape) == (dq.shape, dk.shape) == (inputs[0].shape, inputs[1].shape)


@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "GeluAndMul"])
def test_non_contiguous(name: str) -> None:
    """Strided rows, transposed columns and an expanded gradient are read by their strides."""
    for view in (
        lambda x: torch.cat((x, x), -1)[:, : x.shape[-1]],
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: x.t().contiguous().t(),
    ):
        layer, x = make(name, (33, 320), F32)
        dy = torch.randn(33, 1, device="cuda").expand(33, 320)
        strided = view(x)
        assert strided.stride() != x.stride()
        expected = exact(layer, [x], [dy])
        assert_close(run(kernelized(layer), [strided], [dy]), expected, F32)


def test_launches_are_told_apart() -> None:
    """Code compiled for one launch is not used for another alignment, stride, size, number or type."""
    flat = torch.randn(1 + 64 * 640, device="cuda")
    inputs = [
        flat[:-1].view(128, 320),  # on a boundary of 16 bytes
        flat[1:].view(128, 320),  # and off it
        flat[:-1].view(64, 640)[:, :320],
        flat[1:].view(64, 640)[:, :320],
        flat[:-1].view(64, 640)[:1, 1:321],
        flat[:320].view(1, 320),
        flat[:-1].view(128, 320).to(BF16),
    ]
    for eps in (1e-6, 1, 1.0):
        for x in (*inputs, *reversed(inputs)):
            layer = rms_norm(320, x.dtype)
            layer.variance_epsilon = eps
            dy = torch.randn(x.shape, dtype=x.dtype, device="cuda")
            assert_close(run(kernelized(layer), [x], [dy]), exact(layer, [x], [dy]), x.dtype)
    for x in (*inputs, *reversed(inputs)):
        dy = torch.randn(len(x), 160, dtype=x.dtype, device="cuda")
        layer = reference.SiluAndMul()
        assert_close(run(kernelized(layer), [x], [dy]), exact(layer, [x], [dy]), x.dtype)


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_no_epsilon(rows: int) -> None:
    """Without an epsilon, numbers that a block computes past the last row spoil no gradient."""
    layer, x = make("RMSNorm", (rows, 320), F32)
    layer.variance_epsilon = 0.0
    dy = torch.randn_like(x)
    assert_close(run(kernelized(layer), [x], [dy]), exact(layer, [x], [dy]), F32)


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets past 32 bits reach the right rows, in forward and backward."""
    columns, rows = 16384, 2**31 // 16384 + 3
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    tail = torch.randn(4, columns, dtype=BF16, device="cuda")
    for name in ("RMSNorm", "SiluAndMul"):
        layer = rms_norm(columns, BF16) if name == "RMSNorm" else reference.SiluAndMul()
        width = columns if name == "RMSNorm" else columns // 2
        x = torch.zeros(rows, columns, dtype=BF16, device="cuda")
        dy = torch.zeros(rows, width, dtype=BF16, device="cuda")
        x[-4:], dy[-4:] = tail, tail[:, :width]
        actual = run(kernelized(layer), [x], [dy])
        actual[:2] = [t[-4:].clone() for t in actual[:2]]
        assert_close(actual, exact(layer, [tail], [tail[:, :width]]), BF16)
        del x, dy


def test_weight_gradient_is_deterministic() -> None:
    """The same inputs give the same bits of the weight's gradient every time, since nothing is summed by atomics."""
    layer, x = make("RMSNorm", (5000, 1000), BF16)
    dy = torch.randn_like(x)
    first, *others = [run(kernelized(layer), [x], [dy])[-1] for _ in range(5)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "GeluAndMul", "RotaryEmbedding"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_a_full_graph(name: str, dynamic: bool) -> None:
    """One graph without breaks serves forward and backward, and with dynamic shapes serves other sizes as well."""
    torch._dynamo.reset()
    rotary = name == "RotaryEmbedding"
    layer = reference.RotaryEmbedding() if rotary else make(name, (2, 320), BF16)[0]
    compiled = torch.compile(kernelized(layer), fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for rows in (48, 100, 333) if dynamic else (48,):
            inputs = make_rotary(BF16, 2, (4, 2), rows, 64) if rotary else [make(name, (3, rows, 320), BF16)[1]]
            with torch.no_grad():
                outputs = layer(*inputs)
            grads = [torch.randn_like(y) for y in (outputs if rotary else [outputs])]
            expected = exact(layer, inputs, grads, 2 if rotary else 1)
            assert_close(run(compiled, inputs, grads, 2 if rotary else 1), expected, BF16)


def test_exports() -> None:
    """`torch.export` keeps each kernel as one operator of this package's namespace, for any batch size."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = kernelized(rms_norm(64, F32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return kernels.silu_and_mul(self.norm(x))

    block = Block()
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=4096)}}
    program = torch.export.export(block, (torch.randn(8, 64, device="cuda"),), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [target.split(".")[1] for target in targets] == ["rms_norm", "packed_gated"]
    x = torch.randn(33, 64, device="cuda")
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "GeluAndMul"])
def test_operator_registration(name: str) -> None:
    """The operators pass torch's own checks of schema, fake tensors, autograd and compilation with dynamic shapes."""
    layer, x = make(name, (6, 64), F32)
    operators = torch.ops.demo_kernels_cuda_under_test
    x.requires_grad_()
    if name == "RMSNorm":
        torch.library.opcheck(operators.rms_norm.default, (x, layer.weight, 1e-6, 0.0))
    else:
        torch.library.opcheck(operators.packed_gated.default, (x, int(name == "GeluAndMul")))


@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "GeluAndMul"])
def test_compiler_sees_what_the_kernels_write(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler can read every kernel, or it would copy all inputs in fear of their being overwritten."""
    from torch._higher_order_ops import triton_kernel_wrap

    def fail(message: str, *args: Any, **kwargs: Any) -> None:
        pytest.fail(message)

    monkeypatch.setattr(triton_kernel_wrap.log, "warning", fail)
    torch._dynamo.reset()
    layer, x = make(name, (40, 320), BF16)
    with torch._inductor.config.patch(force_disable_caches=True):
        run(torch.compile(kernelized(layer), fullgraph=True), [x], [torch.randn(40, 320, dtype=BF16, device="cuda")])


@pytest.mark.parametrize("name", ["RMSNorm", "SiluAndMul", "GeluAndMul"])
def test_cuda_graph(name: str) -> None:
    """Forward and backward record into a CUDA graph whose replay follows new inputs."""
    layer, x = make(name, (64, 320), BF16)
    dy = torch.randn(64, 320, dtype=BF16, device="cuda")
    kernelized(layer)
    static_x, static_dy = x.clone(), dy.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(layer, [static_x], [static_dy])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(layer, [static_x], [static_dy])
    static_x.copy_(torch.randn_like(x))
    static_dy.copy_(torch.randn_like(dy))
    graph.replay()
    assert_close(results, exact(layer, [static_x], [static_dy]), BF16)


def test_two_revisions_side_by_side() -> None:
    """A second copy under its own name registers its own operators and both keep working."""
    other = load("demo_kernels_cuda_other_revision", VARIANT).layers
    layer, x = make("RMSNorm", (4, 64), F32)
    results = [torch.compile(kernelized(layer, source), fullgraph=True)(x) for source in (other, kernels)]
    assert torch.equal(*results)
    assert hasattr(torch.ops.demo_kernels_cuda_other_revision, "rms_norm")


def test_second_derivative_is_refused() -> None:
    """A double backward raises rather than treating the first gradient as a constant."""
    layer, x = make("RMSNorm", (4, 64), F32)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(kernelized(layer)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input() -> None:
    """Inputs on another GPU than the current one are computed on their own, launched there before or not."""
    layer, x = make("RMSNorm", (64, 320), BF16)
    dy = torch.randn_like(x)
    expected = exact(layer, [x], [dy])
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
            layer, x, dy = layer.to(device), x.to(device), dy.to(device)
            actual = run(kernelized(layer), [x], [dy])
            assert {tensor.device for tensor in actual} == {torch.device(device)}
            assert_close([tensor.to("cuda:0") for tensor in actual], expected, BF16)


def test_sealed_folder_stays_clean() -> None:
    """Loading and running the variant leaves no file behind that its digest does not know."""
    assert not list(VARIANT.rglob("__pycache__"))
