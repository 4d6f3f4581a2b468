"""Runs with all floating numbers in another dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CASTS: dict[object, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}


def converted(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor in another dtype if it has real or complex numbers; itself for None."""
    if dtype is None:
        return tensor
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.dtype in _REAL else tensor


@contextlib.contextmanager
def only(dtype: torch.dtype | None, inputs: Iterable[torch.Tensor], device_types: Iterable[str]) -> Iterator[None]:
    """Compute in one dtype, if one is given: without autocast, and with casts to other dtypes redirected to it.

    A cast to a dtype coarser than every input stays: it is meant to lose digits.
    """
    if dtype is None:
        yield
        return
    given = [tensor.dtype for tensor in inputs if tensor.dtype in _REAL]
    least = max((torch.finfo(d).eps for d in given), default=1.0)  # the coarsest dtype among the inputs
    with contextlib.ExitStack() as stack:
        for kind in {*device_types, "cpu"} - {"meta"}:  # PyTorch has no autocast for meta tensors
            stack.enter_context(torch.autocast(kind, enabled=False))  # it would cast to 16 bits again
        stack.enter_context(_OneDtype(dtype, {d for d in _REAL if torch.finfo(d).eps <= least}))
        yield


class _OneDtype(TorchFunctionMode):
    """Replaces dtypes that calls name by one dtype."""

    def __init__(self, dtype: torch.dtype, others: set[torch.dtype]) -> None:
        super().__init__()
        self.dtype, self.others = dtype, others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:  # these name a dtype by their own name, not as an argument
            return args[0].to(self._named(_CASTS[func]))
        named = {name: self._named(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._named, args), **named)

    def _named(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in self.others else value
