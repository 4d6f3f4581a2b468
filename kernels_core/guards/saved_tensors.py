"""Tensors that autograd saves during a run whose result may be dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..torch_internals import Hooks, saved_tensors_hooks


class SavedTensors:
    """Tensors saved during a run, hidden from hooks of an outer block, such as those of activation checkpointing."""

    def __init__(self, hooks: Hooks | None) -> None:
        """Keep the hooks of the outer block, if there are any, until `hand_over` calls them."""
        self._hooks = hooks
        self._packed: list[list[Any]] = []

    def pack(self, tensor: torch.Tensor) -> list[Any]:
        """Keep a tensor."""
        self._packed.append([tensor])  # a list: `hand_over` replaces the tensor in it
        return self._packed[-1]

    def unpack(self, packed: list[Any]) -> Any:
        """Return a tensor, as the hooks of the outer block do."""
        return self._hooks[1](packed[0]) if self._hooks is not None else packed[0]

    def hand_over(self) -> None:
        """Pass the saved tensors to the hooks of the outer block, in the same order: the result is used."""
        if self._hooks is not None:
            for packed in self._packed:
                packed[0] = self._hooks[0](packed[0])
        self._packed.clear()


@contextlib.contextmanager
def held_back() -> Iterator[SavedTensors]:
    """Hide the tensors that autograd saves from the hooks of an outer block, until `hand_over` is called.

    Activation checkpointing counts saved tensors, and must not count those of a run whose result is dropped. With
    versions of PyTorch that have no way to ask for the hooks (before 2.7), nothing is hidden.

    Yields:
        The tensors saved so far.

    Example:
        >>> x, packed = torch.ones(2, requires_grad=True), []
        >>> with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        ...     with held_back() as saved:
        ...         y = x.exp()
        ...     saved.hand_over()  # without this, the hooks would never get it
        >>> len(packed)
        1
    """
    hooks = saved_tensors_hooks()
    saved = SavedTensors(hooks)
    hidden = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
    with hidden if hooks is not None else contextlib.nullcontext():
        yield saved
