"""Parents: one function computes several parts of an adopted module, which stay where they are."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelsWarning,
    Mode,
    PluginManager,
    count_calls,
    kernelize,
    unkernelize,
)
from kernels_plugins import Rule, adopt, use_kernel_mapping, verify
from kernels_plugins.adoption.shipped import RULES
from kernels_plugins.adoption.shipped_parents import PARENT_RULES

WIDTH = 8
X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, scale: float = 1.0, **more: object) -> tuple[Tensor, None]:
        return self.proj(hidden_states) * scale, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), nn.Linear(WIDTH, WIDTH)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(WIDTH, eps=1e-3) for _ in range(2))

    def forward(self, hidden_states: Tensor, scale: float = 1.0, *, flag: object = None) -> Any:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, scale=scale, flag=flag)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ScalingBlock(Block):
    """It multiplies the residual."""

    def forward(self, hidden_states: Tensor) -> Any:  # type: ignore[override]
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states))[0]
        hidden_states = 2 * hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ForgettingBlock(Block):
    """It does not pass an argument on."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0, *, flag: object = None) -> Any:
        return super().forward(hidden_states, scale)


class LargerBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(WIDTH, WIDTH)


class PackedBlock(Block):
    def forward(self, *args: Any) -> Any:  # type: ignore[override]
        return super().forward(*args)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    made = Block()
    with torch.no_grad():
        made.post_attention_layernorm.weight.normal_()
    return made


@pytest.fixture
def calls() -> list[torch.dtype]:
    return []


@pytest.fixture
def fused(calls: list[torch.dtype]) -> Iterator[None]:
    """Map a kernel, which counts its calls."""

    def add_and_normalise(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, norm: nn.Module) -> Any:
        calls.append(x.dtype)
        summed = residual + x
        return functional.rms_norm(summed, weight.shape, weight, epsilon), summed

    with use_kernel_mapping({"add_rms_norm": {"cpu": add_and_normalise}}):
        yield


def gradients(module: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    return list(torch.autograd.grad(module(x).pow(2).sum(), [x, *module.parameters()]))


# --- Blocks ----------------------------------------------------------------------------------------


def test_a_block_calls_one_function(fused: None, calls: list[torch.dtype], block: Block) -> None:
    """A kernel serves the sum and the norm of a block, with the same outputs and gradients, and no other names."""
    wanted, slopes, names = block(X, 0.5), gradients(block), [*block.state_dict()]
    adopted = adopt(block)
    assert [(each.path, each.layer_name) for each in adopted.layers if each.path.startswith(":")] == [
        (":add_rms_norm", "add_rms_norm")
    ]
    torch.testing.assert_close(block(X, 0.5), wanted)
    torch.testing.assert_close(block(hidden_states=X, scale=0.5, flag=1), wanted)
    assert len(calls) == 2
    torch.testing.assert_close(gradients(block), slopes)
    assert [*block.state_dict()] == names
    rows = {row.path: row for row in adopted.receipt().rows}
    assert "add_and_normalise" in rows[":add_rms_norm"].origin
    assert rows[":add_rms_norm"].bypasses == ("post_attention_layernorm",)
    assert rows["post_attention_layernorm"].is_bypassed and not rows["input_layernorm"].is_bypassed
    adopted.undo()
    assert type(block) is Block
    before = len(calls)
    block(X)
    assert len(calls) == before


@pytest.mark.parametrize(
    ("arguments", "given"), [((), {}), ((X, 1.0, 2), {}), ((X,), {"hidden_states": X}), ((X,), {"other": 1})]
)
def test_wrong_arguments_raise_as_before(block: Block, arguments: Any, given: Any) -> None:
    """Python binds the arguments of the forward that is written as those of the class's own."""
    with pytest.raises(TypeError) as wanted:
        block(*arguments, **given)
    adopt(block)
    with pytest.raises(TypeError) as found:
        block(*arguments, **given)
    assert str(found.value).partition(")")[2] == str(wanted.value).partition(")")[2]


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.register_forward_hook(lambda module, args, output: output * 2),
        lambda norm: norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda norm: setattr(norm, "forward", lambda x: x * 2),
    ],
    ids=["hook", "hook before", "forward"],
)
def test_a_changed_part_is_called(
    fused: None, calls: list[torch.dtype], block: Block, change: Callable[[Any], Any]
) -> None:
    """A hook or a forward that is put on the norm of an adopted block runs; the kernel does not."""
    plain = copy.deepcopy(block)
    change(plain.post_attention_layernorm)
    adopted = adopt(block)
    change(block.post_attention_layernorm)
    torch.testing.assert_close(block(X), plain(X))
    rows = {row.path: row for row in adopted.receipt().rows}
    assert not calls and rows[":add_rms_norm"].note.startswith("not called")
    assert not rows["post_attention_layernorm"].is_bypassed


def test_a_replaced_part_is_called(fused: None, calls: list[torch.dtype], block: Block) -> None:
    """A norm of another class in place of the adopted one is called, as an adapter around it would be."""
    adopt(block)
    block.post_attention_layernorm = nn.Identity()  # type: ignore[assignment]
    plain = Block()
    plain.load_state_dict(block.state_dict(), strict=False)
    plain.post_attention_layernorm = nn.Identity()  # type: ignore[assignment]
    torch.testing.assert_close(block(X), plain(X))
    assert not calls


def test_hooks_on_other_parts_run(fused: None, calls: list[torch.dtype], block: Block) -> None:
    """Attention, MLP and the first norm are called as modules, with a kernel and without."""
    ran: list[str] = []
    for name in ("self_attn", "mlp", "input_layernorm"):
        getattr(block, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    adopt(block)
    block(X)
    assert sorted(ran) == ["input_layernorm", "mlp", "self_attn"] and calls


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ScalingBlock, "it computes something else: it differs by "),
        (ForgettingBlock, "it calls its parts with other arguments"),
        (LargerBlock, "it has other parts, too: adapter"),
        (PackedBlock, "its forward takes arguments in another way than the layer"),
    ],
)
def test_another_block_is_refused(cls: type[Block], reason: str) -> None:
    """A block that computes something else, or keeps arguments from its attention, stays as it was, with a reason."""
    block = cls()
    adopted = adopt(block)
    assert type(block) is cls
    (refused,) = adopted.refused
    assert reason in refused.reason and refused.path == ""
    assert {layer.layer_name for layer in adopted.layers} == {"RMSNorm"}


def test_a_hooked_norm_is_a_reason(block: Block) -> None:
    """A block whose norm has a hook already is refused, for no kernel would ever serve it."""
    block.post_attention_layernorm.register_forward_hook(lambda *_: None)
    assert not [each for each in adopt(block).layers if each.path.startswith(":")]


def test_blocks_of_one_kind_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred blocks, each with its number in its attention, take one measurement, and share a class."""
    from kernels_plugins.adoption import adopted

    measured: list[object] = []
    monkeypatch.setattr(adopted, "misfit_of_parent", lambda module, rule, adopted: measured.append(module))
    model = nn.ModuleList([Block() for _ in range(5)])
    for number, each in enumerate(model):
        each.self_attn.number = number  # type: ignore[union-attr]
    adopt(model)
    assert len(measured) == 1 and len({type(each) for each in model}) == 1


def test_measuring_reads_no_weight_of_what_is_only_called(block: Block) -> None:
    """A block of a model on the meta device is adopted: attention and MLP are neither copied nor run."""
    block.to("meta")
    assert "add_rms_norm" in {layer.layer_name for layer in adopt(block).layers}


def test_copies_pickles_and_kernelize(fused: None, calls: list[torch.dtype], block: Block) -> None:
    """A copy is adopted, a pickle is not, and kernelize freezes the function of a block."""
    wanted = block(X)
    adopted = adopt(block)
    for each in (copy.deepcopy(block), copy.copy(block)):
        calls.clear()
        torch.testing.assert_close(each(X), wanted)
        assert calls
    assert type(pickle.loads(pickle.dumps(block))) is Block
    kernelize(block, mode=Mode.INFERENCE, device="cpu")
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(block(X), wanted)
    assert calls and all(row.frozen for row in adopted.receipt().rows)
    unkernelize(block)
    adopted.undo()
    assert type(block) is Block and type(block.post_attention_layernorm) is nn.RMSNorm


def test_compiled_and_without_a_kernel(block: Block) -> None:
    """A block without a kernel for its function calls its norm, eager and as one graph."""
    wanted = block(X)
    adopt(block)
    torch.testing.assert_close(block(X), wanted)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(X), wanted)


def test_a_kernel_that_loses_the_gradient_of_the_norm(block: Block) -> None:
    """The weight of the norm is an argument of the function: a kernel that detaches it is refused."""
    slopes = gradients(block)
    adopt(block)

    def detaching(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, norm: nn.Module) -> Any:
        summed = residual + x
        return functional.rms_norm(summed, weight.shape, weight.detach(), epsilon), summed

    with use_kernel_mapping({"add_rms_norm": {"cpu": detaching}}), pytest.warns(UserWarning, match="loses gradients"):
        torch.testing.assert_close(gradients(block), slopes)


def test_a_kernel_that_raises_in_training(block: Block) -> None:
    """The reference answers, although an optimizer has changed the weight, and the function gets the norm itself."""

    def raising(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, norm: nn.Module) -> Any:
        raise RuntimeError("out of registers")

    with torch.no_grad():
        block.post_attention_layernorm.weight.add_(1)
    slopes = gradients(block)
    adopt(block)
    with use_kernel_mapping({"add_rms_norm": {"cpu": raising}}), pytest.warns(KernelsWarning, match="out of registers"):
        torch.testing.assert_close(gradients(block), slopes)


# --- Rules of one's own ----------------------------------------------------------------------------


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.relu(gate) * up


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Any:
        return functional.relu(self.gate(x)) * self.up(x)


def rule(**more: Any) -> Rule:
    given: dict[str, Any] = {
        "oracle": lambda self, function, own, x: function(self.gate(x), self.up(x)),
        "inputs": lambda module: (torch.randn(2, WIDTH, dtype=torch.float64), {}),
        "parts": {"gate": nn.Linear, "up": nn.Linear},
        "fuses": gated,
    }
    return Rule("gated", "gated", ("*.Gated",), **{**given, **more})


def test_a_rule_of_a_user() -> None:
    """A user's rule names a parent, its parts and a function, for which kernels are mapped."""
    module = Gated()
    wanted = module(X)
    with adopt(module, rules=[rule()]) as adopted, use_kernel_mapping({"gated": {"cpu": lambda gate, up: gate * up}}):
        assert [layer.path for layer in adopted.layers] == [":gated"]
        torch.testing.assert_close(module(X), module.gate(X) * module.up(X))
    torch.testing.assert_close(module(X), wanted)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return functional.relu(self.gate(x)) * self.up(x)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"gaet": nn.LayerNorm, "up": nn.Linear}, "not those that the rule names: gaet, up"),
        ({"gate": "RMSNorm", "up": nn.Linear}, "not those that the rule names: gate, up"),
        ({"gate": nn.LayerNorm, "up": nn.Linear}, r"adopted, so a rule names it as 'LayerNorm'\), up is torch"),
        ({"gate": nn.RMSNorm, "up": nn.Linear}, "a part, or a parameter of it, is of another class"),
        ({"gate": "LayerNorm", "up": nn.Linear}, ""),
    ],
)
def test_other_parts_are_a_reason(parts: dict[str, Any], reason: str) -> None:
    """A user's rule whose parts are not there, or that names one otherwise than it is adopted, is refused with that."""
    user = dataclasses.replace(rule(parts=parts), classes=("*.Normed",))
    refused = [each.reason for each in adopt(Normed(), rules=[user, *RULES]).refused]
    assert len(refused) == bool(reason) and (not reason or re.search(reason, refused[0]))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.RMSNorm(WIDTH, eps=1e-3), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.norm(x) * self.scale


class ScaledKernel(nn.Module):
    reads = {"norm": nn.RMSNorm}  # noqa: RUF012

    def forward(self: Any, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (WIDTH,), self.norm.weight * self.scale, self.norm.eps)


def test_a_kernel_reads_past_a_part_that_is_adopted() -> None:
    """A part that is adopted itself is still of its class for a kernel of its parent, and marked as not called."""
    scaled = Rule(
        "scaled",
        "Scaled",
        ("*.Scaled",),
        oracle=lambda self, x: self.norm(x) * self.scale,
        inputs=lambda module: (torch.randn(3, WIDTH, dtype=torch.float64),),
        parts={"norm": nn.RMSNorm},
    )
    module = Scaled()
    wanted = module(X)
    with adopt(module, rules=[scaled, *RULES]) as adopted, use_kernel_mapping({"Scaled": {"cpu": ScaledKernel}}):
        assert {layer.layer_name for layer in adopted.layers} == {"Scaled", "RMSNorm"}
        with count_calls():
            torch.testing.assert_close(module(X), wanted)
        parent, part = adopted.receipt().rows
        assert parent.bypasses == ("norm",) and dict(parent.calls or {}) == {parent.origin: 1}
        assert part.is_bypassed and not part.calls


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"fuses": 1}, ArgumentTypeError, "fuses of a Rule is a function"),
        ({"stubs": 1}, ArgumentTypeError, "stubs of a Rule is a function"),
        ({"function": "gated", "parts": {}}, ArgumentError, "fuses parts"),
        ({"binds": {"weight": "scale"}}, ArgumentError, "fuses parts"),
        ({"mode": "training"}, ArgumentTypeError, "mode of a Rule is"),
        ({"parts": {"gate": 1}}, ArgumentTypeError, "parts of a Rule maps paths to classes"),
        ({"fuses": None, "parts": {"gate": "Linear"}}, ArgumentTypeError, "parts of a Rule maps paths to classes"),
    ],
)
def test_wrong_rules(given: dict[str, Any], error: type[Exception], text: str) -> None:
    """A rule for a parent with arguments that do not fit raises, and names them."""
    with pytest.raises(error, match=text):
        rule(**given)


def test_shipped_rules_are_offered(isolated_plugins: PluginManager) -> None:
    """The plugin offers the rules for parents after those for their parts."""
    from kernels_plugins.adoption import plugin

    isolated_plugins.register(plugin, "adopt")
    assert plugin.kernels_adoption_rules() == (*RULES, *PARENT_RULES)


def test_verify_compares_the_function_of_a_block(fused: None, block: Block) -> None:
    """Inputs of the function are recorded although hooks that record are on the norm; a wrong kernel is found."""
    adopt(block)
    found = [row for row in verify(block, X, gradients=False).rows if row.layer == "add_rms_norm"]
    assert {row.verdict for row in found} <= {"ok", "skipped"} and len(found) > 5

    def wrong(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, norm: nn.Module) -> Any:
        return functional.rms_norm(x, weight.shape, weight, epsilon), residual + x

    with use_kernel_mapping({"add_rms_norm": {"cpu": wrong}}):
        rows = verify(block, X, gradients=False, dtypes=[torch.float32]).rows
        assert "wrong" in {row.verdict for row in rows if row.layer == "add_rms_norm"}
