"""Adoption of functions: a forward that calls one under its global name dispatches it, and no other caller does."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    Mode,
    count_calls,
    functions_of,
    kernelize,
    receipt,
    use_kernel_forward_from_hub,
)
from kernels_plugins import Rule, adopt, adopted_rule, use_kernel_mapping
from kernels_plugins.adoption import classes, functions

HEADS, WIDTH = 2, 8
Pair = tuple[Tensor, Tensor]


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """As models of transformers write it."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def apply_rotary_pos_emb_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    return apply_rotary_pos_emb(q.float(), k.float(), cos, sin, -2)


def renaming(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `deprecate_kwarg` of transformers."""
    old, names = "value", set(inspect.signature(function).parameters)

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if old in kwargs and old not in names:
            kwargs["x"] = kwargs.pop(old)
        return function(*args, **kwargs)

    return renamed


class Attention(nn.Module):
    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index, self.proj = index, nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.proj(x).view(*x.shape[:-1], HEADS, WIDTH).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, q[:, :1], cos, sin)
        return (q * k).transpose(1, 2).flatten(2)


class RenamedAttention(Attention):
    forward = renaming(renaming(Attention.forward))


class Model(nn.Module):
    def __init__(self, cls: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(cls(index) for index in range(2))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[None, :, None] / torch.arange(1.0, 5, device=x.device)
        cos, sin = (torch.cat((each, each), dim=-1) for each in (angles.cos(), angles.sin()))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def rotated_by_nothing(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    return q, k


rotated_by_nothing.can_torch_compile = True  # type: ignore[attr-defined]
UNROTATED = {"rotary_pos_emb": {"cpu": rotated_by_nothing}}
X = torch.randn(2, 3, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[Attention, RenamedAttention])
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    return Model(request.param).eval()


def test_a_function_is_adopted_for_its_callers(model: Model) -> None:
    """A function is listed with each caller, and served there; another model of the same class is not touched."""
    other, wanted = copy.deepcopy(model), model(X)
    adopted = adopt(model)
    assert [(layer.path, layer.layer_name) for layer in adopted.layers] == [
        (f"layers.{index}:apply_rotary_pos_emb", "rotary_pos_emb") for index in range(2)
    ]
    assert not adopted.refused and adopted.layers[0].cls == f"{__name__}.apply_rotary_pos_emb"
    assert type(model.layers[0]) is type(model.layers[1]) and type(other.layers[0]) in (Attention, RenamedAttention)
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=0)
    with use_kernel_mapping(UNROTATED), count_calls(), torch.no_grad():
        torch.testing.assert_close(other(X), wanted)
        assert not torch.allclose(model(X), wanted)
        rows = receipt(model).rows
    assert [row.path for row in rows] == [layer.path for layer in adopted.layers]
    assert not any(row.is_reference for row in rows) and [row.calls for row in rows] == [{rows[0].origin: 2}] * 2
    (layer,) = functions_of(model.layers[0])
    rule = adopted_rule(layer)
    assert rule is not None and rule.name == "rotary"


def names() -> set[str]:
    """Return the names that adoption has put into the globals of this file, but for those of classes that are gone."""
    gc.collect()
    return {name for name in globals() if "__adopted_" in name}


def drop_classes() -> None:
    """Let go of the classes that are kept for models that are adopted again."""
    for cached in (classes._make_class, classes.dispatching, functions.calling):
        cached.cache_clear()


def test_undo_is_exact(model: Model) -> None:
    """Classes are given back, a copy goes on, and the same class serves again."""
    before = type(model.layers[0])
    adopted = adopt(model)
    clone, cls, known = copy.deepcopy(model), type(model.layers[0]), names()
    assert type(pickle.loads(pickle.dumps(model)).layers[0]) is before
    adopted.undo()
    assert type(model.layers[0]) is before and apply_rotary_pos_emb.__name__ == "apply_rotary_pos_emb"
    torch.testing.assert_close(clone(X), model(X))
    with use_kernel_mapping(UNROTATED):
        assert not torch.allclose(clone(X), model(X))
    with adopt(model):
        assert type(model.layers[0]) is cls and names() == known


def test_names_are_dropped_with_the_last_that_can_call_them(model: Model) -> None:
    """A class that is kept for no model any more takes its name in the globals with it, unless its forward is held."""
    drop_classes()
    known = names()
    adopted = adopt(model)
    bare: Any = type(model.layers[0]).forward
    adopted.undo()
    del adopted
    drop_classes()
    assert bare(model.layers[0], X, torch.ones(1, 3, WIDTH), torch.zeros(1, 3, WIDTH)).shape == X.shape
    assert len(names() - known) == 1
    del bare
    assert names() == known


def test_compiled_exported_checkpointed_kernelized(model: Model) -> None:
    """Each gives the numbers of the untouched model, and those of the kernel where one is mapped."""
    plain = copy.deepcopy(model)
    adopt(model)
    torch._dynamo.reset()
    with use_kernel_mapping(UNROTATED), torch.no_grad():
        unrotated = model(X)
        assert not torch.allclose(unrotated, plain(X))
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), unrotated)
        torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), unrotated)
        frozen = kernelize(copy.deepcopy(model), mode=Mode.INFERENCE)
    with torch.no_grad():
        torch.testing.assert_close(frozen(X), unrotated)
        assert all(row.frozen for row in receipt(frozen).rows)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), plain(X))
    for each in (plain, model):
        checkpoint(each, X, use_reentrant=False).sum().backward()
    assert model.layers[0].proj.weight.grad is not None
    torch.testing.assert_close(model.layers[0].proj.weight.grad, plain.layers[0].proj.weight.grad)


def test_undo_of_a_kernelized_model(model: Model) -> None:
    """A model that was kernelized since is given back as it was."""
    before = type(model.layers[0])
    adopted = adopt(model)
    kernelize(model, mode=Mode.INFERENCE)
    adopted.undo()
    assert type(model.layers[0]) is before and "forward" not in vars(model.layers[0])


def test_other_globals_stay_live(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A global that changes later, but for the function itself, changes the adopted model, too."""
    wanted = Model.forward(model, X)
    adopt(model)
    monkeypatch.setattr(f"{__name__}.HEADS", 1)
    with pytest.raises(RuntimeError, match="invalid for input"):
        model(X)
    monkeypatch.undo()
    torch.testing.assert_close(model(X), wanted)


def test_a_copy_of_a_forward_is_exact() -> None:
    """Name, signature, defaults, annotations, attributes and `super()` are those of the original forward."""

    class Deeper(Attention):
        @renaming
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, scale: float = 2.0) -> Tensor:
            """Scale the query."""
            q = scale * self.proj(x).view(*x.shape[:-1], HEADS, WIDTH).transpose(1, 2)
            (rotated,) = [apply_rotary_pos_emb(each, each, cos, sin)[0] for each in (q,)]
            return super().forward(x, cos, sin) + rotated.transpose(1, 2).flatten(2)

    Deeper.forward.mark = 1  # type: ignore[attr-defined]
    model = Model(Deeper)
    wanted = model(X)
    with adopt(model) as adopted:
        assert len(adopted.layers) == 2
        forward: Any = type(model.layers[0]).forward
        assert forward is not Deeper.forward and forward.__wrapped__ is not Deeper.forward.__wrapped__
        for each in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__defaults__", "mark"):
            assert getattr(forward, each) == getattr(Deeper.forward, each)
        assert inspect.signature(forward) == inspect.signature(Deeper.forward)
        assert forward.__wrapped__.__kwdefaults__ == {"scale": 2.0}
        torch.testing.assert_close(model(X), wanted)


# --- Which functions -------------------------------------------------------------------------------

STANDARD = apply_rotary_pos_emb


def partial_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    cos, sin, n = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), cos.shape[-1]
    q, k = (torch.cat((x[..., :n] * cos + rotate_half(x[..., :n]) * sin, x[..., n:]), dim=-1) for x in (q, k))
    return q, k


def half_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    halves = [x.chunk(2, dim=-1) for x in (q, k)]
    q, k = (torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1) for one, two in halves)
    return q, k


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    def rotated(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotated(q) * sin, k * cos + rotated(k) * sin


def heads_first_only(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    return STANDARD(q, k, cos, sin)


def with_positions(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Any = None, unsqueeze_dim: int = 1) -> Pair:
    return STANDARD(q, k, cos, sin, unsqueeze_dim)


class Rotary(nn.Module):
    forward = staticmethod(apply_rotary_pos_emb)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (partial_rotary, "rotary_pos_emb_partial"),
        (half_rotary, "rotary_pos_emb_half"),
        (interleaved, "it computes something else: it differs by "),
        (
            heads_first_only,
            "it cannot be measured: for float64 tensors of (3, 5, 4, 8), (3, 5, 2, 8), (3, 5, 8), (3, 5,",
        ),
        (with_positions, "it takes 6 arguments, and the layer takes 5"),
        (Rotary(), "it is a Rotary, not a function"),
        (use_kernel_forward_from_hub("theirs")(apply_rotary_pos_emb), "it is decorated, as layer 'theirs'"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "object"),
)
def test_functions_are_known_by_what_they_compute(function: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of one name are told apart by measuring them; the others stay, each with its reason."""
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", function)
    adopted = adopt(nn.ModuleList([Attention()]))
    if adopted.layers:
        assert [layer.layer_name for layer in adopted.layers] == [found]
    else:
        assert {each.path for each in adopted.refused} == {"0:apply_rotary_pos_emb"}
        assert adopted.refused[-1].reason.startswith(found)


def test_several_functions_of_one_class() -> None:
    """Each of them is adopted, beside the layer that the class itself is."""

    class Both(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k = apply_rotary_pos_emb(x, x, x[:, 0], x[:, 0])
            return q + apply_rotary_pos_emb_vision(k, k, x[:, 0], x[:, 0])[0]

    module = Both()
    x = torch.randn(2, 4, 4, 8, dtype=torch.float64)
    wanted = module(x)
    rules = [
        Rule("own", "Own", ("*.Both",), lambda self, x: Both.forward(self, x), lambda module: (x,)),
        *(
            Rule(
                name,
                name,
                ("*",),
                globals()[name],
                lambda function, n=n: (x, x, x[:, 0], x[:, 0], 1)[: 4 + n],
                function=name,
            )
            for name, n in (("apply_rotary_pos_emb", 1), ("apply_rotary_pos_emb_vision", 0))
        ),
    ]
    names = ["apply_rotary_pos_emb", "apply_rotary_pos_emb_vision", "Own"]
    with adopt(nn.ModuleList([module]), rules=rules) as adopted:
        assert [layer.layer_name for layer in adopted.layers] == names, adopted.refused
        assert {row.layer_name for row in receipt(module, device="cpu").rows} == set(names)
        torch.testing.assert_close(module(x), wanted)
    assert type(module) is Both


# --- Forwards that cannot be copied ----------------------------------------------------------------


class Wrapper:
    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)

    def __get__(self, module: Any, cls: Any = None) -> Any:
        return self if module is None else functools.partial(self.__wrapped__, module)  # type: ignore[attr-defined]

    def __call__(self, *args: Any) -> Any:
        return self.__wrapped__(*args)  # type: ignore[attr-defined]


def kept_twice(function: Any) -> Any:
    calls = {"of": [function]}

    @functools.wraps(function)
    def counted(*args: Any) -> Any:
        assert calls
        return function(*args)

    return counted


def kept_in_a_list(function: Any) -> Any:
    functions = [function]

    @functools.wraps(function)
    def first(*args: Any) -> Any:
        return functions[0](*args)

    return first


def of_two_names(self: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    del self.apply_rotary_pos_emb  # type: ignore[attr-defined]
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


def by_attribute(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return self.apply_rotary_pos_emb(x, cos, sin)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (Wrapper(Attention.forward), "its forward is wrapped by a Wrapper, which cannot be copied"),
        (kept_twice(Attention.forward), "its forward is wrapped by a decorator that keeps it in several places"),
        (kept_in_a_list(Attention.forward), "its forward is wrapped by a decorator that does not keep it in one "),
        (of_two_names, "its forward uses the name apply_rotary_pos_emb for something else, too"),
        (by_attribute, None),
    ],
)
def test_forwards_that_cannot_be_copied(forward: Any, reason: str | None) -> None:
    """A class stays as it was where a copy might not be exact, with the reason; one that calls a method is none."""
    cls, known = type("OddAttention", (Attention,), {"forward": forward}), names()
    module = cls()
    adopted = adopt(nn.ModuleList([module]))
    assert type(module) is cls and names() == known and not adopted.layers
    assert [each.reason[: len(reason or "")] for each in adopted.refused] == [reason] * (reason is not None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"function": 3}, ArgumentTypeError, "function of a Rule"),
        ({"function": "f", "binds": {"weight": "w"}}, ArgumentError, "is for a function, which has no binds"),
        ({"function": "f", "parts": {"up": nn.Linear}}, ArgumentError, "is for a function, which has no parts"),
    ],
)
def test_wrong_rules(options: Any, error: type[Exception], message: str) -> None:
    """A rule for a function has nothing of a module."""
    with pytest.raises(error, match=message):
        Rule("r", "L", ("*",), lambda x: x, lambda function: (), **options)
