"""Consistency: of each seeded drift, the first layer whose bits differ is named; equal models are found equal."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import pickle
import random
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import typer
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelsError,
    receipt,
    references,
    use_kernel_forward_from_hub,
)
from kernels_core.cli import run
from kernels_core.replay import host_random_states
from kernels_plugins import ConsistencyError, consistency, use_kernel_mapping
from kernels_plugins.consistency.bits import digest, gap
from kernels_plugins.consistency.command import compare_models

HIDDEN, HEADS, LENGTH, ROWS = 32, 4, 6, 3

pytestmark = pytest.mark.usefixtures("mapping_plugin", "same_numbers")


@use_kernel_forward_from_hub("ConsistentNorm")
class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@use_kernel_forward_from_hub("consistent_rotary")
def rotary(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = q.chunk(2, -1)
    return q * cos + torch.cat((-right, left), -1) * sin


class Attention(nn.Module):
    frequencies: torch.Tensor

    def __init__(self, base: float = 10_000.0) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.size = HIDDEN // HEADS
        powers = torch.arange(0, self.size, 2) / self.size
        self.register_buffer("frequencies", base**-powers, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], HEADS, self.size)
        q, k, v = (project(x).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        angles = torch.outer(torch.arange(x.shape[1]), self.frequencies).repeat(1, 2)
        q, k = (rotary(each, angles.cos(), angles.sin()) for each in (q, k))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2)) * self.size**-0.5
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1) @ v


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp_norm = Norm(), Attention(), Norm()
        self.up, self.gate, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), Gate(), nn.Linear(2 * HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm(x)))
        return x + self.down(self.gate(self.up(self.mlp_norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = Norm(), nn.Linear(HIDDEN, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def ids() -> torch.Tensor:
    return torch.randint(0, 50, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


# --- Drifts -----------------------------------------------------------------------------------------


def patched(path: str, forward: Callable[..., Any], method: str = "forward") -> Callable[[Model], None]:
    """Return a drift that gives the module at a path another forward."""

    def drift(model: Model) -> None:
        module = model.get_submodule(path)
        vars(module)[method] = functools.partial(forward, module)

    return drift


def attribute(path: str, name: str, value: object) -> Callable[[Model], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def flipped(path: str, name: str = "weight") -> Callable[[Model], None]:
    """Return a drift that flips the lowest bit of one number."""

    def drift(model: Model) -> None:
        with torch.no_grad():
            getattr(model.get_submodule(path), name).view(torch.int32).view(-1)[7] ^= 1

    return drift


def summed_in_order(self: Any, x: torch.Tensor) -> torch.Tensor:
    total = functools.reduce(torch.add, x.pow(2).unbind(-1))[..., None]
    return x * torch.rsqrt(total / HIDDEN + self.eps) * self.weight


def in_bfloat16(self: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.Linear.forward(self, x.bfloat16().float())


def ten_bits(self: Any, x: torch.Tensor) -> torch.Tensor:
    """As TF32 does: ten bits of each factor."""
    x, weight = ((each.view(torch.int32) & ~0x1FFF).view(torch.float32) for each in (x, self.weight.detach()))
    return functional.linear(x, weight, self.bias)


def fused(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Rounded once, as a fused multiply-add."""
    return functional.linear(x.double(), self.weight.double(), self.bias.double()).float()


def own_seed(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * (torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) > self.p) / (1 - self.p)


def writes_to_its_input(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = Norm.forward(self, x)
    x.mul_(1.0001)
    return y


def other_order(self: Any, x: torch.Tensor) -> torch.Tensor:
    attended = self.dropout(self.attention(self.norm(x)))
    middle = x + attended
    return x + (attended + self.down(self.gate(self.up(self.mlp_norm(middle)))))


def early(self: Any, x: torch.Tensor) -> torch.Tensor:
    middle = (x.double() * (1 + 1e-7) + self.dropout(self.attention(self.norm(x)))).float()
    return middle + self.down(self.gate(self.up(self.mlp_norm(middle))))


def sdpa(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def unmasked(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def scaled_before(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return Attention.attend(self, q * 1.1, k / 1.1, v)


def tanh_gate(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return gate * 0.5 * (1 + torch.tanh(gate * 0.5)) * up


def one_is_nan(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = Gate.forward(self, x).clone()
    y[0, 0, 0] = float("nan")
    return y


def negative_zero(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, -0.0)


class PositiveZero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def on_row_count(self: Any, x: torch.Tensor) -> torch.Tensor:
    return Norm.forward(self, x) if len(x) == ROWS else summed_in_order(self, x)


def second_call(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return Norm.forward(self, x) * (1 + 2**-20 * (self.calls == 2))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * (1 + 2**-22)


def other_backward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return Gate.forward(self, _Backward.apply(x))


def other_weight_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, _Backward.apply(self.weight), self.bias)


def other_between(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + _Backward.apply(self.dropout(self.attention(self.norm(x))))
    return x + self.down(self.gate(self.up(self.mlp_norm(x))))


def kernels(**layers: object) -> Callable[[], contextlib.AbstractContextManager[object]]:
    return lambda: use_kernel_mapping({name: {"cpu": layer} for name, layer in layers.items()})


Kernel = type("Kernel", (nn.Module,), {"forward": summed_in_order})


def fast_rotary(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = q.double().chunk(2, -1)
    return (q.double() * cos + torch.cat((-right, left), -1) * sin).float()


class Case(NamedTuple):
    """A drift of `b`, and what is to be found."""

    drift: Callable[[Any], object]
    path: str
    value: str = "output"
    cause: str = ""
    options: Any = None
    checks: Any = None


MIDDLE = "blocks.1"
DRIFTS: dict[str, Case] = {
    "kernel": Case(
        lambda model: None,
        "blocks.0.norm",
        options={"setting_b": kernels(ConsistentNorm=Kernel)},
        checks={"layer": "ConsistentNorm", "a": "reference", "b": "tests.plugins.test_consistency.Kernel"},
    ),
    "kernel of a function": Case(
        lambda model: None,
        "blocks.0.attention:rotary",
        options={"setting_b": kernels(consistent_rotary=fast_rotary)},
        checks={"layer": "rotary", "a": "reference"},
    ),
    "kernels on one side": Case(
        lambda model: None,
        "blocks.0.norm",
        options={"setting_a": references, "setting_b": kernels(ConsistentNorm=Kernel)},
    ),
    "dtype cast inside": Case(patched(f"{MIDDLE}.up", in_bfloat16), f"{MIDDLE}.up"),
    "dtype of the output": Case(
        patched("head", lambda self, x: nn.Linear.forward(self, x).double()),
        "head",
        cause="torch.float32 in a and torch.float64 in b",
        checks={"ulps": None},
    ),
    "autocast": Case(
        lambda model: None,
        "blocks.0.attention.q",
        options={"setting_b": lambda: torch.autocast("cpu", torch.bfloat16)},
    ),
    "eps": Case(attribute(f"{MIDDLE}.norm", "eps", 1e-5), f"{MIDDLE}.norm", cause="eps is 1e-06 in a and 1e-05 in b"),
    "reduction order": Case(patched(f"{MIDDLE}.mlp_norm", summed_in_order), f"{MIDDLE}.mlp_norm"),
    "dropout seed": Case(patched(f"{MIDDLE}.dropout", own_seed), f"{MIDDLE}.dropout"),
    "dropout probability": Case(attribute(f"{MIDDLE}.dropout", "p", 0.3), f"{MIDDLE}.dropout", cause="p is 0.25 in a"),
    "dropout off": Case(lambda model: model.blocks[1].dropout.eval(), f"{MIDDLE}.dropout", cause="training is True"),
    "fused multiply-add": Case(patched(f"{MIDDLE}.down", fused), f"{MIDDLE}.down"),
    "precision of matrix products": Case(patched(f"{MIDDLE}.up", ten_bits), f"{MIDDLE}.up"),
    "bit flip in a weight": Case(
        flipped(f"{MIDDLE}.attention.v"),
        f"{MIDDLE}.attention.v",
        value="parameter",
        cause="weight differs in 1 of 1,024 numbers",
    ),
    "bit flip in a bias": Case(
        flipped(f"{MIDDLE}.up", "bias"), f"{MIDDLE}.up", value="parameter", checks={"name": "bias", "elements": 1}
    ),
    "bit flip in an embedding": Case(
        flipped("embed"),
        "embed",
        value="parameter",
        cause="weight differs in 1 of",
    ),
    "weights of another dtype": Case(
        lambda model: model.head.double().register_forward_pre_hook(lambda module, args: (args[0].double(),)),
        "",
        value="input of 'head'",
        cause="torch.float32 in a and torch.float64 in b",
    ),
    "in place": Case(
        patched(f"{MIDDLE}.norm", writes_to_its_input),
        f"{MIDDLE}.norm",
        value="input after the call",
        cause="only b changes it",
    ),
    "order of the residual": Case(patched(MIDDLE, other_order), MIDDLE),
    "residual before a layer": Case(patched(MIDDLE, early), MIDDLE, value="input of 'blocks.1.mlp_norm'"),
    "base of rotary positions": Case(
        lambda model: setattr(model.blocks[1].attention, "frequencies", Attention(10_001.0).frequencies),
        f"{MIDDLE}.attention",
        value="parameter",
        cause="frequencies differs in",
        checks={"name": "frequencies"},
    ),
    "implementation of attention": Case(
        patched(f"{MIDDLE}.attention", sdpa, "attend"),
        f"{MIDDLE}.attention",
        value="input of 'blocks.1.attention.out'",
    ),
    "mask": Case(
        patched(f"{MIDDLE}.attention", unmasked, "attend"),
        f"{MIDDLE}.attention",
        value="input of 'blocks.1.attention.out'",
    ),
    "place of the scale": Case(
        patched(f"{MIDDLE}.attention", scaled_before, "attend"),
        f"{MIDDLE}.attention",
        value="input of 'blocks.1.attention.out'",
    ),
    "formula of an activation": Case(patched(f"{MIDDLE}.gate", tanh_gate), f"{MIDDLE}.gate"),
    "NaN": Case(patched(f"{MIDDLE}.gate", one_is_nan), f"{MIDDLE}.gate", checks={"ulps": math.inf, "elements": 1}),
    "batch size": Case(patched("norm", on_row_count), "norm", options={"batch_b": 1, "alike": True, "eval": True}),
    "one of several calls": Case(
        lambda model: (
            [setattr(block, "norm", model.norm) for block in model.blocks] and patched("norm", second_call)(model)
        ),
        "blocks.0.norm",
        options={"twice": True},
        checks={"call": 2},
    ),
    "backward of a layer": Case(
        patched(f"{MIDDLE}.gate", other_backward),
        f"{MIDDLE}.gate",
        value="gradient of the input",
        options={"gradients": True},
    ),
    "gradient of a weight": Case(
        patched(f"{MIDDLE}.up", other_weight_gradient),
        f"{MIDDLE}.up",
        value="gradient of 'weight'",
        options={"gradients": True},
    ),
    "backward between layers": Case(
        patched(MIDDLE, other_between),
        MIDDLE,
        value="gradient of the output of 'blocks.1.dropout'",
        options={"gradients": True},
    ),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_a_seeded_drift_is_found(name: str) -> None:
    """The first layer is named with its value, its cause, how many numbers differ, and that its inputs agree."""
    case, a = DRIFTS[name], Model()
    options = dict(case.options or {})
    if options.pop("twice", False):
        for block in a.blocks:
            block.norm = a.norm
    b = copy.deepcopy(a)
    case.drift(b)
    if options.pop("eval", False):
        b.eval()  # parts of a batch draw other random numbers
    a = b if options.pop("alike", False) else a
    before = torch.get_rng_state()
    report = consistency(a, b, ids(), **options)
    assert torch.equal(before, torch.get_rng_state())
    found = report.drift
    assert not report.ok and found is not None
    assert (found.path, found.value) == (case.path, case.value), str(report)
    assert found.inputs_agree and report.unsteady == () and report.runs == (2, 2)
    assert any(case.cause in cause for cause in found.causes) or not case.cause, found.causes
    if "only b" not in case.cause:
        assert found.elements and found.total and found.elements <= found.total
    for attribute_name, value in (case.checks or {}).items():
        assert getattr(found, attribute_name) == value
    assert json.loads(report.to_json())["drift"]["path"] == case.path
    assert str(report).startswith("the first layer whose bits differ is") and "<table" in report.page().to_html()


def test_equal_models_are_equal() -> None:
    """One model in two settings, a copy of it, and gradients: all bits are the same; each ran once."""
    a = Model()
    for b in (a, copy.deepcopy(a)):
        report = consistency(a, b, {"ids": ids()}, gradients=True)
        assert report.ok and report.outputs_agree and report.runs == (1, 1), str(report)
        assert report.random == tuple(f"blocks.{i}.dropout" for i in range(2))
        assert all(parameter.grad is None for parameter in b.parameters()) and b.training
    assert consistency(a, a, [ids()], batch_a=2, batch_b=2).ok
    with_nan = nn.Sequential(nn.Identity(), nn.ReLU())
    assert consistency(with_nan, with_nan, torch.tensor([[float("nan"), -0.0], [1.0, 2.0]]), batch_b=1).ok


def test_the_default_device_of_the_process_changes_nothing() -> None:
    """Weights of digests and gradients of outputs are drawn on the CPU, wherever new tensors go by default."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    with torch.device("meta"):
        report = consistency(model, copy.deepcopy(model), x, gradients=True)
    assert report.ok and report.outputs_agree, str(report)


def test_a_zero_has_a_sign() -> None:
    """Bits differ where numbers are equal: by no unit in the last place that a comparison of numbers finds."""
    a, b = nn.Sequential(PositiveZero()), nn.Sequential(PositiveZero())
    vars(b[0])["forward"] = functools.partial(negative_zero, b[0])
    found = consistency(a, b, torch.tensor([-1.0, 2.0])).drift
    assert found is not None and (found.path, found.elements, found.largest) == ("0", 1, 0.0)


def test_models_of_transformers() -> None:
    """Two implementations of attention: the input of the projection after it differs first, in the first layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    a = transformers.LlamaForCausalLM(config)
    a.set_attn_implementation("sdpa")
    b = copy.deepcopy(a)
    b.set_attn_implementation("eager")
    found = consistency(a, b, {"input_ids": ids(), "labels": ids()}, gradients=True).drift
    assert found is not None and found.path == "model.layers.0.self_attn" and found.inputs_agree
    assert found.value == "input of 'model.layers.0.self_attn.o_proj'"
    assert consistency(a, a, {"input_ids": ids(), "labels": ids()}, gradients=True).ok


def test_compiled_code_is_compared_layer_by_layer() -> None:
    """Compiled code that is right is equal, one that is not is found, and hooks leave nothing compiled behind."""
    model = Model().eval()
    assert consistency(model, torch.compile(model, backend="aot_eager"), ids()).ok

    def wrong(graph: Any, inputs: Any) -> Callable[..., Any]:
        has_silu = any("silu" in str(node.target) for node in graph.graph.nodes)
        return lambda *args: tuple(each + 1e-3 * has_silu for each in graph(*args))

    report = consistency(model, torch.compile(model, backend=wrong), ids())
    assert report.drift is not None and report.drift.path == "blocks.0.gate", str(report)


def test_only_compiled_as_a_whole() -> None:
    """A difference that only the whole graph has is reported, though each layer compiled by itself is right."""

    def wrong(graph: Any, inputs: Any) -> Callable[..., Any]:
        layers = sum("linear" in str(node.target) for node in graph.graph.nodes)
        return lambda *args: tuple(each + 1e-3 * (layers > 1) for each in graph(*args))

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    report = consistency(model, torch.compile(model, backend=wrong), torch.randn(2, 4))
    assert report.drift is not None and report.drift.path == "" and "as a whole" in report.notes[0]


def test_memory_is_bounded() -> None:
    """At most a few outputs live at any time, however many layers there are; of the first difference, one layer's."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = [0]

    class Step(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1.01
            alive.add(y)
            most[0] = max(most[0], len(alive))
            return y

    class Other(Step):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    a = nn.Sequential(*[Step() for _ in range(100)])
    b = nn.Sequential(*[Step() for _ in range(60)], Other(), *[Step() for _ in range(39)])
    report = consistency(a, b, lambda: torch.ones(4, 1000))
    assert report.drift is not None and report.drift.path == "60" and most[0] <= 4


def test_models_of_other_structure() -> None:
    """Layers that only one has are listed; without any in common, nothing is compared."""
    a = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    b = copy.deepcopy(a)
    b.add_module("extra", nn.Sequential(nn.Hardtanh(-1e-3, 1e-3)))
    report = consistency(a, b, torch.randn(2, 4))
    assert report.only_b == ("extra",) and report.only_a == ()
    assert report.drift is not None and (report.drift.path, report.drift.inputs_agree) == ("", True)
    with pytest.raises(ConsistencyError, match="no layer in common"):
        consistency(nn.Sequential(nn.Embedding(50, 2)), Model(), ids())


class Checkpointed(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functools.partial(Block.forward, self)
        return checkpoint(inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_a_checkpoint_is_no_difference() -> None:
    """Layers that are recomputed in backward have the random numbers of their first run, so gradients are the same."""
    a = Model()
    b = copy.deepcopy(a)
    for block in b.blocks:
        block.__class__ = Checkpointed
    report = consistency(a, b, ids(), gradients=True)
    assert report.ok, str(report)


def test_what_has_no_effect_is_a_remark() -> None:
    """An input that only one side writes to, after its last use; values that have no plain bits; empty tensors."""
    report = consistency(
        nn.Sequential(nn.Identity(), nn.ReLU()), nn.Sequential(nn.Identity(), nn.ReLU(True)), ids() - 25.0
    )
    assert report.ok and "in place on one side only, without effect: the input of 1" in report.notes[0]

    class Sparse(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to_sparse()

    report = consistency(Sparse(), Sparse(), torch.eye(3))
    assert report.ok and "no plain bits" in report.notes[0]
    assert consistency(nn.ReLU(), nn.ReLU(), torch.ones(0, 4), batch_a=1).ok


def test_random_numbers_of_python_and_numpy_begin_anew_in_each_layer() -> None:
    """A layer that draws one more changes nothing after it; both are restored."""

    class Drawing(nn.Module):
        def __init__(self, draws: int) -> None:
            super().__init__()
            self.draws = draws

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.draws):
                random.random(), numpy.random.rand()
            return x

    class Scaling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * random.random() + float(numpy.random.rand())

    random.seed(5), numpy.random.seed(5)
    before = host_random_states()
    report = consistency(nn.Sequential(Drawing(1), Scaling()), nn.Sequential(Drawing(2), Scaling()), torch.ones(2, 3))
    assert report.ok and not report.unsteady
    assert report.random == ("0", "1")
    assert pickle.dumps(host_random_states()) == pickle.dumps(before)


def test_a_first_use_of_numpy_is_no_drift() -> None:
    """NumPy imports its random numbers where they are first used: the run of the first side may be that."""
    code = """
        import torch, numpy
        from torch import nn
        from kernels_plugins import consistency
        class Noise(nn.Module):
            def forward(self, x):
                return x * float(numpy.random.rand())
        model = nn.Sequential(nn.Linear(8, 8), Noise())
        report = consistency(model, model, torch.randn(4, 8))
        print(report.ok, report.random)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.stdout.strip() == "True ('1',)", run.stdout + run.stderr


class Box:
    """An object that holds a tensor."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Boxing(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> Box:
        return Box(x * self.factor)


class Unboxing(nn.Module):
    def forward(self, box: Box) -> torch.Tensor:
        return box.x + 1


class Filling(nn.Module):
    """Changes the object that it is given, as attention does with a cache."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, box: Box) -> Box:
        box.x = box.x * self.factor
        return box


def test_objects_that_layers_return_are_compared() -> None:
    """The layer that makes one is named; one that is passed on is not compared, and the report says so."""
    models = [nn.Sequential(Boxing(factor), Unboxing()) for factor in (1.0, 1 + 2**-20)]
    found = consistency(*models, torch.ones(2, 3)).drift
    assert found is not None and (found.path, found.name, found.inputs_agree) == ("0", ".x", True)
    assert not found.unknown
    models = [nn.Sequential(Boxing(1.0), Filling(factor), Unboxing()) for factor in (1.0, 1 + 2**-20)]
    report = consistency(*models, torch.ones(2, 3))
    assert report.drift is not None and (report.drift.path, report.drift.unknown) == ("2", ("argument 1",))
    assert "as far as they are compared: not in argument 1" in str(report)


class Transposing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1) * 1.0


def test_rows_in_another_dimension_are_a_remark() -> None:
    """Layers that get the sequence first are not compared by row; a drift shows where rows are first again."""
    model, x = nn.Sequential(Transposing(), nn.LayerNorm(8), Transposing(), nn.Identity()), torch.randn(4, 3, 8)
    for rows in (1, 2, 3):
        report = consistency(model, model, x, batch_b=rows)
        assert report.ok and report.outputs_agree and report.layers == 2, rows
        assert report.notes == (
            "not compared, for the rows of the batch are not in the first dimension of a value: 0, 1, 2",
        )

    class RowsDecide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + 2**-20 * (x.shape[1] > 3))

    model[1] = RowsDecide()
    report = consistency(model, model, x, batch_b=1)
    assert report.drift is not None and report.drift.path == "2" and report.drift.unknown == ("argument 1",)
    report = consistency(model[:2], model[:2], x, batch_b=1)
    assert report.ok and not report.outputs_agree


def test_a_batch_without_rows_is_not_split() -> None:
    """It is compared as a whole."""
    model = nn.Sequential(nn.Linear(8, 8))
    assert consistency(model, model, torch.ones(0, 8), batch_b=1).layers == 2


def test_two_decision_files(tmp_path: Path) -> None:
    """Each side replays the decisions of its file; the process has its own again afterwards."""
    model = Model().eval()
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    receipt(model, device="cpu").freeze(before)
    with use_kernel_mapping({"ConsistentNorm": {"cpu": Kernel}}):
        receipt(model, device="cpu").freeze(after)
        found = consistency(model, model, ids(), setting_a=before, setting_b=str(after)).drift
        assert found is not None and found.path == "blocks.0.norm"
        assert (found.a, found.b) == ("reference", f"{__name__}.Kernel")
        assert receipt(model, device="cpu").rows[0].origin == f"{__name__}.Kernel"
    report = consistency(nn.ReLU(), nn.ReLU(), torch.ones(2), setting_b=before)
    assert report.notes == ("setting_b is a decision file without a decision for a layer of the model",)
    after.write_text("{}")
    with pytest.raises(ArgumentError, match=r"after\.json"):
        consistency(nn.ReLU(), nn.ReLU(), torch.ones(2), setting_b=after)


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = [torch.Generator().manual_seed(3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=self.generator[0])


_calls = itertools.count()


class Counting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + next(_calls)


def test_generators_of_a_model_start_from_the_seed_in_each_layer() -> None:
    """Its layer is named as one that draws random numbers, which are the same on both sides, and restored."""
    model = nn.Sequential(nn.Identity(), OwnGenerator(), nn.Linear(2, 2))
    before = model[1].generator[0].get_state()
    report = consistency(model, model, torch.ones(3, 2))
    assert report.ok and report.random == ("1",) and report.unsteady == ()
    assert torch.equal(model[1].generator[0].get_state(), before)
    other = copy.deepcopy(nn.Sequential(nn.Identity(), nn.Identity(), model[2]))
    other[1] = OwnGenerator()
    other[1].generator[0].manual_seed(99)
    assert consistency(model, other, torch.ones(3, 2), gradients=True).ok


def test_bad_inputs_of_models() -> None:
    """Layers that repeat nothing, inputs that change, models that raise or write to parameters, other shapes: named."""
    unsteady = nn.Sequential(nn.Identity(), Counting())
    report = consistency(unsteady, unsteady, torch.ones(2))
    assert report.unsteady == ("a", "b") and report.drift is not None and report.drift.path == "1"
    assert "not deterministic" in str(report)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    with pytest.raises(ConsistencyError, match=r"a raised in layer '1': RuntimeError: mat1") as raised:
        consistency(model, model, torch.ones(2, 4))
    assert (raised.value.side, raised.value.path) == ("a", "1")
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks

    fine = nn.Sequential(nn.Linear(4, 4))
    data = iter(torch.randn(9, 2, 4))
    with pytest.raises(ConsistencyError, match="differ before any layer runs"):
        consistency(fine, fine, lambda: next(data))

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.mul_(2)
            return x * self.weight

    with pytest.raises(ConsistencyError, match="changes its parameters"):
        consistency(Writes(), Writes(), torch.ones(1))

    narrow, wide = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 5))
    found = consistency(narrow, wide, torch.ones(2, 4)).drift
    assert found is not None and "shape (4, 4) in a and (5, 4) in b" in found.causes and found.elements is None

    x = torch.ones(2, 4)
    assert consistency(nn.ReLU(inplace=True), nn.ReLU(inplace=True), x).ok and torch.equal(x, torch.ones(2, 4))


BAD: dict[str, tuple[dict[str, Any], type[KernelsError], str]] = {
    "no module": ({"a": 3}, ArgumentTypeError, "a is 3"),
    "an iterator": ({"inputs": iter([torch.ones(1)])}, ArgumentTypeError, "may give other data"),
    "a setting that cannot be called": ({"setting_b": 3}, ArgumentTypeError, "setting_b"),
    "a decision file that is missing": ({"setting_a": "missing.json"}, ArgumentError, "setting_a is .missing.json"),
    "no rows": ({"batch_a": 0}, ArgumentError, "batch_a is 0"),
    "half a row": ({"batch_a": 0.5}, ArgumentTypeError, "batch_a"),
    "gradients of other batches": ({"batch_a": 1, "gradients": True}, ArgumentError, "sum over all rows"),
    "a model without numbers": ({"b": nn.Linear(1, 1, device="meta")}, ArgumentError, "meta"),
    "inputs without numbers": (
        {"inputs": torch.ones(2, 1, device="meta")},
        ArgumentError,
        "inputs.* on the meta device",
    ),
    "no gradients": ({"a": nn.Identity(), "b": nn.Identity(), "gradients": True}, ConsistencyError, "requires grad"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    """Each is refused with an error of ours that names it."""
    changes, error, message = BAD[name]
    usual = nn.Linear(1, 1)
    with pytest.raises(error, match=message):
        consistency(**{"a": usual, "b": usual, "inputs": torch.ones(2, 1), **changes})


def test_digests() -> None:
    """A bit that differs changes the digest, in any dtype and piece; rows and strides do not."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64):
        x = (torch.rand(3, 70_000) * 100).to(dtype)
        y = x.clone()
        y[1, 69_999] = ~y[1, 69_999] if dtype is torch.bool else y[1, 69_999] + 1
        same = digest(x, 3) == digest(y, 3)
        assert same.tolist() == [True, False, True]
        assert torch.equal(digest(x, 3), digest(x.t().contiguous().t(), 3))
    found = gap(torch.tensor([1.0, -1e-45]), torch.tensor([1.0, 1e-45]))
    assert found is not None and (found.elements, found.ulps) == (1, 2)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exits with 0 for the same bits, 1 for others, 2 for an error; prints a table or JSON, and writes a page."""
    (tmp_path / "some_models.py").write_text(
        "import torch\n"
        "make = lambda: torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.ReLU())\n"
        "other = lambda: torch.nn.Sequential(torch.nn.LayerNorm(4, eps=0.1), torch.nn.ReLU())\n"
        "inputs = lambda: torch.arange(8.0).view(2, 4)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def exit_code(*models: str, **more: Any) -> int:
        options = dict.fromkeys(("setting_a", "setting_b", "device"), "") | dict.fromkeys(
            ("batch_a", "batch_b", "html")
        )
        inputs = {"inputs": "some_models:inputs", "gradients": False, "seed": 0, "as_json": False}
        found: list[int] = []

        def command() -> None:
            with pytest.raises(typer.Exit) as raised:
                compare_models(*models, **{**options, **inputs, **more})
            found.append(raised.value.exit_code)

        try:
            run(command)
        except SystemExit as error:
            found.append(int(str(error.code)))
        return found[0]

    model = "some_models:make"
    assert exit_code(model, model, setting_a="kernels_core:references") == 0
    assert capsys.readouterr().out.startswith("all bits are the same in 3 layers")
    assert exit_code(model, "some_models:other", html=tmp_path / "page.html", as_json=True) == 1
    found = json.loads(capsys.readouterr().out)["drift"]
    assert (found["path"], found["causes"]) == ("0", ["eps is 1e-05 in a and 0.1 in b"])
    assert "Consistency" in (tmp_path / "page.html").read_text()
    assert exit_code(model, model, batch_b=0) == 2
    assert capsys.readouterr().err.startswith("error: batch_b is 0")


class Returns(nn.Module):
    """Adds a number in its own code, after its only layer, and returns it in some form."""

    def __init__(self, number: float, form: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.number, self.form = nn.Identity(), number, form

    def forward(self, x: torch.Tensor) -> Any:
        return self.form(self.inner(x) + self.number)


@dataclasses.dataclass
class Result:
    logits: torch.Tensor


class Holder:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("form", [Result, Holder, lambda y: [Result(y)], lambda y: {"y": Holder(y)}])
def test_objects_that_a_model_returns_are_compared(form: Callable[[torch.Tensor], Any]) -> None:
    """Dataclasses and other objects in the output hold tensors that no later layer shows."""
    report = consistency(Returns(0.0, form), Returns(1.0, form), torch.randn(3))
    assert report.drift is not None and report.drift.path == "" and not report.outputs_agree
    assert consistency(Returns(1.0, form), Returns(1.0, form), torch.randn(3)).ok


def test_outputs_of_other_forms_are_no_agreement() -> None:
    """Outputs with no value in common differ, one that only one side has is noted, and so is a lazy one."""
    for form, other in (
        (lambda y: {"a": y}, lambda y: {"b": y}),
        (lambda y: (y,), lambda y: y),
        (lambda y: None, Result),
    ):
        report = consistency(Returns(0.0, form), Returns(0.0, other), torch.randn(3))
        assert report.drift is not None and report.drift.causes[0].startswith("it returns "), report
    report = consistency(Returns(0.0, lambda y: (y, y)), Returns(0.0, lambda y: (y,)), torch.randn(3))
    assert report.ok and report.notes == ("returned by one side only, which are not compared: [1]",)
    report = consistency(Returns(0.0, iter), Returns(1.0, iter), torch.randn(3))
    assert report.notes == ("with values that have no plain bits, which are compared by type: (the model)",)
