"""Rows in each dimension, at any place and beside any numbers: a kernel whose bits depend on these is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norms import Norm, Steady, by_rows, norm
from torch import nn

from kernels_core import Mode, resolve
from kernels_core.replay import Call
from kernels_plugins import check_kernel, numerics, use_kernel_mapping, verify
from kernels_plugins.numerics.invariance import BACKWARD, Judgement
from kernels_plugins.numerics.properties import find

pytestmark = [
    pytest.mark.usefixtures("numerics_plugin"),
    pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning"),
]


def judged(
    forward: Callable[..., Any], reference: Callable[..., Any], *args: torch.Tensor, name: str = "batch_invariant"
) -> Judgement:
    return find(Call(None, args), forward, reference, [name])[name]


def split_where(is_odd: Callable[[torch.Size], bool]) -> Callable[..., torch.Tensor]:
    return lambda x, weight: by_rows(x, weight, 0 if is_odd(x.shape) else 10**9)


# --- Dimensions in the middle -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 128, 64), (2, 1, 64), (1, 7, 64)])
@pytest.mark.parametrize(
    ("is_odd", "shown"),
    [
        (lambda s: s[1] > 1, "1x2x64"),  # prefill, and one step of a decoder
        (lambda s: s[1] > 300, "1x301x64"),
        (lambda s: s[0] > 1 and s[1] > 1, "x2x64"),
        (lambda s: s[0] == 1 and s[1] == 129, "1x129x64"),
    ],
)
def test_the_length_of_a_sequence_is_found_to_decide(
    shape: tuple[int, ...], is_odd: Callable[[torch.Size], bool], shown: str
) -> None:
    """As of a trainer and a rollout; whatever the first call was, the smallest input is named."""
    found = judged(split_where(is_odd), norm, torch.randn(shape), torch.rand(64))
    assert found.has is False and shown in found.why and "than alone" in found.why


@pytest.mark.parametrize("axis", [1, 2])
def test_each_dimension_in_the_middle_is_tried(axis: int) -> None:
    """Heads and positions of four dimensions, in a length that only the given call has."""
    shape = [2, 3, 5, 64]
    shape[axis] = 11
    found = judged(split_where(lambda s: s[axis] == 11), norm, torch.randn(shape), torch.rand(64))
    assert found.has is False and "11x" in found.why


def test_gradients_and_neighbours_along_a_sequence_are_compared() -> None:
    """A backward that asks for the length, and a forward in which NaN spread along it."""

    class Sequence(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2 * (1 + 2e-7 * (gradient.shape[1] > 16))

    x = torch.randn(2, 8, 64)
    found = judged(Sequence.apply, lambda x: x * 2, x, name=BACKWARD)
    assert found.has is False and "1x17x64" in found.why
    found = judged(lambda x: x * 2 + 0 * x[:, :1], lambda x: x * 2, x)
    assert found.has is False and "beside rows that hold nan" in found.why


@pytest.mark.parametrize(
    "reference",
    [
        lambda x: x * 2 + x.cumsum(1),
        lambda x: nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: x * torch.arange(1, x.shape[1] + 1)[:, None],
        lambda x: x * (1 + torch.arange(3)[: x.shape[1], None]),  # a table of positions that ends
    ],
)
@pytest.mark.parametrize("length", [1, 3])
def test_dimensions_along_which_the_reference_mixes_rows_are_not_held_against_a_kernel(
    reference: Callable[..., Any], length: int
) -> None:
    """Attention, sums and positions depend on the sequence: rows are those of the batch, also after one step."""
    x = torch.randn(2, length, 64)
    assert judged(lambda x: reference(x) * 1, reference, x).has
    uneven = judged(lambda x: reference(x) * (1 + 2e-7 * (len(x) > 64)), reference, x)
    assert uneven.has is False and f" 65x{length}x64" in uneven.why


def test_every_tool_refuses_a_kernel_that_asks_for_the_length() -> None:
    """`numerics`, `check_kernel` and `verify`; a kernel judged on two dimensions is judged anew for three."""

    class Prefill(nn.Module):
        batch_invariant = True

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return by_rows(x, self.weight, 0 if x.dim() == 3 and x.shape[1] > 1 else 10**9)

    layer, x = Norm(), torch.randn(2, 9, 64)
    with use_kernel_mapping({"NumericsNorm": {"cpu": [Prefill, Steady]}}), torch.no_grad():
        with numerics("batch_invariant"):
            layer(x[0])
            assert "Prefill" in resolve(Norm, device="cpu", mode=Mode.INFERENCE).origin
            assert torch.equal(layer(x), norm(x, layer.weight))
            assert "Steady" in resolve(Norm, device="cpu", mode=Mode.INFERENCE).origin
        assert not verify(layer, x, gradients=False).ok
    Prefill.batch_invariant = False
    with pytest.raises(AssertionError, match=r"batch_invariant: .*x 1x2x64"):
        check_kernel(Prefill, layer, x)


# --- Places, layouts and neighbours -------------------------------------------------------------------


def place_from(first: int, last: int = 0) -> Callable[..., torch.Tensor]:
    """Return a norm that computes some rows otherwise, if there are more than those before."""

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, at = norm(x, weight), slice(first, None) if not last else slice(-last, None)
        if len(x) > max(first, 1):
            y[at] = by_rows(x, weight, 0)[at]
        return y

    return forward


@pytest.mark.parametrize(
    ("forward", "shown"),
    [
        (place_from(100), "101x64 float32, whose row 101 "),
        (place_from(2500), "2501x64 float32, whose row 2,501 "),
        (place_from(0, last=1), "2x64 float32, whose row 2 "),
        (place_from(40, last=3), "41x64 float32, whose row "),
    ],
)
def test_faults_by_place_are_shrunk(forward: Callable[..., Any], shown: str) -> None:
    """The fewest rows are found among which a row at its place has other bits, from the first or the last."""
    found = judged(forward, norm, torch.randn(8, 64), torch.rand(64))
    assert found.has is False and shown in found.why


def test_the_kit_blames_a_kernel_for_a_layout_on_a_cpu() -> None:
    """Gaps between rows count there, too, for rows of whole vectors."""

    def gaps(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return by_rows(x, weight, 10**9 if x.is_contiguous() else 3)

    with pytest.raises(AssertionError, match=r"batch_invariant: .*4x64 float32 \(rows with gaps\)"):
        check_kernel(gaps, norm, torch.randn(8, 64), torch.rand(64), ignore={"compile"})


@pytest.mark.parametrize(
    ("is_near", "shown"),
    [
        (lambda x: x.isfinite().all() and (x.abs() > 1e30).any(), "3.40282e+38"),
        (lambda x: ((x != 0) & (x.abs() < 1e-38)).any(), "5.87747e-39"),
        (lambda x: (x < -1e3).any() and x.isfinite().all(), "-10000"),
    ],
)
def test_finite_neighbours_are_found_to_matter(is_near: Callable[[torch.Tensor], bool], shown: str) -> None:
    """The largest number of a dtype, one below its normal numbers, and a negative one."""
    found = judged(
        lambda x, weight: by_rows(x, weight, 0 if is_near(x) else 10**9), norm, torch.randn(8, 64), torch.rand(64)
    )
    assert found.has is False and f"beside rows that hold {shown}" in found.why
