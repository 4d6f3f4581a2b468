"""`opaque` and `reference_backward`: sources around a source, plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from kernels_core import ArgumentError, LoadError, Reference, set_module, source_label

from ..mapping import as_source


@dataclass(frozen=True)
class Adapted:
    """A source whose kernel is made to fit."""

    source: object  # where the kernel comes from: anything that a mapping takes
    as_operator: bool = False  # whether the kernel is one operator in traced calls, and is not traced itself
    from_reference: bool = False  # whether all gradients are those of the reference

    def load(self) -> object:
        """Refuse, with a `LoadError`: only the plugin `adapters` can load it, for the result depends on the layer."""
        raise LoadError(f"{self!r} needs the plugin 'adapters': do not block it with KERNELS_PLUGINS")

    def pinned(self, pin: Any) -> Adapted:
        """Return the same around the kernel that a decision file has."""
        return replace(self, source=cast(Any, self.source).pinned(pin))

    def __repr__(self) -> str:
        text = source_label(self.source)
        if self.from_reference:
            text = f"reference_backward({text})"
        return f"opaque({text})" if self.as_operator else text


def _adapted(source: object, where: str) -> Adapted:
    inner = as_source(source, where)
    if inner is Reference:
        raise ArgumentError(f"{where}: the reference needs no adapter: name it in the mapping itself.")
    return inner if isinstance(inner, Adapted) else Adapted(inner)


def opaque(source: object) -> Adapted:
    """Let compiled code call a kernel that cannot be traced.

    Where a call is traced (`torch.compile`, `torch.export`), the kernel becomes one custom operator: the
    layer's reference determines the shapes of its outputs, and its backward is the kernel's own, or that of the
    reference if the kernel declares `has_backward = False`. Eager calls run the kernel as it is.

    Args:
        source: Where the kernel comes from: anything that a mapping takes.

    Returns:
        A source for mappings. Those of equal sources are equal.

    Raises:
        ArgumentError: If the source is a text that names no layer, or the reference.
        ArgumentTypeError: If no kernel can come from it.

    Example:
        >>> class Halved(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.from_numpy(x.detach().numpy() / 2)
        >>> mapping = {"Half": {"cpu": opaque(Halved)}}
        >>> opaque(LayerRepository("acme/norm", layer_name="Norm", version=1))
        opaque(LayerRepository('acme/norm', layer_name='Norm', version=1))
    """
    return replace(_adapted(source, "opaque(...)"), as_operator=True)


def reference_backward(source: object) -> Adapted:
    """Let a kernel without a backward serve training: its forward, and the gradients of the layer's reference.

    The forward keeps its inputs, not its activations: the backward runs the reference again, with the same
    random numbers and under the same autocast. Calls that autograd does not record run the kernel as it is.
    Argument, answer and errors are those of `opaque`.

    Example:
        >>> reference_backward(LayerRepository("acme/norm", layer_name="Norm", version=1))
        reference_backward(LayerRepository('acme/norm', layer_name='Norm', version=1))
        >>> opaque(reference_backward("acme/norm:Norm")) == reference_backward(opaque("acme/norm:Norm"))
        True
    """
    return replace(_adapted(source, "reference_backward(...)"), from_reference=True)


set_module("kernels_plugins", globals())
