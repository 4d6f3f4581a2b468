"""Packs: kernels of other libraries, which serve where a mapping names them."""

from __future__ import annotations

import inspect
import os
import re
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from warned import ignored, never

from kernels_core import (
    ArgumentError,
    KernelsWarning,
    Mode,
    PluginManager,
    forget,
    kernelize,
    receipt,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.torch_internals import release
from kernels_plugins import adopt, opaque, use_kernel_mapping, verify
from kernels_plugins.adapters import plugin as adapters
from kernels_plugins.adoption import shipped_parents
from kernels_plugins.adoption.classes import dispatching
from kernels_plugins.adoption.shipped import RULES
from kernels_plugins.packs import inductor, liger, linear_cross_entropy, torch_operators
from kernels_plugins.packs.rms_norm import SUMS

CUDA = torch.device("cuda")
LAYERS = ("RMSNorm", "RMSNormOffset", "SwiGLUMLP", "GeGLUTanhMLP", "PackedSwiGLUMLP")


@pytest.fixture(autouse=True)
def packs(isolated_plugins: PluginManager, mapping_plugin: types.ModuleType) -> None:
    """Register the three packs, and the plugin that asks for them."""
    for name, pack in (("inductor", inductor), ("liger", liger), ("torch", torch_operators)):
        isolated_plugins.register(pack, name)
    liger._kernels.cache_clear()


@use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Gated(nn.Module):
    """A gated MLP, with the attributes of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.gate_up_proj = nn.Linear(8, 12)


class FakeLiger:
    """The functions of Liger, in PyTorch and without its memory tricks."""

    @staticmethod
    def norm(x: torch.Tensor, w: torch.Tensor, eps: float, offset: float, casting: str, in_place: bool) -> torch.Tensor:
        assert (offset, casting, in_place) in ((0.0, "llama", False), (1.0, "gemma", False))
        return functional.rms_norm(x, w.shape, offset + w, eps)

    LigerRMSNormFunction = types.SimpleNamespace(apply=norm)
    LigerSiLUMulFunction = types.SimpleNamespace(apply=lambda a, b: functional.silu(a) * b)
    LigerGELUMulFunction = types.SimpleNamespace(apply=lambda a, b: functional.gelu(a, approximate="tanh") * b)


@pytest.fixture
def fake_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace(ops=FakeLiger))  # type: ignore[arg-type]
    monkeypatch.setattr(liger, "version", lambda name: "1.2.3")


# --- The source ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("pack:acme", "there is no pack 'acme': there are inductor, liger, torch"),
        ("pack:", "there is no pack ''"),
        ("pack:torch:", "'pack:torch:' names no layer: write 'pack:torch:LAYER'"),
        ("pack:torch/x", "there is no pack 'torch/x'"),
        (("pack:torch", {"version": 1}), "names no layer of a repository"),
    ],
)
def test_wrong_packs(source: Any, problem: str) -> None:
    """A mapping with a pack that does not exist, or that names no layer, is refused at once, with what there is."""
    with pytest.raises(ArgumentError, match=problem):
        use_kernel_mapping({"RMSNorm": {"cpu": source}})


def test_adapted_pack_names_its_layer(isolated_plugins: PluginManager) -> None:
    """Around a pack, an adapter needs the layer in the text, for it is outside of a mapping."""
    isolated_plugins.register(adapters)
    with pytest.raises(ArgumentError, match="write 'pack:torch:LAYER'"):
        opaque("pack:torch")
    with use_kernel_mapping({"RMSNorm": {"cpu": opaque("pack:torch:RMSNorm")}}):
        assert resolve(Norm, device="cpu", mode=Mode.INFERENCE).origin.endswith("TorchRMSNorm")


def test_torch_pack_by_name() -> None:
    """A pack that a mapping names serves a decorated layer; another of its layers may be named, too."""
    layer, x = Norm(), torch.randn(2, 8)
    expected = layer(x)
    assert resolve(Norm, device="cpu", mode=Mode.INFERENCE).is_reference
    for text in ("pack:torch", "pack:torch:RMSNorm"):
        with use_kernel_mapping({"RMSNorm": text}):
            (row,) = receipt(layer, device="cpu", mode=Mode.TRAINING).rows
            assert row.origin.endswith("TorchRMSNorm") and row.plugin == "mapping"
            torch.testing.assert_close(layer(x), expected)
    with use_kernel_mapping({"RMSNorm": {"cpu": "pack:torch:SwiGLUMLP"}}):
        (refusal,) = resolve(Norm, device="cpu", mode=Mode.INFERENCE).refusals
        assert str(refusal) == "pack:torch:SwiGLUMLP: pack 'torch': it has no kernel for 'SwiGLUMLP' on cpu"


def test_pack_whose_plugin_is_gone(isolated_plugins: PluginManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack that `KERNELS_PLUGINS` blocks, or that is unregistered later, refuses with the reason."""
    monkeypatch.setenv("KERNELS_PLUGINS", "-acme")
    with use_kernel_mapping({"RMSNorm": {"cpu": ["pack:acme", "pack:torch"]}}):
        isolated_plugins.unregister(torch_operators)
        refusals = resolve(Norm, device="cpu", mode=Mode.INFERENCE).refusals
    problem = "no plugin offers it: KERNELS_PLUGINS or a configuration file leaves it out, or it was unregistered"
    assert [refusal.reason for refusal in refusals] == [f"pack {name!r}: {problem}" for name in ("acme", "torch")]


# --- Liger -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_liger")
@pytest.mark.parametrize("name", LAYERS)
def test_liger_computes_the_layer(name: str) -> None:
    """Each kernel gives Liger's function the right arguments: it computes the oracle of the adopted layer."""
    rule = next(rule for rule in RULES if rule.layer_name == name)
    module: Any = Norm() if "Norm" in name else Gated()
    loaded = liger.kernels_packs()["liger"](name, CUDA)
    x = torch.randn(3, 8)
    assert loaded.origin == "liger-kernel 1.2.3"
    torch.testing.assert_close(loaded.layer.forward(module, x), rule.oracle(module, x))
    if "Norm" in name:
        assert loaded.layer.forward(module, x.bfloat16()) is NotImplemented


@pytest.mark.usefixtures("fake_liger")
@pytest.mark.parametrize("name", LAYERS)
def test_backwards_that_liger_gets_wrong(name: str) -> None:
    """A backward that is recorded raises, as does a second one of an MLP, whose saved tensors are overwritten."""
    module: Any = Norm() if "Norm" in name else Gated()
    forward = liger.kernels_packs()["liger"](name, CUDA).layer.forward
    x = torch.randn(3, 8, requires_grad=True)
    output = forward(module, x).sum()
    (first,) = torch.autograd.grad(output, x, retain_graph=True)
    if "Norm" in name:
        torch.testing.assert_close(torch.autograd.grad(output, x)[0], first)
    else:
        with pytest.raises(RuntimeError, match="cannot compute a second backward through one forward"):
            torch.autograd.grad(output, x)
    with pytest.raises(RuntimeError, match="cannot compute second derivatives: leave pack:liger out"):
        torch.autograd.grad(forward(module, x).sum(), x, create_graph=True)


@pytest.mark.usefixtures("fake_liger")
def test_liger_serves_where_it_is_named() -> None:
    """It is never offered by itself; named, it serves calls on GPUs that are not traced."""
    with adopt(nn.Sequential(nn.RMSNorm(8)), rules=RULES) as adopted:
        layer = adopted.model[0]
        assert resolve(layer, device="cuda", mode=Mode.TRAINING).is_reference
        with use_kernel_mapping({"RMSNorm": "pack:liger", "LayerNorm": "pack:liger"}):
            assert resolve(layer, device="cuda", mode=Mode.TRAINING).origin == "liger-kernel 1.2.3"
            assert "it takes only bfloat16, float16, float32" in str(adopted.receipt(device="cuda"))
            traced = resolve(layer, device="cuda", mode=Mode.TRAINING | Mode.TORCH_COMPILE)
            assert "it does not declare can_torch_compile" in str(traced)
            assert "for GPUs, and this call is on cpu" in str(resolve(layer, device="cpu", mode=Mode.TRAINING))
            assert "it has no kernel for 'LayerNorm'" in str(resolve("LayerNorm", device="cuda", mode=Mode.TRAINING))


class Raising(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no driver")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, r"pip install 'kernels-core\[liger\]' installs liger-kernel"),
        (Raising("liger_kernel"), "no driver"),
        (types.SimpleNamespace(ops=None), "LigerSiLUMulFunction"),
    ],
)
def test_liger_that_cannot_be_imported(module: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is missing, raises, or has other names refuses with the reason, and is tried again later."""
    monkeypatch.setitem(sys.modules, "liger_kernel", module)
    with use_kernel_mapping({"RMSNorm": {"cuda": "pack:liger"}}):
        (refusal,) = resolve(Norm, device="cuda", mode=Mode.INFERENCE).refusals
        assert re.search(reason, refusal.reason)
        monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace(ops=FakeLiger))  # type: ignore[arg-type]
        monkeypatch.setattr(liger, "version", lambda name: "1.2.3")
        forget()
        assert resolve(Norm, device="cuda", mode=Mode.INFERENCE).origin == "liger-kernel 1.2.3"


@pytest.mark.slow
def test_liger_has_these_functions() -> None:
    """The real package has the functions that the pack calls, with these parameters."""
    ops = pytest.importorskip("liger_kernel.ops", reason="liger-kernel is not installed")
    parameters = list(inspect.signature(ops.LigerRMSNormFunction.forward).parameters)
    assert parameters[1:7] == ["X", "W", "eps", "offset", "casting_mode", "in_place"]
    for name in LAYERS:
        assert liger.kernels_packs()["liger"](name, CUDA).origin.startswith("liger-kernel ")


# --- Inductor --------------------------------------------------------------------------------------


@use_kernel_forward_from_hub("Scaled")
class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, *, by: float = 2.0) -> torch.Tensor:
        return x.sin() * by


@use_kernel_forward_from_hub("scaled")
def scaled(x: torch.Tensor, *, by: float = 2.0) -> torch.Tensor:
    return x.sin() * by


@use_kernel_forward_from_hub("Printing")
class Printing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + float(x.sum()) + len(os.getcwd())


@pytest.fixture
def eager_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without a compiler, for tests of all but its numbers."""
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiling(f, backend="eager", **options))


@pytest.mark.usefixtures("eager_inductor")
def test_inductor_serves_eager_calls_only() -> None:
    """It serves classes and functions, in both modes, and kernelized; a traced call runs what it ran before."""
    layer, x = nn.Sequential(Norm(), Norm()), torch.randn(2, 8, requires_grad=True)
    expected = layer(x)
    with never(KernelsWarning):
        with use_kernel_mapping({"RMSNorm": "pack:inductor", "scaled": {"cpu": "pack:inductor"}}):
            torch.testing.assert_close(layer(x), expected)
            layer(x).sum().backward()
            with torch.no_grad():
                torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(scaled(x, by=3.0), x.sin() * 3)
            for subject in (Norm, scaled, "RMSNorm"):
                resolution = resolve(subject, device="cpu", mode=Mode.INFERENCE)
                assert resolution.origin == f"inductor of torch {torch.__version__}"
            traced = resolve(Norm, device="cpu", mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
            assert traced.is_reference and "it does not declare can_torch_compile" in str(traced)
            kernelize(layer, mode=Mode.TRAINING, device="cpu")
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.usefixtures("eager_inductor")
def test_inductor_that_cannot_compile() -> None:
    """A forward that does not compile as one graph runs as it is, with one warning and a reason in the receipt."""
    layer, x = Printing(), torch.ones(2)
    expected = layer(x)
    with use_kernel_mapping({"Printing": {"cpu": "pack:inductor"}}):
        with torch.no_grad(), pytest.warns(KernelsWarning, match="reference runs instead: .*it raised"):
            torch.testing.assert_close(layer(x), expected)
        assert "it is in quarantine for torch.float32: it raised" in str(
            receipt(layer, device="cpu", mode=Mode.INFERENCE)
        )


@pytest.mark.usefixtures("eager_inductor")
def test_inductor_compiles_kinds_of_calls_apart(caplog: pytest.LogCaptureFixture) -> None:
    """More kinds of calls than PyTorch compiles variants of one function are compiled, and no warning is given."""
    layer = Scaled()
    with use_kernel_mapping({"Scaled": {"cpu": "pack:inductor"}}), never(KernelsWarning):
        for x in [torch.ones([2] * rank) for rank in range(6)]:
            with torch.no_grad():
                torch.testing.assert_close(layer(x), x.sin() * 2)
            torch.testing.assert_close(layer(x.requires_grad_()), x.sin() * 2)
    assert not any("recompile_limit" in record.getMessage() for record in caplog.records)


@pytest.mark.usefixtures("eager_inductor")
def test_inductor_compiles_few_variants(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the limit of PyTorch for one function, which many kinds share, calls run eager: one warning, one attempt."""
    monkeypatch.setattr(inductor, "_KINDS", 0)
    layer = Scaled()
    inputs = [torch.ones([2] * rank) for rank in range(12)]
    with use_kernel_mapping({"Scaled": {"cpu": "pack:inductor"}}), torch.no_grad():
        with pytest.warns(KernelsWarning, match="compiled for as many variants of a call as PyTorch allows") as found:
            for x in inputs:
                torch.testing.assert_close(layer(x), x.sin() * 2)
        assert len(found) == 1
        assert receipt(layer, device="cpu", mode=Mode.INFERENCE).rows[0].origin.startswith("inductor")
        assert any("_limit" in record.getMessage() for record in caplog.records)  # its first half was another one
        caplog.clear()
        for x in inputs:
            torch.testing.assert_close(layer(x), x.sin() * 2)
        assert not any("_limit" in record.getMessage() for record in caplog.records)


@use_kernel_forward_from_hub("Indexed")
class Indexed(nn.Module):
    def __init__(self, index: int, eager: list[int]) -> None:
        super().__init__()
        self.index, self.eager = index, eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.eager.append(self.index)
        return x * self.index


@pytest.mark.skipif(release < (2, 7), reason="PyTorch 2.6 compiles one variant for all numbers")
def test_inductor_keeps_the_variants_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine modules that differ in a number, the ninth runs eager; the others run their compiled variants."""
    compiling = torch.compile  # the backend `eager` would run the forward as it is
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiling(f, backend="aot_eager", **options))
    eager: list[int] = []
    layers, x = [Indexed(index, eager) for index in range(9)], torch.ones(2, 4)
    with use_kernel_mapping({"Indexed": {"cpu": "pack:inductor"}}), torch.no_grad():
        with pytest.warns(KernelsWarning, match="as many variants of a call as PyTorch allows"):
            assert [layer(x).sum().item() for layer in layers] == [8 * index for index in range(9)]
        assert [layer(x).sum().item() for layer in layers] == [8 * index for index in range(9)]
    assert eager == [8, 8]


@use_kernel_forward_from_hub("Gate")
class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sigmoid() * x


@pytest.mark.usefixtures("eager_inductor")
def test_inductor_runs_hooks_of_parts() -> None:
    """Hooks that come after a part was compiled run, those of all modules and of a backward, too."""
    layer, x = Gate(), torch.ones(2, 4, requires_grad=True)
    part, expected = layer.inner[0], layer(x)
    with use_kernel_mapping({"Gate": {"cpu": "pack:inductor"}}), never(KernelsWarning):
        torch.testing.assert_close(layer(x), expected)
        seen: list[str] = []
        for put in (
            lambda: part.register_forward_hook(lambda *call: seen.append("forward")),
            lambda: part.register_forward_pre_hook(lambda *call: seen.append("pre")),
            lambda: part.register_full_backward_hook(lambda *call: seen.append("backward")),
            lambda: nn.modules.module.register_module_forward_hook(lambda m, *call: seen.append(f"all {m is part}")),
        ):
            hook = put()
            layer(x).sum().backward()
            hook.remove()
        assert [one for one in seen if one != "all False"] == ["forward", "pre", "backward", "all True"]
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.usefixtures("eager_inductor")
def test_inductor_in_transforms() -> None:
    """Under `torch.func`, the layer runs as it is, also with an argument that was changed in place before."""
    layer, x = Norm(), torch.randn(2, 8)
    wanted = torch.func.grad(lambda y: layer(nn.functional.linear(y, torch.eye(8), torch.ones(8))).pow(3).sum())(x)
    with use_kernel_mapping({"RMSNorm": {"cpu": "pack:inductor"}}), never(KernelsWarning):
        layer(x)
        found = torch.func.grad(lambda y: layer(nn.functional.linear(y, torch.eye(8), torch.ones(8))).pow(3).sum())(x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("eager_inductor")
def test_inductor_is_verified() -> None:
    """`verify` compares more kinds of calls than are compiled; layers of PyTorch have variants of their own."""
    with adopt(nn.Sequential(nn.RMSNorm(8), nn.LayerNorm(8)), rules=RULES) as adopted:
        with use_kernel_mapping(dict.fromkeys(("RMSNorm", "LayerNorm"), "pack:inductor")):
            with ignored(KernelsWarning):
                report = verify(adopted.model, torch.randn(4, 8))
    assert {(row.layer, row.verdict) for row in report.rows} == {("RMSNorm", "ok"), ("LayerNorm", "ok")}


@pytest.mark.slow
def test_inductor_numbers() -> None:
    """The compiled forward computes the layer, and its gradients."""
    if not any(os.access(f"{folder}/g++", os.X_OK) for folder in os.environ["PATH"].split(":")):
        pytest.skip("inductor needs a C++ compiler on the CPU")
    layer, x = Norm(), torch.randn(4, 8, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).pow(3).sum(), (x, layer.weight))
    with use_kernel_mapping({"RMSNorm": {"cpu": "pack:inductor"}}):
        found = torch.autograd.grad(layer(x).pow(3).sum(), (x, layer.weight))
        assert not receipt(layer, device="cpu", mode=Mode.TRAINING).rows[0].is_reference
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# --- torch: the loss of a linear layer -------------------------------------------------------------


def head_loss(function: Any, dtype: torch.dtype, *, bias: bool, items: Any, rows: int = 50) -> list[torch.Tensor]:
    """Return the loss and the gradients."""
    torch.manual_seed(0)
    hidden, weight, shift = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 16), (40, 16), (40,)))
    given = [each.requires_grad_() for each in (hidden, weight, *([shift] if bias else []))]
    labels = torch.randint(0, 40, (rows,)).masked_fill(torch.arange(rows) % 3 == 0, -100)
    loss = function(hidden, weight, shift if bias else None, labels, items, -100)
    return [loss, *torch.autograd.grad(loss * 3, given)]


@pytest.mark.parametrize("logits", [2**24, 200], ids=["one chunk", "many"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(9)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_in_chunks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, items: Any, bias: bool, logits: int
) -> None:
    """The chunked loss and its gradients are those of all logits at a time, in one chunk and in many."""
    monkeypatch.setattr(linear_cross_entropy, "_LOGITS", logits)
    found = head_loss(linear_cross_entropy.linear_cross_entropy, dtype, bias=bias, items=items)
    wanted = head_loss(shipped_parents.linear_cross_entropy, dtype, bias=bias, items=items)
    assert found[0].dtype == torch.float32
    options = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, wanted, **options)


def test_the_loss_in_chunks_under_autocast() -> None:
    """The head computes in the dtype of autocast, and gradients have that of their tensors."""
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(linear_cross_entropy.linear_cross_entropy, torch.float32, bias=True, items=None)
        wanted = head_loss(shipped_parents.linear_cross_entropy, torch.float32, bias=True, items=None)
    assert [each.dtype for each in found] == [torch.float32] * 4
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_what_the_loss_in_chunks_does_not_take() -> None:
    """Tensors of two dtypes are passed on, second derivatives raise, and a wrong label is PyTorch's error."""
    loss = linear_cross_entropy.linear_cross_entropy
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([1, 2, -100])
    assert loss(hidden.double(), weight, None, labels, None, -100) is NotImplemented
    assert loss(hidden, weight, torch.zeros(5).double(), labels, None, -100) is NotImplemented
    with pytest.raises(RuntimeError, match="second derivatives"):  # not a slope that is a constant, without a word
        torch.autograd.grad(loss(hidden, weight, None, labels, None, -100), weight, create_graph=True)
    with pytest.raises(IndexError):
        loss(hidden, weight, None, labels + 4, None, -100)
    with torch.no_grad():
        assert loss(hidden, weight, None, labels, None, -100).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_loss_of_no_labels(dtype: torch.dtype) -> None:
    """A batch whose labels are all ignored has the loss NaN, and changes no weight, as with PyTorch."""
    for loss in (linear_cross_entropy.linear_cross_entropy, shipped_parents.linear_cross_entropy):
        given = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 4), (5, 4), (5,))]
        found = loss(*given, torch.full((3,), -100), None, -100)
        found.backward()
        assert found.isnan() and not any(each.grad.any() for each in given)


@pytest.mark.parametrize("autocast", [False, True])
def test_small_gradients_of_a_scaled_loss_in_half_precision(autocast: bool) -> None:
    """The share of each label is too small for float16, and a scaler multiplies the loss for that reason."""
    hidden, weight, labels = torch.randn(512, 8), torch.randn(40_000, 8) / 50, torch.arange(512)
    kernel, reference = linear_cross_entropy.linear_cross_entropy, shipped_parents.linear_cross_entropy
    grads = []
    for loss, dtype in ((kernel, torch.float16), (reference, torch.float32)):
        wide = autocast or loss is reference
        given = [each.to(torch.float32 if wide else dtype, copy=True).requires_grad_() for each in (hidden, weight)]
        with torch.autocast("cpu", torch.float16, enabled=autocast and loss is kernel):
            (loss(*given, None, labels, None, -100) * 4096).backward()
        grads.append(given[1].grad[len(labels) :].float())  # of rows that are no label
    found, wanted = grads
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_the_loss_in_float64_under_autocast() -> None:
    """Autocast leaves float64 alone, and so does the kernel."""
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(linear_cross_entropy.linear_cross_entropy, torch.float64, bias=True, items=None)
        wanted = head_loss(shipped_parents.linear_cross_entropy, torch.float64, bias=True, items=None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_takes_no_gradient() -> None:
    """Only the gradients that are wanted are computed: a head that does not train needs none as large as itself."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = linear_cross_entropy.linear_cross_entropy(hidden, weight, None, torch.tensor([1, 2, 3]), None, -100)
    assert loss.grad_fn.saved_tensors[2:] == (None, None)
    loss.backward()
    assert hidden.grad is not None


def test_the_loss_is_offered_where_a_mapping_names_it_only() -> None:
    """A model loses its logits to no pack that is on by default."""
    rule = next(rule for rule in shipped_parents.PARENT_RULES if rule.layer_name == "linear_cross_entropy")
    function = dispatching(shipped_parents.linear_cross_entropy, rule)
    assert resolve(function, device="cpu", mode=Mode.TRAINING).is_reference
    with use_kernel_mapping({"linear_cross_entropy": {"cpu": "pack:torch"}}):
        assert resolve(function, device="cpu", mode=Mode.TRAINING).origin.endswith("linear_cross_entropy")


@pytest.mark.parametrize("name", ["add_rms_norm", "add_rms_norm_offset"])
def test_sums_that_the_pack_does_not_take(name: str) -> None:
    """Tensors of two dtypes are passed on, as classes differ in the dtypes that they return then."""
    kernel = SUMS[name]
    x, weight = torch.randn(2, 8), torch.randn(8)
    normed, summed = kernel(x, x, weight, 1e-6, None)
    assert torch.equal(summed, 2 * x) and normed.shape == x.shape
    for given in ((x, x.double(), weight), (x, x, weight.double())):
        assert kernel(*given, 1e-6, None) is NotImplemented


# --- Attention -------------------------------------------------------------------------------------


def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False, scale: Any = None) -> Any:
    weights = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        weights = weights.masked_fill(torch.ones(weights.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return (weights if attn_mask is None else weights + attn_mask).softmax(-1) @ value


def short(query: Any, key: Any, value: Any) -> Any:
    return attend(query, key, value)


def masked(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
    return attend(query, key, value, attn_mask)


def whole(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: Any = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    return attend(query, key, value, attn_mask, is_causal, scale)


def causal(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = True
) -> Any:
    return attend(query, key, value, attn_mask, is_causal)


SDPA: Any = {"scaled_dot_product_attention": {"cpu": "pack:torch"}}


@pytest.mark.parametrize(
    ("function", "given"),
    [(short, {}), (masked, {"attn_mask": torch.randn(4, 4)}), (whole, {}), (whole, {"is_causal": True}),
     (whole, {"scale": 0.3, "attn_mask": torch.randn(4, 4)}), (whole, {"enable_gqa": True})],
)  # fmt: skip
def test_attention_that_a_layer_name_asks_for(function: Any, given: dict[str, Any]) -> None:
    """PyTorch's operator computes it, with gradients, in eager and compiled code, by position and by name."""
    heads = (4, 2, 2) if "enable_gqa" in given else (4, 4, 4)
    query, key, value = (torch.randn(2, each, 4, 8, requires_grad=True) for each in heads)
    layer = use_kernel_forward_from_hub("scaled_dot_product_attention")(function)
    with use_kernel_mapping(SDPA), never():
        found = layer(query, key=key, value=value, **given)
        assert resolve(layer, device="cpu", mode=Mode.TRAINING).origin.endswith(
            "attention.scaled_dot_product_attention"
        )
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(query, key, value, **given)
    assert "ScaledDotProduct" in type(found.grad_fn).__name__ or given
    wanted = function(query, key, value, **given)
    torch.testing.assert_close((found, compiled), (wanted, wanted))
    slopes = [torch.autograd.grad(each.square().sum(), (query, key, value)) for each in (found, compiled, wanted)]
    torch.testing.assert_close(slopes[:2], [slopes[2]] * 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [causal, attend, lambda q, k, v: q, lambda query, key: query])
def test_attention_with_other_parameters(function: Any) -> None:
    """Another default, order, name or number of parameters is refused, with those that the operator takes."""
    layer = use_kernel_forward_from_hub("scaled_dot_product_attention")(function)
    with use_kernel_mapping(SDPA):
        (refusal,) = resolve(layer, device="cpu", mode=Mode.INFERENCE).refusals
    assert "functions that take (query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, " in refusal.reason


def test_attention_is_for_functions() -> None:
    """A class of that name is refused: the operator has no module."""

    @use_kernel_forward_from_hub("scaled_dot_product_attention")
    class Attention(nn.Module):
        def forward(self, query: Any, key: Any, value: Any) -> Any:
            return query

    with use_kernel_mapping(SDPA):
        (refusal,) = resolve(Attention, device="cpu", mode=Mode.INFERENCE).refusals
    assert "PyTorch's operator serves functions" in refusal.reason
