"""Findings about numbers, and the calls that they come from: odd first calls decide nothing about later ones."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from fresh_process import run_python
from norms import ByRows, Norm, Steady, by_rows, norm
from torch import nn

from kernels_core import (
    Mode,
    NoKernelError,
    PluginManager,
    RequirementError,
    forget,
    receipt,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.replay import Call
from kernels_plugins import check_kernel, numerics, use_kernel_mapping
from kernels_plugins.numerics import judging, store, wanted
from kernels_plugins.numerics.numbers import with_own_numbers
from kernels_plugins.numerics.properties import find
from kernels_plugins.numerics.rows import EMPTY

pytestmark = [
    pytest.mark.usefixtures("numerics_plugin"),
    pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning"),
]
X = torch.randn(8, 64)


def origin(layer: object = Norm) -> str:
    return resolve(layer, device="cpu", mode=Mode.INFERENCE).origin.rpartition(".")[2]


# --- Numbers that show nothing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first", [torch.zeros(8, 64), torch.full((8, 64), torch.nan), torch.full((8, 64), -torch.inf), torch.ones(5000, 64)]
)
def test_a_warm_up_shows_as_much_as_any_other_call(first: torch.Tensor) -> None:
    """Rows of zeros, NaN, infinities or ones get numbers of their own: the kernel is refused, and on disk, too."""
    with use_kernel_mapping({"NumericsNorm": {"cpu": ByRows}}), numerics("batch_invariant"), torch.no_grad():
        Norm()(first)
        assert origin() == "reference"
        store._found.clear()
        assert "rows have other bits" in str(resolve(Norm, device="cpu", mode=Mode.INFERENCE).refusals)
    with pytest.raises(AssertionError, match=r"batch_invariant: .* rows have other bits"):
        check_kernel(ByRows, Norm(), first, ignore={"compile", "forward", "gradients"})


def test_some_rows_that_show_nothing_get_numbers_of_their_own() -> None:
    """Rows of padding, and single NaN, hold random numbers of the magnitude of the rest; other numbers stay."""
    nan = torch.nan
    given = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [nan, 3.0, 5.0], [7.0, 7.0, 7.0]])
    made = with_own_numbers(given, 0)
    assert torch.equal(made[0], given[0]) and torch.equal(made[2, 1:], given[2, 1:]) and made.isfinite().all()
    assert made[1].ne(0).all() and made[3].unique().numel() == 3
    assert with_own_numbers(torch.zeros(3, 1), 0).unique().numel() == 3
    variances = torch.tensor([[4.0, 100.0], [0.0, 0.0]])
    assert (with_own_numbers(variances, 0)[1] >= 0.5).all()  # a root of them is taken, perhaps
    padded = torch.cat([torch.zeros(300, 64), torch.randn(1, 64)])
    found = find(Call(None, (padded, torch.rand(64))), by_rows, norm, ["batch_invariant"])["batch_invariant"]
    assert found.has is False and "65x64" in found.why


def test_a_mask_is_neither_constant_nor_out_of_range() -> None:
    """Zeros and the lowest number stay, and rows of zeros beside them get numbers that are finite."""
    for dtype in (torch.float64, torch.float32, torch.float16):
        mask = torch.full((4, 4), torch.finfo(dtype).min, dtype=dtype).triu(1)
        made = with_own_numbers(mask, 0)
        assert with_own_numbers(mask) is mask and torch.equal(made[0], mask[0])
        assert made.isfinite().all() and made[3].unique().numel() == 4
    large = torch.tensor([[torch.nan] * 8, [1e100] * 8], dtype=torch.float64)
    assert with_own_numbers(large).isfinite().all()


def test_numbers_beside_a_row_are_those_of_each_input() -> None:
    """The largest float64 has no place in an input of float32: that is no error of the layer."""

    def scaled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y.double()

    call = Call(None, (torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8)))
    assert find(call, scaled, scaled, ["batch_invariant"])["batch_invariant"].has


@pytest.mark.parametrize("draw", [random.random, lambda: float(numpy.random.rand())])
def test_random_numbers_of_the_host_are_noticed_and_restored(draw: Callable[[], float]) -> None:
    """As those of PyTorch: judging takes none of the user's numbers, and equal calls start with the same."""

    def drawing(x: torch.Tensor) -> torch.Tensor:
        return x * draw()

    before = random.getstate(), numpy.random.get_state()[2]
    found = find(Call(None, (X,)), drawing, drawing, ["batch_invariant", "deterministic"])
    assert (random.getstate(), numpy.random.get_state()[2]) == before
    assert found["deterministic"].has and "draws random numbers" in found["batch_invariant"].why


def test_an_empty_input_with_a_weight_says_nothing_of_other_calls() -> None:
    """The weight of a function has two dimensions, too, and is not taken for rows."""
    found = find(Call(None, (torch.ones(0, 64), torch.ones(64, 64))), torch.mm, torch.mm, ["batch_invariant"])
    assert found["batch_invariant"].why == EMPTY


def test_flags_and_dtypes_are_part_of_the_kind_of_a_call() -> None:
    """A kernel that is innocent in one mode, which an argument chooses, is judged in the other one, too."""

    @use_kernel_forward_from_hub("NumericsFlag")
    def flagged(x: torch.Tensor, weight: torch.Tensor, fast: bool = False) -> torch.Tensor:
        return norm(x, weight)

    def kernel(x: torch.Tensor, weight: torch.Tensor, fast: bool = False) -> torch.Tensor:
        return by_rows(x, weight) if fast else norm(x, weight)

    with use_kernel_mapping({"NumericsFlag": {"cpu": kernel}}), numerics("batch_invariant"):
        flagged(X, torch.rand(64))
        assert origin(flagged) == "kernel"
        flagged(X, torch.rand(64), fast=True)
        assert origin(flagged) == "reference"
    kinds = [store.kind_of(Call(Norm().to(dtype), (X,)), ByRows.forward) for dtype in (torch.float32, torch.float64)]
    assert kinds[0] != kinds[1]


def test_a_dimension_among_the_arguments_is_part_of_the_kind_of_a_call() -> None:
    """Along another dimension, another kernel may run: it is judged there, and large numbers start nothing anew."""

    @use_kernel_forward_from_hub("NumericsAlong")
    def along(x: torch.Tensor, weight: torch.Tensor, step: int, dim: int = -1) -> torch.Tensor:
        return norm(x, weight)

    def kernel(x: torch.Tensor, weight: torch.Tensor, step: int, dim: int = -1) -> torch.Tensor:
        return by_rows(x, weight) if dim == 1 else norm(x, weight)

    with use_kernel_mapping({"NumericsAlong": {"cpu": kernel}}), numerics("batch_invariant"):
        along(X, torch.rand(64), 1000)
        assert origin(along) == "kernel"
        along(X, torch.rand(64), 1001, dim=1)
        assert origin(along) == "reference"
    kinds = {store.kind_of(Call(None, (X, step)), kernel) for step in (1000, 1001, 0.5, 2.5)}
    assert len(kinds) == 1
    swapped = {store.kind_of(Call(None, (X, *sizes)), kernel) for sizes in ((1, 1000), (1000, 1))}
    assert len(swapped) == 2


def test_a_module_with_the_id_of_one_that_is_gone_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of a class may differ in an attribute, and an id comes back once its module is collected."""
    monkeypatch.setattr(judging, "id", lambda _: 1, raising=False)

    @use_kernel_forward_from_hub("NumericsModule")
    class Layer(Norm):
        fast = False

    class Kernel(nn.Module):
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return by_rows(x, self.weight) if self.fast else norm(x, self.weight)

    slow, fast = Layer(), Layer()
    fast.fast = True
    with use_kernel_mapping({"NumericsModule": {"cpu": Kernel}}), numerics("batch_invariant"), torch.no_grad():
        for _ in range(2):  # the first call finds the forward of the second
            slow(X)
        assert origin(Layer).endswith("Kernel")
        del slow
        fast(X)
        assert origin(Layer) == "reference"


def test_weights_of_zeros_hold_random_numbers_while_a_kernel_is_judged() -> None:
    """As before a checkpoint is loaded; the weights themselves stay as they are, and count as an argument, too."""
    layer = Norm()
    nn.init.zeros_(layer.weight)
    with use_kernel_mapping({"NumericsNorm": {"cpu": ByRows}}), numerics("batch_invariant"):
        assert not layer(X).any() and not layer.weight.any() and layer.weight.grad is None
        assert "65x64" in str(resolve(Norm, device="cpu", mode=Mode.INFERENCE).refusals)
    found = find(Call(None, (X, torch.zeros(64))), by_rows, norm, ["batch_invariant"])["batch_invariant"]
    assert found.has is False


def test_outputs_that_are_all_equal_show_nothing_and_the_next_call_is_judged() -> None:
    """A scale of 0 that is not a tensor: not known, kept nowhere, and the kernel is judged once there are numbers."""
    scale = {"now": 0.0}

    @use_kernel_forward_from_hub("NumericsScaled")
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * scale["now"]

    class Even(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scale["now"] * x

    layer = Scaled()
    with use_kernel_mapping({"NumericsScaled": {"cpu": Even}}), numerics("batch_invariant"), torch.no_grad():
        with pytest.warns(UserWarning, match="returns nothing but equal numbers"):
            layer(X)
        assert (
            "found out at the first" in receipt(nn.Sequential(layer), device="cpu").rows[0].checked["batch_invariant"]
        )
        scale["now"] = 2.0
        layer(X)
        found = resolve(Scaled, device="cpu", mode=Mode.INFERENCE)
    assert found.origin.endswith("Even") and found.checked["batch_invariant"].startswith("yes")


def test_numbers_that_a_kernel_adds_to_are_random_where_equal_calls_are_compared() -> None:
    """A kernel that differs from run to run by a factor shows it on zeros, too."""
    runs = {"count": 0}

    def drifting(x: torch.Tensor) -> torch.Tensor:
        runs["count"] += 1
        return x * (1 + 2e-7 * (runs["count"] % 3))

    (found,) = find(Call(None, (torch.zeros(3),)), drifting, torch.clone, ["deterministic"]).values()
    assert found.has is False and "forward: " in found.why


def test_gradients_of_inputs_are_found_out_beside_those_of_weights() -> None:
    """Weights require grad and the input of an evaluation does not: its gradient in training varies, and is named."""
    runs = itertools.count()

    class Varying(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * (1 + next(runs) * 1e-3)

    def kernel(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return norm(Varying.apply(x), self.weight)

    found = find(Call(Norm(), (X,)), kernel, Norm.forward, ["deterministic"])["deterministic"]
    assert found.has is False and found.why.startswith("backward: ")


def test_a_kernel_that_computes_no_gradient_of_angles_is_judged() -> None:
    """Where nothing requires grad, a kernel is asked for the gradients that it computes, not for all or none."""

    def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return x * angles.cos() + x.flip(-1) * angles.sin()

    def kernel(x: torch.Tensor, angles: torch.Tensor) -> Any:
        return NotImplemented if angles.requires_grad else turn(x, angles)

    found = find(Call(None, (X, torch.rand(64))), kernel, turn, ["deterministic", "recompute_equal"], compiles=False)
    assert [one.has for one in found.values()] == [True, True]
    assert "recorded" in found["recompute_equal"].why
    assert "forward only" not in found["deterministic"].why


# --- Kinds of calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [torch.randn(0, 64), torch.randn(64)])
def test_a_call_without_rows_decides_nothing_about_others(first: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty call is served as it comes; one of a single row by what nothing is known of; the next is judged."""
    layer = Norm()
    with use_kernel_mapping({"NumericsNorm": {"cpu": [ByRows, Steady]}}), numerics("batch_invariant"), torch.no_grad():
        for _ in range(2):
            assert torch.equal(layer(first), norm(first, layer.weight))
        many = torch.randn(100, 64)
        assert torch.equal(layer(many), norm(many, layer.weight)) and origin() == "Steady"
        assert torch.equal(layer(first), norm(first, layer.weight)) and origin() == "Steady"
    (found,) = find(Call(None, (torch.randn(0, 64),)), torch.sin, torch.sin, ["deterministic"]).values()
    assert found.has is None and "it is empty" in found.why


def test_a_call_of_a_single_row_is_an_error_in_strict_mode_and_later_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is known to have the property there, before and after the kernel was found to have it for rows."""
    monkeypatch.setenv("KERNELS_STRICT", "1")
    layer = Norm()
    with use_kernel_mapping({"NumericsNorm": {"cpu": Steady}}), numerics("batch_invariant"), torch.no_grad():
        for _ in range(2):
            with pytest.raises(NoKernelError, match="none of its inputs has rows"):
                layer(X[0])
            layer(X)
            assert origin() == "Steady"


def test_training_is_part_of_the_kind_of_a_call() -> None:
    """A dropout is batch-invariant when it does nothing, and is judged anew when the module trains."""

    class Drop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, 0.5, self.training)

    layer = use_kernel_forward_from_hub("NumericsDrop")(Drop)()
    kernel = type("Kernel", (nn.Module,), {"forward": lambda self, x: nn.functional.dropout(x, 0.5, self.training)})
    with use_kernel_mapping({"NumericsDrop": {"cpu": kernel}}), numerics("batch_invariant"), torch.no_grad():
        layer.eval()(X)
        assert origin(Drop) == "Kernel"
        with pytest.warns(UserWarning, match="draws random numbers"):
            layer.train()(X)
        assert origin(Drop) == "reference"


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 2, 3)])
@pytest.mark.parametrize("is_layer", [True, False])
def test_rows_of_indices_are_judged(shape: tuple[int, ...], is_layer: bool) -> None:
    """Each index into a table is a row; only those are tried that were given."""
    table, seen = torch.randn(20, 8), set()

    def kernel(ids: torch.Tensor, weight: torch.Tensor, most: int = 64) -> torch.Tensor:
        seen.update(ids.flatten().tolist())
        return weight[ids] * (1 + 2e-7 * (ids.numel() > most))

    ids = torch.randint(3, 10, shape)
    call = Call(None, (ids, table))
    if is_layer:
        call = Call(nn.Embedding(20, 8, _weight=table), (ids,))
        forward: Callable[..., Any] = lambda self, ids, **more: kernel(ids, self.weight, **more)  # noqa: E731
    else:
        forward = kernel
    found = find(call, forward, lambda *args: forward(*args, most=10**9), ["batch_invariant"])["batch_invariant"]
    assert found.has is False and " 65" in found.why and "int64" in found.why
    assert find(call, lambda *args: forward(*args, most=10**9), forward, ["batch_invariant"])["batch_invariant"].has
    assert seen <= set(ids.flatten().tolist())


def test_a_requirement_reads_what_an_earlier_process_found(isolated_plugins: PluginManager) -> None:
    """A receipt that is asked for a property reads the file, though nothing is required of this process."""
    model = nn.Sequential(Norm()).eval()
    with use_kernel_mapping({"NumericsNorm": {"cpu": Steady}}):
        with numerics("batch_invariant"), torch.no_grad():
            model(X)
        store._found.clear()  # as in a process of its own, in which nothing was found out
        wanted.found_out.clear()
        isolated_plugins.unregister(name="numerics-required")
        forget()
        plain = receipt(model)
        assert "batch_invariant" not in plain.rows[0].checked
        (row,) = plain.require("*", batch_invariant=True).rows
        assert row.origin.endswith("Steady")
        with pytest.raises(RequirementError, match="deterministic: not known"):
            receipt(model).require("*", deterministic=True)


def test_calls_on_shards_are_not_known(tmp_path: Path) -> None:
    """Each rank would judge for itself: no rank does, the reference serves with the reason, and no call fails."""
    done = run_python("-c", SHARDS, environment=os.environ, folder=tmp_path, compiler=True)
    assert done.stdout.splitlines() == ["DTensor True spread", "DTensor True", "Steady"], done.stderr  # warned once


SHARDS = """
import os, warnings, torch, torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from kernels_core import Mode, resolve, use_kernel_forward_from_hub
from kernels_plugins import numerics, register_kernel_mapping

dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=0, world_size=1)

@use_kernel_forward_from_hub("Spread")
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
    def forward(self, x):
        return x * self.weight

class Steady(nn.Module):
    local_except = (-1,)
    def forward(self, x):
        return self.weight * x

mesh = init_device_mesh("cpu", (1,))
register_kernel_mapping({"Spread": {"cpu": Steady}})
layer, x = Scale(), torch.randn(2, 4, 8)
spread = Scale()
spread.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
for grad in (False, True):
    with numerics("batch_invariant"), torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = spread(distribute_tensor(x, mesh, [Shard(1)]))
    told = {"spread" for one in caught if "spread over ranks" in str(one.message)}
    print(type(y).__name__, torch.equal(y.full_tensor(), layer(x)), *told)
with numerics("batch_invariant"), torch.no_grad():
    layer(x)
    print(resolve(Scale, device="cpu", mode=Mode.INFERENCE).origin.rpartition(".")[2])
"""
