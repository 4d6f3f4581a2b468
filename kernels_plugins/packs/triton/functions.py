"""The functions of the pack that models may call: `add_rms_norm` and `linear_cross_entropy`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from kernels_core import ArgumentError, ArgumentTypeError, LoadError, require_type, set_module

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _require(where: str, **tensors: object) -> None:
    """Require floating-point tensors of one dtype on one GPU, of which a kernel may read the memory."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{name} of {where} is a tensor, not a {type(tensor).__name__}.")
        first = first if first is not None else tensor
        if tensor.dtype not in _DTYPES or tensor.dtype is not first.dtype:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise ArgumentError(f"{where} takes tensors of one dtype of {names}: {name} is of {tensor.dtype}.")
        if tensor.device != first.device or tensor.layout is not torch.strided:
            raise ArgumentError(
                f"{where} takes plain tensors on one device: {name} is {tensor.layout} on {tensor.device}."
            )


def _require_triton(where: str, device: torch.device) -> None:
    """Import the kernels, so that what is missing is an error of ours.

    Raises:
        LoadError: If Triton is missing, or the device is none that it compiles for.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise LoadError(f"{where} needs Triton: {error}. PyTorch for CUDA installs it.") from error
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise LoadError(f"{where} runs on GPUs, and these tensors are on {device.type}: use PyTorch's operators there.")


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Add a residual connection and normalise the sum by its root mean square, in one kernel.

    Args:
        x: The output of a layer, of shape [..., width].
        residual: What it is added to: of the same shape, dtype and device.
        weight: Of shape [width].
        eps: Added to the mean of squares.
        offset: Added to the weight: 1.0 for norms in the style of Gemma.

    Returns:
        The norm of the sum, and the sum, both of the shape and dtype of `x`.

    Raises:
        ArgumentError: If shapes, dtypes or devices do not fit.
        ArgumentTypeError: For anything of the wrong type.
        LoadError: If Triton is not installed, or the tensors are not on a GPU.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 8), torch.ones(8)
        >>> if torch.cuda.is_available():
        ...     normed, summed = add_rms_norm(x.cuda(), x.cuda(), weight.cuda(), 1e-6)
        ...     torch.testing.assert_close(summed, 2 * x.cuda())
    """
    _require("add_rms_norm", x=x, residual=residual, weight=weight)
    for name, value in (("eps", eps), ("offset", offset)):
        require_type(value, (int, float), f"{name} of add_rms_norm")
    if x.shape != residual.shape or x.shape[-1:] != weight.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, residual, weight))
        raise ArgumentError(f"add_rms_norm takes [..., width] twice and a weight of [width], not {shapes}.")
    _require_triton("add_rms_norm", x.device)
    from .rms_norm import add_rms_norm as kernel

    return kernel(x, residual, weight, eps, float(offset))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Compute the cross entropy of `hidden @ weight.T + bias`, without storing those logits for all tokens at once.

    Gradients are computed in the forward, and the backward passes them on: so one backward for each forward, and no
    second derivatives; another raises a `RuntimeError`. The gradient of the weight is summed in its dtype, over chunks
    of tokens.

    Args:
        hidden: Hidden states of shape [..., width].
        weight: That of the last layer, of shape [vocabulary, width].
        labels: The column of each token, of shape [...], int64. One out of range makes the loss NaN.
        bias: Of shape [vocabulary].
        ignore_index: The label of tokens without a loss.
        reduction: `"mean"` over the tokens with a loss, or `"sum"`.
        num_items: Divides the sum instead, where tokens are spread over several batches.

    Returns:
        The loss, a number in float32, or in float64 for that dtype.

    Raises:
        ArgumentError: If shapes, dtypes, devices or `reduction` do not fit.
        ArgumentTypeError: For anything of the wrong type.
        LoadError: If Triton is not installed, or the tensors are not on a GPU.

    Example:
        >>> import torch
        >>> hidden, weight, labels = torch.randn(4, 8), torch.randn(100, 8), torch.tensor([1, 5, -100, 99])
        >>> if torch.cuda.is_available():
        ...     loss = linear_cross_entropy(hidden.cuda(), weight.cuda(), labels.cuda())
    """
    where = "linear_cross_entropy"
    biases: Mapping[str, object] = {} if bias is None else {"bias": bias}
    if torch.is_autocast_enabled() and isinstance(hidden, Tensor) and isinstance(weight, Tensor) and hidden.is_cuda:
        dtype = torch.get_autocast_dtype("cuda")  # as PyTorch does for the linear layer
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    _require(where, hidden=hidden, weight=weight, **biases)
    if not isinstance(labels, Tensor) or labels.dtype is not torch.int64:
        raise ArgumentTypeError(
            f"labels of {where} is a tensor of int64, not {getattr(labels, 'dtype', type(labels))}."
        )
    require_type(ignore_index, int, f"ignore_index of {where}")
    require_type(reduction, str, f"reduction of {where}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ArgumentError(f"ignore_index of {where} is a label of 64 bits, not {ignore_index}.")
    if reduction not in ("mean", "sum"):
        raise ArgumentError(f"reduction of {where} is 'mean' or 'sum', not {reduction!r}.")
    vocabulary = weight.shape[0] if weight.dim() == 2 else -1
    if (
        hidden.shape[:-1] != labels.shape
        or hidden.dim() == 0
        or weight.shape != (vocabulary, hidden.shape[-1])
        or vocabulary == 0
        or (bias is not None and bias.shape != (vocabulary,))
        or labels.device != hidden.device
    ):
        given = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, labels, *([] if bias is None else [bias])))
        raise ArgumentError(
            f"{where} takes hidden states [..., width], a weight [vocabulary, width], labels [...] on the same device "
            f"and a bias [vocabulary], not {given}."
        )
    if num_items is not None:
        require_type(num_items, (int, float, Tensor), f"num_items of {where}")
    _require_triton(where, hidden.device)
    from .cross_entropy import linear_cross_entropy as kernel

    if num_items is None and reduction == "sum":
        num_items = 1
    return kernel(hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), num_items, ignore_index)


set_module("kernels_plugins", globals())
