"""The kernel that finds the largest magnitude in a tensor.

It needs a GPU, or Triton's interpreter on the CPU (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and no TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from kernels_plugins.packs.triton.largest import BLOCK, start_largest  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16)
VALUES = {"usual": None, "large": 100.0, "NaN": math.nan, "infinite": math.inf, "minus infinity": -math.inf}


def read(*tensors: torch.Tensor, step: int = 1, number: int = 0) -> list[tuple[float, int]]:
    """Return the magnitudes that the kernel writes to the host, and infinities and NaN; its cells are left zero."""
    partial = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    here = torch.full((4,), -1, dtype=torch.int32, pin_memory=HAS_GPU)
    start_largest([*tensors], [step] * len(tensors), number, partial, here.data_ptr())
    if HAS_GPU:
        torch.cuda.synchronize()
    assert not partial.any()
    here = here[: len(tensors)]
    return list(zip((here & -8).view(torch.float32).tolist(), (here & 7).tolist(), strict=True))


def largest(*tensors: torch.Tensor, step: int = 1, number: int = 0) -> list[float]:
    """Return the magnitudes only."""
    return [size for size, _ in read(*tensors, step=step, number=number)]


def expected(x: torch.Tensor) -> tuple[float, int]:
    """Return the same by operators of PyTorch."""
    numbers = x.float()
    special = numbers.isposinf().any() * 1 + numbers.isneginf().any() * 2 + numbers.isnan().any() * 4
    bits = numbers.nan_to_num(0.0, 0.0, 0.0).abs().max().view(torch.int32) & -8
    return bits.view(torch.float32).item(), int(special)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.int8, torch.uint8, torch.bool), ids=str)
@pytest.mark.parametrize("count", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5, 70_001])
def test_finds_the_largest_magnitude(dtype: torch.dtype, count: int) -> None:
    """Of each dtype and size, with a number anywhere that is large, infinite or none; and of zeros."""
    torch.manual_seed(count)
    for kind, value in VALUES.items():
        x = (torch.randn(count, device=DEVICE).clamp(-3, 3) * 10).to(dtype)
        if value is not None:
            if not math.isfinite(value) and not dtype.is_floating_point:
                continue
            x[random.Random(kind).randrange(count)] = value
        assert read(x) == [expected(x)], kind
    assert largest(torch.zeros(count, dtype=dtype, device=DEVICE)) == [0.0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_infinities_and_nan_hide_nothing(dtype: torch.dtype) -> None:
    """Each set of them, anywhere in a tensor or in all of it, beside tensors with others."""
    torch.manual_seed(0)
    values = (math.inf, -math.inf, math.nan)
    for places in range(8):
        x = torch.randn(3 * BLOCK + 11, device=DEVICE).clamp(-3, 3).to(dtype)
        x[7] = -77.0
        for bit, value in enumerate(values):
            if places & 1 << bit:
                x[random.Random(bit + places).randrange(10, len(x))] = value
        other = torch.full((BLOCK + 3, 2), values[places % 3], device=DEVICE, dtype=dtype)
        assert read(x, other, x, x[:5]) == [expected(y) for y in (x, other, x, x[:5])], places
        assert read(x)[0][1] == places


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.transpose(1, 2),
    "columns": lambda x: x[..., 3:10],
    "one column": lambda x: x[..., 3],
    "one head": lambda x: x[:, :, 1],
    "repeated": lambda x: x[:1].expand(9, *x.shape[1:]),
    "one number": lambda x: x[1, 2, 3, :1],
    "scalar": lambda x: x[1, 2, 3, 4],
    "three distances": lambda x: x[:, ::2, ::2, ::2],
    "not aligned": lambda x: x.flatten()[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_each_layout(layout: str) -> None:
    """All numbers of a view, and none beside them: the largest may be its first or its last."""
    torch.manual_seed(0)
    for place in (0, -1):
        view = LAYOUTS[layout](torch.full((4, 300, 5, 16), 1e4, device=DEVICE))
        (view[0] if layout == "repeated" else view).zero_()
        view[(place,) * view.dim()] = -77.0
        assert largest(view) == [77.0], place


def test_parts_are_all_of_a_tensor() -> None:
    """The parts of a large tensor hold each number, and the last ones are in each part."""
    count, step = 11 * BLOCK + 5, 3
    for place in (0, 4 * BLOCK, 5 * BLOCK - 1, 7 * BLOCK + 3, 11 * BLOCK - 1, 11 * BLOCK, count - 1):
        x = torch.ones(count, device=DEVICE)
        x[place] = 9.0
        found = [largest(x, step=step, number=number) == [9.0] for number in range(step)]
        assert sum(found) == (step if place >= 11 * BLOCK else 1), place


def test_reads_several_tensors_at_once() -> None:
    """Of other sizes, dtypes and layouts; none takes part in the magnitude of another."""
    tensors = (
        torch.full((3 * BLOCK + 7,), 2.0, device=DEVICE),
        torch.full((5, 6), -3, device=DEVICE),
        torch.full((40, BLOCK), 4.0, device=DEVICE, dtype=torch.bfloat16)[:, 1:],
        torch.full((), 5.0, device=DEVICE, dtype=torch.float64),
    )
    for count in range(1, 5):
        assert largest(*tensors[:count]) == [2.0, 3.0, 4.0, 5.0][:count]
        assert largest(*tensors[-count:]) == [2.0, 3.0, 4.0, 5.0][-count:]
