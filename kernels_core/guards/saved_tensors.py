"""What autograd saves of a run that may turn out not to count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..torch_internals import Hooks, saved_tensors_hooks


class SavedTensors:
    """What autograd has saved of a run, out of sight of the hooks around, such as those of activation checkpointing."""

    def __init__(self, hooks: Hooks | None) -> None:
        """Stand between autograd and the hooks around, if there are any."""
        self._hooks = hooks
        self._packed: list[list[Any]] = []

    def pack(self, tensor: torch.Tensor) -> list[Any]:
        """Keep a tensor."""
        self._packed.append([tensor])
        return self._packed[-1]

    def unpack(self, packed: list[Any]) -> Any:
        """Give a tensor back, as the hooks around do."""
        return self._hooks[1](packed[0]) if self._hooks is not None else packed[0]

    def hand_over(self) -> None:
        """Show the hooks what they were not shown, in the same order: the run counts."""
        if self._hooks is not None:
            for packed in self._packed:
                packed[0] = self._hooks[0](packed[0])
        self._packed.clear()


@contextlib.contextmanager
def held_back() -> Iterator[SavedTensors]:
    """Keep what autograd saves of a run from the hooks around, until `hand_over` says that the run counts.

    Activation checkpointing counts what is saved, and a run that is void must not count. Versions of PyTorch that do
    not tell which hooks there are (before 2.7) show them everything.

    Yields:
        What was saved.

    Example:
        >>> x, seen = torch.ones(2, requires_grad=True), []
        >>> with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        ...     with held_back() as saved:
        ...         y = x.exp()
        ...     saved.hand_over()  # without this, the hooks would never see it
        >>> len(seen)
        1
    """
    hooks = saved_tensors_hooks()
    saved = SavedTensors(hooks)
    if hooks is None:
        yield saved
        return
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        yield saved
