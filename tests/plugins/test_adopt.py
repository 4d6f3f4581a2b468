"""Adoption: models of others dispatch, compute what they computed, and are given back as they were."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from typer.testing import CliRunner
from warned import never

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelizeError,
    Mode,
    PluginManager,
    count_calls,
    find_layer,
    hookimpl,
    kernelize,
    receipt,
    unkernelize,
    use_kernel_forward_from_hub,
)
from kernels_core.cli import command_line
from kernels_plugins import Rule, adopt, adopted_rule, use_kernel_mapping
from kernels_plugins.adoption import plugin as shipped_plugin
from kernels_plugins.adoption.shipped import RULES

WIDTH = 8


class PlainRMSNorm(nn.Module):
    """As models write it."""

    def __init__(self, width: int = WIDTH, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class OffsetRMSNorm(PlainRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.to(wide.dtype))).to(x.dtype)


class CentredRMSNorm(PlainRMSNorm):
    """Named as one, and none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class PlainLayerNorm(PlainRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps) + self.bias


class UnbiasedLayerNorm(PlainRMSNorm):
    """Without an attribute for a bias, as that of Cohere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class GatedMLP(nn.Module):
    def __init__(self, act: Any = functional.silu, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 12, bias=False) for _ in range(2))
        self.down_proj, self.dropout = nn.Linear(12, WIDTH, bias=False), nn.Dropout(dropout)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x)))


def gating(name: str, act: Any) -> nn.Module:
    """Return an activation with the halves of each row as gate and factor, of a class of that name."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return act(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]

    return type(name, (nn.Module,), {"forward": forward, "__module__": __name__})()


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


class PackedMLP(nn.Module):
    def __init__(self, *, swapped: bool = False) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 24), nn.Linear(12, WIDTH)
        self.swapped = swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(up) * gate if self.swapped else functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.head = PlainRMSNorm(), GatedMLP(), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.mlp(self.norm(x)))


X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


# --- Which layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "layer_name"),
    [
        (PlainRMSNorm(), "RMSNorm"),
        (OffsetRMSNorm(), "RMSNormOffset"),
        (PlainLayerNorm(), "LayerNorm"),
        (nn.RMSNorm(WIDTH), "RMSNorm"),
        (nn.RMSNorm(WIDTH, eps=1e-3), "RMSNorm"),
        (nn.LayerNorm(WIDTH), "LayerNorm"),
        (nn.LayerNorm(WIDTH, bias=False), "LayerNorm"),
        (UnbiasedLayerNorm(), "LayerNorm"),
        (GatedMLP(), "SwiGLUMLP"),
        (GatedMLP(functional.gelu), "GeGLUMLP"),
        (GatedMLP(tanh_gelu), "GeGLUTanhMLP"),
        (GatedMLP(nn.SiLU()), "SwiGLUMLP"),
        (PackedMLP(), "PackedSwiGLUMLP"),
        (gating("SiluAndMul", functional.silu), "SiluAndMul"),
        (gating("SwiGLU", functional.silu), "SiluAndMul"),
        (gating("GeluAndMul", functional.gelu), "GeluAndMul"),
        (gating("GeluAndMul", tanh_gelu), "GeluTanhAndMul"),
        (gating("GEGLU", functional.gelu), "GeluAndMul"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_layer_is_known_by_what_it_computes(module: nn.Module, layer_name: str) -> None:
    """Classes that share a name are told apart by measuring them, and compute the same after being adopted."""
    holder = nn.Sequential(module)
    wanted = holder(X)
    with adopt(holder) as adopted, never():
        assert [(layer.path, layer.layer_name) for layer in adopted.layers] == [("0", layer_name)]
        torch.testing.assert_close(holder(X), wanted)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (CentredRMSNorm(), "it computes something else: it differs by "),
        (nn.RMSNorm(WIDTH, elementwise_affine=False), "its weight is None"),
        (GatedMLP(functional.relu), "it computes something else: it differs by "),
        (GatedMLP(dropout=0.5), "it computes something else: it differs by "),
        (PackedMLP(swapped=True), "it computes something else: it differs by "),
        (gating("GeluAndMul", functional.silu), "it computes something else: it differs by "),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_class_that_computes_something_else_is_refused(module: nn.Module, reason: str) -> None:
    """A class whose name matches and whose numbers do not stays as it was, and the reason is listed."""
    cls = type(module)
    adopted = adopt(nn.Sequential(module))
    assert not adopted.layers and type(module) is cls
    assert {each.path for each in adopted.refused} == {"0"}
    assert all(each.reason.startswith(reason) for each in adopted.refused), adopted.refused


def test_other_parts_are_one_reason() -> None:
    """An MLP of other parts is listed once, with the parts that it has."""

    class OtherMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(x))

    (refused,) = adopt(nn.Sequential(OtherMLP())).refused
    known = "gate_proj, up_proj, down_proj or gate_up_proj, down_proj"
    assert refused.reason == f"it has fc1, fc2, and rules know layers of {known}"


# --- Modules that share a class and differ ---------------------------------------------------------


class ConfiguredMLP(GatedMLP):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config, self.act = type("Config", (), config), lambda x: getattr(functional, self.config.act)(x)


class ListedRMSNorm(PlainRMSNorm):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.options = [factor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.options[0]


def with_hooked_part() -> GatedMLP:
    module = GatedMLP()
    module.up_proj.register_forward_hook(lambda module, args, output: output * 2)
    return module


@pytest.mark.parametrize(
    ("fits", "differs"),
    [
        (GatedMLP(partial(functional.gelu, approximate="tanh")), GatedMLP(partial(torch.add, other=1))),
        (GatedMLP(partial(functional.silu)), GatedMLP(partial(functional.relu))),
        (ConfiguredMLP(act="silu"), ConfiguredMLP(act="relu")),
        (ListedRMSNorm(1.0), ListedRMSNorm(2.0)),
        (GatedMLP(), with_hooked_part()),
    ],
)
def test_one_measurement_stands_for_equal_modules_only(fits: nn.Module, differs: nn.Module) -> None:
    """A module that differs by a function, a configuration, a list or a hook is measured by itself, and refused."""
    holder = nn.Sequential(fits, differs)
    wanted = holder(X)
    with adopt(holder) as adopted:
        assert [layer.path for layer in adopted.layers] == ["0"]
        assert {each.path for each in adopted.refused} == {"1"}
        torch.testing.assert_close(holder(X), wanted)


class ImageLayerNorm(nn.LayerNorm):
    """Channels are first in images, and last in all else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if x.dim() == 4 else super().forward(x)


class CountingRMSNorm(PlainRMSNorm):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.register_buffer("shift", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.shift


class SealedRMSNorm(PlainRMSNorm):
    def __init_subclass__(cls) -> None:
        raise TypeError("this class is sealed")


class HostileRMSNorm(nn.Identity):
    @property
    def weight(self) -> Any:
        raise RuntimeError("no weight")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class StoppingRMSNorm(PlainRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weight


class ScalingRMSNorm(PlainRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        return x * self.weight


class WideningRMSNorm(PlainRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype is torch.float64 else x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class RecordingMLP(GatedMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = super().forward(x)
        return self.last


class LazyMLP(GatedMLP):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.LazyLinear(12)


def shaped(module: nn.Module, *shape: int) -> nn.Module:
    module.weight = nn.Parameter(torch.randn(shape))
    return module


def pruned(module: nn.Module) -> nn.Module:
    prune.random_unstructured(module, "weight", 0.5)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (shaped(PlainRMSNorm(), 2, WIDTH), "its weight is of shape (2, 8), not as long as a row"),
        (shaped(PlainRMSNorm(), 1, WIDTH), "its weight is of shape (1, 8), not as long as a row"),
        (shaped(PlainRMSNorm(), 1), "its weight is of shape (1,), not as long as a row"),
        (nn.LayerNorm((2, WIDTH)), "its weight is of shape (2, 8), not as long as a row"),
        (
            ImageLayerNorm(WIDTH),
            "(3, 1, 2, 8) on a CPU, which the layer takes, it raises RuntimeError: Given normalized",
        ),
        (CountingRMSNorm(torch.tensor(1)), "its shift is no floating-point parameter or buffer"),
        (pruned(nn.LayerNorm(WIDTH)), "its weight is no floating-point parameter or buffer"),
        (StoppingRMSNorm(), "it computes other gradients"),
        (ScalingRMSNorm(), "it writes into its arguments"),
        (RecordingMLP(), "its forward sets attributes of the module"),
        (WideningRMSNorm(), "for torch.bfloat16, it returns a torch.float32 tensor of (3, 1, 2, 8), and the layer"),
        (SealedRMSNorm(), "its class learns of classes that derive from it (__init_subclass__)"),
        (HostileRMSNorm(), "it cannot be measured: RuntimeError: no weight"),
        (LazyMLP(), "it cannot be measured: RuntimeError: Can't access the shape of an uninitialized parameter"),
        (PlainRMSNorm(eps=None), "it has no number as variance_epsilon, eps or epsilon"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_strange_modules_are_refused(module: nn.Module, reason: str) -> None:
    """What kernels would compute wrongly, or no one can measure, is refused with a reason; others are adopted."""
    adopted = adopt(nn.Sequential(module, PlainRMSNorm()))
    assert [layer.path for layer in adopted.layers] == ["1"]
    assert reason in adopted.refused[0].reason, adopted.refused


@pytest.mark.parametrize("context", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16)])
def test_settings_of_the_caller_have_no_part(model: Model, context: Any) -> None:
    """Under a default device, or autocast, the same layers are adopted."""
    with context:
        assert {layer.path for layer in adopt(model).layers} == {"norm", "mlp"}


class LowRank(nn.Linear):
    """An adapter as PEFT makes them."""


def hooked(module: GatedMLP) -> None:
    module.up_proj.register_forward_hook(lambda *_: None)


def adapted(module: GatedMLP) -> None:
    module.up_proj = LowRank(WIDTH, 12)


def parametrized(module: GatedMLP) -> None:
    parametrize.register_parametrization(module.up_proj, "weight", nn.Identity())


def rebound(module: GatedMLP) -> None:
    module.up_proj.forward = lambda x: functional.linear(x, module.up_proj.weight)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "its part up_proj has a hook or a forward of its own, which a kernel would not run"),
        (adapted, "its part up_proj is a test_adopt.LowRank, not a plain Linear"),
        (parametrized, "its part up_proj is a torch.nn.utils.parametrize.ParametrizedLinear, not a plain Linear"),
        (rebound, "its part up_proj has a hook or a forward of its own, which a kernel would not run"),
    ],
)
def test_changed_parts_are_refused(model: Model, change: Any, reason: str) -> None:
    """A kernel that reads past an adapter, a hook or a parametrization would ignore it: the MLP is refused."""
    change(model.mlp)
    adopted = adopt(model)
    assert {layer.path for layer in adopted.layers} == {"norm"}
    assert {each.reason.replace(f"{__name__}.", "test_adopt.") for each in adopted.refused} == {reason}


def test_what_is_taken_is_refused(model: Model) -> None:
    """Adopted, kernelized and decorated modules, and those with a forward of their own, are left alone."""
    adopted = adopt(model)
    assert {each.reason for each in adopt(model).refused} == {"it is adopted already"}
    kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert {each.reason for each in adopt(model).refused} == {"it is kernelized: adopt the model before that"}
    adopted.undo()
    model.norm.forward = lambda x: x  # type: ignore[method-assign]
    (refused,) = adopt(model).refused
    assert refused.reason.startswith("another library has put a forward on it")


# --- As before -------------------------------------------------------------------------------------


def test_undo_is_exact(model: Model) -> None:
    """State dict, attributes and classes are the same objects before, during and after; undoing twice is nothing."""
    before = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    keys, wanted = list(model.state_dict()), model(X)
    adopted = adopt(model)
    assert isinstance(model.norm, PlainRMSNorm) and type(model.norm).__name__ == "PlainRMSNorm"
    assert list(model.state_dict()) == keys
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == {n: d for n, (_, d) in before.items()}
    adopted.undo()
    adopted.undo()
    assert {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()} == before
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=0)


def test_other_models_are_not_touched(model: Model) -> None:
    """Another model of the same classes keeps its classes, and does not dispatch."""
    other = Model()
    with adopt(model):
        assert type(other.norm) is PlainRMSNorm and find_layer(other.norm) is None
        assert type(model.norm) is not PlainRMSNorm


def test_adopted_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules get the same classes again, so compiled graphs serve again; not where a forward was replaced since."""
    graphs: list[object] = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            with adopt(model):
                compiled(X)
    assert len(graphs) == 1
    classes, plain = set(), PlainRMSNorm.forward
    for forward in (plain, lambda self, x: plain(self, x)):
        monkeypatch.setattr(PlainRMSNorm, "forward", forward)
        with adopt(model):
            classes.add(type(model.norm))
    assert len(classes) == 2


@pytest.mark.parametrize("suspended", [False, True])
def test_undo_after_kernelize(model: Model, suspended: bool) -> None:
    """A kernelized model is given back as it was, also while `train()` suspends its kernels."""
    adopted = adopt(model.eval())
    with torch.no_grad():
        wanted = model(X)
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
        torch.testing.assert_close(model(X), wanted)
        assert {row.plugin for row in adopted.receipt().rows if row.layer_name == "RMSNorm"} == {"torch"}
    if suspended:
        model.train()
    adopted.undo()
    assert type(model.norm) is PlainRMSNorm and "forward" not in model.norm.__dict__
    unkernelize(model)


def test_undo_refuses_a_class_that_others_changed(model: Model) -> None:
    """Where another library has made a class of the adopted one, nothing is undone, and the error says so."""
    adopted = adopt(model)
    theirs = type("Sharded", (type(model.norm),), {})
    model.norm.__class__ = theirs
    with pytest.raises(KernelizeError, match=r"The class of 'norm' was changed since it was adopted, to .*Sharded"):
        adopted.undo()
    assert type(model.mlp) is not GatedMLP


def test_copies_are_adopted(model: Model) -> None:
    """A copy dispatches by the same layers, and has tensors of its own."""
    adopt(model)
    deep, shallow = copy.deepcopy(model), copy.copy(model.norm)
    assert type(deep.norm) is type(model.norm) is type(shallow)
    assert deep.norm.weight is not model.norm.weight and shallow.weight is model.norm.weight
    torch.testing.assert_close(deep(X), model(X))
    kernelize(deep, mode=Mode.INFERENCE, device="cpu")
    assert type(copy.deepcopy(deep).norm) is type(deep.norm) is not type(model.norm)


@pytest.mark.parametrize("kernelized", [False, True])
def test_pickles_are_of_the_original_class(model: Model, kernelized: bool) -> None:
    """`torch.save` and pickle give plain models."""
    adopt(model)
    if kernelized:
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with pytest.warns(match="was saved while kernelized") if kernelized else contextlib.nullcontext():
        for loaded in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model, 2))):
            assert type(loaded.norm) is PlainRMSNorm and type(loaded.mlp) is GatedMLP
            torch.testing.assert_close(loaded(X), model(X))


def test_a_pickle_needs_nothing_of_ours(model: Model) -> None:
    """A process without kernels-core can read the pickle of an adopted model."""
    norm = nn.Sequential(nn.RMSNorm(WIDTH))
    adopt(norm)
    code = (
        "import sys, pickle\nsys.modules['kernels_core'] = sys.modules['kernels_plugins'] = None\n"
        "model = pickle.load(sys.stdin.buffer)\nprint(type(model[0]).__mro__[0])"
    )
    ran = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(norm), capture_output=True, check=False)
    assert ran.stdout.decode().strip() == "<class 'torch.nn.modules.normalization.RMSNorm'>", ran.stderr


def test_no_weight_is_copied(model: Model) -> None:
    """A model on the meta device, whose weights cannot be read, is adopted: only shapes are."""
    adopted = adopt(Model().to("meta"))
    assert {layer.layer_name for layer in adopted.layers} == {"RMSNorm", "SwiGLUMLP"}


def needs_a_gpu(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no GPU")


class WideMLP(GatedMLP):
    """Too wide to be copied for measuring."""

    def __init__(self, act: Any = functional.silu, *, by_width: bool = False) -> None:
        super().__init__(act)
        self.gate_proj, self.up_proj = (nn.Linear(1024, 2816, bias=False) for _ in range(2))
        self.down_proj, self.width = nn.Linear(2816, 1024, bias=False), 1024 if by_width else -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(-1, self.width) if self.width > 0 else x).view(x.shape)


@pytest.mark.parametrize(("by_width", "largest"), [(False, 4096), (True, 1024 * 2816)])
def test_wide_layers_are_measured_narrow(by_width: bool, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No random weights of the full width are made, but for a class whose forward relies on its width."""
    from kernels_plugins.adoption import fit

    made: list[int] = []
    random = fit._random
    monkeypatch.setattr(
        fit, "_random", lambda tensor, generator: made.append(tensor.numel()) or random(tensor, generator)
    )
    assert [layer.layer_name for layer in adopt(nn.Sequential(WideMLP(by_width=by_width))).layers] == ["SwiGLUMLP"]
    assert max(made) <= largest
    made.clear()
    (reason,) = {each.reason for each in adopt(nn.Sequential(WideMLP(needs_a_gpu))).refused}
    assert reason == "it cannot be measured: RuntimeError: no GPU" and max(made) <= 4096


class TimmLayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class TimmLayerNorm2d(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimmRmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (WIDTH,), 1e-6
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class TimmBlock(nn.Module):
    """As in timm: `norm1`, `fc1`, a norm that is a subclass, scales of residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_pre, self.norm1, self.norm2 = TimmLayerNorm2d(WIDTH), TimmLayerNorm(WIDTH, eps=1e-6), TimmRmsNorm()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_pre(x).flatten(2).transpose(1, 2)
        return self.scale * self.fc2(self.act(self.fc1(self.norm2(x + self.norm1(x)))))


def test_a_model_in_the_style_of_timm() -> None:
    """Its norms are adopted and served, that of images is refused, and it computes the same, with gradients."""
    model, images = TimmBlock(), torch.randn(2, WIDTH, 3, 5)
    wanted = model(images)
    slopes = torch.autograd.grad(wanted.square().sum(), list(model.parameters()))
    with adopt(model) as adopted, never():
        assert {layer.path: layer.layer_name for layer in adopted.layers} == {"norm1": "LayerNorm", "norm2": "RMSNorm"}
        assert [each.path for each in adopted.refused] == ["norm_pre"]
        assert {row.path for row in adopted.receipt().rows if not row.is_reference} == {"norm1", "norm2"}
        found = model(images)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), list(model.parameters())), slopes)


def test_random_numbers_are_left_alone(model: Model) -> None:
    """Measuring draws from generators of its own, also where a class has dropout."""
    model.mlp.dropout.p = 0.5
    before = torch.random.get_rng_state()
    adopt(model)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- Kernels ---------------------------------------------------------------------------------------


class Fast(nn.Module):
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.variance_epsilon


def test_a_mapped_kernel_reads_canonical_attributes() -> None:
    """A kernel finds the epsilon under its canonical name, whatever the class calls it."""
    holder = nn.Sequential(PlainRMSNorm(eps=2.0), nn.RMSNorm(WIDTH))
    adopt(holder)
    with use_kernel_mapping({"RMSNorm": {"cpu": Fast}}), torch.no_grad():
        torch.testing.assert_close(holder[0](X), X * 2)
        torch.testing.assert_close(holder[1](X), X * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_epsilon_of_an_rms_norm_without_one(dtype: torch.dtype) -> None:
    """Kernels get the epsilon that PyTorch takes then, which is not that of half precision in newer versions."""
    norm, x = nn.RMSNorm(WIDTH).to(dtype), (X * 1e-2).to(dtype)
    with adopt(nn.Sequential(norm)):
        torch.testing.assert_close(norm(x), functional.rms_norm(x, (WIDTH,), eps=norm.variance_epsilon))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cls", [PlainRMSNorm, OffsetRMSNorm, PlainLayerNorm])
def test_the_pack_of_torch_is_right(cls: type[nn.Module], dtype: torch.dtype) -> None:
    """Its kernels serve, and give numbers and gradients as close to float64 as the reference, in the same dtype."""
    torch.manual_seed(0)
    module, x = cls().to(dtype), torch.randn(5, WIDTH).to(dtype)
    exact, wide = copy.deepcopy(module).double(), x.clone().double().requires_grad_()
    exact(wide).pow(2).sum().backward()
    adopted = adopt(nn.Sequential(module))
    given = x.clone().requires_grad_()
    with count_calls():
        output = module(given)
        (row,) = adopted.receipt(mode=Mode.TRAINING).rows
    assert row.plugin == "torch" and row.calls == {row.origin: 1}
    output.pow(2).sum().backward()
    assert output.dtype is dtype and given.grad is not None and wide.grad is not None
    bound = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), exact(wide), rtol=bound, atol=bound)
    torch.testing.assert_close(given.grad.double(), wide.grad, rtol=bound, atol=bound * 10)


def test_the_pack_of_torch_leaves_mixed_dtypes_to_the_reference() -> None:
    """A weight in float32 makes the output float32 in such classes: the reference serves that call, and only that."""
    module = PlainRMSNorm()
    adopted = adopt(nn.Sequential(module))
    with count_calls(), torch.no_grad():
        with pytest.warns(match="it passes some calls on"):
            assert module(X.bfloat16()).dtype is torch.float32
        assert module(X).dtype is torch.float32
        (row,) = adopted.receipt(mode=Mode.INFERENCE).rows
    assert row.plugin == "torch"
    biased = PlainLayerNorm()
    biased.bias.data = biased.bias.data.bfloat16()
    adopt(nn.Sequential(biased))
    with pytest.warns(match="it passes some calls on"):
        torch.testing.assert_close(biased(X), PlainLayerNorm.forward(biased, X))


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_gives_the_dtype_of_the_reference(enabled: bool) -> None:
    """In autocast, weights and arguments in bfloat16 give bfloat16, as without a kernel."""
    module = PlainRMSNorm().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
        wanted = module(X.bfloat16())
        with adopt(nn.Sequential(module)):
            found = module(X.bfloat16())
    assert found.dtype is wanted.dtype
    torch.testing.assert_close(found, wanted)


def test_the_pack_of_torch_is_for_adopted_layers_only() -> None:
    """A decorated layer of the same name is served by nothing: nobody has measured what it computes."""
    decorated = use_kernel_forward_from_hub("RMSNorm")(type("Theirs", (OffsetRMSNorm,), {}))()
    (row,) = receipt(decorated, device="cpu").rows
    assert row.is_reference and not list(row.remarks)


# --- Rules -----------------------------------------------------------------------------------------


def twice(name: str = "twice") -> Rule:
    return Rule(name, "Twice", ("*.Twice",), lambda self, x: 2 * x, lambda module: (X.double(),))


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


@pytest.fixture
def plugin(isolated_plugins: PluginManager) -> list[object]:
    """The rules of a plugin beside the shipped ones; faults are reported to a manager of its own."""
    rules: list[object] = [twice()]

    class Plugin:
        @hookimpl
        def kernels_adoption_rules(self) -> list[object]:
            return rules

    isolated_plugins.register(shipped_plugin, "adopt")
    isolated_plugins.register(Plugin(), "acme")
    return rules


def test_rules_of_plugins_come_first(plugin: list[object]) -> None:
    """A plugin's rules are applied, before the shipped ones, and know their layers later."""
    (layer,) = adopt(nn.Sequential(Twice(), nn.Linear(2, 2))).layers
    assert (layer.layer_name, layer.rule) == ("Twice", "twice")
    plugin[:] = [Rule("ours", "Ours", ("*RMSNorm",), RULES[0].oracle, RULES[0].inputs, RULES[0].binds)]
    norm = nn.Sequential(PlainRMSNorm())
    assert [layer.layer_name for layer in adopt(norm).layers] == ["Ours"]
    rule = adopted_rule(find_layer(norm[0]))
    assert rule is plugin[0]


def test_a_bad_rule_of_a_plugin_is_reported(plugin: list[object]) -> None:
    """What is no rule is left out, with the plugin's name; the others apply."""
    plugin[:] = ["RMSNorm", twice()]
    with pytest.warns(match="Plugin 'acme': kernels_adoption_rules returned 'RMSNorm', which is no Rule"):
        assert adopt(nn.Sequential(Twice())).layers


def test_given_rules_replace_those_of_plugins() -> None:
    """With rules of the caller's own, no other rule applies."""
    assert not adopt(nn.Sequential(nn.RMSNorm(2)), rules=[twice()]).layers


@pytest.mark.parametrize(("zero", "adopted"), [(0.0, True), (float("nan"), False), (1e-3, False)])
def test_rows_of_zeros(zero: float, adopted: bool) -> None:
    """A layer such as ReLU may make rows of zeros: an oracle that does the same fits, and no other."""

    def oracle(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x == 0, 2 * x + zero, 2 * x)

    rule = Rule("twice", "Twice", ("*.Twice",), oracle, lambda module: (torch.zeros(2, 4).double(),))
    assert bool(adopt(nn.Sequential(Twice()), rules=[rule]).layers) is adopted


def test_a_rule_that_raises_refuses() -> None:
    """An oracle or inputs that raise are a reason, and the model stays as it was."""
    rule = Rule("broken", "Twice", ("*.Twice",), lambda self, x: 1 / 0, lambda module: (X,))
    (refused,) = adopt(nn.Sequential(Twice()), rules=[rule]).refused
    assert refused.reason == "it cannot be measured: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adopt(3), "A model"),
        (lambda: adopt(nn.Linear(1, 1), rules="x"), "rules is a list of Rule, not 'x'"),
        (lambda: adopt(nn.Linear(1, 1), rules=[3]), "An item of rules"),
        (lambda: Rule("r", "L", "*.X", lambda self, x: x, lambda m: ()), "classes of a Rule is a tuple of patterns"),
        (lambda: Rule("r", "L", None, lambda self, x: x, lambda m: ()), "classes of a Rule is a tuple of patterns"),
        (lambda: Rule("r", "L", (), 3, lambda m: ()), "oracle of a Rule is a function, not 3"),
        (lambda: Rule("r", "L", (), max, max, {"forward": "x"}), "a module has not, not 'forward'"),
        (lambda: Rule("r", "L", (), max, max, {"weight": 3}), "of a Rule"),
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    """Wrong types are errors of ours that name the argument."""
    with pytest.raises(ArgumentTypeError, match=message):
        make()


@pytest.mark.parametrize("pattern", ["RMSNorm", ""])
def test_a_pattern_that_matches_no_class(pattern: str) -> None:
    """A name without its module would never match, and no model would tell: the error has the pattern that is meant."""
    with pytest.raises(ArgumentError, match=rf"module and class: '{pattern}' matches none\. Write '\*\.{pattern}'"):
        Rule("r", "L", ("*.Other", pattern), lambda self, x: x, lambda module: ())


def test_the_list_is_readable(model: Model) -> None:
    """Equal modules share a line, and the JSON has a record for each."""
    model.extra = nn.ModuleList(PlainRMSNorm() for _ in range(3))
    model.other = CentredRMSNorm()
    adopted = adopt(model)
    assert "norm and 3 more" in str(adopted) and "refused: it computes something else" in str(adopted)
    assert '"path": "extra.2"' in adopted.to_json()
    assert adopted._repr_html_().startswith("<")


# --- Found by a reviewer ---------------------------------------------------------------------------


def test_a_binding_of_an_attribute_that_the_class_has(model: Model) -> None:
    """A rule may not read another value for an attribute that the module has: kernels would read that one."""
    for binds in ({"eps": lambda module: module.eps**2}, {"weight": lambda module: 1 + module.weight}):
        rule = Rule("ours", "Ours", ("*RMSNorm",), RULES[0].oracle, RULES[0].inputs, {**RULES[0].binds, **binds})
        (refused,) = adopt(nn.Sequential(PlainRMSNorm()), rules=[rule]).refused
        assert "is not what the rule reads for it: bind another name" in refused.reason


def test_undo_takes_back_forwards_that_libraries_keep(model: Model) -> None:
    """A hook that keeps the forward that it found runs the plain one after `undo()`; taken off, it leaves none."""
    adopted = adopt(model)
    model.norm._old_forward = model.norm.forward
    model.mlp.forward = model.mlp.forward  # as accelerate puts it back
    adopted.undo()
    assert model.norm._old_forward.__func__ is PlainRMSNorm.forward
    assert "forward" not in model.mlp.__dict__ and adopt(model).layers


def test_copies_leave_the_class_alone_meanwhile(model: Model) -> None:
    """While a module is copied or pickled, other threads see it as it is."""
    seen = []

    class Watched(PlainRMSNorm):
        def __getstate__(self) -> dict[str, Any]:
            seen.append(type(self))
            return dict(self.__dict__)

    holder = nn.Sequential(Watched())
    adopt(holder)
    seen.clear()  # measuring copies a module, too
    made = [copy.deepcopy(holder[0]), copy.copy(holder[0])]
    assert set(seen) == {type(holder[0])} == {type(each) for each in made}


def test_a_rule_without_inputs_measures_nothing() -> None:
    """No call, or a tensor that is no tuple of arguments, is a reason to refuse."""
    for inputs in ([], X):
        rule = Rule("none", "Twice", ("*.Twice",), lambda self, x: 2 * x, lambda module, inputs=inputs: inputs)
        (refused,) = adopt(nn.Sequential(Twice()), rules=[rule]).refused
        assert "returned no tuple of arguments" in refused.reason


def test_a_class_that_cannot_be_changed_is_refused() -> None:
    """Where a class cannot be put on a module, that one is refused, and the others are adopted."""

    class Fixed(PlainRMSNorm):
        __class__ = property(lambda self: Fixed)  # type: ignore[assignment]

    adopted = adopt(nn.Sequential(PlainRMSNorm(), Fixed()))
    assert [layer.path for layer in adopted.layers] == ["0"]
    (refused,) = adopted.refused
    assert refused.path == "1" and "cannot be of class" in refused.reason
    adopted.undo()
    assert type(adopted.model[0]) is PlainRMSNorm


def test_where_a_norm_adds_its_epsilon_is_measured() -> None:
    """A class that adds it outside of the root differs in tiny rows only, and is no RMSNorm."""

    class OutsideRMSNorm(PlainRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)

    assert not adopt(nn.Sequential(OutsideRMSNorm(eps=1e-12))).layers
    assert adopt(nn.Sequential(PlainRMSNorm(eps=1e-12))).layers


def made() -> nn.Module:
    return nn.Sequential(PlainRMSNorm(), CentredRMSNorm())


@pytest.mark.parametrize("options", [[], ["--served"], ["--served", "--device", "cpu"]])
def test_the_command(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows both lists, and who serves; as JSON, in one document; without any layer, it exits with 1."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run, cli = CliRunner().invoke, command_line()
    shown = run(cli, ["adopt", "test_adopt:made", *options])
    assert shown.exit_code == 0 and "1 adopted, 1 refused, which run as before" in shown.stdout
    assert ("TorchRMSNorm" in shown.stdout) is bool(options)
    found = json.loads(run(cli, ["adopt", "test_adopt:made", *options, "--json"]).stdout)
    assert [len(found[name]) for name in ("layers", "refused")] == [1, 2]
    assert [row["plugin"] for row in found.get("receipt", [])] == ["torch"] * bool(options)
    assert run(cli, ["adopt", "torch.nn:Identity"]).exit_code == 1


# --- Changes after adoption ------------------------------------------------------------------------


def without_dropout(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("act", "change"),
    [
        (nn.SiLU(), lambda mlp: setattr(mlp.dropout, "p", 1.0)),
        (nn.SiLU(), lambda mlp: setattr(mlp, "act", nn.ReLU())),
        (functional.silu, lambda mlp: setattr(mlp, "act", functional.relu)),
    ],
    ids=["dropout", "activation", "function"],
)
def test_an_activation_or_a_dropout_that_changes_later(act: Any, change: Any) -> None:
    """An MLP computes with a probability or an activation that was set after it was adopted, eager and compiled."""
    torch.manual_seed(0)
    mlp = GatedMLP(act)
    kernel = type("Kernel", (nn.Module,), {"forward": without_dropout, "can_torch_compile": True})
    with adopt(mlp) as adopted, use_kernel_mapping({"SwiGLUMLP": {"cpu": kernel}}):
        assert adopted.receipt().rows[0].plugin == "mapping"
        before = mlp(X)
        torch._dynamo.reset()
        compiled = torch.compile(mlp, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), before)
        change(mlp)
        found, note = (mlp(X), compiled(X)), adopted.receipt().rows[0].note
    wanted = mlp(X)
    assert not torch.equal(wanted, before) and note == "its condition is not met"
    torch.testing.assert_close(found, (wanted, wanted))


def test_an_activation_that_is_adopted_itself() -> None:
    """An MLP is served although its activation got a class of its own, too."""

    class NewGELUActivation(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    class FastMLP(nn.Module):
        def forward(self: Any, x: torch.Tensor) -> Any:
            return self.down_proj(tanh_gelu(self.gate_proj(x)) * self.up_proj(x))

    mlp = GatedMLP(NewGELUActivation())
    with adopt(mlp) as adopted, use_kernel_mapping({"GeGLUTanhMLP": {"cpu": FastMLP}}), count_calls():
        assert {layer.layer_name for layer in adopted.layers} == {"GeGLUTanhMLP", "GeluTanh"}
        mlp(X)
        assert [sum((row.calls or {}).values()) for row in adopted.receipt().rows] == [1, 0]


def test_other_modules_are_not_copied_to_be_measured() -> None:
    """A module that refers to its model is measured without a copy of that."""

    class Uncopied(nn.Module):
        def __deepcopy__(self, memo: object) -> Any:
            raise AssertionError("copied")

    norms = [PlainRMSNorm() for _ in range(3)]
    holder = Uncopied()
    object.__setattr__(norms[0], "model", holder)
    norms[1].holders = [{"model": holder}]  # type: ignore[assignment]
    norms[2].get = holder.parameters  # type: ignore[assignment]
    adopted = adopt(nn.Sequential(*norms))
    assert len(adopted.layers) == 3, adopted.refused
