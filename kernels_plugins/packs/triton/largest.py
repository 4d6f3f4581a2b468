"""The largest magnitudes in tensors, in one kernel: for those who look at numbers and must not be noticed.

Magnitudes are compared as the integers that their bits are, in float32: infinity is above all numbers, NaN above that.
A program that comes upon either reads its part once more, for the largest finite one: only then, for it takes time.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, resources

TENSORS = 4
"""Tensors that one kernel reads."""

BLOCK = 4096
"""Numbers that a program reads at a time."""

_WARPS = 8
_PROGRAMS = 4
"""Programs for each multiprocessor; with twice as many, 33 MB took an H100 a tenth longer."""

_PARTS = tl.constexpr(8)
"""Parts of a block in the second read, so that it takes no more registers than the first: all programs run at once."""

_FREE = [f"{name}{index}" for name in ("count", "step") for index in range(TENSORS)] + ["number", "address"]


@triton.jit
def _largest_of(x_ptr, count, step, number, columns, stride, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    most, special = _read(x_ptr, count, step, number, columns, stride, DENSE, False, BLOCK, 1)
    if most >= 0x7F800000:
        most, special = _read(x_ptr, count, step, number, columns, stride, DENSE, True, BLOCK, _PARTS)
    return most, special


@triton.jit
def _read(
    x_ptr, count, step, number, columns, stride,
    DENSE: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    SIZE: tl.constexpr = BLOCK // PARTS
    column = tl.arange(0, SIZE)
    largest = tl.zeros([SIZE], tl.int32)
    special = tl.zeros([SIZE], tl.int32)
    whole = tl.cast(count, tl.int64) // BLOCK
    # From the end, which was written last, to the start, which the next kernel reads first: caches hold a part of both.
    for block in range(number % step + tl.program_id(0) * step, whole, programs * step):
        for part in range(PARTS):
            place = (whole - 1 - block) * BLOCK + part * SIZE + column
            if not DENSE:
                place = place // columns * stride + place % columns
            x = tl.load(x_ptr + place)
            largest = tl.maximum(largest, _bits(x, SPLIT))
            if SPLIT:
                special |= _special(x)
    if tl.program_id(0) == programs - 1:  # what is left; also in a read of a part, for it is small
        for part in range(PARTS):
            place = whole * BLOCK + part * SIZE + column
            mask = place < count
            if not DENSE:
                place = place // columns * stride + place % columns
            x = tl.load(x_ptr + place, mask=mask, other=0)
            largest = tl.maximum(largest, _bits(x, SPLIT))
            if SPLIT:
                special |= _special(x)
    found = tl.full([], 0, tl.int32)
    if SPLIT:
        found = tl.max(special & 1, axis=0) | tl.max(special & 2, axis=0) | tl.max(special & 4, axis=0)
    return tl.max(largest, axis=0), found


@triton.jit
def _bits(x, SPLIT: tl.constexpr):
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if SPLIT:
        bits = tl.where(bits < 0x7F800000, bits, 0)
    return bits


@triton.jit
def _special(x):
    signed = x.to(tl.float32).to(tl.int32, bitcast=True)
    bits = signed & 0x7FFFFFFF
    infinite = tl.where(signed < 0, 2, 1)
    return tl.where(bits > 0x7F800000, 4, tl.where(bits == 0x7F800000, infinite, 0))


@triton.jit(do_not_specialize=_FREE)
def _largest_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, partial_ptr,
    count0, count1, count2, count3, step0, step1, step2, step3, number, address,
    columns0, columns1, columns2, columns3, stride0, stride1, stride2, stride3,
    DENSE0: tl.constexpr, DENSE1: tl.constexpr, DENSE2: tl.constexpr, DENSE3: tl.constexpr,
    COUNT: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    most, special = _largest_of(x0_ptr, count0, step0, number, columns0, stride0, DENSE0, BLOCK)
    tl.atomic_max(partial_ptr, most, sem="relaxed")
    if COUNT > 1:
        most, found = _largest_of(x1_ptr, count1, step1, number, columns1, stride1, DENSE1, BLOCK)
        tl.atomic_max(partial_ptr + 1, most, sem="relaxed")
        special |= found << 3
    if COUNT > 2:
        most, found = _largest_of(x2_ptr, count2, step2, number, columns2, stride2, DENSE2, BLOCK)
        tl.atomic_max(partial_ptr + 2, most, sem="relaxed")
        special |= found << 6
    if COUNT > 3:
        most, found = _largest_of(x3_ptr, count3, step3, number, columns3, stride3, DENSE3, BLOCK)
        tl.atomic_max(partial_ptr + 3, most, sem="relaxed")
        special |= found << 9
    done = partial_ptr + TENSORS
    if special != 0:
        tl.atomic_or(done + 1, special, sem="relaxed")
    if tl.atomic_add(done, 1, sem="acq_rel") == tl.num_programs(0) - 1:  # the last one tells the host
        results = tl.cast(address, tl.int64).to(tl.pointer_type(tl.int32))
        all_special = tl.atomic_xchg(done + 1, 0, sem="relaxed")
        for index in tl.static_range(COUNT):
            most = tl.atomic_xchg(partial_ptr + index, 0, sem="relaxed")
            tl.store(results + index, (most & -8) | ((all_special >> (3 * index)) & 7))
        tl.atomic_xchg(done, 0, sem="relaxed")


_largest = Launcher(_largest_kernel)


def start_largest(tensors: list[Tensor], steps: Sequence[int], number: int, partial: Tensor, address: int) -> None:
    """Let a GPU write the bits of the largest finite magnitudes of tensors to an address, in float32, without waiting.

    In place of the last three bits of each: 1 if there is an infinity, 2 for minus infinity, 4 for NaN.

    Args:
        tensors: At most four of one device, of real numbers, not empty.
        steps: For each tensor: reads one block in so many, and what is left behind the last one.
        number: Which of these blocks: those of the numbers from 0 to the step are all.
        partial: Eight zeros of int32 on their device, for no other kernel meanwhile. They are zeros again after it.
        address: Of four bytes for each that the GPU can write to, such as pinned memory of the host.
    """
    plan = _plan(tuple([(tensor.shape, tensor.stride()) for tensor in tensors]), tuple(steps), tensors[0].get_device())
    if plan is None:
        tensors = [tensor.contiguous() for tensor in tensors]
        start_largest(tensors, steps, number, partial, address)
        return
    programs, free, numbers, constants = plan
    read = (*tensors, *tensors[:1] * (TENSORS - len(tensors)), partial)
    _largest(programs, _WARPS, read, (*free, number, address), numbers, constants)


@functools.lru_cache(1024)
def _plan(forms: tuple[Any, ...], steps: tuple[int, ...], device: int) -> tuple[Any, ...] | None:
    """Return the programs, numbers and constants of a launch; None where a tensor has more than one distance."""
    layouts = [_layout(shape, strides) for shape, strides in forms]
    if None in layouts:
        return None
    found: list[Any] = [*layouts, *[(0, 1, 1, True)] * (TENSORS - len(layouts))]
    counts, columns, strides, dense = zip(*found, strict=True)
    blocks = max(count // BLOCK // step for count, step in zip(counts, steps, strict=False))
    programs = max(1, min(blocks, _PROGRAMS * resources(device)[0]))
    free = (*counts, *steps, *[1] * (TENSORS - len(steps)))
    return programs, free, (*columns, *strides), (*dense, len(layouts), TENSORS, BLOCK)


def _layout(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int, int, bool] | None:
    """Return a count of numbers, the length of rows, the distance between them, and whether there is but one.

    None if there are more distances. Dimensions are taken in the order in which they lie in memory; numbers that are
    repeated count once. Of one row, the length is no part of the machine code: it is 1.
    """
    left: list[list[Any]] = []
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if stride):
        if size == 1:
            continue
        if left and stride == left[-1][0] * left[-1][1]:
            left[-1][1] *= size
        else:
            left.append([stride, size])
    if not left or left[0][0] != 1:
        left.insert(0, [1, 1])
    if len(left) > 2:
        return None
    columns = left[0][1]
    return (columns, 1, 1, True) if len(left) == 1 else (columns * left[1][1], columns, left[1][0], False)
