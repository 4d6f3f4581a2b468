"""The loss of a linear layer, and its gradients, in chunks of rows: never all logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
        num_items: Tensor | int | None,
        ignore_index: int,
    ) -> Tensor:
        """Compute the gradients, too: the backward follows at once, and would have to compute the logits again."""
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        rows = max(1, _LOGITS // len(weight))
        # In float16, what is divided by the number of labels would vanish before a scaled loss could multiply it. So
        # the backward divides, and until then sums may be too large for that dtype.
        late = weight.dtype is torch.float16
        # A sum of many chunks in bfloat16 would lose their last digits.
        is_wide = late or len(hidden_states) > rows
        wide = torch.promote_types(weight.dtype, torch.float32) if is_wide else weight.dtype
        for_hidden = torch.empty_like(hidden_states) if of_hidden else None
        for_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        for_bias = torch.zeros_like(bias, dtype=wide) if of_bias and bias is not None else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        items = (labels != ignore_index).sum() if num_items is None else num_items
        # The mean of no labels is NaN, and has gradients of zero.
        share = torch.ones_like(loss) / (items if num_items is not None else items.clamp(min=1))  # type: ignore[union-attr]
        for start in range(0, len(hidden_states), rows):
            chunk, wanted = hidden_states[start : start + rows], labels[start : start + rows]
            found = functional.linear(chunk, weight, bias).float()
            loss += functional.cross_entropy(found, wanted, ignore_index=ignore_index, reduction="sum")
            if not any(ctx.needs_input_grad[:3]):
                continue
            taken = (wanted != ignore_index).unsqueeze(1)
            found = found.softmax(-1)
            found.scatter_add_(1, wanted.unsqueeze(1).where(taken, 0), found.new_full((len(wanted), 1), -1.0))
            found = found.mul_(taken if late else share.where(taken, 0)).to(weight.dtype)
            if for_hidden is not None:
                torch.mm(found, weight, out=for_hidden[start : start + rows])
            if for_weight is not None:
                for_weight += found.t() @ chunk
            if for_bias is not None:
                for_bias += found.sum(0)
        narrow = (each if late or each is None else each.to(weight.dtype) for each in (for_weight, for_bias))
        ctx.save_for_backward(share if late else None, for_hidden, *narrow)
        return loss / items

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `once_differentiable` sees nothing where the gradient itself is a constant
            raise RuntimeError("linear_cross_entropy has no second derivatives: there, let the reference serve.")
        share, *found = ctx.saved_tensors
        factor = gradient if share is None else gradient * share
        return (*(each if each is None else each * factor for each in found), None, None, None)


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
    if torch.is_autocast_enabled(kind) and hidden_states.dtype is not torch.float64:  # as the linear layer does
        given, dtype = (hidden_states, weight, bias), torch.get_autocast_dtype(kind)
        hidden_states, weight, bias = (each if each is None else each.to(dtype) for each in given)  # type: ignore[assignment]
    if hidden_states.dtype is not weight.dtype or (bias is not None and bias.dtype is not weight.dtype):
        return NotImplemented
    return _Chunked.apply(hidden_states, weight, bias, labels, num_items, ignore_index)  # type: ignore[no-untyped-call]
