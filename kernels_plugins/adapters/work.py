"""The work of an operator: a layer, a kernel, and calls that are put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels_core import Layer, NoKernelError, references, strict
from kernels_core.replay import Call

from .ambient import Autocast
from .structure import Parts, Structure, rebuild, take

Forward = Callable[..., Any]
Taken = tuple[Structure, Parts]
"""A result of a forward, taken apart."""
Gradients = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Spec:
    """The parts that calls of one structure (see `take_call`) share; autocast is as where the call was traced."""

    layer: Layer
    structure: Structure
    objects: tuple[Any, ...]
    autocast: Autocast

    def call(self, tensors: Sequence[torch.Tensor], ints: Sequence[int], floats: Sequence[float]) -> Call:
        """Put a call together, on a module that is rebuilt."""
        module, args, kwargs = rebuild(self.structure, tensors, ints, floats, self.objects)
        return Call(module, args, kwargs, self.layer.signature)


@dataclass(eq=False)
class Work:
    """A kernel's forward that serves a layer, with its own backward or with that of the reference."""

    layer: Layer
    kernel: Forward
    origin: str
    own_backward: bool

    def reference(self, call: Call) -> Taken:
        """Run the reference, with the references of all layers inside of it, and take its result apart."""
        with references():
            return apart(call.make(self.layer.reference))

    def reference_on_copies(self, call: Call) -> tuple[Structure, Parts, bool]:
        """Do the same on copies; the last value is whether random numbers were drawn."""
        with references(), call.replayed(self.layer.reference) as replay:
            return *apart(replay.outputs), replay.drew

    def fall_back(self, why: str) -> None:
        """Raise `NoKernelError` if the reference must not serve in place of the kernel."""
        if strict() or not self.layer.use_fallback:
            rule = "KERNELS_STRICT is on" if strict() else "the layer was decorated with use_fallback=False"
            raise NoKernelError(
                f"Layer {self.layer.name!r}: {self.origin} {why}, and {rule}. Register a kernel that fits, or allow "
                "the reference."
            )


def apart(output: Any) -> Taken:
    """Take the result of a forward apart."""
    parts = Parts()
    return take(output, parts), parts


def gradients_of(
    outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], grads: Gradients, *, again: bool = False
) -> Gradients:
    """Return the gradients of some tensors, for given gradients of the outputs."""
    pairs = [
        (output, grad.to(output.dtype))  # under autocast, the reference may give another one
        for output, grad in zip(outputs, grads, strict=True)
        if output.requires_grad and grad is not None
    ]
    if not pairs or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad(
        [output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True, create_graph=again
    )
