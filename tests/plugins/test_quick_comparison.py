"""The quick look agrees with the full comparison: it never passes an output that `compare` would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_plugins.comparison import alike, compare

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(), (1,), (7,), (64, 33), (3, 0), (256, 128)]),
    error=st.sampled_from([0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-3, 4e-3, 1e-2, 0.1, 1.0]),
    kind=st.sampled_from(["random", "biased", "grown", "one number"]),
    size=st.sampled_from([1e-6, 1.0, 3e4]),
    seed=st.integers(0, 10),
)
def test_passes_what_compares_well_and_nothing_else(
    dtype: torch.dtype, shape: tuple[int, ...], error: float, kind: str, size: float, seed: int
) -> None:
    """For errors of any kind and size, next to the allowed error, both judge alike."""
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(shape, generator=generator, dtype=torch.float64) * size
    noise = {
        "random": torch.randn(shape, generator=generator, dtype=torch.float64) * size,
        "biased": torch.full(shape, size, dtype=torch.float64),
        "grown": expected,
        "one number": torch.zeros(shape, dtype=torch.float64),
    }[kind]
    if kind == "one number" and noise.numel():
        noise.view(-1)[-1] = size
    actual, wanted = (expected + error * noise).to(dtype), expected.to(dtype)
    if bool(torch.isfinite(actual).all() and torch.isfinite(wanted).all()):
        assert alike([(actual, wanted)]) == compare(actual, wanted, quick=True).ok


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf])),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.tensor([1]), torch.tensor([2])),
        (torch.tensor([2**24 + 1]), torch.tensor([2**24])),
        (torch.tensor([True]), torch.tensor([False])),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}),
        ([torch.ones(2)], (torch.ones(2),)),
        ((torch.ones(2), 3), (torch.ones(2), 4)),
        ((torch.ones(2), None), (torch.ones(2), torch.ones(2))),
        (torch.ones(2).to_sparse(), torch.ones(2).to_sparse()),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64)),
        ([torch.ones(2), torch.zeros(2)], [torch.ones(2), torch.ones(2)]),
    ],
    ids=repr,
)
def test_what_is_not_certain_is_not_passed(actual: Any, expected: Any) -> None:
    """Other structures, dtypes and values, and outputs that only `compare` can judge."""
    assert not alike([(torch.ones(1), torch.ones(1)), (actual, expected)])


def test_tensors_that_must_be_equal() -> None:
    """The last of many numbers counts, and so does a shape; nothing at all is alike."""
    one = torch.zeros(1000)
    other = one.clone()
    assert alike([], [(one, other), (torch.ones(0), torch.ones(0))]) and alike([])
    other[-1] = 1e-30
    assert not alike([], [(one, other)]) and not alike([], [(one, torch.zeros(10))])


@pytest.mark.parametrize("inference", [False, True])
def test_nothing_is_recorded(inference: bool) -> None:
    """Tensors that require grad, or were made in inference mode, under autocast, are compared in their own dtype."""
    with torch.inference_mode(inference), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(64, requires_grad=not inference)
        assert alike([(x, x.clone())], [(x, x.clone())]) and not alike([(x, x * (1 + 1e-4))])
