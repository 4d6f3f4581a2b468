"""Leaves no trace of an evaluation: random numbers, gradients, buffers and modes of a model are put back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kernels_core.torch_internals import version

_MISSING = object()


class Upkeep:
    """What a model is like, and how to make it so again.

    Buffers are copied, for layers change them; the numbers of parameters are not, for nobody should change those.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at the model."""
        self._modules = [(module, module.training, module.__dict__.get("forward", _MISSING)) for module in _of(model)]
        self._buffers = [(module, dict(module._buffers)) for module in _of(model) if module._buffers]
        tensors = {id(tensor): tensor for _, kept in self._buffers for tensor in kept.values() if tensor is not None}
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
        self._registered = [(module, dict(module._parameters)) for module in _of(model) if module._parameters]
        self._parameters = [
            (name, parameter, version(parameter), parameter.grad, parameter.data, parameter.requires_grad)
            for name, parameter in model.named_parameters()
        ]

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Start with the same random numbers and without gradients, and put everything back after."""
        for _, parameter, *_ in self._parameters:
            parameter.grad = None
        try:
            with _forked_random_state():
                yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Make the model what it was."""
        for module, parameters in self._registered:
            module._parameters.clear()
            module._parameters.update(parameters)
        for _, parameter, _, gradient, data, requires_grad in self._parameters:
            if not _is_same(parameter, data):  # `half()`, `to()` and the like put other data into the same parameter
                parameter.grad = None
                parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, buffers in self._buffers:
            module._buffers.clear()
            module._buffers.update(buffers)
        for tensor, copy in self._copies:  # batch normalization changes its buffers without counting that
            if tensor.device.type != "meta" and not torch.equal(tensor, copy):
                with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                    tensor.copy_(copy)
        for module, training, forward in self._modules:
            if module.training is not training:
                module.training = training
            if module.__dict__.get("forward", _MISSING) is not forward:
                if forward is _MISSING:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward

    def changed_parameters(self) -> list[str]:
        """Return the names of parameters that were changed in place since, which cannot be undone."""
        return [name for name, parameter, count, *_ in self._parameters if version(parameter) != count]


def _of(model: nn.Module) -> Iterator[nn.Module]:
    return model.modules()


def _is_same(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    """Whether a tensor still has its data; those of a subclass cannot always tell."""
    with contextlib.suppress(RuntimeError):
        return (tensor.data_ptr(), tensor.dtype, tensor.device) == (data.data_ptr(), data.dtype, data.device)
    return True


@contextlib.contextmanager
def _forked_random_state() -> Iterator[None]:
    """Let random numbers start from here in each evaluation: of Python, PyTorch, its GPUs, and NumPy if it is used."""
    numpy: Any = sys.modules.get("numpy.random")
    kept = random.getstate(), numpy.get_state() if numpy else None
    kind = next((kind for kind in ("cuda", "xpu") if _has(kind)), None)
    devices = list(range(getattr(torch, kind).device_count())) if kind else []
    try:
        with torch.random.fork_rng(devices, device_type=kind or "cuda"):
            yield
    finally:
        random.setstate(kept[0])
        if numpy:
            numpy.set_state(kept[1])


def _has(kind: str) -> bool:
    device: Any = getattr(torch, kind, None)
    return device is not None and bool(device.is_available() and device.is_initialized())
