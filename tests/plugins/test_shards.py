"""Kernels on the shards of distributed tensors, by 2 and 4 processes, compared with the undecorated model."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from ranks import run_ranks
from torch import nn

from kernels_core import Mode, resolve, use_kernel_forward_from_hub
from kernels_core.guards.crossing import strides_of
from kernels_plugins import use_kernel_mapping

RANKS = """
import functools, json, os, sys, warnings, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module)
from kernels_core import KernelsError, KernelsWarning, Mode, kernelize, quarantined, release
from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import canary, use_kernel_mapping, verify

count = int(sys.argv[1])
torch.set_num_threads(1)
children = []
for rank in range(count):
    child = os.fork()
    if not child: break
    children.append(child)
else:
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(max(codes) and 1)

ran = []
def rms(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

class PlainNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.eps = 1e-6
    def forward(self, x):
        return rms(x, self.weight, self.eps)
class PlainMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))
def plain_add(x, residual, weight):
    total = x + residual
    return rms(total, weight), total
Norm = use_kernel_forward_from_hub("Norm")(type("Norm", (PlainNorm,), {"forward": PlainNorm.forward}))
Mlp = use_kernel_forward_from_hub("Mlp")(type("Mlp", (PlainMlp,), {"forward": PlainMlp.forward}))
add_norm = use_kernel_forward_from_hub("add_norm")(lambda x, residual, weight: plain_add(x, residual, weight))
add = use_kernel_forward_from_hub("sum")(lambda x, residual: x + residual)

def noted(*tensors):
    assert all(type(t) in (torch.Tensor, nn.Parameter) for t in tensors), tensors
    torch.compiler.is_compiling() or ran.append(tuple(tensors[0].shape))
class NormKernel(nn.Module):
    local_except, can_torch_compile = (-1,), True
    def forward(self, x):
        noted(x, self.weight)
        return rms(x, self.weight, self.eps)
class MlpKernel(nn.Module):
    local_except = (-1,)
    def forward(self, x):
        noted(x, self.up.weight, self.down.bias)
        return self.down(self.up(x).relu())
def add_kernel(x, residual, weight):
    noted(x, residual, weight)
    total = residual + x
    return rms(total, weight), total
add_kernel.local_except = (-1,)
def sum_kernel(x, residual):
    noted(x, residual)
    return residual + x  # the gradient of both is that of the output, not copied
sum_kernel.local_except = ()
MAPPING = {"Norm": {"cpu": NormKernel}, "Mlp": {"cpu": MlpKernel}, "add_norm": {"cpu": add_kernel}}
MAPPING["sum"] = {"cpu": sum_kernel}

def whole(module, mesh):
    for inner in module.modules():
        for name, parameter in list(inner._parameters.items()):
            held = distribute_tensor(parameter.detach(), mesh, [Replicate()] * mesh.ndim)
            inner._parameters[name] = nn.Parameter(held)
    return module

def results(function, mesh, places, *shapes, others=()):
    '''Return outputs and all gradients of a call with inputs placed so.'''
    torch.manual_seed(3)
    inputs = [distribute_tensor(torch.randn(shape), mesh, places).requires_grad_() for shape in shapes]
    if "P" in str(places[0]): inputs = [i.detach().requires_grad_() for i in inputs]
    weights = list(function.parameters()) if isinstance(function, nn.Module) else list(others)
    for weight in weights: weight.grad = None
    outputs = function(*inputs, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((output * torch.full_like(output, 0.5 + n)).pow(2).sum() for n, output in enumerate(outputs)).backward()
    return [*outputs, *[i.grad for i in inputs], *[w.grad for w in weights]]

def accumulated(function, mesh):
    '''Return all gradients of two backwards of a sum, and the one that the caller gives to both.'''
    torch.manual_seed(4)
    *inputs, given = [distribute_tensor(torch.randn(4, 8, 8), mesh, [Shard(1)]) for _ in range(3)]
    for each in inputs: each.requires_grad_()
    for _ in range(2): function(*inputs).backward(given)
    return [*[i.grad for i in inputs], given]

report = {}
def same(ours, theirs):
    return [
        "ok" if a.placements == b.placements and a.shape == b.shape and a.to_local().shape == b.to_local().shape
        and torch.allclose(a.full_tensor(), b.full_tensor(), atol=1e-5) else f"{a} instead of {b}"
        for a, b in zip(ours, theirs, strict=True)]
def compared(name, ours, theirs):
    ran.clear()
    with warnings.catch_warnings(record=True) as caught, use_kernel_mapping(MAPPING):
        warnings.simplefilter("always")
        found = ours()
    served = list(ran)
    texts = [str(w.message) for w in caught if issubclass(w.category, KernelsWarning)]
    report[name] = [sorted(set(same(found, theirs()))), served, texts]
"""

CALLS = """
dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=count)
line = init_device_mesh("cpu", (count,))
meshes = {"line": (line, {
    "sequence": [Shard(1)], "batch": [Shard(0)], "replicated": [Replicate()], "hidden": [Shard(2)]})}
if count == 4:
    meshes = {"square": (init_device_mesh("cpu", (2, 2)), {
        "batch and sequence": [Shard(0), Shard(1)], "sequence twice": [Shard(1), Shard(1)],
        "replicated, sequence": [Replicate(), Shard(1)], "batch and hidden": [Shard(0), Shard(2)]})} | meshes
def weight_of(mesh):
    return nn.Parameter(distribute_tensor(torch.linspace(0.5, 1.5, 8), mesh, [Replicate()] * mesh.ndim))
for title, (mesh, cases) in meshes.items():
    norm, plain, mlp, plain_mlp = whole(Norm(), mesh), whole(PlainNorm(), mesh), Mlp(), PlainMlp()
    torch.manual_seed(1)
    for p in mlp.parameters(): nn.init.normal_(p)
    plain_mlp.load_state_dict(mlp.state_dict())
    mlp, plain_mlp, w, v = whole(mlp, mesh), whole(plain_mlp, mesh), weight_of(mesh), weight_of(mesh)
    with use_kernel_mapping(MAPPING):
        frozen = kernelize(whole(Norm(), mesh), mode=Mode.TRAINING, device="cpu")
    for case, places in cases.items():
        shape = (4, 8, 8)
        compared(f"{title} {case} norm", lambda: results(norm, mesh, places, shape),
            lambda: results(plain, mesh, places, shape))
        compared(f"{title} {case} kernelized", lambda: results(frozen, mesh, places, shape),
            lambda: results(plain, mesh, places, shape))
        if title == "line" and count == 4: continue
        if case != "sequence twice":  # PyTorch has no rule for the linear layer of the undecorated model
            compared(f"{title} {case} mlp", lambda: results(mlp, mesh, places, shape),
                lambda: results(plain_mlp, mesh, places, shape))
        compared(f"{title} {case} function", lambda: results(add_norm, mesh, places, shape, shape, others=[w]),
            lambda: results(plain_add, mesh, places, shape, shape, others=[v]))
norm, plain = whole(Norm(), line), whole(PlainNorm(), line)
for case, size in ("uneven", 7), ("a rank without any", {2: 1, 4: 5}[count]):
    compared(case, *[lambda m=m: results(m, line, [Shard(1)], (2, size, 8)) for m in (norm, plain)])
compared("accumulated", lambda: accumulated(add, line), lambda: accumulated(lambda x, other: x + other, line))
def expanded(function):
    '''Return the gradient of what had another shape, from one that each rank expands over its positions.'''
    torch.manual_seed(7)
    x, other = [distribute_tensor(torch.randn(24), line, [Shard(0)]).requires_grad_() for _ in range(2)]
    given = DTensor.from_local(torch.arange(6.0).expand(4 // count, 6), line, [Shard(0)])
    function(x.view(4, 6), other.view(4, 6)).backward(given)
    return [x.grad, other.grad]
compared("expanded", lambda: expanded(add), lambda: expanded(lambda x, other: x + other))
def more(layer, *, create_graph):
    '''Return gradients of strided and replicated gradients, of a second backward, and of a gradient.'''
    torch.manual_seed(6)
    layer.weight.grad = None
    x = distribute_tensor(torch.randn(2, 4, 8), line, [Shard(1)]).requires_grad_()
    other = distribute_tensor(torch.randn(8, 4, 2), line, [Shard(1)])
    y = layer(x)
    loss = (y.transpose(0, 2) * other).sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    y.backward(distribute_tensor(torch.randn(2, 4, 8), line, [Replicate()]), retain_graph=True)
    found = [x.grad.clone(), layer.weight.grad.clone()]
    first = torch.autograd.grad((y * y).sum(), [x, layer.weight], create_graph=create_graph)
    if create_graph: (first[0] * first[0]).sum().backward()
    return [*found, *[g.detach() for g in first], x.grad, layer.weight.grad]
for create_graph in False, True:
    run = functools.partial(more, create_graph=create_graph)
    compared("more" + " gradients" * create_graph, *[functools.partial(run, m) for m in (norm, plain)])
part = DTensor.from_local(torch.randn(2, 4, 8), line, [Partial()])
with torch.no_grad(): compared("partial", lambda: [norm(part)], lambda: [plain(part)])

# A block, tensor and sequence parallel: norm, projections, norm.
class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(5)
        self.norm, self.up, self.down, self.last = norm(), nn.Linear(8, 8), nn.Linear(8, 8), norm()
    def forward(self, x):
        return self.last(x + self.down(torch.relu(self.up(self.norm(x)))))
def parallel(norm):
    return parallelize_module(Block(norm), line, {
        "norm": SequenceParallel(), "last": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False)})
block, plain_block = parallel(Norm), parallel(PlainNorm)
compared("block", *[lambda m=m: results(m, line, [Shard(1)], (2, 8, 8)) for m in (block, plain_block)])
if count == 2:
    for name, module in ("compiled", norm), ("kernelized and compiled", None):
        torch._dynamo.reset()
        if module is None:
            with use_kernel_mapping(MAPPING):
                module = kernelize(whole(Norm(), line), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
        run = torch.compile(module, backend="aot_eager", fullgraph=True)
        class Compiled(nn.Module):
            forward = staticmethod(run)
            parameters = module.parameters
        for places, shape in (([Shard(1)], (2, 4, 8)), ([Shard(0)], (2, 6, 8))):
            ran.clear()
            compared(f"{name} {places[0]}",
                *[lambda m=m: results(m, line, places, shape) for m in (Compiled(), plain)])
report = {"calls": report, "quarantine": [entry.reason for entry in quarantined()], "tools": {}}
"""


TOOLS = """
class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)
Centred = use_kernel_forward_from_hub("Centred")(Centred)
class OneRankWrong(NormKernel):
    def forward(self, x):
        return rms(x, self.weight, self.eps) * (1.5 if rank == 1 else 1.0)
class WrongGradient(NormKernel):
    def forward(self, x):
        return rms(x, self.weight.detach() * 1.5 - self.weight * 0.5, self.eps)
calls = []
class Raises(NormKernel):
    def forward(self, x):
        if rank == 1: raise RuntimeError("no memory on this rank")
        return rms(x, self.weight, self.eps)
class RaisesAgain(NormKernel):
    def forward(self, x):
        calls.append(rank)
        if calls == [1, 1]: raise RuntimeError("no memory for a second run on this rank")
        return rms(x, self.weight, self.eps)
flaky, counted = [], []
class FlakyReference(PlainNorm):  # on one rank, it raises in one of its runs
    def forward(self, x):
        counted.append(0)
        if rank == 1 and len(counted) in flaky: raise RuntimeError("no memory for the reference on this rank")
        return rms(x, self.weight, self.eps)
FlakyReference = use_kernel_forward_from_hub("FlakyReference")(FlakyReference)
class NotLocal(nn.Module):
    local_except = (-1,)
    def forward(self, x):
        return x - x.mean(1, keepdim=True)
for name, make, kernel in (("Norm", Norm, NormKernel), ("Norm", Norm, OneRankWrong), ("Norm", Norm, WrongGradient),
        ("Centred", Centred, NotLocal), ("Norm", Norm, Raises), ("Norm", Norm, RaisesAgain))[:6 if count == 2 else 0]:
    calls.clear()
    torch.manual_seed(2)
    layer, x = whole(make(), line), distribute_tensor(torch.randn(2, 4, 8), line, [Shard(1)])
    with warnings.catch_warnings(record=True) as caught, use_kernel_mapping({name: {"cpu": kernel}}):
        warnings.simplefilter("always")
        with canary(first=2, every=0):
            for _ in range(3):
                layer(x.clone().requires_grad_()).sum().backward()
        texts = [str(w.message) for w in caught if issubclass(w.category, KernelsWarning)]
        quarantine = [entry.reason for entry in quarantined()]
        release()
        calls.clear()
        rows = [str(row) for row in verify(nn.Sequential(layer), x, gradients=True).rows]
    report["tools"][kernel.__name__] = [texts, quarantine, rows]
    release()
for run in range(1, 8 if count == 2 else 0):  # whichever run of the reference raises on one rank, none waits for ever
    flaky[:], found = [run], []
    layer, x = whole(FlakyReference(), line), distribute_tensor(torch.randn(2, 4, 8), line, [Shard(1)])
    with use_kernel_mapping({"FlakyReference": {"cpu": NormKernel}}):
        counted.clear()
        with warnings.catch_warnings(), canary(first=2, every=0):
            warnings.simplefilter("error" if run == 1 and rank == 1 else "ignore")
            for _ in range(3):
                try: layer(x.clone().requires_grad_()).sum().backward()
                except KernelsWarning as warning: found.append(str(warning))
        release()
        counted.clear()
        try: rows = [str(row) for row in verify(nn.Sequential(layer), x, gradients=True).rows]
        except KernelsError as error: rows = [str(error)]
        agreed = torch.zeros(1)
        dist.all_reduce(agreed)  # all ranks have come to the same place
    report["tools"][f"flaky {run}"] = [found, [entry.reason for entry in quarantined()], rows]
open(f"{rank}.json", "w").write(json.dumps(report))
dist.destroy_process_group()
os._exit(0)
"""


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("cut", [(-3,), (-2,), (-1,), (-3, -2), (-2, -1), (-1, -3)])
def test_the_strides_of_a_whole_are_found_from_a_shard(cut: tuple[int, ...], order: tuple[int, ...]) -> None:
    """In whatever order the dimensions lie in memory, also where two are cut, and a rank has one position."""

    def strides(shape: torch.Size) -> tuple[int, ...]:
        back = [order.index(dim) for dim in range(3)]
        return torch.empty([shape[dim] for dim in order]).permute(back).stride()

    shape, held = torch.Size((4, 2, 6)), torch.Size([n // 2 if i - 3 in cut else n for i, n in enumerate((4, 2, 6))])
    assert strides_of(torch.empty_strided(held, strides(held)), shape, cut) == strides(shape)


WRONG = "OneRankWrong", "WrongGradient", "NotLocal"


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """Run all in so many processes, once for all tests; return what each reports."""

    @functools.cache
    def run(count: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        done = run_python("-c", RANKS + CALLS + TOOLS, str(count), environment=os.environ, folder=folder, compiler=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]

    return run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes with fork")
@pytest.mark.parametrize("count", [2, 4])
def test_local_kernels_run_on_shards(count: int, on_ranks: Callable[[int], list[dict[str, Any]]]) -> None:
    """Outputs, inputs' and weights' gradients and placements are those of the undecorated model, on every mesh."""
    reports = [report["calls"] for report in on_ranks(count)]
    assert [report["quarantine"] for report in on_ranks(count)] == [[]] * count
    for report in reports:
        assert {name: values for name, (values, _, _) in report.items() if values != ["ok"]} == {}
        for name, (_, served, texts) in report.items():
            refused = "hidden" in name or name in ("a rank without any", "partial")
            assert bool(served) is not (refused or "compiled" in name), name
            assert all("local_except" in text for text in texts), (name, texts)
            assert refused or not texts, (name, texts)
    assert any("x is sharded over dimension -1" in str(texts) for _, _, texts in reports[0].values())
    assert len(reports[0]["block"][1]) == 2
    if count == 4:
        assert reports[0]["square batch and sequence norm"][1] == [[2, 4, 8]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes with fork")
def test_canary_and_verify_compare_shards(on_ranks: Callable[[int], list[dict[str, Any]]]) -> None:
    """A right kernel passes; a kernel wrong on one rank or on all is out on all; none waits for one that raises."""
    for rank, tools in enumerate(report["tools"] for report in on_ranks(2)):
        texts, quarantine, rows = tools["NormKernel"]
        assert texts == quarantine == [] and all(": ok" in row for row in rows), (texts, rows)
        for name in WRONG:
            reasons = tools[name][1]
            assert len(reasons) == 1 and "a canary found" in reasons[0], (name, reasons)
        assert tools["Raises"][1] == tools["RaisesAgain"][1] == []
        why = "on this rank" if rank == 1 else "another rank of the mesh has failed there"
        assert "gradients are not compared" in str(tools["RaisesAgain"][0]) and why in str(tools["RaisesAgain"][0])
        for name in ("Raises", "RaisesAgain"):
            assert any(": failed: it raises RuntimeError: " in row and why in row for row in tools[name][2])
        for run in range(1, 8):
            found, reasons, rows = tools[f"flaky {run}"]
            assert reasons == [] and rows and not any(": wrong" in row for row in rows)
            assert len(found) == (1 if run == rank == 1 else 0)  # a warning that is an error, on one rank
            assert run > 3 or why in rows[0]
        assert any(": wrong" in row for row in tools["WrongGradient"][2] + tools["NotLocal"][2])


@pytest.mark.parametrize("declared", [-1, (1,), ["-1"], (True,)])
def test_a_wrong_declaration_is_refused(declared: object) -> None:
    """The reason names the declaration, and a right one."""

    @use_kernel_forward_from_hub("LocalDeclared")
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    kernel = type("Kernel", (nn.Module,), {"local_except": declared, "forward": lambda self, x: x})
    with use_kernel_mapping({"LocalDeclared": {"cpu": kernel}}):
        found = resolve(Layer, device="cpu", mode=Mode.INFERENCE)
    assert found.is_reference and "local_except" in str(found.refusals[0]) and "(-1,)" in str(found.refusals[0])


SHIPPED = """
import functools
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from kernels_plugins import use_kernel_mapping
from kernels_plugins.demo import layers as references_of_demo
join()
mesh = init_device_mesh("cpu", (W,))
found = {}

def results(call, dim, tensors, weights=()):
    '''Return outputs and gradients of a call whose inputs are sharded over a dimension from the end, weights whole.'''
    torch.manual_seed(1)
    given = [distribute_tensor(t.clone(), mesh, [Shard(t.ndim + dim)]).requires_grad_(learns) for t, learns in tensors]
    outputs = call(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for w in weights: w.grad = None
    sum((output.float() * (0.5 + n)).pow(2).sum() for n, output in enumerate(outputs)).backward()
    gradients = [t.grad for t in given if t.requires_grad] + [w.grad for w in weights]
    return [(t.full_tensor(), str(t.placements)) for t in (*outputs, *gradients)]

def compared(name, layer, plain, kernel, dim, tensors, weights=()):
    ran.clear()
    with use_kernel_mapping({name: {"cpu": kernel}}): ours = results(layer, dim, tensors, weights)
    theirs = results(plain, dim, tensors, weights)
    same = all(torch.allclose(a, b, atol=1e-4) and p == q for (a, p), (b, q) in zip(ours, theirs, strict=True))
    found[f"{name} {dim}"] = [same, ran[:]]

ran = []
def noting(kernel):
    '''Note the shapes that a kernel gets.'''
    @functools.wraps(getattr(kernel, "forward", kernel))
    def noted(self, *tensors):
        assert not any(isinstance(t, DTensor) for t in tensors)
        ran.append(tuple(tensors[0].shape))
        return kernel.forward(self, *tensors)
    if isinstance(kernel, type):
        return type(kernel.__name__, (nn.Module,), {"local_except": kernel.local_except, "forward": noted})
    @functools.wraps(kernel)
    def noted_function(*tensors):
        ran.append(tuple(tensors[0].shape))
        return kernel(*tensors)
    return noted_function

build = Path(references_of_demo.__file__).parent / "hub/kernels-demo/llama-layers/build/torch-cpu"
sys.path.insert(0, str(build))
import layers as of_demo
B, H, S, D = 2, 2, 4, 8
angles = torch.randn(1, S, D)
rotated = [(torch.randn(B, H, S, D), True), (torch.randn(B, 1, S, D), True)]
rotated += [(angles.cos(), False), (angles.sin(), False)]
for name, shape in ("RMSNorm", (B, S, D)), ("SiluAndMul", (B, S, D)), ("GeluAndMul", (B, S, D)):
    layer = getattr(references_of_demo, name)(*[D][: name == "RMSNorm"])
    for key, p in list(layer._parameters.items()):
        layer._parameters[key] = nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()]))
    plain = lambda *given, layer=layer: decorated_layer(layer).reference(layer, *given)
    kernel, weights = noting(getattr(of_demo, name)), list(layer.parameters())
    compared(name, layer, plain, kernel, -2, [(torch.randn(shape), True)], weights)
rotary = references_of_demo.RotaryEmbedding()
plain = lambda *given: decorated_layer(rotary).reference(rotary, *given)
compared("RotaryEmbedding", rotary, plain, noting(of_demo.RotaryEmbedding), -2, rotated)

if os.environ["HAS_TRITON"]:
    from kernels_plugins.packs.triton import layers, rotary as launcher
    def turned(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    def plain(q, k, cos, sin): return turned(q, cos, sin), turned(k, cos, sin)
    rotary = use_kernel_forward_from_hub("rotary_pos_emb")(
        lambda q, k, cos, sin, unsqueeze_dim=1: plain(q, k, cos, sin))
    # What it takes and refuses is as on a GPU; PyTorch turns in place of its launch.
    launcher.rotary = lambda q, k, cos, sin, heads, halves: plain(q, k, cos, sin)
    kernel = noting(layers.rotary_pos_emb)
    compared("rotary_pos_emb", rotary, plain, kernel, -2, rotated)
    # Heads of q are no batch of cos, though both are in the third dimension from the end.
    misleading = [(torch.randn(B, 2, S, D), True), (torch.randn(B, 2, S, D), True)]
    misleading += [(torch.randn(2, S, D), False), (torch.randn(2, S, D), False)]
    compared("rotary_pos_emb", rotary, plain, kernel, -3, misleading)
report(**found)
"""


def test_shipped_kernels_on_shards(tmp_path: Path) -> None:
    """The layers of the demo, and rotary embeddings of the pack `triton`, run on the positions that a rank holds."""
    has_triton = "1" if importlib.util.find_spec("triton") else ""
    shapes = {"RotaryEmbedding": [2, 2, 2, 8], "rotary_pos_emb": [2, 2, 2, 8]}
    for found in run_ranks(tmp_path, SHIPPED, HAS_TRITON=has_triton):
        assert len(found) == (6 if has_triton else 4)
        for case, (same, ran) in found.items():
            name, dim = case.split()
            assert same, case
            assert ran == ([shapes.get(name, [2, 2, 8])] if dim == "-2" else []), case
