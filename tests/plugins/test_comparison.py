"""`compare`: which outputs are equal within the tolerance of their dtype, and its report on those that are not."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_core import ArgumentTypeError
from kernels_plugins.comparison import compare

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    hidden: torch.Tensor
    more: Any = None


NESTED: list[Any] = [
    torch.ones(2, 3),
    (torch.ones(2), [torch.zeros(1), None, "text", 3]),
    {"a": torch.ones(2), "b": {"c": (torch.ones(()),)}},
    OrderedDict(a=torch.ones(2)),
    Pair(torch.ones(1), torch.ones(2)),
    Output(torch.ones(3), {"deep": [torch.ones(1)]}),
    torch.empty(0, 4),
    torch.tensor([True, False]),
    torch.tensor([1 + 2j]),
    torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]),
    torch.ones(3).to_sparse(),
    torch.ones(4).to(torch.float8_e4m3fn),
    torch.Size([1, 2]),
]


@pytest.mark.parametrize("value", NESTED, ids=str)
@pytest.mark.parametrize("quick", [False, True])
def test_equal_values_are_equal(value: Any, quick: bool) -> None:
    """Whatever holds the tensors, and whatever they hold."""
    assert compare(value, value, quick=quick).ok


MISMATCHES: list[tuple[Any, Any, str]] = [
    (torch.ones(2), torch.ones(3), "output: shape (2,) instead of (3,)"),
    (torch.ones(2), torch.ones(2).double(), "output: torch.float32 instead of torch.float64"),
    (torch.ones(2), torch.ones(2, device="meta"), "output: on cpu instead of meta"),
    ([torch.ones(2)], (torch.ones(2),), "output: list instead of tuple"),
    ({"a": 1}, {"b": 1}, "output: holds ['a'] instead of ['b']"),
    ((1, (2,)), (1, (2, 3)), "[1]: holds [0] instead of [0], [1]"),
    (None, torch.ones(2), "output: NoneType instead of a tensor"),
    (torch.ones(2), None, "output: Tensor instead of NoneType"),
    ((torch.ones(1), 3), (torch.ones(1), 4), "[1]: 3 instead of 4"),
    ("a", "b", "output: 'a' instead of 'b'"),
    (1.0, 1.5, "output: 1.0 instead of 1.5"),
    (Output(torch.ones(1), 1), Output(torch.ones(1), 2), ".more: 1 instead of 2"),
]


@pytest.mark.parametrize(("actual", "expected", "told"), MISMATCHES, ids=lambda value: str(value)[:30])
def test_what_is_no_number_is_told(actual: Any, expected: Any, told: str) -> None:
    """Structure, shape, dtype, device and plain values."""
    comparison = compare(actual, expected)
    assert not comparison.ok
    assert str(comparison) == told


def test_the_worst_place_and_the_numbers_are_told() -> None:
    """Where it is furthest off, by how much, and how much on average."""
    expected = torch.ones(4, 8)
    actual = expected.clone()
    actual[2, 5] = 1.5
    comparison = compare({"y": actual}, {"y": expected})
    assert comparison.worst is not None and comparison.worst.index == (2, 5)
    assert comparison.largest("max_abs") == comparison.largest("max_rel") == 0.5
    assert comparison.largest("mean_abs") == 0.5 / 32
    assert comparison.largest("max_ulps") == 0.5 * 2**23
    assert str(comparison).startswith("['y'] (float32, 4x8): 1.5 instead of 1 at [2, 5], ")
    assert "\n" not in str(comparison)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_told(spoiled: float, quick: bool) -> None:
    """On either side, and of the other sign."""
    good, bad = torch.ones(3), torch.tensor([1.0, spoiled, 1.0])
    for actual, expected in ((bad, good), (good, bad), (bad, -bad if spoiled == spoiled else good)):
        comparison = compare(actual, expected, quick=quick)
        assert not comparison.ok and comparison.worst is not None and comparison.worst.index == (1,)
        assert (
            "1 of 3 not finite as expected" in str(comparison)
            or "3 of 3" in str(comparison)
            or "instead" in str(comparison)
        )


def test_integers_are_compared_exactly() -> None:
    """No integer may differ, however large."""
    assert not compare(torch.tensor([2**31]), torch.tensor([2**31 + 1])).ok
    assert not compare(torch.tensor([True]), torch.tensor([False]), quick=True).ok


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(64, 256), (2, 4096)])
def test_rounding_passes_and_bias_does_not(dtype: torch.dtype, size: tuple[int, int], quick: bool) -> None:
    """Numbers that are rounded twice pass; a shift of all to one side does not."""
    torch.manual_seed(0)
    exact = torch.randn(size, dtype=torch.float64)
    expected = exact.to(dtype)
    rounded = (expected.double() * (1 + torch.finfo(dtype).eps * (torch.rand(size).double() - 0.5))).to(dtype)
    assert compare(rounded, expected, quick=quick).ok
    assert compare(rounded, expected, exact=exact, quick=quick).ok
    step = 200 if dtype is torch.float32 else 3
    for wrong in (exact * (1 + step * torch.finfo(dtype).eps), exact + 2e-5 + step * torch.finfo(dtype).eps):
        for ideal in (None, exact):
            assert not compare(wrong.to(dtype), expected, exact=ideal, quick=quick).ok


def test_a_better_answer_than_the_reference_passes() -> None:
    """With a float64 reference, a kernel that errs less than the reference is right, however far from it."""
    exact = torch.linspace(1, 2, 64, dtype=torch.float64)
    reference = (exact + 0.1).float()
    assert not compare(exact.float(), reference).ok
    assert compare(exact.float(), reference, exact=exact).ok
    assert compare(exact.float(), reference, exact=exact).differences[0].own_error == pytest.approx(0.1, rel=1e-4)


def test_tolerances_of_ones_own() -> None:
    """For all dtypes, or per dtype."""
    a, b = torch.tensor([1.0, -1.0]), torch.tensor([1.05, -0.95])
    assert not compare(a, b).ok
    assert compare(a, b, tolerances=(0.1, 0.0)).ok
    assert compare(a, b, tolerances={torch.float32: (0.0, 0.1)}).ok
    assert not compare(a, b, tolerances={torch.float16: (0.0, 0.1)}).ok
    assert not compare(a, b, tolerances=(0.0, 0.0)).ok
    assert compare(a, a, tolerances=(0.0, 0.0)).ok


def test_an_overflow_of_the_reference_is_no_fault_of_the_kernel() -> None:
    """float16 has no room for the numbers of float64; the same infinity, or the number, are both right."""
    exact = torch.tensor([1e5, 1.0], dtype=torch.float64)
    infinite = exact.half()
    assert compare(infinite, infinite, exact=exact).ok
    assert not compare(torch.tensor([6e4, 1.0]).half(), infinite, exact=exact).ok


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e300])
def test_a_float64_that_was_misread_is_no_judge(number: float) -> None:
    """Native code may read float64 as another dtype: a right kernel is not wrong for it, and a wrong one not right."""
    expected = torch.linspace(1, 2, 64)
    exact = expected.double()
    exact[3] = number
    assert compare(expected.clone(), expected, exact=exact).ok
    assert not compare(expected + 0.1, expected, exact=exact).ok


def test_an_exact_output_of_another_structure_is_refused() -> None:
    """Both references are the same function."""
    with pytest.raises(ArgumentTypeError, match="exact has 2 leaves and expected has 1"):
        compare(torch.ones(1), torch.ones(1), exact=[torch.ones(1), torch.ones(1)])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(4, 9), min_size=2, max_size=3),  # one number alone shows no scale
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_random_sums_in_two_orders_are_equal(shape: list[int], dtype: torch.dtype, scale: float, seed: int) -> None:
    """Sums that cancel leave numbers near zero, and these are right, too."""
    torch.manual_seed(seed)
    terms = (torch.randn(16, *shape) * scale).to(dtype)
    exact = terms.double().sum(0)
    one = sum(terms.float().unbind()[1:], terms[0].float()).to(dtype)
    two = sum(terms.float().flip(0).unbind()[1:], terms[-1].float()).to(dtype)
    assert compare(one, two, exact=exact).ok
    assert compare(one, two).ok
    assert compare(one, two, quick=True).ok
