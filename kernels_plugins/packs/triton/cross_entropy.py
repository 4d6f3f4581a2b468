"""The loss of a language model from its last hidden states, without the logits of all tokens at once.

Logits of a chunk of tokens are computed, their loss is taken, and the gradient of the logits takes their place; from it
come the gradients of hidden states and weights, in the forward. So logits are neither stored nor computed twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, power_of_two

CHUNK_BYTES = 256 * 2**20
"""Memory for the logits of a chunk: the more, the fewer passes over the gradient of the weight."""

_MULTIPLE = 256
"""Of which the tokens of a chunk are a multiple: matrix products of other sizes are a tenth slower on an H100."""

_FREE = ["rows", "ignored"]


@triton.jit(do_not_specialize=_FREE)
def _loss_kernel(
    logits_ptr, labels_ptr, scale_ptr, loss_ptr, rows, ignored, columns, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    dtype: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    label = tl.load(labels_ptr + row)
    counts = label != ignored
    # A label that is no column has no loss: NaN shows it, without a synchronization to raise an error.
    inside = (label >= 0) & (label < columns)
    chosen = tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(dtype)
    # The largest logit so far, and the sum of exponentials relative to it, in each lane.
    largest = tl.full([BLOCK], float("-inf"), dtype)
    total = tl.zeros([BLOCK], dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + column, mask=column < columns, other=float("-inf")).to(dtype)
        larger = tl.maximum(largest, logits)
        base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf less -inf is not a number
        total = total * tl.exp(largest - base) + tl.exp(logits - base)
        largest = larger
    top = tl.max(largest, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    log_total = base + tl.log(tl.sum(total * tl.exp(largest - base), axis=0))
    tl.store(loss_ptr + row, tl.where(counts, log_total - chosen, 0.0))
    if GRADIENT:
        scale = tl.where(counts, tl.load(scale_ptr).to(dtype), 0.0)
        tl.debug_barrier()  # all threads have read the logit of the label
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < columns
            logits = tl.load(logits_ptr + column, mask=mask, other=float("-inf")).to(dtype)
            gradient = (tl.exp(logits - log_total) - tl.where(column == label, 1.0, 0.0)) * scale
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _multiply_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    # By one, which is by far the most frequent factor, without reading anything else.
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size, other=0.0)
        tl.store(x_ptr + index, (x * factor).to(x_ptr.dtype.element_ty), mask=index < size)


_launch_loss = Launcher(_loss_kernel)
_launch_multiply = Launcher(_multiply_kernel)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses of tokens times a factor, with gradients from the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignored: int,
        factor: Tensor,
    ) -> Tensor:
        """Compute the loss, and the gradients of the first three as far as they are wanted."""
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants = wants_hidden or wants_weight or wants_bias
        rows, columns = hidden.shape[0], weight.shape[0]
        losses = torch.empty(rows, dtype=factor.dtype, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.empty_like(weight) if wants_weight else None
        dbias = torch.zeros(columns, dtype=factor.dtype, device=hidden.device) if wants_bias else None
        # In float16, gradients that are divided by the number of tokens would vanish: they are multiplied at the end.
        late = hidden.dtype == torch.float16
        scale = torch.ones_like(factor) if late else factor
        block = power_of_two(columns, 16384)
        warps = min(32, max(4, block // 512))
        size = _chunk_rows(rows, columns, hidden.element_size())
        buffer = torch.empty((size, columns), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, rows, size):
            part, chosen, loss = (x[start : start + size] for x in (hidden, labels, losses))
            logits = buffer[: len(part)]
            torch.mm(part, weight.t(), out=logits)
            if bias is not None:
                logits += bias
            _launch_loss(
                len(part), warps, (logits, chosen, scale, loss), (len(part), ignored), (columns,), (wants, block),
            )  # fmt: skip
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[start : start + size])
            if dweight is not None:
                torch.addmm(dweight, logits.t(), part, beta=1 if start else 0, out=dweight)
            if dbias is not None:
                dbias += logits.sum(0, dtype=dbias.dtype)
        if dweight is not None and rows == 0:
            dweight.zero_()
        ctx.gradients = (dhidden, dweight, dbias if dbias is None else dbias.to(weight.dtype))
        # Without any label, the factor is infinite, and the gradients are zero: infinity times zero would be NaN.
        ctx.factor = factor.nan_to_num(posinf=0.0) if late else None
        return losses.sum() * factor

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        """Multiply the gradients by that of the loss, in place, and pass them on."""
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivatives: there, use PyTorch's operators.")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy computes its gradients in the forward, and its backward passes them on: a second "
                "backward needs a second forward."
            )
        gradients, ctx.gradients = ctx.gradients, None  # no other reference: autograd may keep them without a copy
        factor = dloss if ctx.factor is None else dloss * ctx.factor
        for gradient in gradients:
            if gradient is not None and gradient.numel():
                size = gradient.numel()
                _launch_multiply(-(-size // 8192), 8, (gradient, factor), (), (size,), (8192,))
        return *gradients, None, None, None


def _chunk_rows(rows: int, columns: int, size: int) -> int:
    """Return how many tokens a chunk has: as equal as multiples allow, and within the memory for one."""
    most = max(1, CHUNK_BYTES // (columns * size) // _MULTIPLE) * _MULTIPLE
    chunks = max(1, -(-rows // most))
    return max(1, min(rows, -(-rows // chunks // _MULTIPLE) * _MULTIPLE))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, num_items: Tensor | float | None, ignored: int
) -> Tensor:
    """Return the sum of the losses of tokens by a number of items, or their mean; in float32 or wider.

    Args:
        hidden: Of shape [tokens, width].
        weight: Of shape [vocabulary, width], and the same dtype.
        bias: None, or of shape [vocabulary].
        labels: Columns of shape [tokens], in int64. The loss with another than a column, or `ignored`, is NaN.
        num_items: None for the number of tokens that have a loss.
        ignored: The label of tokens that have none.
    """
    count = (labels != ignored).sum() if num_items is None else num_items
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    factor = 1.0 / torch.as_tensor(count, dtype=dtype, device=hidden.device)
    if not torch.is_grad_enabled():  # or gradients would be computed for nothing
        hidden, weight, bias = hidden.detach(), weight.detach(), bias if bias is None else bias.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels.contiguous(), ignored, factor)
    return loss
