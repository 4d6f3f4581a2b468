"""The kernels of the pack `triton`: numbers, gradients, shapes, strides, and what they refuse.

They need a GPU, or Triton's interpreter on the CPU (`TRITON_INTERPRET=1`), which runs all but the compiled ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and no TRITON_INTERPRET=1", allow_module_level=True)

from torch.nn import functional  # noqa: E402

from kernels_core import Mode  # noqa: E402
from kernels_plugins import adopt, use_kernel_mapping  # noqa: E402
from kernels_plugins.adoption import shipped  # noqa: E402
from kernels_plugins.packs.triton import cross_entropy, gated, layers, rms_norm, rotary  # noqa: E402
from kernels_plugins.packs.triton.functions import add_rms_norm, linear_cross_entropy  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Bounds on the relative error (of norms) against float64: a few roundings to the dtype, which the interpreter cuts off.
ERROR = {F64: 1e-14, F32: 2e-6, BF16: 8e-3 if HAS_GPU else 2.5e-2, F16: 2e-3}
DTYPES = pytest.mark.parametrize(
    "dtype", ERROR if HAS_GPU else (F32, BF16), ids=lambda dtype: str(dtype).removeprefix("torch.")
)
# The interpreter takes milliseconds for each program: there, few shapes show the ways through the kernels.
SHAPES = [(3, 5), (2, 3, 100), *([(7,), (5, 1024), (3, 2, 2880), (9, 4097), (300, 130)] if HAS_GPU else [])]
WIDE = [(3, 9000), (2, 40000), *([(4, 5120), (2, 12288), (2, 16384)] if HAS_GPU else [])]

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Fix the random inputs."""
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def run(call: Call, inputs: list[Any], grads: list[Any] | None, wanted: int) -> list[Any]:
    """Return the outputs of a call, and the gradients of the first inputs."""
    inputs = [x.detach().requires_grad_(i < wanted) for i, x in enumerate(inputs)]
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.ones_like(y) for y in outputs] if grads is None else grads
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs[:wanted], grads))


def check(call: Call, exact: Call, inputs: list[Any], wanted: int, bound: float | None = None) -> None:
    """Compare outputs and gradients with those in float64, by norm; NaN is never near."""
    with torch.no_grad():
        outputs = exact(*(x.double() for x in inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(y, dtype=inputs[0].dtype) for y in outputs]
    found = run(call, inputs, grads, wanted)
    known = run(exact, [x.double() for x in inputs], [g.double() for g in grads], wanted)
    for index, (a, e) in enumerate(zip(found, known, strict=True)):
        assert a.shape == e.shape and (index < len(outputs) or a.dtype is inputs[index - len(outputs)].dtype)
        error = ((a.double() - e).norm() / e.norm()).item()
        assert error < (bound or ERROR[inputs[0].dtype]), f"tensor {index}: relative error {error:.1e}"


# --- Norms -----------------------------------------------------------------------------------------


def exact_norm(x: Any, weight: Any, offset: float = 0.0) -> Any:
    return shipped._rms_norm(x, weight + offset, 1e-6)


def exact_add(x: Any, residual: Any, weight: Any, offset: float = 0.0) -> tuple[Any, Any]:
    return exact_norm(x + residual, weight, offset), x + residual


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE], ids=str)
def test_norms(shape: tuple[int, ...], offset: float, dtype: torch.dtype) -> None:
    """Both families of norms, alone and of a sum, agree with float64 for narrow and wide rows."""
    x, residual, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    check(lambda x, w: rms_norm.rms_norm(x, w, 1e-6, offset), lambda x, w: exact_norm(x, w, offset), [x, weight], 2)
    check(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6, offset),
        lambda x, r, w: exact_add(x, r, w, offset),
        [x, residual, weight],
        3,
    )


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_of_a_norm_of_a_sum(used: int) -> None:
    """Where only the norm, or only the sum, has a use, gradients are those of that one."""
    inputs = [randn(4, 100), randn(4, 100), randn(100)]
    check(lambda *a: add_rms_norm(*a, 1e-6)[used], lambda *a: exact_add(*a)[used], inputs, 3 - used)


@pytest.mark.parametrize("frozen", ["weight", "rows"])
def test_frozen_inputs(frozen: str) -> None:
    """A weight, or rows, without a gradient: the other's is right."""
    x, weight = randn(6, 100), randn(100)
    x.requires_grad_(frozen == "weight"), weight.requires_grad_(frozen == "rows")
    rms_norm.rms_norm(x, weight, 1e-6).sum().backward()
    wide = [each.detach().double().requires_grad_(each.requires_grad) for each in (x, weight)]
    exact_norm(*wide).sum().backward()
    for found, known in zip((x, weight), wide, strict=True):
        assert (found.grad is None) == (known.grad is None)
        if known.grad is not None:
            torch.testing.assert_close(found.grad.double(), known.grad, rtol=1e-5, atol=1e-5)


def test_norm_of_large_and_small_rows() -> None:
    """Zeros, rows as small as the epsilon, and huge ones: no NaN, and no lost digits; also without an epsilon."""
    scale = torch.tensor([0.0, 1e-8, 1e-3, 1.0, 1e4, 1e8], device=DEVICE)[:, None]
    x, weight = randn(6, 64) * scale, randn(64)
    check(lambda x, w: rms_norm.rms_norm(x, w, 1e-6), exact_norm, [x, weight], 2)
    y, dx, dweight = run(lambda x, w: rms_norm.rms_norm(x, w, 0.0), [x[1:], weight], None, 2)
    assert all(each.isfinite().all() for each in (y, dx, dweight))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_weight_gradient_is_deterministic(rows: int) -> None:
    """The same inputs give the same bits each time, since nothing is summed by atomics."""
    x, weight = randn(rows, 100, dtype=BF16), randn(100, dtype=BF16)
    first, *others = [run(lambda x, w: rms_norm.rms_norm(x, w, 1e-6), [x, weight], None, 2)[-1] for _ in range(3)]
    assert all(torch.equal(first, other) for other in others)


# --- Gated activations -----------------------------------------------------------------------------

KINDS: dict[int, Call] = {
    gated.SILU: functional.silu,
    gated.GELU: functional.gelu,
    gated.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated(shape: tuple[int, ...], kind: int, dtype: torch.dtype) -> None:
    """Gate and up as two tensors, and as the halves of one, agree with float64; also far from zero."""
    activation = KINDS[kind]
    gate, up = 4 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    check(lambda a, b: gated.gated(a, b, kind), lambda a, b: activation(a) * b, [gate, up], 2)
    packed = torch.cat((gate, up), dim=-1)

    def exact(x: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        return activation(a) * b

    check(lambda x: gated.packed_gated(x, kind), exact, [packed], 1)
    name = {gated.SILU: "SiluAndMul", gated.GELU: "GeluAndMul", gated.GELU_TANH: "GeluTanhAndMul"}[kind]
    check(lambda x: layers.KERNELS[name].forward(None, x), exact, [packed], 1)  # type: ignore[union-attr]


# --- Rotary ----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("heads", [(8, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_rotary(heads: tuple[int, int], shared: bool, dtype: torch.dtype) -> None:
    """Queries and grouped keys, before and after positions, turned in whole, in part and by half the angles."""
    batch, seq, dim = 2, 9, 24
    q = randn(batch, seq, heads[0], dim, dtype=dtype).transpose(1, 2)
    k = randn(batch, heads[1], seq, dim, dtype=dtype)
    for name, width in (("", dim), ("_partial", 16), ("_half", dim // 2)):
        cos, sin = (randn(1 if shared else batch, seq, width, dtype=dtype) for _ in range(2))
        kernel, exact = (getattr(module, f"rotary_pos_emb{name}") for module in (layers, shipped))
        check(kernel, exact, [q, k, cos, sin], 2)
        other = [x.transpose(1, 2) for x in (q, k)]
        check(partial(kernel, unsqueeze_dim=2), partial(exact, unsqueeze_dim=2), [*other, cos, sin], 2)
        if name != "_partial":  # which copies, in the end
            assert [y.stride() for y in kernel(q, k, cos, sin)] == [y.stride() for y in exact(q, k, cos, sin)]
    seen = [randn(seq, heads[0], dim, dtype=dtype), randn(seq, heads[1], dim, dtype=dtype)]
    angles = [randn(seq, dim, dtype=dtype) for _ in range(2)]
    check(layers.rotary_pos_emb_vision, shipped.rotary_pos_emb_vision, [*seen, *angles], 2)


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rotary_rounds_as_the_reference(dtype: torch.dtype) -> None:
    """Each product is rounded before the sum, as where they are computed one after the other: equal bits."""
    q, k, cos, sin = (randn(*shape, dtype=dtype) for shape in ((2, 4, 7, 64), (2, 1, 7, 64), (2, 7, 64), (2, 7, 64)))
    for found, known in zip(rotary.rotary(q, k, cos, sin), shipped.rotary_pos_emb(q, k, cos, sin), strict=True):
        assert (found == known).float().mean() > 0.995


def test_rotary_leaves_calls_to_others() -> None:
    """Other shapes, dtypes, dimensions and learned angles are passed on."""
    q, k, cos = randn(2, 4, 7, 16), randn(2, 2, 7, 16), randn(2, 7, 16)
    for arguments in (
        (q, k, cos.double(), cos.double()),
        (q, k, cos, cos[..., :8]),
        (q, k, cos[..., :8], cos[..., :8]),  # partial
        (q, k, cos[:, :6], cos[:, :6]),
        (q, k[:1], cos, cos),
        (q, k, cos, cos, 3),
        (q, k, cos, cos, 0),
        (q[0], k[0], cos, cos),
        (q, k, cos.requires_grad_(), cos),
    ):
        assert layers.rotary_pos_emb(*arguments) is NotImplemented
    with pytest.raises(ValueError, match="does not take tensors of shape"):
        rotary.rotary(q, k, cos.detach()[:, :6], cos.detach()[:, :6])


# --- Linear cross entropy --------------------------------------------------------------------------


@pytest.fixture(params=[1, 2**40], ids=["many chunks", "one chunk"])
def chunks(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in many chunks, and in one."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(cross_entropy, "_MULTIPLE", 4)


def labels_of(*shape: int, below: int) -> torch.Tensor:
    labels = torch.randint(below, shape, device=DEVICE)
    labels.view(-1)[::5] = -100
    return labels


@pytest.mark.usefixtures("chunks")
@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_items": 7}], ids=str)
def test_linear_cross_entropy(options: dict[str, Any], bias: bool, dtype: torch.dtype) -> None:
    """Loss and gradients are those of the logits, as mean, as sum, and divided by a number of items."""
    labels = labels_of(3, 5, below=1000)
    count = options.get("num_items", 1) if options else int((labels != -100).sum())

    def exact(hidden: Any, weight: Any, *rest: Any) -> Any:
        logits = functional.linear(hidden, weight, *rest).flatten(0, 1)
        return functional.cross_entropy(logits, labels.flatten(), reduction="sum") / count

    inputs = [randn(3, 5, 32, dtype=dtype), randn(1000, 32, dtype=dtype) / 4]
    inputs += [randn(1000, dtype=dtype)] if bias else []
    bound = {BF16: 2e-2, F16: 3e-3}.get(dtype)  # the logits are rounded, and their exponential is taken
    check(lambda h, w, *b: linear_cross_entropy(h, w, labels, *b, **options), exact, inputs, 2 + bias, bound)


def test_linear_cross_entropy_at_the_edges() -> None:
    """No tokens, only ignored ones, another ignored label, labels out of range, infinite logits."""
    hidden, weight = randn(4, 8), randn(10, 8)
    ignored = torch.full((4,), -100, device=DEVICE)
    assert linear_cross_entropy(hidden, weight, ignored).isnan()  # as PyTorch's
    found = run(lambda h, w: linear_cross_entropy(h, w, ignored, reduction="sum"), [hidden, weight], None, 2)
    assert all(not each.any() for each in found)
    found = run(lambda h, w: linear_cross_entropy(h, w, ignored[:0], reduction="sum"), [hidden[:0], weight], None, 2)
    assert [each.shape for each in found] == [(), (0, 8), (10, 8)] and not any(each.any() for each in found)
    halves = [each.half().requires_grad_() for each in (hidden, weight)]
    found = torch.autograd.grad(linear_cross_entropy(*halves, ignored), halves)
    assert not any(each.any() for each in found)  # zeros as PyTorch's, although the loss is NaN
    labels = torch.tensor([3, 0, 3, 1], device=DEVICE)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, ignore_index=3),
        functional.cross_entropy(hidden @ weight.T, labels, ignore_index=3),
    )
    for wrong in (10, -1):
        assert linear_cross_entropy(hidden, weight, labels.where(labels != 1, wrong)).isnan()
    bias = torch.zeros(10, device=DEVICE)
    bias[5:] = float("-inf")
    check(
        lambda h, w: linear_cross_entropy(h, w, labels, bias),
        lambda h, w: functional.cross_entropy(h @ w.T + bias, labels),
        [hidden, weight],
        2,
    )


def test_linear_cross_entropy_once() -> None:
    """A scaled loss scales the gradients; a second backward, and second derivatives, raise."""
    hidden, weight, labels = randn(6, 8).requires_grad_(), randn(10, 8), labels_of(6, below=10)
    (plain,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)
    (scaled,) = torch.autograd.grad(-3 * linear_cross_entropy(hidden, weight, labels), hidden)
    torch.testing.assert_close(scaled, -3 * plain)
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward needs a second forward"):
        torch.autograd.grad(loss, hidden)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


# --- Any of them -----------------------------------------------------------------------------------


def views() -> Iterator[Call]:
    """Yield functions that return tensors of the same numbers, with other strides."""
    yield lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]]
    yield lambda x: torch.stack((x, x), -1)[..., 0]
    yield lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)
    yield lambda x: torch.cat((x[:1], x))[1:]


@pytest.mark.parametrize("view", views())
def test_strides(view: Call) -> None:
    """Rows at other distances, in other orders, off the alignment, and gradients that are expanded."""
    x, other, weight = randn(5, 7, 65), randn(5, 7, 65), randn(65)
    check(lambda a, w: rms_norm.rms_norm(view(a), w, 1e-6), exact_norm, [x, weight], 2)
    check(lambda a, b, w: add_rms_norm(view(a), view(b), w, 1e-6), exact_add, [x, other, weight], 3)
    check(lambda a, b: gated.gated(view(a), b, 0), lambda a, b: functional.silu(a) * b, [x, other], 2)
    check(lambda a: gated.packed_gated(view(a), 0), lambda a: shipped.silu_and_mul(None, a), [randn(5, 7, 66)], 1)
    q, k, cos = randn(5, 7, 4, 66), randn(5, 2, 4, 66), randn(5, 4, 66)
    check(lambda *a: rotary.rotary(*map(view, a)), shipped.rotary_pos_emb, [q, k, cos, cos], 2)
    h, labels = randn(5, 7, 8), labels_of(5, 7, below=65)
    check(
        lambda a, w: linear_cross_entropy(view(a), view(w), labels),
        lambda a, w: functional.cross_entropy((a @ w.T).flatten(0, 1), labels.flatten()),
        [h, randn(65, 8)],
        2,
    )
    grown = run(lambda a, w: rms_norm.rms_norm(a, w, 1e-6).sum((0, 1, 2)), [x, weight], None, 2)
    torch.testing.assert_close(grown, run(lambda a, w: exact_norm(a, w).sum((0, 1, 2)), [x, weight], None, 2))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0, 64), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    """Empty inputs give empty outputs, and a zero gradient for the weight."""
    x, weight = randn(*shape, dtype=BF16), randn(shape[-1], dtype=BF16)
    y, dx, dweight = run(lambda x, w: rms_norm.rms_norm(x, w, 1e-6), [x, weight], None, 2)
    assert y.shape == dx.shape == shape and not dweight.any()
    found = run(lambda x, r, w: add_rms_norm(x, r, w, 1e-6), [x, x, weight], None, 3)
    assert [each.shape for each in found] == [shape] * 4 + [weight.shape] and not found[-1].any()
    assert [each.shape for each in run(lambda a, b: gated.gated(a, b, 0), [x, x], None, 2)] == [shape] * 3
    assert gated.packed_gated(x, 0).shape == (*shape[:-1], shape[-1] // 2)
    q = randn(2, 4, 0, 16)
    assert [y.shape for y in run(rotary.rotary, [q, q, *(randn(2, 0, 16),) * 2], None, 2)] == [q.shape] * 4


def test_sizes_that_do_not_fit() -> None:
    """A kernel that would read past the end of a tensor is not launched."""
    with pytest.raises(ValueError, match="do not fit a weight"):
        rms_norm.rms_norm(randn(3, 8), randn(4), 1e-6)
    with pytest.raises(ValueError, match="rows and their residual differ"):
        rms_norm.add_rms_norm(randn(3, 8), randn(2, 8), randn(8), 1e-6)
    with pytest.raises(ValueError, match="gate and up differ"):
        gated.gated(randn(3, 8), randn(3, 4), 0)


def test_second_derivatives_are_refused() -> None:
    """A second backward through the gradients raises, rather than taking the first for constant."""
    x, weight = randn(4, 64).requires_grad_(), randn(64)
    for y in (rms_norm.rms_norm(x, weight, 1e-6), gated.packed_gated(x, 0)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_layers_leave_other_dtypes() -> None:
    """A weight of another dtype, or of another width, is passed on: classes differ in what they return."""
    module = torch.nn.RMSNorm(8, device=DEVICE)
    module.variance_epsilon = 1e-6
    for name in ("RMSNorm", "RMSNormOffset"):
        forward = layers.KERNELS[name].forward  # type: ignore[union-attr]
        assert forward(module, randn(2, 8, dtype=BF16)) is NotImplemented
        assert forward(module, randn(2, 4)) is NotImplemented


@needs_gpu
def test_tensors_on_two_devices() -> None:
    """A weight on the CPU is an error, not an address that a GPU would read; also after the same call was right."""
    x, weight = randn(3, 8), randn(8)
    for _ in range(2):
        rms_norm.rms_norm(x, weight, 1e-6)
        with pytest.raises(ValueError, match="takes tensors of one device, not of cuda:0, cpu, cuda:0"):
            rms_norm.rms_norm(x, weight.cpu(), 1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input() -> None:
    """Inputs on another GPU than the current one are computed there, launched there before or not."""
    x, weight = randn(5, 64), randn(64)
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        inputs = [x.to(device), weight.to(device)]
        check(lambda x, w: rms_norm.rms_norm(x, w, 1e-6), exact_norm, inputs, 2)


# --- Compiled and captured -------------------------------------------------------------------------


def operators() -> dict[str, tuple[Call, list[Any], int]]:
    """Return functions of tensors with inputs, and of how many of these gradients are wanted."""
    q, k, cos = randn(2, 4, 6, 16), randn(2, 2, 6, 16), randn(2, 6, 16)
    return {
        "rms_norm": (lambda x, w: rms_norm.rms_norm(x, w, 1e-6), [randn(6, 64), randn(64)], 2),
        "add_rms_norm": (lambda *a: rms_norm.add_rms_norm(*a, 1e-6), [randn(6, 64), randn(6, 64), randn(64)], 3),
        "gated": (lambda a, b: gated.gated(a, b, 1), [randn(6, 64), randn(6, 64)], 2),
        "packed_gated": (lambda a: gated.packed_gated(a, 2), [randn(6, 64)], 1),
        "rotary": (rotary.rotary, [q, k, cos, cos.flip(0)], 2),
    }


NAMES = ("rms_norm", "add_rms_norm", "gated", "packed_gated", "rotary")


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_a_full_graph(name: str, dynamic: bool) -> None:
    """One graph without breaks computes outputs and gradients."""
    torch._dynamo.reset()
    call, inputs, wanted = operators()[name]
    known = run(call, inputs, None, wanted)
    found = run(torch.compile(call, fullgraph=True, dynamic=dynamic), inputs, None, wanted)
    torch.testing.assert_close(found, known)


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_operator_registration(name: str) -> None:
    """The operators pass PyTorch's own checks of schema, fake tensors, autograd and compilation."""
    _, inputs, wanted = operators()[name]
    rest = {"rms_norm": (1e-6, 0.0), "add_rms_norm": (1e-6, 1.0), "gated": (1,), "packed_gated": (2,)}
    inputs = [x.requires_grad_(i < wanted) for i, x in enumerate(inputs)]
    operator = getattr(torch.ops.kernels_plugins_packs_triton, name).default
    torch.library.opcheck(operator, (*inputs, *rest.get(name, (1, 2, False))))


@needs_gpu
@pytest.mark.parametrize("name", [*NAMES, "linear_cross_entropy"])
def test_cuda_graph(name: str) -> None:
    """Forward and backward record into a CUDA graph, whose replay follows new inputs."""
    if name == "linear_cross_entropy":
        labels = labels_of(6, below=100)
        call, inputs, wanted = (lambda h, w: linear_cross_entropy(h, w, labels)), [randn(6, 64), randn(100, 64)], 2
    else:
        call, inputs, wanted = operators()[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(call, inputs, None, wanted)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, inputs, None, wanted)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, run(call, inputs, None, wanted))


# --- A model ---------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("config", ["LlamaConfig", "GemmaConfig", "Phi3Config"])
def test_adopted_models(config: str) -> None:
    """Models run on the kernels for all of their layers: logits, loss and gradients are the model's own."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
    more = {"num_key_value_heads": 2, "vocab_size": 1000, "head_dim": 32, "pad_token_id": 0}
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes, **more))
    ids = torch.randint(1, 1000, (2, 17), device="cuda")

    def trained() -> list[Any]:
        loss = model(ids, labels=ids, use_cache=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def logits() -> Any:
        with torch.no_grad():
            return model.eval()(ids).logits

    wanted, expected = trained(), logits()
    mapping: Any = dict.fromkeys(layers.KERNELS, "pack:triton")
    with adopt(model) as adopted, use_kernel_mapping(mapping):
        names = {layer.layer_name for layer in adopted.layers}
        assert len(names) >= 5 and names <= layers.KERNELS.keys()
        found = logits()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.compile(model)(ids).logits, expected, rtol=1e-3, atol=1e-4)
        model.train()
        for kernel, own in zip(trained(), wanted, strict=True):
            torch.testing.assert_close(kernel, own, rtol=1e-3, atol=1e-5)
        rows = adopted.receipt(device="cuda", mode=Mode.TRAINING).rows
        others = [row for row in rows if not row.origin.startswith("pack triton") and "bypassed" not in str(row)]
        assert not others, "\n".join(map(str, others))
