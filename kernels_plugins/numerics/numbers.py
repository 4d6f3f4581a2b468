"""Numbers of their own for tensors that hold too few: zeros, NaN and constants show no difference of bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernels_core.replay import Call

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def telling(call: Call) -> Call:
    """Return a call on copies, in which tensors that could show no difference hold random numbers.

    A warm-up passes zeros, and weights may be zeros until they are loaded: findings are about the implementation.
    """
    with torch.inference_mode(False), torch.no_grad():  # in this order: the former enables gradients
        copied = call.snapshot(state=True)
        for name, tensor in copied.tensors.items():
            broadcast = any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if not name.startswith("input ") and _has_numbers(tensor) and not broadcast and not _some(tensor).any():
                tensor.copy_(with_own_numbers(tensor))

        def change(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or (own := with_own_numbers(leaf.detach())) is leaf:
                return leaf
            return own.requires_grad_(leaf.requires_grad)

        return copied.replaced(change)


def with_own_numbers(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Return a tensor whose numbers are finite, and whose rows along a dimension are neither constant nor 0.

    In place of others it holds random numbers of the magnitude of the rest, from a fixed seed; without a dimension,
    all is one row.

    Example:
        >>> with_own_numbers(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), 0)[0]
        tensor([1., 2.])
        >>> with_own_numbers(torch.zeros(2, 2)).unique().numel()
        4
    """
    if not _has_numbers(tensor):
        return tensor
    moved = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    rows = moved.reshape(len(moved), -1)
    some = _some(rows)
    shown = some if rows.shape[1] == 1 else rows.isfinite()  # in a mask, zeros are numbers like others
    low, high = rows.where(shown, torch.inf).amin(1), rows.where(shown, -torch.inf).amax(1)
    silent = low > high if rows.shape[1] == 1 else low >= high
    replaced = silent[:, None] | ~rows.isfinite()
    if not replaced.any():
        return tensor
    known = rows[some].abs().float()
    most = min(torch.finfo(each).max for each in (rows.dtype, known.dtype)) / 16
    known = known[known < most]  # numbers at the ends of a dtype mask something, and would overflow
    generator = torch.Generator(tensor.device).manual_seed(0)
    draw = torch.rand if known.numel() and bool((rows[some] > 0).all()) else torch.randn
    drawn = draw(rows.shape, generator=generator, device=tensor.device)
    if draw is torch.rand:  # such as variances, of which a root is taken
        drawn += 0.5
    drawn *= known.median() if known.numel() else 1
    made = rows.where(~replaced, drawn.to(rows.dtype)).reshape(moved.shape)
    return made[0] if dim is None else made.movedim(0, dim)


def are_telling(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds at least two numbers that are finite."""
    finite = tensor[tensor.isfinite()] if tensor.is_floating_point() else tensor.flatten()
    return finite.numel() > 1 and bool((finite != finite[0]).any())


def _has_numbers(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype in _DTYPES
        and tensor.numel() > 0
        and tensor.device.type != "meta"
    )


def _some(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.isfinite() & (tensor != 0)
