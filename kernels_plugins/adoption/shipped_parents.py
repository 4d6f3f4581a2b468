"""The rules for parents that come with kernels-core: blocks that add and normalise, and the loss of causal models."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels_core import Mode, find_layer, resolve

from .rule import Rule, UnfitError
from .shipped import random_rows

# --- Blocks: x + attention(norm(x)), x + mlp(norm(x)) ----------------------------------------------


def add_rms_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float, norm: Any = None
) -> tuple[Tensor, Tensor]:
    """Add two tensors, and normalise the sum; return the normalised sum, and the sum.

    The default of the norm is never used: with it, the dispatcher does not ask in each call whether it is a tensor.
    """
    summed = residual + hidden_states
    if weight is _weight(norm):
        return norm(summed), summed
    # A call made again, on copies of its tensors: the norm is not copied, for it is no tensor.
    (name,) = (name for name, parameter in norm._parameters.items() if parameter is _weight(norm))
    return torch.func.functional_call(norm, {name: weight}, (summed,)), summed


def _weight(norm: Any) -> Tensor:
    """Return the weight of a norm: from where it is mostly, in a tenth of the time."""
    weight = norm._parameters.get("weight")
    return norm.weight if weight is None else weight  # type: ignore[no-any-return]


def pre_norm_block(self: Any, add_norm: Callable[..., Any], own: object, hidden_states: Tensor, **more: Any) -> Tensor:
    """Normalise, attend and add; normalise, project and add."""
    output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
    norm = self.post_attention_layernorm
    output, residual = add_norm(output, hidden_states, _weight(norm), norm.variance_epsilon, norm)
    output = self.mlp(output)
    return residual + (output[0] if isinstance(output, tuple) else output)  # type: ignore[no-any-return]


def dropping_block(self: Any, add_norm: Callable[..., Any], own: object, hidden_states: Tensor, **more: Any) -> Tensor:
    """Do the same, with dropout of what is added."""
    output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
    output, norm = self.resid_attn_dropout(output), self.post_attention_layernorm
    output, residual = add_norm(output, hidden_states, _weight(norm), norm.variance_epsilon, norm)
    return residual + self.resid_mlp_dropout(self.mlp(output))  # type: ignore[no-any-return]


def sandwich_block(self: Any, add_norm: Callable[..., Any], own: object, hidden_states: Tensor, **more: Any) -> Tensor:
    """Do the same, with a norm of what is added in place of dropout."""
    output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
    output, norm = self.post_attention_layernorm(output), self.pre_feedforward_layernorm
    output, residual = add_norm(output, hidden_states, _weight(norm), norm.variance_epsilon, norm)
    return residual + self.post_feedforward_layernorm(self.mlp(output))  # type: ignore[no-any-return]


class _Stub(nn.Module):
    """A part that is only called."""

    def __init__(self, width: int, *others: object) -> None:
        super().__init__()
        self.weight, self.others = nn.Parameter(random_rows(width)[1]), others

    def forward(self, hidden_states: Tensor, **others: object) -> Any:
        output = hidden_states * self.weight
        return (output, *self.others) if self.others else output


_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_DROPOUTS = ("resid_attn_dropout", "resid_mlp_dropout")
_BETWEEN = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _of_block(module: Any, *answers: object) -> dict[str, nn.Module]:
    if missing := [name for name in _PARTS if not hasattr(module, name)]:
        raise UnfitError(f"it has no {' and no '.join(missing)}, and rules know blocks of {', '.join(_PARTS)}")
    (width,) = module.input_layernorm.weight.shape
    return {"self_attn": _Stub(width, None), "mlp": _Stub(width, *answers)}


def _hidden(module: Any, parts: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Return calls without and with all other arguments: objects of no meaning, which must go to the attention."""
    if more := [name for name, _ in module.named_children() if name not in parts]:
        raise UnfitError(f"it has other parts, too: {', '.join(more)}")
    (width,) = module.input_layernorm.weight.shape
    names = [each.name for each in inspect.signature(type(module).forward).parameters.values()][2:]
    return [(random_rows(2, width), {}), (random_rows(2, width), {name: object() for name in names})]


_BLOCKS = ("*.*DecoderLayer", "*.*Block")


def _block(
    name: str,
    norm: str,
    oracle: Callable[..., Tensor] = pre_norm_block,
    more: tuple[str, ...] = (),
    scores: tuple[object, ...] = (),
) -> Rule:
    return Rule(
        f"add and {name}",
        {"RMSNorm": "add_rms_norm", "RMSNormOffset": "add_rms_norm_offset"}[norm],
        _BLOCKS,
        oracle,
        partial(_hidden, parts=(*_PARTS, *more)),
        parts={_BETWEEN[0] if more == _BETWEEN else _PARTS[2]: norm},
        fuses=add_rms_norm,
        stubs=lambda module: _of_block(module, *scores),
    )


# --- Loss: linear and cross entropy ----------------------------------------------------------------


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_items: Tensor | int | None,
    ignore_index: int,
) -> Tensor:
    """Return the cross entropy of a linear layer, in float32: the mean of the labels, or their sum over a number."""
    logits = functional.linear(hidden_states, weight, bias).float()
    reduction = "mean" if num_items is None else "sum"
    loss = functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    return loss if num_items is None else loss / num_items


class _OtherLogitsError(UnfitError):
    """The class computes its logits, or their loss, in another way."""


class _WithoutLogits:
    """Stands for a model while its forward runs: the logits are hidden states, and their loss is computed of those."""

    def __init__(self, module: Any, function: Callable[..., Tensor]) -> None:
        self._module, self._function, self._hidden = module, function, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def lm_head(self, hidden_states: Any) -> Any:
        self._hidden = hidden_states
        return hidden_states

    def loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: object,
    ) -> Tensor:
        """Do as `ForCausalLMLoss` of transformers does, which ignores all other arguments, too."""
        head = self._module.lm_head
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        rows = logits.reshape(-1, logits.shape[-1])
        if logits is not self._hidden or vocab_size != head.out_features or shift_labels.numel() != len(rows):
            raise _OtherLogitsError("its loss is not that of its lm_head: logits are scaled, capped or cast before")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(rows.device)
        labels = shift_labels.reshape(-1).to(rows.device)
        return self._function(rows, head.weight, head.bias, labels, num_items_in_batch, ignore_index)


def causal_lm(self: Any, function: Callable[..., Tensor], own: Callable[..., Any], **arguments: Any) -> Any:
    """Run the forward of a causal model without its logits, where a kernel computes the loss of a training step."""
    measured = find_layer(function) is None
    with_loss = arguments.get("labels") is not None and self.training and torch.is_grad_enabled()
    # Not while it is compiled: compilers fuse the loss themselves, and cannot ask which kernel serves.
    if not with_loss or torch.compiler.is_compiling() or not _has_usual_loss(self):
        return own(self, **arguments)
    if not measured and resolve(function, device=self.lm_head.weight.device, mode=Mode.TRAINING).is_reference:
        return own(self, **arguments)
    try:
        output = own(_WithoutLogits(self, function), **arguments)
    except _OtherLogitsError:  # since it was measured, a number of its configuration was changed
        if measured:
            raise
        return own(self, **arguments)
    return dataclasses.replace(output, logits=None)


def _has_usual_loss(module: Any) -> bool:
    usual = getattr(sys.modules.get("transformers.loss.loss_utils"), "ForCausalLMLoss", None)
    return usual is not None and module.loss_function is usual


class _Outputs:
    """The outputs of a model: all but the hidden states are None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class _Model(nn.Module):
    """A model that is only called, or its decoder."""

    decoder = property(lambda self: self)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random_rows(5, 4)[:2])

    def forward(self, *arguments: object, **others: object) -> _Outputs:
        return _Outputs(self.weight * 1)


def _of_model(module: Any) -> Mapping[str, nn.Module]:
    head = nn.Linear(4, module.lm_head.out_features, module.lm_head.bias is not None, dtype=torch.float64)
    return {module.base_model_prefix: _Model(), "lm_head": head}


def _labelled(module: Any) -> list[tuple[Any, ...]]:
    if not _has_usual_loss(module):
        raise UnfitError("its loss is not ForCausalLMLoss of transformers")
    ids = torch.arange(10).view(2, 5) % module.lm_head.out_features
    labels = ids.masked_fill(ids % 3 == 0, -100)
    given = {"input_ids": ids, "labels": labels}
    return [(given,), ({**given, "num_items_in_batch": 7},), ({**given, "num_items_in_batch": torch.tensor(7)},)]


PARENT_RULES = (
    _block("RMSNorm", "RMSNorm"),
    _block("RMSNorm, 1 + weight", "RMSNormOffset"),
    _block("RMSNorm, experts with scores", "RMSNorm", scores=(None,)),
    _block("RMSNorm, dropout", "RMSNorm", dropping_block, _DROPOUTS),
    _block("RMSNorm, between norms", "RMSNorm", sandwich_block, _BETWEEN),
    _block("RMSNorm, 1 + weight, between norms", "RMSNormOffset", sandwich_block, _BETWEEN),
    Rule(
        "loss of a causal model",
        "linear_cross_entropy",
        ("*.*ForCausalLM",),
        causal_lm,
        _labelled,
        parts={"lm_head": nn.Linear},
        fuses=linear_cross_entropy,
        stubs=_of_model,
        mode=Mode.TRAINING,
    ),
)
"""In the order in which they are tried."""
