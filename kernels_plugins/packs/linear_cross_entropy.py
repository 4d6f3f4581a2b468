"""The loss of a linear layer, and its gradients, in chunks of rows: never all logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LOGITS = 2**24
"""Logits of a chunk: 64 MiB in float32."""


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        items: Tensor | int,
        ignore_index: int,
    ) -> Tensor:
        """Compute the gradients, too: the backward follows at once, and would have to compute the logits again."""
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        rows = max(1, _LOGITS // len(weight))
        # A sum of many chunks in bfloat16 would lose their last digits.
        wide = torch.promote_types(weight.dtype, torch.float32) if len(hidden_states) > rows else weight.dtype
        for_hidden = torch.empty_like(hidden_states) if of_hidden else None
        for_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        for_bias = torch.zeros_like(bias, dtype=wide) if of_bias and bias is not None else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for start in range(0, len(hidden_states), rows):
            chunk, wanted = hidden_states[start : start + rows], labels[start : start + rows]
            found = functional.linear(chunk, weight, bias).float()
            loss += functional.cross_entropy(found, wanted, ignore_index=ignore_index, reduction="sum")
            if not any(ctx.needs_input_grad[:3]):
                continue
            taken = (wanted != ignore_index).unsqueeze(1)
            found = found.softmax(-1)
            found.scatter_add_(1, wanted.unsqueeze(1).where(taken, 0), found.new_full((len(wanted), 1), -1.0))
            found = found.mul_(taken / items).to(weight.dtype)
            if for_hidden is not None:
                torch.mm(found, weight, out=for_hidden[start : start + rows])
            if for_weight is not None:
                for_weight += found.t() @ chunk
            if for_bias is not None:
                for_bias += found.sum(0)
        narrow = (each if each is None else each.to(weight.dtype) for each in (for_weight, for_bias))
        ctx.save_for_backward(for_hidden, *narrow)
        return loss / items

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(each if each is None else each * gradient for each in ctx.saved_tensors), None, None, None)


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_items: Tensor | int | None,
    ignore_index: int,
) -> Any:
    """Return the mean loss of the labels, or their sum by a number of items; in float32."""
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind):  # as the linear layer does
        given, dtype = (hidden_states, weight, bias), torch.get_autocast_dtype(kind)
        hidden_states, weight, bias = (each if each is None else each.to(dtype) for each in given)  # type: ignore[assignment]
    if hidden_states.dtype is not weight.dtype or (bias is not None and bias.dtype is not weight.dtype):
        return NotImplemented
    items = (labels != ignore_index).sum() if num_items is None else num_items
    return _Chunked.apply(hidden_states, weight, bias, labels, items, ignore_index)  # type: ignore[no-untyped-call]
