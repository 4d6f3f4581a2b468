"""Everything of a model that a run may change, to be restored."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..torch_internals import version
from .ambient import kept_host_random_states, kept_random_states, unobserved
from .copies import generators_of, same_numbers


class ModelState:
    """The state of a model, as it is when this is made.

    Buffers, gradients, training modes, and the attributes of its modules. Buffers are copied, for layers change them;
    parameters are not, so changes of their numbers are noticed (`changed_parameters`), and stay.

    Args:
        model: The model.

    Example:
        >>> model = torch.nn.BatchNorm1d(2)
        >>> with ModelState(model).kept():
        ...     y = model(torch.randn(3, 2)) + torch.rand(1)
        >>> model.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at the model."""
        modules = list(model.modules())
        # FSDP2 notes apart from the module whether its parameters are whole now: parts are put back by its own method.
        self._sharded: list[Any] = [module for module in modules if hasattr(type(module), "reshard")]
        self._reshard()
        self._generators = generators_of(model)
        self._attributes = [(module, type(module), dict(module.__dict__)) for module in modules]
        held = [value for _, _, state in self._attributes for value in state.values() if isinstance(value, list | dict)]
        # `__dict__` holds the same list or dict after a change in it.
        self._held = [(value, value.copy()) for value in held]
        with unobserved():
            self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._parameters = [
            (name, parameter, version(parameter), parameter.grad, parameter.data, parameter.requires_grad)
            for name, parameter in model.named_parameters()
        ]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Begin a block with these random numbers and without gradients, and restore everything after it."""
        for _, parameter, *_ in self._parameters:
            parameter.grad = None
        try:
            with _kept_generators(self._generators):
                yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Restore the model."""
        self._reshard()
        for module, cls, state in self._attributes:
            if type(module) is not cls:  # `train()` and `eval()` change that of a kernelized module, and so do others
                object.__setattr__(module, "__class__", cls)
            if _identities(module.__dict__) != _identities(state):
                module.__dict__.clear()  # attributes that the run has added go, too
                module.__dict__.update(state)
        for held, content in self._held:
            if _identities(held) != _identities(content):
                held.clear()
                held.update(content) if isinstance(held, dict) else held.extend(content)
        for _, parameter, _, gradient, data, requires_grad in self._parameters:
            if not _has_data(parameter, data):  # `half()`, `to()` and others put other data into the same parameter
                parameter.grad = None
                parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        with unobserved():  # compared by value: batch normalization changes its buffers without a new version
            for buffer, before in self._buffers:
                if not buffer.is_meta and not same_numbers(buffer.detach(), before):
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.detach().copy_(before)

    def _reshard(self) -> None:
        for module in self._sharded:
            module.reshard()

    def changed_parameters(self) -> list[str]:
        """Return the names of the parameters that were changed in place since, which `restore` cannot undo."""
        return [name for name, parameter, count, *_ in self._parameters if version(parameter) != count]


def _identities(held: Any) -> list[int]:
    """Return the `id` of each object in a list or dict, in order, to notice another one that is equal."""
    return [id(one) for one in (itertools.chain(*held.items()) if isinstance(held, dict) else held)]


def _has_data(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    """Whether a tensor still has its data; unknown for some subclasses."""
    with contextlib.suppress(RuntimeError):
        return (tensor.data_ptr(), tensor.dtype, tensor.device) == (data.data_ptr(), data.dtype, data.device)
    return True


@contextlib.contextmanager
def _kept_generators(own: list[torch.Generator]) -> Iterator[None]:
    """Restore the random generators of Python, PyTorch, its devices in use, the model, and NumPy if it is imported."""
    kinds = {kind: getattr(torch, kind, None) for kind in ("cuda", "xpu")}
    used = {kind: device for kind, device in kinds.items() if device and device.is_available()}
    counts = {kind: device.device_count() for kind, device in used.items() if device.is_initialized()}
    devices = [torch.device(kind, n) for kind, count in counts.items() for n in range(count)]
    with kept_host_random_states(), kept_random_states([*devices, *own]):
        yield
