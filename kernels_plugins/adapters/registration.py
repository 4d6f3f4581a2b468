"""Registers a kernel as a custom operator of PyTorch, with a backward that is an operator, too.

The schema is `(Tensor[] tensors, SymInt[]? ints, float[]? floats, str call) -> Tensor[]`. The lists hold the parts of
a call, the tensors of the module among them; `call` names the rest (`names`). AOTInductor gives None for an empty list
of numbers.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from kernels_core.torch_internals import destroy_library, disabled_when_called, forget_operators

from .names import free_name

Target = Callable[..., list[torch.Tensor]]

_NAMESPACE = "kernels_opaque"
_SCHEMA = "(Tensor[] tensors, SymInt[]? ints, float[]? floats, str call) -> Tensor[]"
_BACKWARD = "(Tensor[] grads, Tensor[] tensors, SymInt[]? ints, float[]? floats, str call, bool[] needs) -> Tensor[]"


def register(operator: Any) -> Target:
    """Register an operator until it is collected, for PyTorch refers to it weakly; return it as graphs call it.

    It has a `name`, and the methods `forward`, `shape` (for tensors without data) and `backward`, with the arguments
    of the schemas.
    """
    me = weakref.ref(operator)  # the library, which PyTorch keeps, would keep it alive

    def alive() -> Any:
        found = me()
        if found is None:
            raise RuntimeError("The kernel behind this operator is gone: keep its layer and its mapping.")
        return found

    def shape(t: Any, i: Any, f: Any, call: str) -> Any:
        return alive().shape(t, i or [], f or [], call)

    library: Any = cast(Any, torch.library).Library(_NAMESPACE, "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    backward = f"{operator.name}_backward"
    library.define(operator.name + _SCHEMA, tags=tags)
    library.define(backward + _BACKWARD, tags=tags)
    for name, real, fake in (
        (operator.name, lambda t, i, f, call: alive().forward(t, i or [], f or [], call), shape),
        (backward, lambda g, t, i, f, *rest: alive().backward(g, t, i or [], f or [], *rest), _shape_of_gradients),
    ):
        # Dynamo must not trace into the kernel.
        library.impl(name, disabled_when_called(real), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
    namespace = getattr(torch.ops, _NAMESPACE)
    gradients = getattr(namespace, backward).default

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ints, floats, call = inputs
        ctx.save_for_backward(*tensors)
        ctx.rest = (ints, floats, call, [tensor.requires_grad for tensor in tensors])

    def derive(ctx: Any, grads: list[torch.Tensor]) -> Any:
        ints, floats, call, needs = ctx.rest
        found = iter(gradients(grads, list(ctx.saved_tensors), ints, floats, call, needs))
        return (
            [next(found) if need else None for need in needs],
            [] if ints == [] else None,
            [] if floats == [] else None,
            None,
        )

    def derive_nothing(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "The backward of an opaque kernel cannot be differentiated again in compiled code: call the layer "
            "outside of torch.compile for that."
        )

    torch.library.register_autograd(f"{_NAMESPACE}::{operator.name}", derive, setup_context=save, lib=library)
    torch.library.register_autograd(f"{_NAMESPACE}::{backward}", derive_nothing, lib=library)
    # PyTorch keeps every operator that it has looked up. Graphs get another object for the same operator, which holds
    # the kernel as long as one of them lives, and which only graphs hold.
    forget_operators(namespace, operator.name)
    target = getattr(namespace, operator.name).default
    target.kernels_operator = operator
    forget_operators(namespace, operator.name, backward)
    weakref.finalize(operator, _withdraw, library, namespace, operator.name, backward).atexit = False
    return cast(Target, target)


def _shape_of_gradients(grads: Any, tensors: list[torch.Tensor], ints: Any, floats: Any, call: str, needs: Any) -> Any:
    return outputs_like(itertools.compress(tensors, needs))


def outputs_like(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return outputs of an operator without data; they are always contiguous."""
    return [torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device) for tensor in tensors]


def _withdraw(library: Any, namespace: Any, *names: str) -> None:
    destroy_library(library)
    forget_operators(namespace, *names)
    free_name(names[0])
